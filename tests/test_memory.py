"""Outputs lie in memory that torch did not allocate, large ones on huge pages: they must be tensors like any other."""

import ctypes
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from batch_norm_cases import as_rows
from torch.nn import functional as F

from fastarch import extension
from fastarch.ops import batch_norm, conv_relu_pool

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)

HUGE_PAGE = 2 << 20
SIZE = (5, 16, 117, 119)  # 4.5 MB, of no round number of pages


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: memory that has to be poisoned is torch's own."""


def normalised(layout=torch.Tensor.contiguous) -> torch.Tensor:
    return batch_norm(layout(torch.randn(SIZE)), None, None, training=True)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, as_rows], ids=["planes", "rows"])
def test_outputs_and_gradients(layout):
    # in float64: in float32 rounding would make other elements pass ReLU
    x, residual, grad_output = (layout(torch.randn(SIZE, dtype=torch.float64)) for _ in range(3))
    w = torch.randn(16, 16, 3, 3, dtype=torch.float64)

    def ours():
        y = batch_norm(x, None, None, training=True, residual=residual, activation="relu")
        return y, conv_relu_pool(x, w, padding=1, pool=None)

    def theirs():
        y = (F.batch_norm(x, None, None, training=True) + residual).relu()
        return y, F.conv2d(x, w, padding=1).relu()

    leaves = [x.requires_grad_(), residual.requires_grad_(), w.requires_grad_()]
    got, want = ours(), theirs()
    for a, b in zip(got, want):
        assert a.data_ptr() % HUGE_PAGE == 0, "it is no large output, or not on huge pages"
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert a.stride() == x.stride()
    for a, b in zip(*(torch.autograd.grad(y, leaves, [grad_output] * 2) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_small_outputs_and_poisoned_memory_are_torchs():
    torch.use_deterministic_algorithms(True)
    try:
        assert normalised().data_ptr() % HUGE_PAGE
    finally:
        torch.use_deterministic_algorithms(False)
    assert batch_norm(torch.randn(2, 3, 4, 5), None, None, training=True).data_ptr() % HUGE_PAGE


def test_smaller_outputs_are_kept_where_malloc_gives_memory_back():
    resource, libc = pytest.importorskip("resource"), ctypes.CDLL(None)
    x = torch.randn(64, 32, 14, 14)  # 1.6 MB

    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        batch_norm(x, None, None, training=True)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    page_faults()
    libc.malloc_trim(0)
    assert page_faults() < 100  # of some 400 pages


def test_the_storage_can_grow_be_shared_and_saved():
    y = normalised()
    before = y.clone()
    assert y.untyped_storage().nbytes() == before.nbytes
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), before)
    y.resize_(2, *SIZE)
    assert torch.equal(y[0], before)
    shared = normalised().share_memory_()
    assert shared.is_shared()


def test_memory_is_used_again_and_given_back():
    first = normalised().data_ptr()
    assert normalised().data_ptr() == first
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows in range(100):  # each of another size, 600 MB in all, of which 128 are kept
        batch_norm(torch.randn(5, 16, 100 + rows, 119), None, None, training=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB, on Linux
    assert grown < 200 * 1024, f"{grown} KB more after 100 outputs"


def test_a_large_output_is_on_huge_pages_whatever_was_kept():
    def output(size: int) -> torch.Tensor:
        return batch_norm(torch.randn(1, 1, size), None, None, training=True)

    output((1 << 20) - 1)  # 4 bytes less than 4 MB
    assert output(1 << 20).data_ptr() % HUGE_PAGE == 0


def test_threads_share_what_is_kept():
    x = torch.randn(SIZE)
    want = batch_norm(x, None, None, training=True)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: batch_norm(x, None, None, training=True), range(40)))
    assert all(torch.equal(y, want) for y in outputs)
    assert len({y.data_ptr() for y in outputs}) == len(outputs)
