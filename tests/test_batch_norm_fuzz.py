"""batch_norm on drawn shapes, strides, layouts and options: exact where statistics are powers of two, else close."""

import math
import os
from typing import NamedTuple

import torch
from batch_norm_cases import EPS, Case, as_rows, double, in_torch, run
from closeness import EXCEPTIONS, TIMES_EAGER
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fastarch.ops import batch_norm

EXAMPLES = int(os.environ.get("FASTARCH_FUZZ_EXAMPLES", "150"))
LAYOUTS = ["contiguous", "channels_last", "sliced", "sliced channels", "transposed"]
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Problem(NamedTuple):
    case: Case
    layouts: tuple[str, str, str]  # of input, residual and the output's gradient
    dtype: torch.dtype
    seed: int


@st.composite
def problems(draw, dtypes: list[torch.dtype], training: bool) -> Problem:
    most = {0: 1, 1: 300, 2: 40, 3: 9}
    rank = draw(st.sampled_from([0, 1, 2, 2, 3]))
    size = [draw(st.integers(1, most[rank])) for _ in range(rank)]
    x = (draw(st.integers(1, 6)), draw(st.one_of(st.integers(1, 9), st.integers(10, 140))), *size)
    residual, relu, weight, bias = (draw(st.booleans()) for _ in range(4))
    case = Case(x, residual, relu and (residual or not training), weight, bias, training)
    layouts = tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3))
    return Problem(case, layouts, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**32)))


def laid_out(t: torch.Tensor | None, layout: str) -> torch.Tensor | None:
    if t is None or layout == "contiguous":
        return t
    if layout == "channels_last":
        return as_rows(t)
    if layout == "transposed":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced channels":
        return torch.cat([t, t], 1)[:, t.shape[1] :]
    return torch.stack([t, t], -1)[..., 1]


def arranged(problem: Problem, drawn: dict, grad_output: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """With the strides of the problem."""
    of_input, of_residual, of_grad = problem.layouts
    strides = {"input": laid_out(drawn["input"], of_input), "residual": laid_out(drawn["residual"], of_residual)}
    return drawn | strides, laid_out(grad_output, of_grad)


@fuzz
@given(problems([torch.float32, torch.float64, torch.bfloat16, torch.float16], training=False))
def test_evaluation_is_exact(problem):
    """Small integers, scaled by powers of two: no sum and no product is rounded, in 16 bits neither."""
    case, _, dtype, seed = problem
    note(f"{problem}")
    torch.manual_seed(seed)
    C, wide = case.x[1], torch.float64 if dtype == torch.float64 else torch.float32

    def integers(shape, dtype: torch.dtype, most: int = 2) -> torch.Tensor:
        return torch.randint(-most, most + 1, shape).to(dtype)

    drawn = {"input": integers(case.x, dtype), "residual": integers(case.x, dtype) if case.residual else None}
    drawn |= {name: integers((C,), wide) if getattr(case, name) else None for name in ("weight", "bias")}
    drawn["running_mean"], drawn["running_var"] = integers((C,), wide, 1), 4.0 ** torch.randint(0, 2, (C,)).to(wide)
    grad_output = integers(case.x, dtype)
    options = case.options | {"eps": 0.0}
    got = run(batch_norm, *arranged(problem, drawn, grad_output), **options)
    for name, want in run(in_torch, double(drawn), grad_output.double(), **options).items():
        assert torch.equal(got[name].double(), want), name


@fuzz
@given(problems([torch.float32, torch.float64], training=True))
def test_training(problem):
    case, _, dtype, seed = problem
    if case.x[0] * math.prod(case.x[2:]) < 3:
        case = case._replace(x=(3, *case.x[1:]))  # one value has no variance, two are 1 and -1 whatever they are
    note(f"{problem}")
    torch.manual_seed(seed)
    C = case.x[1]
    along = (C, *(1 for _ in case.x[2:]))
    x = torch.randn(case.x) * (torch.rand(along) + 0.5) + torch.randn(along)
    # far from ReLU's edge, on which side of it rounding decides
    residual = (16 + torch.rand(case.x)) * torch.randint(0, 2, case.x).mul(2).sub(1) if case.residual else None
    drawn = {"input": x, "residual": residual}
    drawn |= {name: 2 * torch.rand(C) - 1 if getattr(case, name) else None for name in ("weight", "bias")}
    drawn |= {"running_mean": torch.randn(C), "running_var": torch.rand(C) + 0.5}
    drawn = {name: t if t is None else t.to(dtype) for name, t in drawn.items()}
    grad_output = torch.randn(case.x).to(dtype)
    got = run(batch_norm, *arranged(problem, drawn, grad_output), **case.options)
    eager = run(in_torch, drawn, grad_output, **case.options)
    truth = run(in_torch, double(drawn), grad_output.double(), **case.options)
    times, units = EXCEPTIONS.get(dtype, (TIMES_EAGER, 1.0))
    for name, terms in magnitudes(double(drawn), grad_output.double()).items():
        if name not in truth:
            continue
        error, own = ((results[name].double() - truth[name]).abs().max().item() for results in (got, eager))
        allowed = times * own + units * torch.finfo(dtype).eps * terms.max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, eager's {own:.3g}"


def magnitudes(drawn: dict, grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """What results are sums of, without signs.

    The rule of closeness.py, but with its unit at the scale of the terms: where one channel's terms cancel, eager's
    error can be nothing by luck, and drawn problems find such luck.
    """
    x, dy, residual = drawn["input"], grad_output.abs(), drawn["residual"]
    C, over = x.shape[1], [0, *range(2, x.dim())]
    along = (C, *(1 for _ in x.shape[2:]))
    mean, var = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
    rstd = (var + EPS).rsqrt()
    xhat, weight = (x.abs() + mean.abs()) * rstd, 1.0 if drawn["weight"] is None else drawn["weight"].abs().view(along)
    y = xhat * weight + (0.0 if drawn["bias"] is None else drawn["bias"].abs().view(along))
    return {
        "y": y if residual is None else y + residual.abs(),
        "running_mean": drawn["running_mean"].abs() + mean.abs().flatten(),
        "running_var": drawn["running_var"] + var.flatten(),
        "dx": weight * rstd * (dy + dy.mean(over, keepdim=True) + xhat * (dy * xhat).mean(over, keepdim=True)),
        "dresidual": dy,
        "dweight": (dy * xhat).sum(over),
        "dbias": dy.sum(over),
    }
