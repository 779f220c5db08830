"""Every Triton kernel, compiled for GPUs that are not here: it fits, spills nothing, multiplies on tensor cores."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may have
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
PRODUCTS = (
    *(f"conv_relu_pool_{kernel}_kernel" for kernel in ("fwd", "bwd_input", "bwd_weight")),
    *(f"attention_{kernel}_kernel" for kernel in ("fwd", "bwd_q", "bwd_kv")),  # split has too few rows for HGMMA
    *(f"gru_{kernel}_kernel" for kernel in ("fwd", "fwd_reset", "fwd_candidate", "bwd", "bwd_reset")),
)
APPLIED = ("batch_norm_fwd_kernel", "batch_norm_bwd_kernel")


@pytest.fixture(scope="module")
def kernels():
    """Compiling is slow, so it is done once for all tests."""
    return printed_by("triton_ahead_of_time.py")


def printed_by(name):
    """What a script prints, run on all CPUs."""
    script = Path(__file__).with_name(name)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(script.parents[1] / folder) for folder in ("tests", "bench"))
    environment["PYTHONSAFEPATH"] = "1"  # as -P does, which Python 3.10 does not know
    shards = len(os.sched_getaffinity(0))

    def run(shard):
        command = [sys.executable, script, str(shard), str(shards)]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    with ThreadPoolExecutor(shards) as pool:
        return [json.loads(line) for output in pool.map(run, range(shards)) for line in output.splitlines()]


def offenders(kernels, offends):
    shown = [{name: kernel[name] for name in kernel if name != "instructions"} for kernel in kernels if offends(kernel)]
    return "\n".join(map(str, shown))


def test_every_case_compiles(kernels):
    assert len(kernels) > 400
    assert {kernel["gpu"] for kernel in kernels} == {*SHARED}
    assert not offenders(kernels, lambda kernel: "error" in kernel)


def test_nothing_is_spilled(kernels):
    # two words of the stack may hold what is needed once, before the loop
    assert not offenders(
        kernels, lambda kernel: not kernel["may_spill"] and (kernel["local"] > 0 or kernel["stack"] > 16)
    )


def test_shared_memory_fits(kernels):
    assert not offenders(kernels, lambda kernel: kernel["shared"] > SHARED[kernel["gpu"]])


def test_products_run_on_tensor_cores(kernels):
    def without(kernel):
        exact = "torch.float32" in kernel["case"] and "tf32=False" in kernel["case"]
        exact = exact and not kernel["case"].startswith("Attention")  # three products of TF32 parts
        wanted = TENSOR_CORES[kernel["gpu"]]
        found = any(name.startswith(wanted) for name in kernel["instructions"])
        return kernel["kernel"] in PRODUCTS and kernel["multiplies"] and found == exact

    assert not offenders(kernels, without)


def test_whole_vectors_are_loaded_and_stored(kernels):
    """Where batch_norm's rows of memory allow it, and ahead of their use."""

    def without(kernel):
        wanted = ("LDGSTS.E.BYPASS.128", "STG.E.128")
        return "c=64" in kernel["case"] and kernel["kernel"] in APPLIED and not {*wanted} <= {*kernel["instructions"]}

    assert not offenders(kernels, without)


def test_attention_reads_by_tma(kernels):
    """From Hopper on, wherever no sequence ends inside a tensor."""

    def without(kernel):
        by_tma = "UTMALDG" in {name.split(".")[0] for name in kernel["instructions"]}
        described = kernel["case"].startswith("Attention") and not {"packed", "lengths"} & {
            *re.findall(r"\w+", kernel["case"])
        }
        walks = kernel["kernel"] in PRODUCTS
        return walks and by_tma != (described and kernel["gpu"] >= 90)

    assert not offenders(kernels, without)


def test_candidates_of_tune_compile_fit_and_spill_nothing():
    found = printed_by("candidates_ahead_of_time.py")
    assert len({kernel["case"] for kernel in found}) >= 5
    assert not offenders(found, lambda kernel: "error" in kernel)
    assert not offenders(found, lambda kernel: kernel["local"] > 0 or kernel["stack"] > 16)
    assert not offenders(found, lambda kernel: kernel["shared"] > SHARED[kernel["gpu"]])
