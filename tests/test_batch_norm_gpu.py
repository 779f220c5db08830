"""batch_norm on a GPU: both algorithms against float64, and what only a device shows."""

import importlib

import pytest
import torch
from batch_norm_cases import CASES, Case, as_rows, double, draw, in_torch, run
from closeness import assert_close

import fastarch
from fastarch import extension
from fastarch.ops import batch_norm
from fastarch.routing import Route

op = importlib.import_module("fastarch.ops.batch_norm")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {"contiguous": False, "channels_last": True}
BLOCK = Case((8, 64, 28, 28), residual=True, relu=True)
SMALL = Case((5, 24, 7, 7), residual=True, relu=True)


def serves(algorithm: str, case: Case, channels_last: bool) -> bool:
    """The persistent kernels want rows, the batch's own statistics, and the extension built."""
    if algorithm == "two_pass":
        return True
    rows = op.is_rows(draw(case, torch.float32, channels_last)["input"])
    return extension.cuda is not None and case.training and rows


def served(cases):
    return [
        pytest.param(case, algorithm, channels_last, id=f"{algorithm}-{layout}-{case}")
        for case in cases
        for layout, channels_last in LAYOUTS.items()
        for algorithm in ("two_pass", "persistent")
        if serves(algorithm, case, channels_last)
    ]


@pytest.fixture
def algorithm_is(monkeypatch):
    """Routes every call to one algorithm."""
    return lambda algorithm: monkeypatch.setattr(op, "route", lambda *_: Route(algorithm, "for this test"))


def gradient(drawn, channels_last: bool):
    grad_output = torch.randn_like(drawn["input"])
    return as_rows(grad_output) if channels_last else grad_output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "algorithm", "channels_last"), served([*CASES, BLOCK]))
def test_values_and_gradients(case, algorithm, channels_last, dtype, algorithm_is):
    drawn = draw(case, dtype, channels_last, "cuda")
    grad_output = gradient(drawn, channels_last)
    eager = run(in_torch, drawn, grad_output, **case.options)
    truth = run(in_torch, double(drawn), grad_output.double(), **case.options)
    algorithm_is(algorithm)
    got = run(batch_norm, drawn, grad_output, **case.options)
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])
    assert got["y"].stride() == op.empty_output(drawn["input"]).stride()


@pytest.mark.parametrize(("case", "algorithm", "channels_last"), served([BLOCK, SMALL]))
def test_a_large_mean_does_not_cancel_the_variance(case, algorithm, channels_last, algorithm_is):
    drawn = draw(case, torch.float32, channels_last, "cuda")
    drawn["input"] = drawn["input"] + 1e4
    drawn["input"][0, :, :2, :2] = -1e4  # outliers come first
    algorithm_is(algorithm)
    got = run(batch_norm, drawn, momentum=1.0, **case.options)["running_var"]
    want = drawn["input"].double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "algorithm", "channels_last"), served([BLOCK, SMALL]))
def test_bits_do_not_depend_on_the_run(case, algorithm, channels_last, dtype, algorithm_is):
    drawn = draw(case, dtype, channels_last, "cuda")
    grad_output = gradient(drawn, channels_last)
    algorithm_is(algorithm)
    first = run(batch_norm, drawn, grad_output, **case.options)
    for _ in range(10):
        for name, t in run(batch_norm, drawn, grad_output, **case.options).items():
            assert torch.equal(t, first[name]), name


@pytest.mark.parametrize(("case", "algorithm", "channels_last"), served([BLOCK]))
def test_any_strides(case, algorithm, channels_last, algorithm_is):
    drawn = draw(case, torch.float32, channels_last, "cuda")
    grad_output = gradient(drawn, channels_last)
    algorithm_is(algorithm)
    want = run(batch_norm, drawn, grad_output, **case.options)
    sliced = torch.cat([grad_output, grad_output], -1)[..., ::2].copy_(grad_output)
    other = {"residual": as_rows(drawn["residual"]) if not channels_last else drawn["residual"].contiguous()}
    for got in (
        run(batch_norm, drawn, sliced, **case.options),
        run(batch_norm, drawn | other, grad_output, **case.options),
    ):
        for name, t in got.items():
            assert torch.equal(t, want[name]), name


@pytest.mark.parametrize("algorithm", ["two_pass", "persistent"])
@pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
def test_more_than_2_to_the_31_elements(algorithm, channels_last, algorithm_is):
    """Halves that are equal have the statistics of one, and come out equal."""
    shape = (2, 8, 11600, 11600)
    if not serves(algorithm, Case((2, 8, 4, 4)), channels_last):
        pytest.skip("not served")
    half = torch.randn(1, *shape[1:], dtype=torch.bfloat16, device="cuda")
    x = torch.cat([half, half])
    x = as_rows(x) if channels_last else x
    assert x.numel() > 2**31
    algorithm_is(algorithm)
    x.requires_grad_()
    y = batch_norm(x, None, None, training=True, activation="relu")
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(y[0], y[1]) and torch.equal(dx[0], dx[1])
    want = torch.nn.functional.batch_norm(half.float()[..., :64], *half.float().var_mean((0, 2, 3), correction=0)[::-1])
    torch.testing.assert_close(y[:1, ..., :64].float(), want.relu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("case", "algorithm", "channels_last"), served([BLOCK]))
def test_a_stream_that_is_not_the_default(case, algorithm, channels_last, algorithm_is):
    drawn = draw(case, torch.bfloat16, channels_last, "cuda")
    algorithm_is(algorithm)
    want = run(batch_norm, drawn, **case.options)["y"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = drawn | {"input": drawn["input"].clone()}
        y = run(batch_norm, late, **case.options)["y"]
    stream.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize(("case", "algorithm", "channels_last"), served([BLOCK]))
def test_cuda_graphs_replay(case, algorithm, channels_last, algorithm_is):
    drawn = draw(case, torch.bfloat16, channels_last, "cuda")
    algorithm_is(algorithm)
    step = lambda: run(batch_norm, drawn, drawn["residual"], **case.options)  # noqa: E731
    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for t in got.values():
        t.zero_()
    graph.replay()
    for name, t in got.items():
        assert torch.equal(t, want[name]), name


@pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS)
def test_compile(channels_last):
    torch._dynamo.reset()
    drawn = draw(BLOCK, torch.bfloat16, channels_last, "cuda")
    grad_output = gradient(drawn, channels_last)

    def function(**arguments):
        return batch_norm(**arguments) * 3

    results = [run(f, drawn, grad_output, **BLOCK.options) for f in (torch.compile(function, fullgraph=True), function)]
    for name, got in results[0].items():
        torch.testing.assert_close(got, results[1][name])


def test_a_residual_network_trains_as_torch():
    model = fastarch.models.resnet18(classes=10).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 96, 96, device="cuda").contiguous(memory_format=torch.channels_last)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    grads = []
    for context in (torch.enable_grad(), fastarch.reference()):
        model.load_state_dict(before)
        with context:
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            grads.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for got, want in zip(*grads):
        assert (got - want).norm() <= 5e-2 * want.norm()  # TF32, and ReLU's of elements near 0
