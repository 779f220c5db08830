"""batch_norm on CPUs: values, statistics, gradients, the mask, and PyTorch's contract."""

import importlib
import itertools
import math

import pytest
import torch
from batch_norm_cases import CASES, EPS, Case, as_rows, double, draw, in_torch, run
from closeness import assert_close
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import fastarch
from fastarch import extension, routing
from fastarch.ops import batch_norm

op = importlib.import_module("fastarch.ops.batch_norm")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PLAIN = Case((3, 5, 6, 7))
FULL = Case((3, 10, 7, 5), residual=True, relu=True)
ROWS = Case((9, 13), residual=True, relu=True)
EVALUATION = FULL._replace(training=False)
NAMES = ("input", "residual", "weight", "bias")

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


def named(name: str):
    return lambda message: f"{name}: {message}"


def layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"contiguous": t, "channels_last": as_rows(t)}


def arguments_of_fwd(case: Case, dtype: torch.dtype, channels_last: bool = False) -> dict:
    """fwd's, per-channel tensors in the dtype that it wants them in."""
    drawn = draw(case, dtype, channels_last)
    per_channel = [None if t is None else t.to(op.statistics_dtype(dtype)) for t in list(drawn.values())[2:]]
    weight, bias, mean, var = per_channel
    given = {"mean": None, "var": None} if case.training else {"mean": mean, "var": var}
    tensors = {"input": drawn["input"], "residual": drawn["residual"], "weight": weight, "bias": bias} | given
    save_mask = case.relu and case.residual
    return tensors | {"eps": EPS, "relu": case.relu, "save_mask": save_mask, "algorithm": "two_pass"}


def arguments_of_bwd(case: Case, dtype: torch.dtype, channels_last: bool = False) -> dict:
    given = arguments_of_fwd(case, dtype, channels_last)
    y, *batch, mask = op.fwd(**given)
    saved = {"grad_output": torch.randn_like(y), "input": given["input"], "mask": mask if mask.numel() else None}
    mean, var = batch if case.training else (given["mean"], given["var"])
    saved |= {"weight": given["weight"], "bias": given["bias"], "mean": mean, "var": var}
    saved |= {"mean_dz": None, "mean_dz_xhat": None, "eps": EPS, "relu": case.relu, "training": case.training}
    return saved | {"algorithm": "two_pass", "output_mask": [True] * 4}


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


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_compile_with_dynamic_shapes(channels_last, training):
    torch._dynamo.reset()
    w, b = torch.randn(9, requires_grad=True), torch.randn(9, requires_grad=True)
    graphs = []
    keep = lambda graph, _: graphs.append(graph.code) or graph.forward  # noqa: E731

    def function(x, residual, mean, var):
        return batch_norm(x * 2, mean, var, w, b, training=training, residual=residual, activation="relu") * 3

    compiled = torch.compile(
        function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((4, 9, 10, 12), (5, 9, 14, 16), (7, 9, 8, 22)):
            x, residual = (as_rows(t) if channels_last else t for t in torch.randn(2, *size))
            results = []
            for f in (compiled, function):
                running = torch.zeros(9), torch.ones(9)
                y = f(x, residual.requires_grad_(), *running)
                results.append((y, *running, *torch.autograd.grad(y.square().sum(), (w, b, residual))))
            for got, want in zip(*results):
                torch.testing.assert_close(got, want)
            assert torch.equal(results[0][1], torch.zeros(9)) != training
    forward, backward = graphs
    assert "fastarch.batch_norm_fwd" in forward
    assert "fastarch.batch_norm_bwd" in backward, "the compiled backward is the reference's"


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_with_inductor(momentum):
    """Training steps, which count batches, without recompilation."""
    torch._dynamo.reset()
    bn, other = (fastarch.nn.BatchNorm2d(9, momentum=momentum, activation="relu") for _ in range(2))
    compiled = torch.compile(bn, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(4, 9, 10, 12, requires_grad=True)
            results = []
            for function in (compiled, other):
                y = function(x)
                results.append((y, *torch.autograd.grad(y.square().sum(), x)))
            for got, want in zip(*results):
                torch.testing.assert_close(got, want)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(bn.state_dict()[name], value, msg=named(name))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_export_keeps_the_operation(training):
    model = fastarch.nn.BatchNorm2d(3, activation="relu").train(training)
    example = torch.randn(4, 3, 12, 12), torch.randn(4, 3, 12, 12)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) * 2)
    assert any("fastarch.batch_norm_fwd" in str(node.target) for node in program.graph.nodes)
    x, residual = torch.randn(2, 1, 3, 12, 12)
    torch.testing.assert_close(program.module()(x, residual), model(x, residual))


def test_autocast():
    """torch leaves batch_norm alone: the input has 16 bits after a convolution, parameters and statistics have 32."""
    drawn = draw(FULL._replace(residual=False), torch.float32)
    drawn["input"] = drawn["input"].bfloat16()
    outside = run(batch_norm, drawn, torch.ones(FULL.x).bfloat16(), **FULL.options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(batch_norm, drawn, torch.ones(FULL.x).bfloat16(), **FULL.options)
    assert inside["y"].dtype == inside["dx"].dtype == torch.bfloat16
    assert inside["dweight"].dtype == inside["dbias"].dtype == inside["running_var"].dtype == torch.float32
    for name in outside:
        assert torch.equal(inside[name], outside[name]), name


@pytest.mark.parametrize("case", [FULL, EVALUATION], ids=str)
def test_transforms_go_through_the_reference(case):
    drawn = draw(case, torch.float64)
    running = (None, None) if case.training else (drawn["running_mean"], drawn["running_var"])
    w = drawn["weight"]

    def apply(x, w):
        return batch_norm(x, *running, w, drawn["bias"], residual=drawn["residual"].expand_as(x), **case.options)

    f = lambda x, w: apply(x, w).square().sum()  # noqa: E731
    x = drawn["input"]
    want = torch.autograd.grad(f(x, w.requires_grad_()), w)[0]
    w = w.detach()
    torch.testing.assert_close(torch.func.grad(f, 1)(x, w), want)
    torch.testing.assert_close(
        torch.func.vmap(apply, (0, None))(torch.stack([x, 2 * x]), w), torch.stack([apply(x, w), apply(2 * x, w)])
    )
    _, tangent = torch.func.jvp(lambda w: f(x, w), (w,), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, want.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, torch.ones_like(w))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(x, dual)).tangent, want.sum())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_saved_memory(training, dtype, channels_last):
    N, C, H, W = FULL.x
    bits = N * H * W * math.ceil(C / 8) if channels_last else N * C * math.ceil(H * W / 8)
    for options, mask in (({"residual": True, "relu": True}, bits), ({"relu": True}, 0), ({"residual": True}, 0)):
        case = Case(FULL.x, **options, training=training)
        drawn = draw(case, dtype, channels_last)
        leaves = {name: t.requires_grad_() for name, t in drawn.items() if name in NAMES and t is not None}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            batch_norm(**drawn, **case.options)
        per_channel = 4 * C * op.statistics_dtype(dtype).itemsize  # weight, bias, mean and var
        assert sum(t.nbytes for t in saved) == leaves["input"].nbytes + per_channel + mask, options


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        Case((70, 4, 33, 31), residual=True, relu=True),
        Case((3, 65, 40, 41), relu=True),
        Case((3, 65, 40, 41), residual=True, relu=True, training=False),
        Case((5000, 70), residual=True, relu=True),
        Case((70, 1, 33, 31), relu=True),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_run_or_threads(case, channels_last, threads):
    drawn, grad_output = draw(case, torch.float32, channels_last), torch.randn(case.x)
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(run(batch_norm, drawn, grad_output, **case.options))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_momentum(momentum, dtype):
    drawn = draw(PLAIN, dtype)
    got, want = (run(f, drawn, momentum=momentum, **PLAIN.options) for f in (batch_norm, in_torch))
    of_tensor = run(batch_norm, drawn, momentum=torch.tensor(momentum, dtype=dtype), **PLAIN.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=named(name))
        torch.testing.assert_close(of_tensor[name], got[name], msg=named(f"{name}, from a tensor"))


def test_without_running_statistics_nothing_is_updated():
    drawn = draw(PLAIN, torch.float32)
    with_statistics = run(batch_norm, drawn, **PLAIN.options)
    without = run(batch_norm, drawn | {"running_mean": None, "running_var": None}, **PLAIN.options)
    assert torch.equal(without["y"], with_statistics["y"])


def test_parameters_that_are_updated_before_the_backward_are_an_error():
    """As in torch: what was saved for the backward is guarded against changes in place."""
    drawn = draw(EVALUATION, torch.float32)
    drawn["input"].requires_grad_()
    for name in ("input", "weight", "running_var"):
        y = batch_norm(**drawn, **EVALUATION.options)
        with torch.no_grad():
            drawn[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_reference_context_and_routes():
    drawn = draw(PLAIN, torch.float32)
    with routing.recording() as calls:
        got = run(batch_norm, drawn, **PLAIN.options)
        with fastarch.reference():
            want = run(batch_norm, drawn, **PLAIN.options)
        batch_norm(torch.empty(0, 5), None, None, training=True)
        batch_norm(torch.empty(2, 5, device="meta"), None, None, training=True)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=named(name))
    assert [call.operation for call in calls] == ["batch_norm"] * 4
    assert [call.backend for call in calls] == [f"cpu-{extension.isa} two_pass", *["reference"] * 3]
    assert calls[0].shapes == {"input": PLAIN.x}
    assert calls[0].reason == "statistics, then the rest, from the cache where a channel fits into it"
    assert calls[1].reason == "inside fastarch.reference()"
    assert calls[2].reason == "nothing to normalise"
    assert calls[3].reason == "no kernel for meta"


def test_route_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "cpu", None)
    assert op.route(torch.empty(2, 5), True, None) == ("reference", "fastarch._C is not built")
    assert batch_norm(torch.randn(2, 5), None, None, training=True).shape == (2, 5)


def test_route_of_a_dtype_without_kernels():
    x = torch.empty(2, 5, dtype=torch.float8_e4m3fn)
    assert op.route(x, True, None) == ("reference", "no CPU kernel for torch.float8_e4m3fn")


@pytest.mark.parametrize(
    ("layout", "dtype", "training", "group", "algorithm"),
    [
        ("channels_last", torch.bfloat16, True, None, "persistent"),
        ("channels_last", torch.bfloat16, True, "a group", "two_pass"),
        ("channels_last", torch.float32, False, None, "two_pass"),
        ("contiguous", torch.float16, True, None, "two_pass"),
        ("channels_last", torch.float64, True, None, "reference"),
    ],
    ids=str,
)
def test_route_on_gpus(layout, dtype, training, group, algorithm, monkeypatch):
    x = layouts(torch.empty(2, 5, 3, 3, dtype=dtype))[layout]
    monkeypatch.setattr(extension, "cuda", extension)  # as if it were built
    assert op.route_cuda(x, training, group).kernel == algorithm
    monkeypatch.setattr(extension, "cuda", None)
    assert op.route_cuda(x, training, group).kernel == ("two_pass" if algorithm == "persistent" else algorithm)
    assert op.backend("cuda", algorithm) == {
        "persistent": "cuda persistent",
        "two_pass": "triton two_pass",
        "reference": "reference",
    }.get(algorithm)


X, C5 = torch.zeros(3, 5, 4), torch.ones(5)
BAD = [
    (TypeError, "want input as a floating tensor, got list", lambda: batch_norm([1.0], C5, C5)),
    (TypeError, "want input as a floating tensor, got torch.int64", lambda: batch_norm(X.long(), C5, C5)),
    (TypeError, "want input as a floating tensor, got torch.complex64", lambda: batch_norm(X.cfloat(), C5, C5)),
    (ValueError, r"want input \[N, C, ...\], got \[5\]", lambda: batch_norm(C5, C5, C5)),
    (TypeError, "want weight as a tensor or None, got float", lambda: batch_norm(X, C5, C5, 1.0)),
    (TypeError, "want residual as a tensor or None, got int", lambda: batch_norm(X, C5, C5, residual=0)),
    (
        TypeError,
        "input is torch.float32 on cpu, bias is torch.float64 on cpu",
        lambda: batch_norm(X, C5, C5, None, C5.double()),
    ),
    (
        TypeError,
        "input is torch.bfloat16 on cpu, weight is torch.float16 on cpu",
        lambda: batch_norm(X.bfloat16(), C5, C5, C5.half()),
    ),
    (
        TypeError,
        "input is torch.float32 on cpu, running_mean is torch.float32 on meta",
        lambda: batch_norm(X, C5.to("meta"), C5),
    ),
    (
        TypeError,
        "input is torch.bfloat16 on cpu, residual is torch.float32 on cpu",
        lambda: batch_norm(X.bfloat16(), C5, C5, residual=X),
    ),
    (ValueError, r"want running_var \[5\] for input \[3, 5, 4\], got \[4\]", lambda: batch_norm(X, C5, C5[:4])),
    (ValueError, r"want weight \[5\] for input \[3, 5, 4\], got \[5, 1\]", lambda: batch_norm(X, C5, C5, C5[:, None])),
    (
        ValueError,
        r"want residual \[3, 5, 4\] for input \[3, 5, 4\], got \[3, 5, 1\]",  # which would broadcast
        lambda: batch_norm(X, C5, C5, residual=X[..., :1]),
    ),
    (TypeError, "want momentum as a number or a tensor, got NoneType", lambda: batch_norm(X, C5, C5, momentum=None)),
    (ValueError, "want eps > 0 when training, >= 0 otherwise, got 0", lambda: batch_norm(X, C5, C5, eps=0, training=1)),
    (ValueError, "want eps > 0 when training, >= 0 otherwise, got -1", lambda: batch_norm(X, C5, C5, eps=-1)),
    (ValueError, "want activation None or 'relu', got 'gelu'", lambda: batch_norm(X, C5, C5, activation="gelu")),
    (ValueError, "want both running_mean and running_var, or neither, got one of", lambda: batch_norm(X, C5, None)),
    (ValueError, "want running_mean and running_var when not training, got neither", lambda: batch_norm(X, None, None)),
    (
        ValueError,
        r"want more than 1 value per channel when training, got \[1, 5\]",
        lambda: batch_norm(X[:1, :, 0], C5, C5, training=True),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_errors_say_what_was_wanted_and_what_came(error, message, call):
    with pytest.raises(error, match=f"^batch_norm: {message}"):
        call()


def nonsense(arguments: dict) -> list[dict]:
    """Each argument of fwd or bwd in turn replaced by something that does not fit."""
    x, per_channel = arguments["input"], torch.ones(arguments["input"].shape[1], dtype=torch.float32)
    wrong = {}
    for name in ("input", "residual", "grad_output"):
        wrong[name] = [x[:1], x[:, :1], x[..., :1], x[0], x.double(), x.int()]
        wrong[name] += [torch.cat([x, x]), torch.cat([x, x], 1)]
    wrong["input"] += [x.flatten()[:1], x.new_empty(()), x[:, :0]]
    for name in ("weight", "bias", "mean", "var", "mean_dz", "mean_dz_xhat"):
        wrong[name] = [per_channel[:-1], per_channel[:0], per_channel[None], per_channel.double(), per_channel.int()]
        wrong[name] += [per_channel.bfloat16(), torch.cat([per_channel] * 2)]
    if (mask := arguments.get("mask")) is not None:
        wrong["mask"] = [mask[:-1], mask[:, :-1], mask.flatten(), mask.int(), mask[:0], mask.bool()]
    return [arguments | {name: bad} for name, values in wrong.items() if name in arguments for bad in values]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [FULL, EVALUATION, ROWS], ids=str)
def test_nonsense_in_direct_calls_of_the_operations_raises(case, channels_last):
    refused = (ValueError, TypeError, RuntimeError)
    for operation, arguments_of in ((op.fwd, arguments_of_fwd), (op.bwd, arguments_of_bwd)):
        arguments = arguments_of(case, torch.float32, channels_last)
        for i, bad in enumerate(nonsense(arguments)):
            with pytest.raises(refused):
                operation(**bad)
                pytest.fail(f"argument {i} of {operation} was taken")
    given = arguments_of_fwd(case, torch.float32, channels_last)
    for bad in ({"mean": None, "var": torch.ones(case.x[1])}, {"mean": torch.ones(case.x[1]), "var": None}):
        with pytest.raises(refused):
            op.fwd(**given | bad)
    saved = arguments_of_bwd(case, torch.float32, channels_last)
    for bad in ({"mean_dz": saved["mean"]}, {"mean_dz_xhat": saved["var"]}):
        with pytest.raises(refused):
            op.bwd(**saved | bad)
    x = given["input"]
    for bad in (x.flatten()[0], x[:, 0].flatten(), x.int(), x[:, :0]):
        with pytest.raises(refused):
            op.stats(bad)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [FULL, EVALUATION, ROWS, CASES[6]], ids=str)
def test_a_mask_that_is_nonsense_stays_in_bounds(case, channels_last):
    """Under the address sanitizer (make sanitize) this would be caught; here bits of padding must count for nothing."""
    arguments = arguments_of_bwd(case, torch.float32, channels_last)
    mask = torch.randint_like(arguments["mask"], 256)
    inner = case.x[1] if op.is_rows(arguments["input"]) else math.prod(case.x[2:])
    clean = mask.clone()
    if inner % 8:
        clean[:, -1] &= (1 << inner % 8) - 1
    for got, want in zip(op.bwd(**arguments | {"mask": mask}), op.bwd(**arguments | {"mask": clean})):
        assert torch.equal(got, want)
