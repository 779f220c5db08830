"""Attention on drawn shapes, strides and options, alone and together."""

import os
from typing import NamedTuple

import torch
from attention_cases import Case, double, draw, in_torch, ours, run
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FASTARCH_FUZZ_EXAMPLES", "150"))
LAYOUTS = ["contiguous", "tokens first", "sliced", "transposed"]
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Problem(NamedTuple):
    case: Case
    layouts: tuple[str, ...]  # of query, key, value and the output's gradient
    dtype: torch.dtype
    seed: int


@st.composite
def problems(draw) -> Problem:
    length = st.one_of(st.integers(1, 20), st.sampled_from([1, 48, 49, 97, 127, 128, 129, 197, 260]))
    width = st.one_of(st.integers(1, 40), st.sampled_from([1, 16, 31, 32, 33, 64, 100]))
    group, Hkv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    bound = st.one_of(st.just(-1), st.integers(0, 5), st.integers(6, 150))
    dims = "".join(dim for dim in "bhij" if draw(st.booleans()))
    case = Case(
        draw(st.integers(1, 2)),
        group * Hkv,
        draw(length),
        draw(length),
        draw(width),
        draw(width),
        Hkv,
        mask=draw(st.sampled_from(["", "", f"bool {dims}", f"float {dims}"])),
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.tuples(bound, bound))),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.7])),
        alibi=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.25])),
        lower_right=draw(st.booleans()),
    )
    layouts = tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4))
    return Problem(case, layouts, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(0, 2**32)))


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "tokens first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    return torch.stack([t, t], -1)[..., 1] if layout == "sliced" else t


@fuzz
@given(problems())
def test_any_options_together(problem):
    """Against the reference in float64, in units at the scale of what is summed: values are of the order of 1."""
    case, layouts, dtype, seed = problem
    note(f"{problem}")
    torch.manual_seed(seed)
    drawn = draw(case, dtype)
    grad_output = torch.randn(case.B, case.H, case.Lq, case.Dv).to(dtype)
    grad_lse = torch.randn(case.B, case.H, case.Lq).to(dtype)
    names = ("query", "key", "value")
    arranged = drawn | {name: laid_out(drawn[name], layout) for name, layout in zip(names, layouts)}
    got = run(ours, case, arranged, laid_out(grad_output, layouts[3]), grad_lse)
    truth = run(in_torch, case, double(drawn), grad_output.double(), grad_lse.double())
    for name, want in truth.items():
        allowed = tolerance(name, want, case, dtype)
        torch.testing.assert_close(got[name].double(), want, rtol=0, atol=allowed, msg=lambda m: f"{name}: {m}")  # noqa: B023


def tolerance(name: str, want: torch.Tensor, case: Case, dtype: torch.dtype) -> float:
    """64 units of the largest value, or of 1; more for sums of larger terms that cancel.

    In dp - delta two sums of Dv terms cancel, wholly where there is one key; a mask's gradient is a sum of scores'.
    """
    finite = want[want.isfinite()]
    scale = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    if name in ("dq", "dk", "dmask"):
        scale *= case.Dv**0.5
    if name == "dmask":
        scale *= (case.B * case.H * case.Lq * case.Lk / want.numel()) ** 0.5
    return 64 * torch.finfo(dtype).eps * scale
