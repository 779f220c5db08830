"""batch_norm in training, alone, with ReLU, and with a residual and ReLU, in both memory formats."""

import pytest
import torch
from harness import Case
from torch import Tensor, nn
from workloads import BATCH_NORM, BatchNorm

import fastarch


class Reference(nn.BatchNorm2d):
    """The passes of torch that one pass of ours stands for."""

    def __init__(self, channels: int, activation: str | None):
        super().__init__(channels)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = y if residual is None else y + residual
        return y.relu() if self.activation else y


def case(name: str, workload: BatchNorm, kind: str, layout: str, device: torch.device, dtype: torch.dtype) -> Case:
    """Weight, bias and statistics stay in float32, as autocast leaves them."""
    activation = None if kind == "plain" else "relu"
    ours = fastarch.nn.BatchNorm2d(workload.C, activation=activation).to(device)
    reference = Reference(workload.C, activation).to(device)
    format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    inputs = tuple(
        torch.randn(workload).to(device, dtype).contiguous(memory_format=format) for _ in range(1 + ("add" in kind))
    )
    tensors = len(inputs) + 1  # x, the residual, y; in the backward dy, x and their gradients
    moved = tensors * inputs[0].nbytes
    moved_back = moved + inputs[0].nbytes
    return Case(f"{name} {layout} {kind}", ours, reference, inputs, 0.0, moved, moved_back, in_any_format=False)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["plain", "relu", "add_relu"])
@pytest.mark.parametrize("name", BATCH_NORM)
def test_batch_norm(name, kind, layout, mode, compare, device, dtype):
    compare(case(name, BATCH_NORM[name], kind, layout, device, dtype), mode)
