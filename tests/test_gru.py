"""gru and gru_cell on CPUs: values, gradients, and what they are computed with."""

import itertools

import numpy as np
import pytest
import torch
from closeness import assert_close
from gru_cases import (
    BEFORE,
    CASES,
    FULL,
    GRADIENTS,
    ONE_STEP,
    PLAIN,
    Case,
    arguments_of_bwd,
    arguments_of_fwd,
    compare,
    double,
    draw,
    draw_gradients,
    in_torch,
    op,
    run,
)

from fastarch import extension
from fastarch.ops import gru, gru_cell
from fastarch.ref.gru import gru_cell as cell_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    compare(gru, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_STEP, ids=str)
def test_one_step(case, dtype):
    compare(gru, case, dtype)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "case",
    [
        *ONE_STEP,
        Case(40, 17, 40, 130, lengths=True),  # rows are shared out
        Case(30, 1, 20, 330),  # hidden units, which meet after every step
        Case(30, 2, 20, 330, reverse=True, lengths=True, reset_after=False),
        Case(5, 24, 20, 390, lengths=True),  # units, whose weights are many: forward
        Case(5, 24, 20, 390, reverse=True, reset_after=False),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_run_or_threads(case, count, threads):
    drawn, gradients = draw(case, torch.float32), draw_gradients(case, torch.float32)
    results = []
    for number in (1, count, count):
        threads(number)
        results.append(run(gru, drawn, gradients, **case.options))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_long_sequences(threads):
    """Nothing builds up over thousands of steps."""
    compare(gru, Case(4096, 1, 4, 24), torch.float32)
    compare(gru, Case(4096, 2, 3, 5, reverse=True, lengths=True), torch.float32)


def test_more_sequences_than_a_chunk_of_gradients_holds():
    compare(gru, Case(2, 1100, 3, 5, lengths=True), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_cell(batched, reset_after, dtype):
    def step(function, drawn, dtype):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in drawn]
        h = function(*leaves, reset_after=reset_after)
        wanted = [t for t in leaves if t is not None]
        return [h.detach(), *torch.autograd.grad(h, wanted, torch.ones_like(h))]

    for N, C, H in ((5, 4, 7), (70, 33, 20)):
        drawn = [t for t in list(draw(Case(1, N, C, H), dtype).values())[:6]]
        drawn[0] = drawn[0][0]
        if not batched:
            drawn[:2] = drawn[0][0], drawn[1][0]
        got, eager, truth = (
            step(f, drawn, d) for f, d in ((gru_cell, dtype), (cell_reference, dtype), (cell_reference, torch.float64))
        )
        for name, *values in zip(("h", *GRADIENTS), got, eager, truth):
            assert_close(name, *values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoid_and_tanh(dtype):
    """Within 2.6 units of the last place over the whole range: gates of cells whose weights let x through alone."""
    wide = np.longdouble
    magnitudes = np.geomspace(1e-30, 80.0, 200_000)
    x = np.concatenate([magnitudes, -magnitudes, np.linspace(-20, 20, 200_001)])
    x = torch.from_numpy(x).to(dtype)
    w = torch.ones(3, 1, dtype=dtype)
    _, _, gates = op.fwd(
        x.view(1, -1, 1), x.new_zeros(len(x), 1), w, torch.zeros_like(w), *[None] * 3, False, True, True, "sequence"
    )
    sigmoid, update, tanh, _ = gates[0, :, :, 0].numpy().T
    exact = x.numpy().astype(wide)
    for got, want in ((sigmoid, 1 / (1 + np.exp(-exact))), (tanh, np.tanh(exact))):
        unit = np.spacing(np.abs(want).astype(got.dtype)).astype(wide)
        assert (np.abs(got.astype(wide) - want) / unit).max() < 2.6
    assert np.array_equal(sigmoid, update)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturation_and_nan(dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e4, -1e4, 0.0, -0.0]).to(dtype)
    w = torch.ones(3, 1, dtype=dtype)
    _, h_n, gates = op.fwd(
        x.view(1, -1, 1), x.new_zeros(len(x), 1), w, torch.zeros_like(w), *[None] * 3, False, True, True, "sequence"
    )
    r, z, n, _ = gates[0, :, :, 0].T
    for got, want in ((r, x.sigmoid()), (z, x.sigmoid()), (n, x.tanh())):
        torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(torch.float32).tiny, equal_nan=True)
    assert h_n.isnan().flatten().tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("case", [FULL, BEFORE], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_what_stands_in_padding_counts_for_nothing(case, reverse):
    case = case._replace(reverse=reverse)
    drawn, gradients = draw(case, torch.float32), draw_gradients(case, torch.float32)
    want = run(gru, drawn, gradients, **case.options)
    padding = torch.arange(case.T).unsqueeze(1) >= drawn["lengths"]
    drawn["input"] = drawn["input"].masked_fill(padding.unsqueeze(-1), float("nan"))
    gradients = gradients[0].masked_fill(padding.unsqueeze(-1), float("nan")), gradients[1]
    got = run(gru, drawn, gradients, **case.options)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not got["output"][padding].any()
    assert not got["dx"][padding].any()


def strided(t: torch.Tensor) -> list[torch.Tensor]:
    """The same values with other strides."""
    padded = torch.full([2 * size + 3 for size in t.shape], 99.0, dtype=t.dtype)
    backwards = list(reversed(range(t.dim())))
    return [
        padded[tuple(slice(1, 2 * size, 2) for size in t.shape)].copy_(t),
        t.permute(backwards).contiguous().permute(backwards),
        torch.stack([t, t], -1)[..., 1],
    ]


@pytest.mark.parametrize("case", [FULL, BEFORE], ids=str)
def test_strides_of_inputs_and_gradients(case):
    drawn, gradients = draw(case, torch.float32), draw_gradients(case, torch.float32)
    want = run(gru, drawn, gradients, **case.options)
    for i in range(3):
        laid_out = {name: strided(t)[i] for name, t in drawn.items()}
        got = run(gru, laid_out, [strided(g)[i] for g in gradients], **case.options)
        for name in want:
            assert torch.equal(got[name], want[name]), name
    same = gradients[0][:1, :1].expand_as(gradients[0])  # as from sum(): strides of 0
    got, want = (run(gru, drawn, (g, gradients[1]), **case.options) for g in (same, same.contiguous()))
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("case", [FULL, BEFORE], ids=str)
def test_gradients_of_one_result_alone(case):
    """The gradient of a result that nobody used does not exist; it counts as 0."""
    saved = arguments_of_bwd(case, torch.float32)
    for name in ("grad_output", "grad_h_n"):
        got = op.bwd(**saved | {name: None})
        want = op.bwd(**saved | {name: torch.zeros_like(saved[name])})
        for g, w in zip(got, want):
            assert torch.equal(g, w)


@pytest.mark.parametrize("case", [PLAIN, FULL, BEFORE], ids=str)
def test_gradients_that_are_not_wanted_are_not_computed(case):
    saved = arguments_of_bwd(case, torch.float32)
    everything = op.bwd(**saved)
    for wanted in itertools.product([True, False], repeat=6):
        for got, want, is_wanted in zip(op.bwd(**saved | {"output_mask": wanted}), everything, wanted):
            assert torch.equal(got, want) if is_wanted else not got.numel()


@pytest.mark.parametrize("case", [PLAIN, FULL, BEFORE], ids=str)
def test_gates_are_saved_without_changing_results(case):
    with_gates = op.fwd(**arguments_of_fwd(case, torch.float32))
    torch.manual_seed(0)
    arguments = arguments_of_fwd(case, torch.float32)
    with_gates = op.fwd(**arguments)
    without = op.fwd(**arguments | {"save_gates": False})
    for got, want in zip(without[:2], with_gates[:2]):
        assert torch.equal(got, want)
    assert not without[2].numel()
    assert with_gates[2].shape == (case.T, case.N, 4 if case.reset_after else 3, case.H)


@pytest.mark.parametrize(
    "case", [Case(3, 2, 3, 4), Case(4, 3, 2, 3, True, True), Case(3, 2, 2, 3, reset_after=False)], ids=str
)
def test_first_and_second_derivatives(case):
    drawn = double(draw(case, torch.float32))
    lengths = drawn.pop("lengths")
    leaves = [t.requires_grad_() for t in drawn.values()]

    def function(*tensors):
        return gru(*tensors, lengths=lengths, **case.options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivatives_equal_those_of_the_reference():
    def penalty(function):
        drawn = double(draw(FULL, torch.float32))
        x = drawn["input"].requires_grad_()
        (slope,) = torch.autograd.grad(function(**drawn, **FULL.options)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    torch.manual_seed(1)
    got = penalty(gru)
    torch.manual_seed(1)
    torch.testing.assert_close(got, penalty(in_torch))
    assert got.any()
