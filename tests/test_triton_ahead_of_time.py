"""Every Triton kernel, compiled for GPUs that are not here: it fits, spills nothing, multiplies on tensor cores."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may have
PRODUCTS = ("conv_relu_pool_fwd_kernel", "conv_relu_pool_bwd_input_kernel", "conv_relu_pool_bwd_weight_kernel")


@pytest.fixture(scope="module")
def kernels():
    """What triton_ahead_of_time.py prints: compiling is slow, so it runs on all CPUs, once for all tests."""
    script = Path(__file__).with_name("triton_ahead_of_time.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shards = len(os.sched_getaffinity(0))

    def run(shard):
        command = [sys.executable, "-P", script, str(shard), str(shards)]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    with ThreadPoolExecutor(shards) as pool:
        return [json.loads(line) for output in pool.map(run, range(shards)) for line in output.splitlines()]


def offenders(kernels, offends):
    return [kernel for kernel in kernels if offends(kernel)]


def test_every_case_compiles(kernels):
    assert not [kernel for kernel in kernels if "error" in kernel]
