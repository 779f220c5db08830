"""batch_norm on CPUs: what PyTorch's users count on beside the values: compilation, memory, routes, errors."""

import importlib
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
    draw,
    in_torch,
    run,
)
from torch._dynamo.backends.common import aot_autograd

import fastarch
from fastarch import extension, routing
from fastarch.ops import batch_norm

op = importlib.import_module("fastarch.ops.batch_norm")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("input", "residual", "weight", "bias")

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


def named(name: str):
    return lambda message: f"{name}: {message}"


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


@pytest.mark.parametrize("momentum", [0, 0.1, 0.7, 1.0, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics_change_where_they_are(dtype, momentum):
    x = torch.randn(6, 5, 4, dtype=dtype)
    buffers = torch.rand(2, 5, 2, dtype=dtype)
    running, before = buffers.clone()[..., 1], buffers[..., 1]
    versions = [t._version for t in running]
    batch_norm(x, *running, training=True, momentum=momentum)
    batch = torch.stack([x.mean((0, 2)), x.var((0, 2))])
    torch.testing.assert_close(running, before.lerp(batch, torch.as_tensor(momentum).to(dtype)))
    assert all(t._version > version for t, version in zip(running, versions))
    assert torch.equal(running._base[..., 0], buffers[..., 0])
    with pytest.raises(RuntimeError):
        batch_norm(x, running[0, :1].expand(5), running[1], training=True, momentum=momentum)


def test_direct_calls_of_update_are_checked():
    running_mean, running_var, mean, var = torch.rand(4, 5)
    torch.library.opcheck(op.update, (running_mean, running_var, mean, var, 0.1, 1.25))
    for bad in (
        (running_mean[:4], running_var, mean, var),
        (running_mean, running_var.double(), mean, var),
        (running_mean, running_var, mean, var[:, None]),
        (running_mean.half(), running_var.half(), mean.half(), var.half()),
    ):
        with pytest.raises((ValueError, TypeError), match="batch_norm: want"):
            op.update(*bad, 0.1, 1.25)


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
    x = torch.empty(2, 5, 3, 3, dtype=dtype)
    x = as_rows(x) if layout == "channels_last" else x
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
