# Every target sets up what it needs, in environments inside the checkout.
#
#   make demo        train LeNet-5 on handwritten digits, ours against PyTorch's
#   make test        all tests that need no GPU
#   make bench       compare with the peers, everything or OP="gru attention": ARGS="-k char --peers eager"
#   make bench-check  a short set against what this machine recorded, in two minutes: is anything slower?
#   make lint        formats and static checks
#   make sanitize    the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer; ISAS=avx2: only those
#   make sanitize-cuda  the same of the CUDA kernels, executed on the CPU
#   make races       the C++ kernels under ThreadSanitizer
#   make emulate     on processors without AVX-512, AVX2 and AVX, and on aarch64, by Debian's qemu-user
#   make every-gpu   every one of Triton's kernels compiled for every GPU
#   make fuzz        2000 examples a fuzz test
#   make nightly     the six above, which take too long for CI; how they last went is in .ci/nightly.md
#   make cuda-build  compile and link the CUDA extension, without a GPU
#   make gpu         with the system's python3: build in place; tests, tiles, benchmarks on its GPU, 9 minutes a time
#   make docs        the pages of docs/, in site/
#   make wheel       source distribution and wheel in dist/, the wheel for Linux also as a manylinux one
#   make clean

PYTHON ?= python3
OP ?=
ARGS ?=
BIN := .venv/bin
READY := .venv/ready
SOURCES := setup.py pyproject.toml requirements-dev.txt fastarch/version.py $(wildcard csrc/*.* csrc/*/*.*)
OPERATIONS := conv_relu_pool batch_norm gru attention
CPU_TESTS := $(filter-out %_gpu.py %_cuda_on_cpu.py,$(foreach op,$(OPERATIONS),$(wildcard tests/test_$(op)*.py)))
PEERS := onnx onnxruntime onnxscript openvino

# `kernels/` and `fastarch/` must be found where they are installed, never because of the current directory
export PYTHONSAFEPATH := 1

.PHONY: demo test bench bench-check lint sanitize sanitize-cuda races emulate every-gpu fuzz nightly cuda-build gpu \
  docs wheel clean

$(READY): $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,test]"
	touch $@

demo: $(READY)
	$(BIN)/fastarch demo $(ARGS)

# Each instruction set that this machine has; the GPU kernels interpreted, in processes of their own. Tests share the
# cores one by one, but for those that look at the clock or at memory, or take all cores themselves.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto
ALONE := $(addprefix tests/,test_import.py test_memory.py test_triton_ahead_of_time.py)
test: $(READY)
	$(BIN)/pytest $(ALONE) $(ARGS)
	$(SIDE_BY_SIDE) tests --ignore tests/interpreted $(addprefix --ignore ,$(ALONE)) $(ARGS)
	FASTARCH_CPU_ISA=avx2 $(SIDE_BY_SIDE) $(CPU_TESTS) $(ARGS)
	FASTARCH_CPU_ISA=generic $(SIDE_BY_SIDE) $(CPU_TESTS) $(ARGS)
	TRITON_INTERPRET=1 $(SIDE_BY_SIDE) tests/interpreted $(ARGS)

bench: $(READY)
	$(BIN)/python -m pip install --quiet $(PEERS)
	$(BIN)/fastarch bench $(OP) $(ARGS)

bench-check: $(READY)
	PYTHONSAFEPATH= $(BIN)/python bench/check.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

# Kernels with sanitizers compile for three minutes an instruction set. pytest captures what Python writes alone: a
# sanitizer's report is written past it, and ends the process. All instruction sets of this machine.
SANITIZED := build/sanitize
ISAS ?= $(shell $(BIN)/python -c "from fastarch.extension import cpu, isa; print(*cpu.isas[:cpu.isas.index(isa) + 1])")
sanitize: $(READY)
	FASTARCH_SANITIZE=address,undefined FASTARCH_SANITIZE_ISAS="$(ISAS)" FASTARCH_CUDA=0 \
	$(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	for isa in $(ISAS); do \
	  FASTARCH_CPU_ISA=$$isa FASTARCH_FUZZ_EXAMPLES=400 PYTHONPATH=$(SANITIZED)/lib ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libubsan.so)" \
	  $(BIN)/pytest --capture=sys $(CPU_TESTS) -k "fuzz or exact or nonsense" $(ARGS) || exit 1; \
	done

sanitize-cuda: $(READY)
	$(SIDE_BY_SIDE) -m sanitized $(wildcard tests/test_*cuda_on_cpu.py) $(ARGS)

# Workers are threads that ThreadSanitizer sees, torch's own operations have one (csrc/cpu/parallel.h). It wants memory
# where it expects it: setarch --addr-no-randomize.
THREADED := build/races
races: $(READY)
	FASTARCH_SANITIZE=thread FASTARCH_CUDA=0 $(BIN)/python setup.py --quiet build --build-base $(THREADED) --build-lib $(THREADED)/lib
	FASTARCH_FUZZ_EXAMPLES=100 PYTHONPATH=$(THREADED)/lib OMP_NUM_THREADS=1 TSAN_OPTIONS="halt_on_error=1 exitcode=66" \
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libtsan.so)" \
	setarch --addr-no-randomize $(BIN)/pytest --capture=sys $(CPU_TESTS) -k "fuzz or exact or threads" $(ARGS)

emulate: $(READY)
	$(BIN)/python .ci/check_emulated.py
	$(BIN)/python .ci/check_aarch64.py

every-gpu: $(READY)
	FASTARCH_EVERY_GPU=1 $(BIN)/pytest tests/test_triton_ahead_of_time.py $(ARGS)

fuzz: $(READY)
	FASTARCH_FUZZ_EXAMPLES=2000 $(SIDE_BY_SIDE) $(wildcard tests/test_*_fuzz.py) $(ARGS)

NIGHTLY ?= sanitize sanitize-cuda races emulate every-gpu fuzz
nightly: $(READY)
	$(BIN)/python .ci/nightly.py $(NIGHTLY)

CUDA := .venv-cuda
BUILT := build/cuda
cuda-build:
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet torch==2.14.1 setuptools pybind11 ninja numpy
	FASTARCH_CUDA=1 $(CUDA)/bin/python setup.py --quiet build --build-base $(BUILT) --build-lib $(BUILT)/lib
	PYTHONPATH=$(BUILT)/lib $(CUDA)/bin/python .ci/check_cuda_build.py

gpu:
	PYTHONSAFEPATH= $(PYTHON) bench/gpu.py $(ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The libraries of torch come with torch. Repaired where auditwheel can be: on Linux.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist --wheel
	[ "$$(uname)" != Linux ] || PATH=$(BIN):$$PATH $(BIN)/python -m auditwheel repair \
	  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist/manylinux dist/*.whl

clean:
	rm -rf .venv $(CUDA) build dist out site *.egg-info fastarch/*.so .pytest_cache .ruff_cache .hypothesis
