"""gru on a GPU: every algorithm against float64, and what only a device shows."""

import pytest
import torch
from gru_cases import CASES, Case, compare, draw, draw_gradients, op, run

import fastarch
from fastarch import extension
from fastarch.ops import gru
from fastarch.routing import Route

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALGORITHMS = ["cell", "pointwise", *(["persistent"] if extension.cuda is not None else [])]
WIDE = Case(20, 70, 96, 256, reverse=True, lengths=True)
ONE_STEP = Case(1, 64, 256, 512)
RESETS = [WIDE, WIDE._replace(reset_after=False)]

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture
def algorithm_is(monkeypatch):
    """Routes every call to one algorithm."""
    return lambda algorithm: monkeypatch.setattr(op, "route", lambda *_: Route(algorithm, "for this test"))


@pytest.fixture(autouse=True)
def exact_products(request):
    """Of float32, in ours and in torch's."""
    for settings in (torch.backends.cudnn.rnn, torch.backends.cuda.matmul):
        before = settings.fp32_precision
        request.addfinalizer(lambda settings=settings, before=before: setattr(settings, "fp32_precision", before))
        settings.fp32_precision = "ieee"


def on_gpu(case, dtype):
    return draw(case, dtype, "cuda"), draw_gradients(case, dtype, "cuda")


@every_algorithm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *RESETS, ONE_STEP], ids=str)
def test_values_and_gradients(case, dtype, algorithm, algorithm_is):
    algorithm_is(algorithm)
    compare(gru, case, dtype, "cuda")


@every_algorithm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RESETS, ids=str)
def test_bits_do_not_depend_on_the_run(case, dtype, algorithm, algorithm_is):
    drawn, gradients = on_gpu(case, dtype)
    algorithm_is(algorithm)
    first = run(gru, drawn, gradients, **case.options)
    for _ in range(10):
        for name, t in run(gru, drawn, gradients, **case.options).items():
            assert torch.equal(t, first[name]), name


@every_algorithm
def test_tf32_rounds_no_more_than_its_operands(algorithm, algorithm_is):
    drawn, gradients = on_gpu(WIDE, torch.float32)
    algorithm_is(algorithm)
    exact = run(gru, drawn, gradients, **WIDE.options)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    for name, t in run(gru, drawn, gradients, **WIDE.options).items():
        assert (t - exact[name]).norm() <= 5e-3 * exact[name].norm(), name


@every_algorithm
@pytest.mark.parametrize("case", [*RESETS, ONE_STEP], ids=str)
def test_any_strides(case, algorithm, algorithm_is):
    drawn, gradients = on_gpu(case, torch.float32)
    algorithm_is(algorithm)
    want = run(gru, drawn, gradients, **case.options)
    strided = {name: t.mT.contiguous().mT if name == "input" else t for name, t in drawn.items()}
    sliced = [torch.stack((g, g), -1)[..., 0] for g in gradients]
    for name, t in run(gru, strided, sliced, **case.options).items():
        torch.testing.assert_close(t, want[name], rtol=1e-4, atol=1e-4)


@every_algorithm
@pytest.mark.parametrize("case", RESETS, ids=str)
def test_padding_counts_for_nothing(case, algorithm, algorithm_is):
    drawn, (dy, dh_n) = on_gpu(case, torch.bfloat16)
    algorithm_is(algorithm)
    want = run(gru, drawn, (dy, dh_n), **case.options)
    dead = torch.arange(case.T, device="cuda")[:, None] >= drawn["lengths"]
    drawn["input"][dead] = dy[dead] = torch.nan
    for name, t in run(gru, drawn, (dy, dh_n), **case.options).items():
        assert torch.equal(t, want[name]), name


@every_algorithm
def test_more_than_2_to_the_31_elements(algorithm, algorithm_is):
    """Of the gates. The last step of a long sequence is a single step from the output before it."""
    case = Case(2100, 1024, 8, 256)
    assert case.T * case.N * 4 * case.H > 2**31
    drawn, (dy, _) = on_gpu(case, torch.bfloat16)
    algorithm_is(algorithm)
    input = drawn["input"].requires_grad_()
    output, h_n = gru(**drawn)
    last = drawn | {"input": input.detach()[-1:], "h0": output.detach()[-2]}
    torch.testing.assert_close(h_n, gru(**last)[1], rtol=2e-2, atol=2e-2)
    (dx,) = torch.autograd.grad(output, input, dy)
    leaf = last["input"].requires_grad_()
    (want,) = torch.autograd.grad(gru(**last)[0], leaf, dy[-1:])
    torch.testing.assert_close(dx[-1:], want, rtol=5e-2, atol=5e-2)


@every_algorithm
def test_a_stream_that_is_not_the_default(algorithm, algorithm_is):
    drawn, _ = on_gpu(WIDE, torch.bfloat16)
    algorithm_is(algorithm)
    want = run(gru, drawn, **WIDE.options)["output"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = drawn | {"input": drawn["input"].clone()}
        output = run(gru, late, **WIDE.options)["output"]
    stream.synchronize()
    assert torch.equal(output, want)


@every_algorithm
@pytest.mark.parametrize("case", [*RESETS, ONE_STEP], ids=str)
def test_cuda_graphs_replay(case, algorithm, algorithm_is):
    drawn, gradients = on_gpu(case, torch.bfloat16)
    algorithm_is(algorithm)
    step = lambda: run(gru, drawn, gradients, **case.options)  # noqa: E731
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


@pytest.mark.parametrize("case", [*RESETS, ONE_STEP], ids=str)
def test_nothing_waits_for_the_device(case):
    drawn, gradients = on_gpu(case, torch.bfloat16)
    run(gru, drawn, gradients, **case.options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(gru, drawn, gradients, **case.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_layer_trains_as_torch():
    ours = fastarch.nn.GRU(40, 192, 2, bidirectional=True).cuda()
    torchs = torch.nn.GRU(40, 192, 2, bidirectional=True).cuda()
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(30, 16, 40, device="cuda")
    for layer in (ours, torchs):
        layer(x)[0].square().sum().backward()
    for got, want in zip(ours.parameters(), torchs.parameters()):
        assert (got.grad - want.grad).norm() <= 1e-4 * want.grad.norm()
