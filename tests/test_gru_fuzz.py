"""gru on drawn shapes, strides, lengths and options, by the rule of closeness.py with its unit at the terms' scale."""

import os
from typing import NamedTuple

import torch
from closeness import EXCEPTIONS, TIMES_EAGER
from gru_cases import Case, double, draw, draw_gradients, in_torch, run
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fastarch.ops import gru

EXAMPLES = int(os.environ.get("FASTARCH_FUZZ_EXAMPLES", "100"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Problem(NamedTuple):
    case: Case
    layouts: tuple[str, str]  # of inputs and gradients
    dtype: torch.dtype
    threads: int
    seed: int


@st.composite
def problems(draw) -> Problem:
    sizes = st.one_of(st.integers(1, 9), st.integers(10, 70))
    T, N, C, H = draw(st.integers(1, 9)), draw(sizes), draw(sizes), draw(sizes)
    case = Case(T, N, C, H, *(draw(st.booleans()) for _ in range(5)))
    layouts = tuple(draw(st.sampled_from(["contiguous", "transposed", "sliced"])) for _ in range(2))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return Problem(case, layouts, dtype, draw(st.integers(1, 3)), draw(st.integers(0, 2**32)))


def laid_out(t: torch.Tensor | None, layout: str) -> torch.Tensor | None:
    if t is None or layout == "contiguous":
        return t
    if layout == "transposed":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    return torch.stack([t, t], -1)[..., 1]


@fuzz
@given(problems())
def test_gru(problem):
    case, (of_inputs, of_gradients), dtype, threads, seed = problem
    note(f"{problem}")
    torch.manual_seed(seed)
    results = []
    for _ in range(max(1, min(5, 100 // (case.T * case.N * case.H)))):  # of few elements eager's error is small by luck
        drawn, gradients = draw(case, dtype), draw_gradients(case, dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            given_ = {name: laid_out(t, of_inputs) for name, t in drawn.items()}
            got = run(gru, given_, [laid_out(g, of_gradients) for g in gradients], **case.options)
        finally:
            torch.set_num_threads(before)
        eager = run(in_torch, drawn, gradients, **case.options)
        results.append((got, eager, run(in_torch, double(drawn), [g.double() for g in gradients], **case.options)))
    got, eager, truth = ({name: torch.stack([r[name] for r in each]) for name in each[0]} for each in zip(*results))
    times, units = EXCEPTIONS.get(dtype, (TIMES_EAGER, 1.0))
    # and so it is where terms cancel
    terms = max(1.0, *(t.abs().max().item() for t in truth.values() if t.numel()))
    for name in truth:
        error, own = ((results[name].double() - truth[name]).abs().max().item() for results in (got, eager))
        allowed = times * own + 4 * units * torch.finfo(dtype).eps * terms
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, eager's {own:.3g}"
