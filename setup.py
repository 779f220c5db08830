"""Builds fastarch: the CPU kernels once per instruction set, fastarch._C around them, and fastarch._cuda where it can.

Environment: CXX; FASTARCH_CUDA=0|1 forces the CUDA extension off or on; TORCH_CUDA_ARCH_LIST names its architectures;
FASTARCH_SANITIZE builds the C++ with GCC's sanitizers: address,undefined (make sanitize) or thread (make races), its
kernels for the instruction sets in FASTARCH_SANITIZE_ISAS, all by default.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.modified import newer_group

# nvcc on PATH can be a script that starts another, and torch would look for the toolkit's headers around the script.
if (nvcc := shutil.which("nvcc")) and "CUDA_HOME" not in os.environ:
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    if top := re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())

# An extension must be compiled against the torch that will load it: the one of the environment that installs fastarch.
# pip's build isolation hides it, so look there as well.
sys.path.append(sysconfig.get_path("purelib"))
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

VERSION = {}
exec(Path("fastarch/version.py").read_text(), VERSION)

INSTRUCTION_SETS = {"generic": []}
# what threads share does not depend on the instruction set: to look for races one is enough, in a third of the time
if platform.machine().lower() in ("x86_64", "amd64") and os.environ.get("FASTARCH_SANITIZE") != "thread":
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [*INSTRUCTION_SETS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# a * b + c may contract to one operation; nothing else about the kernels' arithmetic is relaxed: NaN must stay NaN.
KERNEL_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
OPTIMISE = ["-std=c++20", "-O2", "-fvisibility=hidden"]
# -O1: instrumented, the unrolled loops of the kernels take minutes a file to optimise
SANITIZE = ["-O1", "-g1", f"-fsanitize={os.environ.get('FASTARCH_SANITIZE')}", "-fno-sanitize-recover=all"]
SANITIZE = SANITIZE if "FASTARCH_SANITIZE" in os.environ else []
SANITIZED_SETS = os.environ.get("FASTARCH_SANITIZE_ISAS", " ".join(INSTRUCTION_SETS)).split()


def cuda_wanted() -> bool:
    if "FASTARCH_CUDA" in os.environ:
        return os.environ["FASTARCH_CUDA"] == "1"
    return torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None


def cpu_extension() -> Extension:
    macros = [
        ("FASTARCH_VERSION", f'"{VERSION["__version__"]}"'),
        ("FASTARCH_TORCH", f'"{torch.__version__}"'),
        ("FASTARCH_KERNEL_FLAGS", f'"{" ".join(KERNEL_FLAGS)}"'),
        *((f"FASTARCH_BUILDS_{isa.upper()}", None) for isa in INSTRUCTION_SETS),
    ]
    # Compiled with OpenMP but not linked to it: its symbols come from the runtime torch has loaded, never a second.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    sources = [str(p) for p in sorted(Path("csrc/cpu").glob("*.cpp")) if not p.stem.endswith("_kernels")]
    return cpp_extension.CppExtension(
        "fastarch._C",
        ["csrc/module.cpp", *sources],
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=macros,
        extra_compile_args=[*OPTIMISE, *SANITIZE, *openmp],
        extra_link_args=SANITIZE,
        depends=[str(p) for p in Path("csrc").rglob("*.h")],
    )


def cuda_extension() -> Extension:
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    sources = [str(p) for p in sorted(Path("csrc/cuda").iterdir()) if p.suffix in (".cpp", ".cu")]
    return cpp_extension.CUDAExtension(
        "fastarch._cuda",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("FASTARCH_CUDA_ARCHITECTURES", f'"{architectures}"')],
        extra_compile_args={"cxx": OPTIMISE, "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo"]},
    )


def compiler() -> list[str]:
    """The C++ compiler as a command: CXX may hold arguments, or ccache before it."""
    return shlex.split(cpp_extension.get_cxx_compiler())


def kernel_object(isa: str, source: Path, folder: Path) -> str:
    """Compile one kernel source for one instruction set."""
    sanitize = SANITIZE if isa in SANITIZED_SETS else []
    target = folder / f"{source.stem}_{isa}{'_sanitized' if sanitize else ''}.o"
    if newer_group([str(source), *map(str, Path("csrc").rglob("*.h")), "setup.py"], str(target)):
        flags = [*KERNEL_FLAGS, *WARNINGS, *sanitize, *INSTRUCTION_SETS[isa], f"-DFASTARCH_ISA={isa}", "-Icsrc"]
        command = [*compiler(), *flags, "-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return str(target)


def extensions() -> tuple[list[Extension], dict]:
    """What can be built here. A machine without a compiler installs pure Python: Triton and the reference."""
    missing = None
    if torch is None:
        missing = "torch is not installed"
    elif sys.platform == "win32" or shutil.which(compiler()[0]) is None:
        missing = "there is no GCC or Clang"
    if missing:
        print(f"fastarch: {missing}, so no C++ or CUDA kernels are built: CPUs will run the reference, CUDA Triton")
        return [], {}

    class Build(cpp_extension.BuildExtension):
        def build_extension(self, ext):
            if ext.name == "fastarch._C":
                folder = Path(self.build_temp) / "kernels"
                folder.mkdir(parents=True, exist_ok=True)
                sources = sorted(Path("csrc/cpu").glob("*_kernels.cpp"))
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    jobs = [pool.submit(kernel_object, isa, p, folder) for p in sources for isa in INSTRUCTION_SETS]
                    ext.extra_objects = [job.result() for job in jobs]
            super().build_extension(ext)

    modules = [cpu_extension()] + ([cuda_extension()] if cuda_wanted() else [])
    return modules, {"build_ext": Build}


modules, commands = extensions()
setup(
    ext_modules=modules,
    cmdclass=commands,
    packages=[
        "fastarch",
        "fastarch.fusion",
        "fastarch.integrations",
        "fastarch.integrations.kernels",
        "fastarch.kernels",
        "fastarch.models",
        "fastarch.nn",
        "fastarch.ops",
        "fastarch.ref",
    ],
    package_dir={"fastarch": "fastarch", "fastarch.kernels": "kernels"},
    # pip without torch in its environment installs one anyway, so build against that one
    setup_requires=[] if torch else ["torch>={},<{}".format(*VERSION["TORCH"])],
)
