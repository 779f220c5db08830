"""On a GPU whose memory is full: an error that says so, and nothing is broken for the next call."""

import pytest
import torch

import fastarch
from fastarch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LIMIT = 2**30  # bytes; each large call below needs more, of which its input is a part
CALLS = {  # layer, shape of a small input, the factor by which its first size is too large
    "conv_relu_pool": (lambda: nn.ConvReLUPool2d(8, 64, 3, padding=1, pool=None), (1, 8, 64, 64), 2000),
    "batch_norm": (lambda: nn.BatchNorm2d(64), (2, 64, 32, 32), 1500),
    "gru": (lambda: nn.GRU(32, 256), (2, 8, 32), 10000),
    "attention": (lambda: nn.MultiheadAttention(64, 4, batch_first=True), (2, 128, 64), 10000),
}


@pytest.fixture
def little_memory():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def result(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x, x, x) if isinstance(layer, torch.nn.MultiheadAttention) else layer(x)
    return y if isinstance(y, torch.Tensor) else y[0]


@pytest.mark.parametrize("operation", CALLS)
def test_out_of_memory_is_an_error_and_the_next_call_works(operation, little_memory):
    make, small, factor = CALLS[operation]
    layer = make().cuda()
    x = torch.randn(small, device="cuda", requires_grad=True)
    result(layer, x).sum().backward()
    want = x.grad.clone()
    with pytest.raises(torch.OutOfMemoryError):
        result(layer, torch.randn(factor * small[0], *small[1:], device="cuda", requires_grad=True)).sum().backward()
    torch.cuda.empty_cache()
    layer.zero_grad()
    x.grad = None
    result(layer, x).sum().backward()
    assert torch.equal(x.grad, want)
    got = result(layer, x)
    with fastarch.reference():
        torch.testing.assert_close(got, result(layer, x), rtol=1e-2, atol=1e-3)
