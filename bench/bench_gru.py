"""gru: whole sequences, in layers and both directions, and a single step; without a state before, as models start."""

import pytest
import torch
from harness import Case, First
from torch import nn
from workloads import GRU, GRUS

import fastarch


def case(name: str, workload: GRU, device: torch.device, dtype: torch.dtype) -> Case:
    T, N, C, H, layers, bidirectional = workload
    reference = nn.GRU(C, H, layers, bidirectional=bidirectional)
    ours = fastarch.nn.GRU(C, H, layers, bidirectional=bidirectional)
    ours.load_state_dict(reference.state_dict())
    ours, reference = (First(gru).to(device, dtype) for gru in (ours, reference))
    x = torch.randn(T, N, C).to(device, dtype)
    weights = [p for p in reference.parameters() if p.dim() == 2]
    moved = (
        sum(p.nbytes for p in reference.parameters()) + x.nbytes + T * N * H * (1 + bidirectional) * x.element_size()
    )
    flops = 2 * T * N * sum(p.numel() for p in weights)
    return Case(name, ours, reference, (x,), flops, moved, in_any_format=False, compiled=True)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", GRUS)
def test_gru(name, mode, compare, device, dtype):
    compare(case(name, GRUS[name], device, dtype), mode)
