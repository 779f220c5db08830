"""What goes wrong around the kernels, and is survived: threads, forks, interrupts, memory that ends, other versions.

Where the state of the process could suffer, in a process of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from every_operation import results, same
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

import fastarch
from fastarch import extension, ops, routing

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)

ROOT = Path(__file__).parents[1]
SCRIPT = "import torch; from fastarch import ops; from every_operation import results, same\n"


def python(script: str, *options: str, timeout: float = 60, **environment: str) -> str:
    """What a process printed; it fails where the process does, or hangs."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "2", **environment}
    command = [sys.executable, *options, "-c", script]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# ---- threads


def test_operations_in_several_threads_give_the_bits_of_one(threads):
    threads(2)
    want, start = results(), threading.Barrier(4)

    def run(_):
        start.wait()
        return [same(results(), want) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [[True] * 3] * 4


def test_reference_is_of_the_thread_that_asked_for_it():
    with fastarch.reference():
        assert routing.reference_reason() == "inside fastarch.reference()"
        assert in_another_thread(routing.reference_reason) is None
        with fastarch.reference():
            pass
        assert routing.reference_reason() == "inside fastarch.reference()"
    assert routing.reference_reason() is None


def test_reference_ends_with_an_exception():
    with pytest.raises(KeyError), fastarch.reference():
        raise KeyError
    assert routing.reference_reason() is None


def test_recording_is_of_the_thread_that_asked_for_it():
    x = torch.randn(2, 3)
    with routing.recording() as calls:
        in_another_thread(lambda: ops.batch_norm(x, None, None, training=True))
        assert calls == []
        ops.batch_norm(x, None, None, training=True)
    ops.batch_norm(x, None, None, training=True)
    assert [call.operation for call in calls] == ["batch_norm"]


def test_explain_tells_nothing_of_other_threads():
    """Another thread runs models of its own, before, inside and behind a layer of ours."""
    other = nn.Sequential(fastarch.nn.BatchNorm1d(3))
    x = torch.randn(4, 3)

    class Busy(nn.Module):
        def forward(self, x):
            in_another_thread(lambda: other(x))
            return x

    model = nn.Sequential(Busy(), fastarch.nn.BatchNorm1d(3), Busy())
    assert [(call.layer, call.operation) for call in fastarch.explain(model, x)] == [("1", "batch_norm")]


def test_compiled_code_sees_the_reference_of_its_thread():
    x, reasons = torch.randn(3, 5), []

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return x + (routing.reference_reason() is not None)

    def is_reference():
        reasons.append(not torch.equal(compiled(x), x))

    is_reference()
    with fastarch.reference():
        is_reference()
        in_another_thread(is_reference)
    is_reference()
    assert reasons == [False, True, False, False]


def test_reference_may_be_asked_for_in_compiled_code():
    x, w = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 3, 3)

    def both(x):
        with fastarch.reference():
            y = ops.conv_relu_pool(x, w)
        return y, ops.conv_relu_pool(x, w)

    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    for got, want in zip(torch.compile(both, fullgraph=True, backend=backend)(x), both(x)):
        torch.testing.assert_close(got, want)
    assert len([name for name in names if "conv2d" in name]) == 1
    assert len([name for name in names if "conv_relu_pool_fwd" in name]) == 1


class Deep(torch.autograd.Function):
    """Its backward goes through `depth` more of its kind, each inside the other; beyond 60 autograd changes thread."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), routing.reference_reason()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Deep.apply(x, ctx.depth - 1, ctx.seen).sum().backward()
        return grad, None, None


@pytest.mark.parametrize("on", [False, True])
def test_autograds_threads_see_the_reference_of_the_backward(on):
    """As those of CUDA devices do: where a checkpoint computes its forward again."""
    x, seen = torch.ones(1, requires_grad=True), []
    y = Deep.apply(x, 80, seen)
    with fastarch.reference() if on else torch.enable_grad():
        y.backward()
    idents, reasons = zip(*seen)
    assert len(set(idents)) > 1, "autograd kept to one thread: nothing was tested"
    assert set(reasons) == {"inside fastarch.reference()" if on else None}


def test_a_checkpoint_inside_reference_recomputes_there():
    x, w = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 3, 3, requires_grad=True)
    with fastarch.reference(), routing.recording() as calls:
        checkpoint(lambda: ops.conv_relu_pool(x, w), use_reentrant=False).sum().backward()
    assert [call.backend for call in calls] == ["reference"] * 2


# ---- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "before", ["", "results()", "torch.randn(2000, 2000).sin()", "results(), os.fork() or results()"]
)
def test_a_forked_child_computes_what_its_parent_does(before):
    """With torch's threads cold, warm by ours, warm by torch's own, and in a child's child."""
    script = f"""
import os, signal
signal.alarm(30)  # hanging is what children do, where OpenMP waits for threads that only the parent has
torch.set_num_threads(2)
{before}
child = os.fork()
found = results()
assert torch.get_num_threads() == 2
assert len(os.listdir("/proc/self/task")) >= 2 or not os.path.exists("/proc"), "it computed on one thread"
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(results(), found)
os._exit(0)
"""
    python(SCRIPT + script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_of_multiprocessing_give_the_parents_bits():
    script = """
import multiprocessing, signal
signal.alarm(45)
def work(_):
    return [t.tolist() for t in results()[:2]]
want = work(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(4)) == [want] * 4
print("done")
"""
    assert "done" in python(SCRIPT + script)


# ---- interrupts and exceptions


def test_an_interrupt_during_a_long_operation_leaves_everything_usable(threads):
    q = torch.randn(1, 16, 4096, 64)

    def compute():
        return ops.scaled_dot_product_attention(q, q, q)

    start = time.perf_counter()
    want = compute()
    duration = time.perf_counter() - start

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        model = nn.Sequential(fastarch.nn.BatchNorm1d(3))
        model.forward = lambda _: compute()
        for interrupted in (compute, lambda: fastarch.explain(model, q)):
            signal.setitimer(signal.ITIMER_REAL, duration / 4)
            with pytest.raises(KeyboardInterrupt), fastarch.reference() if interrupted is compute else torch.no_grad():
                while True:
                    interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
    assert routing.reference_reason() is None
    assert torch.equal(compute(), want)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_explain_ends_with_an_exception_in_a_hook(register):
    def fail(*_):
        raise KeyError("in a hook")

    model, x = nn.Sequential(fastarch.nn.BatchNorm1d(3), fastarch.nn.BatchNorm1d(3)), torch.randn(4, 3)
    handle = getattr(model[1], register)(fail)
    with pytest.raises(KeyError, match="in a hook"):
        fastarch.explain(model, x)
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
    assert getattr(routing._local, "calls", None) is None, "it still records"
    handle.remove()
    assert [call.layer for call in fastarch.explain(model, x)] == ["0", "1"]


def test_an_exception_in_a_backward_hook_leaves_the_next_backward_alone():
    def fail(_):
        raise KeyError("in a hook")

    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, requires_grad=True)

    def hidden():
        return ops.batch_norm(x, None, None, training=True, activation="relu")

    (want,) = torch.autograd.grad(ops.conv_relu_pool(hidden(), w).sum(), [x])
    y = hidden()
    y.register_hook(fail)
    with pytest.raises(KeyError, match="in a hook"):
        ops.conv_relu_pool(y, w).sum().backward()
    assert x.grad is None
    (got,) = torch.autograd.grad(ops.conv_relu_pool(hidden(), w).sum(), [x])
    assert torch.equal(got, want)


# ---- memory that ends


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_memory_that_ends_half_way_is_an_error_and_no_more():
    """Step by step more is allowed, so that one allocation after the other is the one that fails."""
    script = """
import resource
want, large = results(), results(8)
del large
errors = successes = 0
for megabytes in range(0, 60, 4):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (megabytes << 20), resource.RLIM_INFINITY))
    try:
        results(8)
        successes += 1
    except (RuntimeError, MemoryError) as error:
        assert isinstance(error, MemoryError) or "alloc" in str(error), error
        errors += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert same(results(), want)
print(errors, successes)
"""
    errors, successes = map(int, python(SCRIPT + script).split())
    assert errors > 2 and successes > 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_memory_that_is_kept_for_outputs_is_there_for_others():
    script = """
import resource
x = torch.randn(8, 16, 250, 250)  # 32 MB, as much as is kept, four times
outputs = [ops.batch_norm(x, None, None, training=True) for _ in range(4)]
del outputs
y = torch.randn(5, 16, 500, 500)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (16 << 20), resource.RLIM_INFINITY))
ops.batch_norm(y, None, None, training=True)  # 80 MB: more than is allowed beside what is kept
"""
    python(SCRIPT + script)


# ---- other versions, other machines


def test_import_and_cpus_need_no_home():
    script = """
found = results()
import os
assert all(t.isfinite().all() for t in found)
"""
    nowhere = {
        name: "/dev/null/none" for name in ("HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
    }
    python(SCRIPT + script, "-W", "error::UserWarning", **nowhere)


def test_a_torch_that_is_too_old_is_an_error_that_names_both_versions():
    script = """
import torch
torch.__version__ = type(torch.__version__)("2.10.1")
try:
    import fastarch
except ImportError as error:
    print(error)
"""
    assert python(script) == "fastarch: want torch 2.11 or newer, below 2.15, got 2.10.1\n"


def test_a_torch_newer_than_those_tested_and_than_the_kernels_is_a_warning_for_each():
    script = """
import torch, warnings
torch.__version__ = type(torch.__version__)("2.99.0")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastarch
    from fastarch import extension
for warning in caught:
    print(warning.message)
print(extension.cpu)
x = torch.randn(2, 1, 8, 8)
print(*fastarch.explain(fastarch.nn.ConvReLUPool2d(1, 2, 3), x)[0][3:5], sep=": ")
"""
    tested, built, cpu, explained = python(script).splitlines()
    failure = "fastarch._C was built but cannot be loaded: want torch {}, for which it was compiled, got 2.99.0"
    failure = failure.format(extension.cpu.torch)
    assert tested == "fastarch: tested with torch 2.11 and newer, below 2.15, got 2.99.0"
    assert built == f"fastarch: CPUs run the slow reference: {failure}"
    assert cpu == "None"
    assert explained == f"reference: {failure}"


def test_a_triton_that_is_too_old_is_an_error_that_names_both_versions():
    pytest.importorskip("triton")
    script = """
import triton
triton.__version__ = "3.2.0"
try:
    import fastarch.kernels.batch_norm
except ImportError as error:
    print(error)
"""
    assert python(script) == "fastarch.kernels: want Triton 3.6 or newer, got 3.2.0\n"


def test_versions_stand_in_pyproject_as_they_do_in_the_package():
    from fastarch.version import TORCH

    assert '"torch>={},<{}"'.format(*TORCH) in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("what", ["for another torch", "for no machine"])
def test_an_extension_that_cannot_be_loaded_is_said_once_and_shown_by_info(what, tmp_path):
    for folder, to in (("fastarch", "fastarch"), ("kernels", "fastarch/kernels")):
        shutil.copytree(ROOT / folder, tmp_path / to, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    file = tmp_path / "fastarch" / Path(extension.cpu.__file__).name
    if what == "for another torch":
        source = tmp_path / "other.c"
        source.write_text("void of_another_torch(void); void *PyInit__C(void) { of_another_torch(); return 0; }")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
        why = "undefined symbol: of_another_torch"
    else:
        file.write_bytes(b"no ELF file")
        why = "file too short"
    script = "import sys; sys.argv = ['fastarch', 'info']; from fastarch.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "COLUMNS": "400"}
    done = subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fastarch: CPUs run the slow reference: fastarch._C was built but cannot be loaded") == 1
    assert why in done.stderr
    (row,) = [line for line in done.stdout.splitlines() if "CPU kernels" in line]
    assert why in row and "reference" in row
