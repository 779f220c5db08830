"""Shapes and options that attention is tested on, and the results to hold it against."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastarch.ops import scaled_dot_product_attention
from fastarch.ref.attention import attention as reference

op = importlib.import_module("fastarch.ops.attention")  # the module, not the function of its name


class Case(NamedTuple):
    """q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]; a mask's sizes are of b, h, i, j: 1 where not named."""

    B: int
    H: int
    Lq: int
    Lk: int
    D: int
    Dv: int | None = None
    Hkv: int | None = None
    mask: str = ""  # "bool" or "float", and its dimensions: "bool bij"
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    alibi: bool = False
    dropout: float = 0.0
    lower_right: bool = False

    def __str__(self) -> str:
        sizes = f"B{self.B}H{self.H}Lq{self.Lq}Lk{self.Lk}D{self.D}"
        options = [f"{name}={value}" for name, value in zip(self._fields[5:], self[5:]) if value]
        return " ".join([sizes, *options])

    @property
    def options(self) -> dict:
        """Of the public function."""
        return {
            "dropout_p": self.dropout,
            "is_causal": self.causal,
            "enable_gqa": self.Hkv is not None,
            "window": self.window,
            "softcap": self.softcap,
            "causal_alignment": "lower_right" if self.lower_right else "upper_left",
        }

    @property
    def inner_options(self) -> tuple:
        """Of the reference and, after two lengths, of fwd."""
        left, right = self.window or (-1, -1)
        right = 0 if self.causal else right
        return self.D**-0.5, left, right, self.lower_right, self.softcap, self.dropout


PLAIN = Case(2, 3, 33, 47, 24)
SMALL = Case(1, 2, 3, 4, 2)
FULL = Case(
    2, 4, 39, 70, 20, 12, 2, mask="float bij", window=(30, 20), softcap=2.0, alibi=True, dropout=0.2, lower_right=True
)
CASES = [
    Case(1, 1, 1, 1, 1),
    Case(2, 3, 1, 97, 64),
    Case(1, 2, 97, 97, 64),
    Case(1, 2, 197, 197, 64, causal=True),
    PLAIN,
    Case(1, 1, 1025, 197, 16, causal=True),  # the last queries reach every key
    Case(1, 1, 197, 1025, 32, causal=True, lower_right=True),
    Case(1, 2, 1025, 1025, 32, window=(64, 0)),
    Case(1, 2, 130, 130, 72, 40),
    Case(1, 1, 65, 129, 256, 256),
    Case(1, 1, 70, 65, 3, 200),
    Case(2, 6, 50, 70, 40, Hkv=2),
    Case(2, 4, 33, 65, 16, Hkv=1, causal=True),
    Case(1, 2, 100, 60, 32, causal=True, lower_right=True),  # the first 40 queries have no keys
    Case(1, 1, 200, 60, 24, causal=True, lower_right=True),  # whole tiles of rows have none
    Case(2, 2, 71, 90, 32, mask="bool bhij"),
    Case(2, 2, 70, 90, 32, mask="bool bi"),
    Case(2, 2, 70, 90, 32, mask="bool bj"),
    Case(2, 2, 70, 90, 32, mask="float bhij"),
    Case(2, 2, 70, 90, 32, mask="float hij"),
    Case(2, 2, 70, 90, 32, mask="float i"),
    Case(2, 2, 70, 90, 32, mask="float "),
    Case(1, 2, 200, 200, 32, window=(10, 30)),
    Case(1, 2, 100, 150, 32, window=(-1, 20)),
    Case(1, 2, 100, 150, 32, window=(20, -1), lower_right=True),
    Case(1, 2, 75, 75, 32, softcap=1.0),
    Case(2, 3, 75, 85, 32, alibi=True),
    Case(2, 2, 75, 150, 32, dropout=0.3),
    Case(1, 2, 150, 130, 32, 16, dropout=0.1, causal=True),
    FULL,
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(case: Case, dtype: torch.dtype, tokens_first: bool = False) -> dict[str, Tensor | None]:
    """The arguments by name, from the seed; tokens_first: in memory [B, L, H, D], as a projection leaves them."""
    B, H, Lq, Lk, D = case[:5]
    Dv, Hkv = case.Dv or D, case.Hkv or H

    def heads(h: int, length: int, width: int) -> Tensor:
        t = torch.randn(B, h, length, width).to(dtype)
        return t.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else t

    drawn = {"query": heads(H, Lq, D), "key": heads(Hkv, Lk, D), "value": heads(Hkv, Lk, Dv)}
    drawn["attn_mask"] = drawn["alibi_slopes"] = None
    if case.mask:
        kind, dims = case.mask.split(" ")
        sizes = [size if dim in dims else 1 for dim, size in zip("bhij", (B, H, Lq, Lk))]
        drawn["attn_mask"] = torch.rand(sizes) < 0.7 if kind == "bool" else torch.randn(sizes).to(dtype)
    if case.alibi:
        drawn["alibi_slopes"] = torch.rand(B, H) / 4
    return drawn


NAMES = {"query": "dq", "key": "dk", "value": "dv", "attn_mask": "dmask"}


def leaves_of(drawn: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {
        name: t.detach().requires_grad_()
        for name, t in drawn.items()
        if name in NAMES and t is not None and t.is_floating_point()
    }


def run(function, case: Case, drawn: dict, grad_output: Tensor | None = None, grad_lse=None) -> dict[str, Tensor]:
    """The output, lse and, with a grad_output, every gradient by name."""
    leaves = leaves_of(drawn)
    torch.manual_seed(7)  # of dropout
    o, lse = function(case, drawn | leaves)
    results = {"o": o.detach(), "lse": lse.detach()}
    if grad_output is not None:
        outputs, grads = ((o, lse), (grad_output, grad_lse)) if grad_lse is not None else ((o,), (grad_output,))
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        results |= {NAMES[name]: grad for name, grad in zip(leaves, found)}
    return results


def ours(case: Case, drawn: dict) -> tuple[Tensor, Tensor]:
    return scaled_dot_product_attention(**drawn, **case.options, return_lse=True)


def in_torch(case: Case, drawn: dict) -> tuple[Tensor, Tensor]:
    """The reference, with the seed that ours draws."""
    q, k, v, mask, slopes = drawn.values()
    seed = torch.randint(2**63 - 1, (1,), device=q.device) if case.dropout else None
    return reference(q, k, v, mask, slopes, None, None, None, seed, *case.inner_options)


def in_eager(case: Case, drawn: dict) -> tuple[Tensor, Tensor]:
    """torch's own operation where it can do the case, with every option in its mask; else the reference."""
    if case.softcap or case.dropout:
        return in_torch(case, drawn)
    q, k, v, mask, slopes = drawn.values()
    lse = in_torch(case, drawn)[1]
    if mask is None and slopes is None and not case.window and not case.lower_right:
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.Hkv is not None), lse
    i, j = (torch.arange(length, device=q.device) for length in (case.Lq, case.Lk))
    distance = j - i[:, None] - case.lower_right * (case.Lk - case.Lq)
    left, right = case.inner_options[1:3]
    live = (left < 0) | (distance >= -left)
    live = live & ((right < 0) | (distance <= right))
    bias = q.new_zeros(case.B, case.H, case.Lq, case.Lk)
    if slopes is not None:
        bias = bias - slopes.view(-1, case.H, 1, 1) * distance.abs()
    if mask is not None:
        live, bias = (live & mask, bias) if mask.dtype == torch.bool else (live, bias + mask)
    bias = bias.to(q.dtype).masked_fill(~live, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=case.Hkv is not None), lse


def double(drawn: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in drawn.items()}


def arguments_of_fwd(case: Case, dtype: torch.dtype, tokens_first: bool = False) -> dict:
    drawn = draw(case, dtype, tokens_first)
    names = ("q", "k", "v", "mask", "alibi_slopes")
    arguments = dict(zip(names, drawn.values())) | {"cu_seqlens_q": None, "cu_seqlens_k": None, "seqlens_k": None}
    arguments["seed"] = torch.tensor([123456789012345]) if case.dropout else None
    arguments |= {"max_seqlen_q": case.Lq, "max_seqlen_k": case.Lk}
    names = ("scale", "window_left", "window_right", "lower_right", "softcap", "dropout_p")
    return arguments | dict(zip(names, case.inner_options)) | {"algorithm": "flash"}


def arguments_of_bwd(case: Case, dtype: torch.dtype, tokens_first: bool = False) -> dict:
    given = arguments_of_fwd(case, dtype, tokens_first)
    output, lse = op.fwd(**given)
    first = {"grad_output": torch.randn_like(output), "grad_lse": torch.randn_like(lse)}
    tensors = {name: given[name] for name in list(given)[:9]}
    options = {name: given[name] for name in list(given)[9:]}
    wanted = [True, True, True, case.mask.startswith("float")]
    return first | tensors | {"output": output, "lse": lse} | options | {"output_mask": wanted}
