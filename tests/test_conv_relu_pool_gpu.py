"""conv_relu_pool on a GPU: every algorithm against float64, and what only a device shows."""

import importlib

import pytest
import torch
from closeness import assert_close
from conv_relu_pool_cases import CASES, Case, double, draw, geometry_of, reference_of, run

import fastarch
from fastarch import extension
from fastarch.ops import conv_relu_pool

op = importlib.import_module("fastarch.ops.conv_relu_pool")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ALGORITHMS = ["implicit_gemm", "library", "direct"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENET = Case((2, 6, 14, 14), (16, 6, 5, 5), {})
VGG = Case((3, 32, 14, 12), (80, 32, 3, 3), {"padding": 1})
STEM = Case(
    (2, 3, 40, 37), (20, 3, 7, 7), {"stride": 2, "padding": 3, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}
)


@pytest.fixture(autouse=True)
def float32_products():
    """Tests may set their precision."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def serves(algorithm: str, case: Case) -> bool:
    """The direct kernels want few input channels, one group, and the extension built."""
    if algorithm != "direct":
        return True
    return extension.cuda is not None and case.options.get("groups", 1) == 1 and case.w[1] <= 4


SERVED = [pytest.param(case, a, id=f"{a}-{case}") for case in CASES for a in ALGORITHMS if serves(a, case)]
SOME = [pytest.param(case, a, id=f"{a}-{case}") for case in (LENET, VGG, STEM) for a in ALGORITHMS if serves(a, case)]


def with_algorithm(case: Case, algorithm: str):
    geometry = geometry_of(case)
    return lambda x, w, b: op.run(x, w, b, geometry, algorithm)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "algorithm"), SERVED)
def test_values_and_gradients(case, algorithm, dtype, channels_last):
    torch.backends.cudnn.allow_tf32 = False
    tensors = draw(case, dtype, channels_last, "cuda")
    reference = reference_of(geometry_of(case))
    grad_output = torch.randn_like(reference(*tensors))
    got = run(with_algorithm(case, algorithm), tensors, grad_output)
    eager = run(reference, tensors, grad_output)
    truth = run(reference, double(tensors), grad_output.double())
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])
    assert got["y"].stride() == torch.empty_like(got["y"], memory_format=op.memory_format(tensors[0])).stride()


@pytest.mark.parametrize(("case", "algorithm"), SERVED)
def test_tf32(case, algorithm):
    """Operands of 11 bits: measured against that, for cuDNN computes small shapes in full float32 all the same.

    Gradients are a matter of test_integers_are_exact: which of two nearly equal elements is a window's maximum depends
    on rounding, and moves a whole gradient.
    """
    torch.backends.cudnn.allow_tf32 = True
    tensors = draw(case, torch.float32, True, "cuda")
    got = with_algorithm(case, algorithm)(*tensors)
    truth = reference_of(geometry_of(case))(*double(tensors))
    assert (got - truth).norm() <= 2**-10 * truth.norm() + 1e-30


@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)],
    ids=str,
)
@pytest.mark.parametrize(("case", "algorithm"), SERVED)
def test_integers_are_exact(case, algorithm, dtype, tf32):
    """On small integers every sum is exact, in TF32 too; ties are frequent."""
    torch.backends.cudnn.allow_tf32 = tf32
    x, w, b = (None if t is None else torch.randint_like(t, -2, 3) for t in draw(case, dtype, True, "cuda"))
    if case.options.get("pool") == "avg":  # averages divide by up to 6
        x, w, b = x, 6 * w, None if b is None else 6 * b
    reference = reference_of(geometry_of(case))
    want = reference(*double((x, w, b)))
    grad_output = torch.randint_like(want, -2, 3) * (6 if case.options.get("pool") == "avg" else 1)
    got = run(with_algorithm(case, algorithm), (x, w, b), grad_output.to(dtype))
    for name, t in run(reference, double((x, w, b)), grad_output).items():
        assert torch.equal(got[name], t.to(dtype)), name


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("case", "algorithm"), SOME)
def test_any_strides(case, algorithm, channels_last):
    x, w, b = draw(case, torch.float32, channels_last, "cuda")
    function = with_algorithm(case, algorithm)
    y = function(x, w, b)
    grad_output = torch.randn_like(y)
    want = run(function, (x, w, b), grad_output)
    sliced = torch.cat([x, x], -1)[..., ::2].copy_(x)
    for name, t in run(function, (sliced, w, b), grad_output).items():
        torch.testing.assert_close(t, want[name], msg=lambda m, n=name: f"sliced input, {n}: {m}")
    other = torch.cat([grad_output, grad_output], -1)[..., ::2].copy_(grad_output)
    expanded = torch.ones((), device="cuda").expand_as(y)
    for g, plain in ((other, grad_output), (expanded, torch.ones_like(y))):
        want = run(function, (x, w, b), plain)
        for name, t in run(function, (x, w, b), g).items():
            assert torch.equal(t, want[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "algorithm"), SOME)
def test_bits_do_not_depend_on_the_run(case, algorithm, dtype):
    tensors = draw(case._replace(x=(64, *case.x[1:])), dtype, True, "cuda")
    function = with_algorithm(case, algorithm)
    grad_output = torch.randn_like(function(*tensors))
    first = run(function, tensors, grad_output)
    for _ in range(5):
        for name, t in run(function, tensors, grad_output).items():
            assert torch.equal(t, first[name]), name


@pytest.mark.parametrize(("case", "algorithm"), SOME)
def test_nan_stays_in_its_patch(case, algorithm):
    x, w, b = draw(case, torch.float32, True, "cuda")
    x[1, 0, 5, 5] = float("nan")
    got = with_algorithm(case, algorithm)(x, w, b)
    assert torch.equal(got.isnan(), reference_of(geometry_of(case))(x, w, b).isnan())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_than_2_to_the_31_elements(algorithm):
    """Images beyond the reach of 32-bit offsets come out as they do alone."""
    if algorithm == "direct" and extension.cuda is None:
        pytest.skip("fastarch._cuda is not built")
    N, C, H = 3, 4, 15000
    case = Case((N, C, H, H), (4, C, 3, 3), {"padding": 1})
    options = {"dtype": torch.bfloat16, "device": "cuda"}  # of integers: no result depends on the order of its sum
    x = torch.randint(-2, 3, (N, H, H, C), **options).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    w, b = torch.randint(-2, 3, case.w, **options), torch.randint(-2, 3, (4,), **options)
    grad_output = torch.randint(-2, 3, (N, 4, H // 2, H // 2), **options)
    whole = run(with_algorithm(case, algorithm), (x, w, b), grad_output)
    last = run(with_algorithm(case, algorithm), (x[-1:], w, b), grad_output[-1:])
    for name in ("y", "dx"):
        assert torch.equal(whole[name][-1:], last[name]), name


def test_a_stream_that_is_not_the_default():
    x, w, b = draw(VGG, torch.bfloat16, True, "cuda")
    want = conv_relu_pool(x, w, b, padding=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x.clone()
        y = conv_relu_pool(late, w, b, padding=1)
    stream.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_cuda_graphs_replay(algorithm):
    tensors = draw(STEM, torch.bfloat16, True, "cuda")
    if not serves(algorithm, STEM):
        pytest.skip("fastarch._cuda is not built")
    function = with_algorithm(STEM, algorithm)
    want = function(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(*tensors)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)


@pytest.mark.parametrize("case", [LENET, VGG, STEM], ids=str)
def test_compile(case):
    torch._dynamo.reset()
    tensors = [t.requires_grad_() for t in draw(case, torch.bfloat16, True, "cuda")]

    def function(x, w, b):
        return conv_relu_pool(x * 2, w, b, **case.options) * 3

    results = [
        (y := f(*tensors), *torch.autograd.grad(y.sum(), tensors))
        for f in (torch.compile(function, fullgraph=True), function)
    ]
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_autocast():
    x, w, b = (t.requires_grad_() for t in draw(VGG, torch.float32, True, "cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        y = conv_relu_pool(x, w, b, padding=1)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_models_train_as_torch():
    model = fastarch.models.vgg11(classes=10).cuda().to(memory_format=torch.channels_last)
    model.eval()  # without dropout
    x = torch.randn(2, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    grads = []
    for context in (torch.enable_grad(), fastarch.reference()):
        with context:
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            grads.append([y.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(*grads):
        assert (got - want).norm() <= 2e-2 * want.norm()  # TF32
