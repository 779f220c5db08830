"""conv_relu_pool against every other way to run Conv2d, ReLU and MaxPool2d."""

import pytest
import torch
from harness import Case
from torch import nn
from workloads import CONV_RELU_POOL, ConvReLUPool

import fastarch


def case(name: str, workload: ConvReLUPool, device: torch.device, dtype: torch.dtype) -> Case:
    N, C, H, W, K, kernel, stride, padding, *pool = workload
    ours = fastarch.nn.ConvReLUPool2d(
        C, K, kernel, stride, padding, pool_size=pool[0], pool_stride=pool[1], pool_padding=pool[2]
    )
    reference = nn.Sequential(nn.Conv2d(C, K, kernel, stride, padding), nn.ReLU(), nn.MaxPool2d(*pool))
    reference[0].load_state_dict(ours.state_dict())
    ours, reference = ours.to(device, dtype), reference.to(device, dtype)
    x = torch.randn(N, C, H, W).to(device, dtype)
    with torch.no_grad():
        convolution, y = reference[0](x), reference(x)
    moved = (x.numel() + ours.weight.numel() + y.numel()) * x.element_size()
    return Case(name, ours, reference, (x,), 2 * convolution.numel() * C * kernel * kernel, moved)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", CONV_RELU_POOL)
def test_conv_relu_pool(name, mode, compare, device, dtype):
    compare(case(name, CONV_RELU_POOL[name], device, dtype), mode)
