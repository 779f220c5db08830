"""conv_relu_pool on CPUs: values, gradients, every algorithm, and PyTorch's contract."""

import importlib

import pytest
import torch
from closeness import assert_close
from conv_relu_pool_cases import CASES, Case, double, draw, geometry_of, plan_of, reference_of, run
from torch.nn import functional as F

import fastarch
from fastarch import extension, routing
from fastarch.ops import conv_relu_pool

op = importlib.import_module("fastarch.ops.conv_relu_pool")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALGORITHMS = ["direct", "winograd", "polyphase", "library"]
LENET = Case((2, 6, 14, 14), (16, 6, 5, 5), {})
VGG = Case((2, 9, 10, 12), (20, 9, 3, 3), {"padding": 1})

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


def named(name: str):
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, channels_last):
    tensors = draw(case, dtype, channels_last)
    reference = reference_of(geometry_of(case))
    grad_output = torch.randn_like(reference(*tensors))
    got = run(lambda x, w, b: conv_relu_pool(x, w, b, **case.options), tensors, grad_output)
    eager = run(reference, tensors, grad_output)
    truth = run(reference, double(tensors), grad_output.double())
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])
    assert got["y"].stride() == torch.empty_like(got["y"], memory_format=op.memory_format(tensors[0])).stride()


def serves(algorithm: str, case: Case, geometry: op.Geometry) -> bool:
    (_, _, R, S), (stride_h, stride_w) = case.w, geometry.stride
    undilated = geometry.dilation == (1, 1)
    if algorithm == "winograd":
        return undilated and (R, S, stride_h, stride_w) == (3, 3, 1, 1) and geometry.tiles_are_windows()
    return algorithm != "polyphase" or (undilated and R <= 4 * stride_h and S <= 4 * stride_w)


def served() -> list[tuple[Case, str]]:
    """Every case with every algorithm that can serve it."""
    pairs = []
    for case in CASES:
        geometry = geometry_of(case)
        pairs += [pytest.param(case, a, id=f"{a}-{case}") for a in ALGORITHMS if serves(a, case, geometry)]
    return pairs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("case", "algorithm"), served())
def test_integers_are_exact(case, algorithm, layout):
    """On small integers every sum is exact, so results are equal to the last bit; ties are frequent."""
    x, _, b = (None if t is None else (2 * t).round() for t in draw(case, torch.float32))
    # 81: the filter transform for four taps divides by 4.5 and 9, twice; 12: averages divide by 2, 3, 4 and 6
    w, b = 81 * torch.randint(-2, 3, case.w).float(), None if b is None else 81 * b
    w = w.contiguous(memory_format=layout)
    geometry = geometry_of(case)
    y, index = op.fwd(x, 12 * w, None if b is None else 12 * b, *geometry, algorithm, True)
    want = reference_of(geometry)(x, 12 * w, None if b is None else 12 * b)
    assert torch.equal(y, want)
    grad_output = 12 * torch.randint_like(y, -2, 3)
    got = dict(zip(("dx", "dw", "db"), op.bwd(grad_output, x, w, index, *geometry, algorithm, [True] * 3)))
    assert op.memory_format(got["dw"]) is op.memory_format(w)
    want = run(reference_of(geometry), (x, w, b), grad_output)
    for name in got.keys() & want.keys():
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=named(name))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "algorithm"), served())
def test_algorithms(case, algorithm, dtype, channels_last):
    tensors = draw(case, dtype, channels_last)
    geometry = geometry_of(case)
    reference, truth = reference_of(geometry), reference_of(geometry)(*double(tensors))
    y, index = op.fwd(*tensors, *geometry, algorithm, True)
    own = draw(case, dtype, channels_last or algorithm == "library")  # that of the library's own layout
    exact = algorithm != "polyphase" or plan_of(case, tensors[0].dtype).route.kernel == algorithm
    if exact:  # where polyphase saves nothing it is never chosen, and may sum more terms than torch
        assert_close(
            "y", y, reference(tensors[0].contiguous(memory_format=op.memory_format(own[0])), *tensors[1:]), truth
        )
    assert torch.equal(op.fwd(*tensors, *geometry, algorithm, False)[0], y), (
        "the output depends on whether index is saved"
    )
    assert index.stride() == y.stride()


def test_index_counts_windows_from_their_own_corner():
    x = torch.tensor([[[[-1.0, 5.0, 2.0], [7.0, 7.0, -3.0], [-4.0, -5.0, -6.0]]]])
    w = torch.ones(1, 1, 1, 1)
    for algorithm in ALGORITHMS:
        if algorithm == "winograd":
            continue
        geometry = geometry_of(Case(x.shape, w.shape, {"pool_padding": 1}))
        y, index = op.fwd(x, w, None, *geometry, algorithm, True)
        assert y.flatten().tolist() == [0, 5, 7, 7], algorithm  # windows of 1, 2, 2 and 4 elements
        assert index.flatten().tolist() == [255, 2, 1, 0], algorithm


def test_nan_ties_and_infinities():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 1], x[0, 0, 2, 0], x[0, 0, 3, 3] = float("nan"), float("inf"), -float("inf")
    x.requires_grad_()
    w, b = torch.ones(1, 1, 1, 1), torch.tensor([1.0])
    y = conv_relu_pool(x, w, b)
    want = F.max_pool2d((x + 1).relu(), 2)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    grads = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_in_its_patch(value):
    x, w = torch.randn(1, 3, 12, 12, requires_grad=True), torch.randn(4, 3, 3, 3)
    y = conv_relu_pool(x, w, torch.full((4,), 9.0))
    grad_output = torch.zeros_like(y)
    grad_output[0, 1, 2, 3] = value
    (dx,) = torch.autograd.grad(y, x, grad_output)
    (want,) = torch.autograd.grad(
        op.reference(x, w, torch.full((4,), 9.0), *geometry_of(Case(x.shape, w.shape, {}))), x, grad_output
    )
    assert torch.equal(dx.isfinite(), want.isfinite())


def strided(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    padded = torch.full((t.shape[0] + 1, t.shape[1] + 2, t.shape[2] + 3, 2 * t.shape[3]), 99.0, dtype=t.dtype)
    sliced = padded[1:, 1:-1, 2:-1, ::2]
    sliced.copy_(t)
    return {
        "sliced": sliced,
        "transposed": t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "sliced channels_last": torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    }


@pytest.mark.parametrize("case", [LENET, VGG, CASES[11]], ids=str)
def test_any_strides(case):
    x, w, b = draw(case, torch.float32)
    y = conv_relu_pool(x, w, b, **case.options)
    grad_output = torch.randn_like(y)
    want = run(lambda *t: conv_relu_pool(*t, **case.options), (x, w, b), grad_output)
    for name, variant in strided(x).items():
        got = run(lambda *t: conv_relu_pool(*t, **case.options), (variant, w, b), grad_output)
        for key in want:
            torch.testing.assert_close(got[key], want[key], msg=named(f"input {name}, {key}"))
    for name, variant in strided(grad_output).items():
        got = run(lambda *t: conv_relu_pool(*t, **case.options), (x, w, b), variant)
        for key in want:
            assert torch.equal(got[key], want[key]), f"grad_output {name}, {key}"
    expanded = torch.ones(()).expand_as(y)
    got, want = (
        run(lambda *t: conv_relu_pool(*t, **case.options), (x, w, b), g) for g in (expanded, expanded.contiguous())
    )
    for key in want:
        assert torch.equal(got[key], want[key]), f"expanded grad_output, {key}"


@pytest.mark.parametrize("case", [LENET, VGG, CASES[10], CASES[13]], ids=str)
def test_bits_do_not_depend_on_run_or_threads(case, threads):
    x, w, b = draw(case._replace(x=(9, *case.x[1:])), torch.float32)
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        y = conv_relu_pool(x, w, b, **case.options)
        results.append(run(lambda *t: conv_relu_pool(*t, **case.options), (x, w, b), torch.ones_like(y)))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_unbatched_and_named_padding():
    x, w = torch.randn(3, 13, 12), torch.randn(5, 3, 4, 3)
    for padding in ("same", "valid"):
        y = conv_relu_pool(x, w, padding=padding)
        torch.testing.assert_close(y, F.max_pool2d(F.conv2d(x, w, padding=padding).relu(), 2))


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_that_are_asked_for(needed):
    tensors = [t.requires_grad_(need) for t, need in zip(draw(VGG, torch.float32), needed)]
    conv_relu_pool(*tensors, padding=1).sum().backward()
    assert [t.grad is not None for t in tensors] == list(needed)


def test_gradcheck():
    for case in (LENET._replace(x=(1, 2, 7, 8), w=(3, 2, 3, 3)), CASES[12]._replace(x=(1, 2, 9, 8), w=(3, 2, 5, 5))):
        tensors = [t.requires_grad_() for t in draw(case, torch.float64)]
        function = lambda *t: conv_relu_pool(*t, **case.options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


def test_second_derivative_is_not_lost():
    x, w, b = (t.requires_grad_() for t in draw(VGG, torch.float64))
    seconds = []
    for function in (
        lambda: conv_relu_pool(x, w, b, padding=1),
        lambda: F.max_pool2d(F.conv2d(x, w, b, padding=1).relu(), 2),
    ):
        (dx,) = torch.autograd.grad(function().square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(dx.square().sum(), w)[0])
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("save_index", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(save_index, channels_last):
    for case in (LENET, VGG, CASES[11]):
        x, w, b = draw(case, torch.float32, channels_last)
        w = w.contiguous(memory_format=torch.channels_last) if channels_last else w
        geometry = geometry_of(case)
        algorithm = plan_of(case).route.kernel
        torch.library.opcheck(op.fwd, (x, w, b, *geometry, algorithm, save_index))
        y, index = op.fwd(x, w, b, *geometry, algorithm, True)
        for mask in ([True, True, True], [save_index, True, False]):
            torch.library.opcheck(op.bwd, (torch.randn_like(y), x, w, index, *geometry, algorithm, mask))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_with_dynamic_shapes(channels_last):
    torch._dynamo.reset()
    w, b = torch.randn(20, 9, 3, 3, requires_grad=True), torch.randn(20, requires_grad=True)

    def function(x):
        return conv_relu_pool(x * 2, w, b, padding=1) * 3

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((4, 9, 10, 12), (5, 9, 14, 16), (7, 9, 8, 22)):
            x = torch.randn(size)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            for got, want in zip(*((y := f(x), *torch.autograd.grad(y.sum(), (w, b))) for f in (compiled, function))):
                torch.testing.assert_close(got, want)


def test_export_keeps_the_operation():
    model = fastarch.nn.ConvReLUPool2d(3, 8, 3, padding=1)
    x = torch.randn(4, 3, 12, 12)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert any("fastarch.conv_relu_pool_fwd" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(1, 3, 12, 12)
    torch.testing.assert_close(program.module()(x), model(x))


def test_autocast():
    x, w, b = (t.requires_grad_() for t in draw(VGG, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_relu_pool(x, w, b, padding=1)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(y, conv_relu_pool(x.bfloat16(), w.bfloat16(), b.bfloat16(), padding=1))


def test_transforms_go_through_the_reference():
    x, w, b = draw(VGG, torch.float64)
    f = lambda x, w: conv_relu_pool(x, w, b, padding=1).square().sum()  # noqa: E731
    want = torch.autograd.grad(f(x, w.requires_grad_()), w)[0]
    torch.testing.assert_close(torch.func.grad(f, 1)(x, w.detach()), want)
    each = torch.func.vmap(lambda x: conv_relu_pool(x, w.detach(), b, padding=1))(x.unsqueeze(1))
    torch.testing.assert_close(each.squeeze(1), conv_relu_pool(x, w.detach(), b, padding=1))
    _, tangent = torch.func.jvp(lambda w: f(x, w), (w.detach(),), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, want.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w.detach(), torch.ones_like(w))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(x, dual)).tangent, want.sum())


def test_saved_memory():
    x, w, b = (t.requires_grad_() for t in draw(VGG, torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = conv_relu_pool(x, w, b, padding=1)
    assert sum(t.nbytes for t in saved) == x.nbytes + w.nbytes + b.nbytes + y.numel()


def test_reference_context_and_routes():
    x, w, b = draw(LENET, torch.float32)
    with routing.recording() as calls:
        conv_relu_pool(x, w, b)
        with fastarch.reference():
            conv_relu_pool(x, w, b)
        conv_relu_pool(x.to(torch.complex64).real, w, b, pool="avg", pool_size=3)
    assert [call.backend for call in calls] == [f"cpu-{extension.isa} direct", "reference", "reference"]
    assert calls[1].reason == "inside fastarch.reference()"
    assert "pool window" in calls[2].reason
    assert calls[0].shapes == {"input": (2, 6, 14, 14), "weight": (16, 6, 5, 5)}


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (LENET, "direct"),
        (VGG._replace(x=(4, 9, 10, 12)), "winograd"),
        (VGG._replace(options={"padding": 1, "pool_size": 3, "pool_stride": 2}), "polyphase"),
        (CASES[10], "polyphase"),
        (Case((1, 16, 8, 8), (16, 1, 3, 3), {"groups": 16}), "library"),
        (Case((1, 200, 8, 8), (16, 200, 3, 3), {"dilation": 2}), "library"),
        (Case((1, 512, 6, 6), (8, 512, 3, 3), {}), "winograd"),
        (Case((1, 512, 9, 9), (8, 512, 3, 3), {"stride": 2}), "direct"),
        (Case((1, 512, 4, 4), (32, 512, 1, 1), {}), "library"),
        (Case((1, 512, 5, 5), (32, 512, 1, 1), {}), "direct"),
        (Case((1, 512, 8, 8), (32, 512, 1, 1), {"stride": 2}), "direct"),
        (Case((1, 2, 3000, 3000), (1, 2, 3, 3), {"dilation": 1000}), "reference"),
    ],
    ids=str,
)
def test_route(case, algorithm):
    assert plan_of(case).route.kernel == algorithm


@pytest.mark.parametrize(
    ("case", "dtype", "algorithm"),
    [
        (Case((8, 3, 224, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}), torch.bfloat16, "direct"),
        (Case((8, 3, 224, 224), (64, 3, 7, 7), {"dilation": 20}), torch.bfloat16, "implicit_gemm"),
        (Case((8, 64, 224, 224), (64, 64, 3, 3), {"padding": 1}), torch.bfloat16, "implicit_gemm"),
        (Case((8, 256, 56, 56), (256, 256, 3, 3), {"padding": 1}), torch.bfloat16, "library"),
        (Case((8, 64, 14, 14), (64, 1, 3, 3), {"groups": 64}), torch.float16, "library"),
        (Case((8, 64, 14, 14), (64, 64, 3, 3), {}), torch.float32, "library"),
        (Case((8, 64, 14, 14), (64, 64, 3, 3), {}), torch.float64, "reference"),
    ],
    ids=str,
)
def test_route_on_gpus(case, dtype, algorithm, monkeypatch):
    monkeypatch.setattr(extension, "cuda", extension)  # as if it were built
    assert plan_of(case, dtype, "cuda").route.kernel == algorithm


BAD = [
    (TypeError, "want weight as a tensor, got list", lambda x, w, b: conv_relu_pool(x, [1.0], b)),
    (
        TypeError,
        "input is torch.float32 on cpu, weight is torch.float64 on cpu",
        lambda x, w, b: conv_relu_pool(x, w.double(), b),
    ),
    (TypeError, "bias is torch.float32 on meta", lambda x, w, b: conv_relu_pool(x, w, b.to("meta"))),
    (ValueError, r"want input \[N, C, H, W\] or \[C, H, W\]", lambda x, w, b: conv_relu_pool(x[0, 0], w, b)),
    (ValueError, r"for input \[2, 9, 10, 12\], got \[20, 8, 3, 3\]", lambda x, w, b: conv_relu_pool(x, w[:, :8], b)),
    (ValueError, r"want bias \[20\], got \[19\]", lambda x, w, b: conv_relu_pool(x, w, b[:19])),
    (ValueError, "want groups >= 1, got 0", lambda x, w, b: conv_relu_pool(x, w, b, groups=0)),
    (ValueError, "K a multiple of groups = 3", lambda x, w, b: conv_relu_pool(x, w[:, :3], b, groups=3)),
    (ValueError, "want stride as one or two integers >= 1, got 0", lambda x, w, b: conv_relu_pool(x, w, b, stride=0)),
    (
        ValueError,
        r"want padding as one or two integers >= 0, got \(1, -1\)",
        lambda x, w, b: conv_relu_pool(x, w, b, padding=(1, -1)),
    ),
    (ValueError, "want stride 1 for padding 'same'", lambda x, w, b: conv_relu_pool(x, w, b, padding="same", stride=2)),
    (ValueError, "want padding as", lambda x, w, b: conv_relu_pool(x, w, b, padding="full")),
    (
        ValueError,
        "want stride as one or two integers >= 1, got 1.0",  # though 1 and 1.0 are one key of a dictionary
        lambda x, w, b: (conv_relu_pool(x, w, b, stride=1), conv_relu_pool(x, w, b, stride=1.0)),
    ),
    (ValueError, "want dilation as", lambda x, w, b: conv_relu_pool(x, w, b, dilation=(1, 2, 3))),
    (ValueError, "want pool 'max', 'avg' or None, got 'min'", lambda x, w, b: conv_relu_pool(x, w, b, pool="min")),
    (
        ValueError,
        r"at most half of pool_size \(2, 2\), got \(2, 2\)",
        lambda x, w, b: conv_relu_pool(x, w, b, pool_padding=2),
    ),
    (ValueError, "got a convolution of", lambda x, w, b: conv_relu_pool(x[:, :, :2], w, b)),
    (ValueError, "and an output of", lambda x, w, b: conv_relu_pool(x, w, b, pool_size=20)),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_errors_say_what_was_wanted_and_what_came(error, message, call):
    with pytest.raises(error, match=f"conv_relu_pool: .*{message}"):
        call(*draw(VGG, torch.float32))


def test_direct_calls_of_the_operation_are_checked():
    x, w, b = draw(VGG, torch.float32)
    geometry = geometry_of(VGG)
    y, index = op.fwd(x, w, b, *geometry, "direct", True)
    bad_geometry = [
        geometry._replace(**change)
        for change in (
            {"stride": (0, 1)},
            {"padding": (-1, 0)},
            {"dilation": (1, 0)},
            {"groups": 0},
            {"groups": 2},
            {"pool": "min"},
            {"pool_size": (16, 16)},
            {"pool_padding": (2, 0)},
            {"pool": "avg", "pool_size": (3, 3)},
            {"pool_stride": (1,)},
        )
    ]
    for bad in bad_geometry:
        with pytest.raises((ValueError, RuntimeError)):
            op.fwd(x, w, b, *bad, "direct", True)
        with pytest.raises((ValueError, RuntimeError)):
            op.bwd(y, x, w, index, *bad, "direct", [True] * 3)
    for tensors in (
        (x[0], w, b),
        (x, w[:, :4], b),
        (x, w, b[:3]),
        (x, w.double(), b),
        (x, w, b.double()),
        (x[..., :1, :], w, b),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            op.fwd(*tensors, *geometry, "direct", True)
    for tensors in ((y[:1], x, w, index), (y, x, w, index[..., :2]), (y, x, w, index.int()), (y.double(), x, w, index)):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            op.bwd(*tensors, *geometry, "direct", [True] * 3)
    for algorithm in ("winograd", "nonsense"):
        with pytest.raises(ValueError, match="conv_relu_pool: "):
            op.fwd(x, w, b, *geometry._replace(pool_size=(3, 3)), algorithm, True)
    with pytest.raises(ValueError, match="polyphase wants"):
        op.fwd(x, torch.randn(20, 9, 5, 3), b, *geometry, "polyphase", True)


def test_an_index_that_is_nonsense_stays_in_bounds():
    """Under the address sanitizer (make sanitize) this would be caught; here it must at least not crash."""
    for case in (VGG, CASES[11], CASES[12]):
        x, w, b = draw(case, torch.float32)
        geometry = geometry_of(case)
        y, index = op.fwd(x, w, b, *geometry, "direct", True)
        op.bwd(torch.randn_like(y), x, w, torch.randint_like(index, 256), *geometry, "direct", [True] * 3)
