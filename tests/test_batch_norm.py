"""batch_norm on CPUs: values, statistics, gradients and the mask."""

import importlib
import itertools
import math

import pytest
import torch
from batch_norm_cases import (
    CASES,
    EVALUATION,
    FULL,
    PLAIN,
    ROWS,
    Case,
    arguments_of_bwd,
    arguments_of_fwd,
    as_rows,
    double,
    draw,
    in_torch,
    run,
)
from closeness import assert_close
from torch.nn import functional as F

import fastarch
from fastarch import extension
from fastarch.ops import batch_norm

op = importlib.import_module("fastarch.ops.batch_norm")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("input", "residual", "weight", "bias")

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


def named(name: str):
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_statistics_and_gradients(case, dtype, channels_last):
    drawn = draw(case, dtype, channels_last)
    grad_output = torch.randn(case.x).to(dtype)
    got = run(batch_norm, drawn, grad_output, **case.options)
    eager = run(in_torch, drawn, grad_output, **case.options)
    truth = run(in_torch, double(drawn), grad_output.double(), **case.options)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])
    assert got["y"].stride() == drawn["input"].stride()
    if not case.training:
        assert all(torch.equal(got[name], drawn[name]) for name in ("running_mean", "running_var"))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [FULL, EVALUATION, ROWS, PLAIN], ids=str)
def test_parameters_and_statistics_of_float32_beside_16_bits(case, dtype, channels_last):
    drawn = draw(case, dtype, channels_last)
    drawn |= {name: t.float() for name, t in drawn.items() if name not in ("input", "residual")}
    grad_output = torch.randn(case.x).to(dtype)
    got, eager = (run(f, drawn, grad_output, **case.options) for f in (batch_norm, in_torch))
    truth = run(in_torch, double(drawn), grad_output.double(), **case.options)
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_parameters_of_either_precision_beside_16_bits(training):
    """As FSDP mixes them: parameters in bfloat16, buffers in float32; torch refuses it."""
    case = FULL._replace(training=training)
    drawn = draw(case, torch.bfloat16)
    grad_output = torch.randn(case.x).bfloat16()
    wide = ("weight", "bias", "running_mean", "running_var")
    want = run(batch_norm, drawn | {name: drawn[name].float() for name in wide}, grad_output, **case.options)
    eager = run(in_torch, drawn, grad_output, **case.options)
    truth = run(in_torch, double(drawn), grad_output.double(), **case.options)
    for count in (1, 2, 3):
        for chosen in itertools.combinations(wide, count):
            mixed = drawn | {name: drawn[name].float() for name in chosen}
            got = run(batch_norm, mixed, grad_output, **case.options)
            with fastarch.reference():
                reference = run(batch_norm, mixed, grad_output, **case.options)
            for name in want:
                message = f"{name}, {chosen} in float32"
                # what runs in bfloat16 takes the batch's share after rounding it: one unit more
                units = 2**-7 if name.startswith("running") and got[name].dtype == torch.bfloat16 else 0
                want_here = want[name].to(got[name].dtype)
                torch.testing.assert_close(got[name], want_here, rtol=units, atol=0, msg=named(message))
                assert reference[name].dtype == got[name].dtype, message
                assert_close(message, reference[name].bfloat16(), eager[name], truth[name])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.relu and case.residual], ids=str)
def test_mask(case, dtype, channels_last):
    given = arguments_of_fwd(case, dtype, channels_last)
    y, *_, mask = op.fwd(**given)
    size = case.x[2:]
    rows = case.x[1] > 1 and (channels_last or math.prod(size) == 1)
    passed = (y > 0).movedim(1, -1).flatten(0, -2) if rows else (y > 0).flatten(0, 1).flatten(1)
    assert mask.dtype == torch.uint8
    assert mask.shape == (len(passed), (passed.shape[1] + 7) // 8)
    bits = torch.stack([mask >> i & 1 for i in range(8)], -1).flatten(1).bool()
    assert torch.equal(bits[:, : passed.shape[1]], passed)
    assert not bits[:, passed.shape[1] :].any(), "bits of padding"
    without = op.fwd(**given | {"save_mask": False})
    assert torch.equal(without[0], y), "the output depends on whether the mask is saved"
    assert not without[3].numel()


def test_mask_passes_what_is_not_at_most_zero():
    """As torch's ReLU: NaN passes, 0 and -0 do not."""
    x = torch.tensor([[0.0, -0.0, float("nan"), 1e-38, -1e-38, float("inf"), -float("inf"), 2.0, -3.0]]).expand(2, 9)
    ones, zeros = torch.ones(9), torch.zeros(9)
    y, *_, mask = op.fwd(x, torch.zeros_like(x), None, None, zeros, ones, 0.0, True, True, "two_pass")
    assert mask.tolist() == [[0b10101100, 0]] * 2
    torch.testing.assert_close(y, x.relu(), rtol=0, atol=0, equal_nan=True)


def strided(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    padded = torch.full([2 * size + 3 for size in t.shape], 99.0, dtype=t.dtype)
    sliced = padded[tuple(slice(1, 2 * size, 2) for size in t.shape)].copy_(t)
    backwards = list(reversed(range(t.dim())))
    return {
        "sliced": sliced,
        "transposed": t.permute(backwards).contiguous().permute(backwards),
        "sliced channels_last": as_rows(torch.cat([t, t], 1))[:, : t.shape[1]],
        "sliced batch": torch.cat([t, t], 0)[::2].copy_(t),
        "channels_last": as_rows(t),
        "contiguous": t.contiguous(),
    }


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [FULL, EVALUATION, ROWS, CASES[13]], ids=str)
def test_any_strides(case, channels_last):
    drawn = draw(case, torch.float32, channels_last)
    grad_output = torch.randn(case.x)
    want = run(batch_norm, drawn, grad_output, **case.options)
    for name, variant in strided(drawn["input"]).items():
        got = run(batch_norm, drawn | {"input": variant}, grad_output, **case.options)
        for key in want:  # in another layout sums have another order
            torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-5, msg=named(f"input {name}, {key}"))
    for name, variant in strided(drawn["residual"]).items():
        got = run(batch_norm, drawn | {"residual": variant}, grad_output, **case.options)
        assert all(torch.equal(got[key], want[key]) for key in want), f"residual {name}"
    for name, variant in strided(grad_output).items():
        got = run(batch_norm, drawn, variant, **case.options)
        assert all(torch.equal(got[key], want[key]) for key in want), f"grad_output {name}"


@pytest.mark.parametrize("case", [FULL, EVALUATION, ROWS], ids=str)
def test_expanded_tensors(case):
    drawn = draw(case, torch.float32)
    one = torch.randn(())
    expanded = {"input": drawn["input"][:1].expand(case.x), "residual": one.expand(case.x)}
    got = run(batch_norm, drawn | expanded, one.expand(case.x), **case.options)
    dense = {name: t.contiguous() for name, t in expanded.items()}
    want = run(batch_norm, drawn | dense, one.expand(case.x).contiguous(), **case.options)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_strided_parameters_and_statistics():
    drawn = draw(FULL, torch.float32)
    grad_output = torch.randn(FULL.x)
    for training in (True, False):
        options = FULL.options | {"training": training}
        want = run(batch_norm, drawn, grad_output, **options)
        strides = {name: torch.stack([t, t], 1)[:, 1] for name, t in drawn.items() if t.dim() == 1}
        got = run(batch_norm, drawn | strides, grad_output, **options)
        for name in want:
            assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("outliers", ["none", "first", "first_of_each"])
@pytest.mark.parametrize("channels", ["all", "one"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows"])
def test_large_means_do_not_cancel_the_variance(layout, channels, outliers):
    """E[x^2] - E[x]^2 in float32 would be off by 6e-8 * 1e8: by some hundred percent, or by percents with outliers."""
    x = torch.randn(8, 3, 256, 256)
    x[:, slice(None) if channels == "all" else 1] += 1e4
    if outliers != "none":  # a shift by the first value alone would cancel
        x[: 1 if outliers == "first" else None, :, 0, 0] = 0.0
    x = {"contiguous": x, "channels_last": as_rows(x), "rows": x.movedim(1, -1).reshape(-1, 3)}[layout]
    over = [0, *range(2, x.dim())]
    truth = x.double().var(over), x.double().mean(over)
    mean, var = torch.zeros(3), torch.ones(3)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(var.double(), truth[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), truth[1], rtol=1e-7, atol=1e-6)
    exact = F.batch_norm(x.double(), None, None, training=True)
    # half a unit of float32 at 1e4, by which a mean is rounded, and two units of the outliers' y
    torch.testing.assert_close(y.double(), exact, rtol=2.4e-7, atol=2**-11)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("where", "options"),
    [
        *itertools.product(["input", "grad_output"], [{}, {"relu": True}, {"residual": True, "relu": True}]),
        ("residual", {"residual": True, "relu": True}),
    ],
    ids=str,
)
def test_nan_and_infinity_go_where_torch_sends_them(where, value, options, training, channels_last):
    case = Case((4, 11, 3, 5), **options, training=training)
    drawn = draw(case, torch.float32, channels_last) | {"grad_output": torch.randn(case.x)}
    drawn[where][1, 3, 2, 1] = value
    grad_output = drawn.pop("grad_output")
    got, want = (run(f, drawn, grad_output, **case.options) for f in (batch_norm, in_torch))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=named(name))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4, 4), (3, 5, 0), (3, 5, 4, 0), (0, 1, 2)], ids=str)
def test_empty_batch(shape, training):
    case = Case(shape, residual=True, relu=True, training=training)
    drawn = draw(case, torch.float32)
    got, want = (run(f, drawn, torch.empty(shape), **case.options) for f in (batch_norm, in_torch))
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert torch.equal(got["running_var"], drawn["running_var"])
    assert not got["dweight"].any()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4, 4), (3, 5, 0), (0, 1, 2)], ids=str)
def test_operations_of_an_empty_batch(shape, channels_last):
    """Of several ranks some may have nothing; the statistics are then those of the others."""
    for training in (True, False):
        case = Case(shape, residual=True, relu=True, training=training)
        assert [t.tolist() for t in op.stats(draw(case, torch.float32)["input"])] == [[0.0] * shape[1]] * 2
        arguments = arguments_of_bwd(case, torch.float32, channels_last)
        mean_dz = {"mean_dz": arguments["mean"], "mean_dz_xhat": arguments["var"]} if training else {}
        for means in ({}, mean_dz):
            dx, dresidual, dweight, dbias = op.bwd(**arguments | means)
            assert dx.shape == dresidual.shape == shape
            assert dweight.tolist() == dbias.tolist() == [0.0] * shape[1]


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1), (1, 1, 1, 1)], ids=str)
def test_one_value_per_channel_has_no_variance(shape):
    x, running = torch.randn(shape), (torch.zeros(shape[1]), torch.ones(shape[1]))
    for function in (batch_norm, F.batch_norm):
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            function(x, *running, training=True)
    torch.testing.assert_close(batch_norm(x, *running), F.batch_norm(x, *running))


@pytest.mark.parametrize("case", [FULL, FULL._replace(relu=False), EVALUATION, ROWS], ids=str)
def test_only_the_gradients_that_are_asked_for(case):
    drawn, grad_output = draw(case, torch.float32), torch.randn(case.x)
    results = run(batch_norm, drawn, grad_output, **case.options)
    want = {name: results[f"d{'x' if name == 'input' else name}"] for name in NAMES}
    for needed in itertools.product([True, False], repeat=4):
        leaves = {name: drawn[name].clone().requires_grad_(need) for name, need in zip(NAMES, needed)}
        running = {name: drawn[name].clone() for name in ("running_mean", "running_var")}
        y = batch_norm(**leaves, **running, **case.options)
        assert torch.equal(y, results["y"])
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(grad_output)
        for (name, leaf), need in zip(leaves.items(), needed):
            assert (leaf.grad is not None) == need, name
            if need:
                torch.testing.assert_close(leaf.grad, want[name], rtol=0, atol=0, msg=named(f"{name} of {needed}"))


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 2, 2, 2), residual=True, relu=True),
        Case((2, 2, 2, 1), residual=True, relu=True, training=False),
        Case((4, 2), relu=True),
        Case((4, 2), relu=True, weight=False, bias=False, training=False),
        Case((2, 2, 3), residual=True, weight=False),
    ],
    ids=str,
)
def test_gradcheck(case):
    drawn = draw(case, torch.float64)
    leaves = {name: t.requires_grad_() for name, t in drawn.items() if name in NAMES and t is not None}
    running = (None, None) if case.training else (drawn["running_mean"], drawn["running_var"])

    def function(*tensors):
        given = dict(zip(leaves, tensors))
        return batch_norm(given.pop("input"), *running, **given, **case.options)

    assert torch.autograd.gradcheck(function, list(leaves.values()))
    assert torch.autograd.gradgradcheck(function, list(leaves.values()))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [FULL, EVALUATION, ROWS, PLAIN, FULL._replace(residual=False)], ids=str)
def test_second_derivative_is_not_lost(case, channels_last):
    drawn = draw(case, torch.float64, channels_last)
    seconds = []
    for function in (batch_norm, in_torch):
        leaves = {name: t.detach().requires_grad_() for name, t in drawn.items() if name in NAMES and t is not None}
        running = {name: drawn[name].clone() for name in ("running_mean", "running_var")}
        y = function(**leaves, **running, **case.options)
        firsts = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        seconds.append(torch.autograd.grad(sum(f.square().sum() for f in firsts), list(leaves.values())))
    for name, got, want in zip(leaves, *seconds):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item(), msg=named(name))


def test_infinite_gradients_stop_at_relu_in_the_first_and_in_the_second_derivative():
    """The differentiable backward selects by the mask; a product would make NaN of 0 times infinity."""
    drawn = draw(FULL, torch.float64)
    leaves = {name: t.requires_grad_() for name, t in drawn.items() if name in NAMES}
    y = batch_norm(**drawn, **FULL.options)
    grad_output = torch.where(y > 0, 1.0, math.inf)
    kept = [torch.autograd.grad(y, leaves["residual"], grad_output, retain_graph=True)[0]]
    kept += torch.autograd.grad(y, leaves["residual"], grad_output, create_graph=True)
    assert all(torch.equal(dresidual, (y > 0).double()) for dresidual in kept)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [FULL, EVALUATION, ROWS, PLAIN, CASES[6], CASES[7]], ids=str)
def test_opcheck(case, channels_last):
    arguments = arguments_of_fwd(case, torch.float32, channels_last)
    torch.library.opcheck(op.stats, (arguments["input"],))
    torch.library.opcheck(op.fwd, tuple(arguments.values()))
    if case.training:  # as the ranks of a group call it
        mean, var = op.stats(arguments["input"])
        torch.library.opcheck(op.fwd, tuple((arguments | {"mean": mean, "var": var}).values()))
    arguments = arguments_of_bwd(case, torch.bfloat16, channels_last)
    for wanted in ([True] * 4, [False, True, False, True], [True, False, False, False], [False] * 4):
        torch.library.opcheck(op.bwd, tuple((arguments | {"output_mask": wanted}).values()))
    given = {"mean_dz": arguments["mean"], "mean_dz_xhat": arguments["var"]}
    torch.library.opcheck(op.bwd, tuple((arguments | given).values()))


def test_means_that_are_given_replace_those_of_the_batch():
    """As several ranks call bwd: first for the sums, then with the means over all of them."""
    for case in (FULL, ROWS):
        arguments = arguments_of_bwd(case, torch.float64)
        want = op.bwd(**arguments)
        sums = op.bwd(**arguments | {"output_mask": [False, False, True, True]})
        assert torch.equal(sums[2], want[2])
        assert torch.equal(sums[3], want[3])
        values = arguments["input"].numel() // case.x[1]
        means = {"mean_dz": sums[3] / values, "mean_dz_xhat": sums[2] / values}
        got = op.bwd(**arguments | means)
        for name, one, other in zip(("dx", "dresidual", "dweight", "dbias"), got, want):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13, msg=named(name))
        doubled = op.bwd(**arguments | {name: 2 * mean for name, mean in means.items()})
        assert not torch.allclose(doubled[0], want[0])
        assert torch.equal(doubled[1], want[1])
