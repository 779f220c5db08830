"""Attention, plain and causal, in inference and in training, there also with dropout; decoding from a cache of keys
and values."""

import pytest
import torch
from harness import Case
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import ATTENTION, DECODE, Attention

from fastarch.ops import attention_decode, scaled_dot_product_attention


class Attend(nn.Module):
    """One call, of ours or of torch's."""

    def __init__(self, function, workload: Attention):
        super().__init__()
        self.function, self.is_causal, self.dropout = function, workload.causal, workload.dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v, is_causal=self.is_causal, dropout_p=self.dropout if self.training else 0.0)


class Decode(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_decode(q, k, v)


class TorchDecode(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def case(name: str, workload: Attention, device: torch.device, dtype: torch.dtype) -> Case:
    B, H, Lq, Lk, D, causal, dropout = workload
    inputs = tuple(torch.randn(B, H, L, D).to(device, dtype) for L in (Lq, Lk, Lk))
    flops = 4.0 * B * H * Lq * Lk * D * (0.5 if causal else 1.0)
    moved = 2 * (inputs[0].nbytes + inputs[1].nbytes)
    ours, reference = (Attend(f, workload) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    return Case(name, ours, reference, inputs, flops, moved, in_any_format=False, drops=dropout > 0)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", [name for name, w in ATTENTION.items() if not w.dropout])
def test_attention(name, mode, compare, device, dtype):
    compare(case(name, ATTENTION[name], device, dtype), mode)


@pytest.mark.parametrize("mode", ["training"])
def test_dropout(mode, compare, device, dtype):
    compare(case("dropout", ATTENTION["dropout"], device, dtype), mode)


@pytest.mark.parametrize("mode", ["inference"])
def test_decode(mode, compare, device, dtype):
    w = DECODE["decode"]
    q = torch.randn(w.B, w.Hq, 1, w.D).to(device, dtype)
    k, v = (torch.randn(w.B, w.Hkv, w.Lk, w.D).to(device, dtype) for _ in range(2))
    flops = 4.0 * w.B * w.Hq * w.Lk * w.D
    moved = k.nbytes + v.nbytes
    compare(Case("decode", Decode(), TorchDecode(), (q, k, v), flops, moved, in_any_format=False), mode)
