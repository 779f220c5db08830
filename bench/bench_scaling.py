"""How cost grows with one size at a time, the others as they are: batch, sequence length, hidden size, threads."""

from typing import NamedTuple

import bench_attention
import bench_conv_relu_pool
import bench_gru
import pytest
import torch
from harness import Case, Point
from workloads import BY_THREADS, GRU, SCALING, Attention, ConvReLUPool

CASES = {ConvReLUPool: bench_conv_relu_pool.case, GRU: bench_gru.case, Attention: bench_attention.case}
SIZES = [(series, size) for series, growth in SCALING.items() for size in growth.sizes]
MOST = torch.get_num_threads()
THREADS = sorted({2**i for i in range(MOST.bit_length())} | {MOST})


def case(workload: NamedTuple, point: Point, device: torch.device, dtype: torch.dtype) -> Case:
    made = CASES[type(workload)](f"{point.series} {point.size}", workload, device, dtype)
    return made._replace(point=point, compiled=False)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(("series", "size"), SIZES)
def test_sizes(series, size, mode, compare, device, dtype):
    growth = SCALING[series]
    workload = growth.workload._replace(**dict.fromkeys(growth.fields, size))
    compare(case(workload, Point(series, growth.axis, size), device, dtype), mode)


@pytest.fixture
def threads():
    """Sets the number of threads for one case."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("size", THREADS)
@pytest.mark.parametrize("series", BY_THREADS)
def test_threads(series, size, mode, threads, compare, device, dtype):
    if device.type == "cuda":
        pytest.skip("a GPU has threads of its own")
    threads(size)
    compare(case(BY_THREADS[series], Point(series, "threads", size), device, dtype), mode)
