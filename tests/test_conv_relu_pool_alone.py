"""conv_relu_pool without ReLU and pool, a convolution alone, and the layer Conv2d on it."""

import copy
import importlib
import pickle

import pytest
import torch
from closeness import assert_close
from conv_relu_pool_cases import Case, double, draw, geometry_of, plan_of, reference_of, run
from torch import nn
from torch.nn import functional as F

import fastarch
from fastarch import extension, routing
from fastarch.models.resnet import Projection
from fastarch.ops import conv_relu_pool

op = importlib.import_module("fastarch.ops.conv_relu_pool")

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)

ALONE = {"pool": None, "activation": None}
CASES = [
    Case((2, 9, 10, 13), (20, 9, 3, 3), {"padding": 1, **ALONE}),
    Case((2, 8, 3, 3), (40, 8, 3, 3), ALONE, bias=False),  # one output of a tile
    Case((3, 70, 9, 7), (67, 70, 3, 3), {"padding": (0, 2), **ALONE}),  # parts of channels that are not whole
    Case((2, 130, 14, 14), (65, 130, 3, 3), {"padding": 1, **ALONE}),
    Case((9, 16, 17, 15), (16, 16, 3, 3), {"padding": 3, **ALONE}, bias=False),  # padding that sees no input
    Case((1, 24, 40, 40), (8, 24, 3, 3), {"padding": "same", **ALONE}),
    Case((0, 8, 8, 8), (4, 8, 3, 3), ALONE),  # an empty batch
]
SMALL = Case((2, 8, 4, 5), (3, 8, 3, 3), {"padding": 1, **ALONE})
OTHERS = [
    Case((2, 3, 9, 8), (5, 3, 3, 3), {"padding": 1, **ALONE}),
    Case((2, 8, 9, 8), (6, 4, 3, 3), {"groups": 2, **ALONE}),
    Case((2, 8, 9, 8), (6, 8, 3, 3), {"stride": 2, **ALONE}),
    Case((2, 8, 9, 8), (6, 8, 1, 1), ALONE),
    Case((2, 8, 9, 8), (6, 8, 2, 2), {"padding": "same", **ALONE}),
]


def alone(case: Case):
    return lambda x, w, b: conv_relu_pool(x, w, b, **case.options)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, channels_last, activation):
    """With ReLU too: where nothing is pooled its backward is the same, of the gradient that ReLU lets through."""
    case = case._replace(options=case.options | {"activation": activation})
    assert plan_of(case, dtype).route.kernel == "winograd"
    tensors, reference = draw(case, dtype, channels_last), reference_of(geometry_of(case), activation == "relu")
    grad_output = torch.randn_like(reference(*tensors))
    got, eager = (run(f, tensors, grad_output) for f in (alone(case), reference))
    truth = run(reference, double(tensors), grad_output.double())
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])
    assert got["y"].stride() == torch.empty_like(got["y"], memory_format=op.memory_format(tensors[0])).stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_exact_on_integers(case, dtype, layout):
    """Small enough for 16 bits: every product and sum of the transforms is a multiple of a quarter below 64."""

    def few(shape, count: int, value: float) -> torch.Tensor:
        """Zeros but for about `count`, so that no sum is large."""
        t = torch.zeros(shape, dtype=dtype)
        t.view(-1)[:: 1 + t.numel() // count] = value
        return t.contiguous(memory_format=layout)

    x, w = few(case.x, 5, 1), few(case.w, 40, 2)
    b, geometry = torch.ones(case.w[0], dtype=dtype), geometry_of(case)
    y, index = op.fwd(x, w, b, *geometry, "winograd", False, None, None, False)
    assert index.numel() == 0
    grad_output = few(y.shape, 7, 2)
    got = dict(zip(("dx", "dw", "db"), op.bwd(grad_output, x, w, index, *geometry, "winograd", [True] * 3)))
    want = run(reference_of(geometry, False), double((x, w, b)), grad_output.double())
    for name, result in {"y": y, **got}.items():
        assert torch.equal(result.double(), want[name]), name


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_a_library_computes_what_has_no_fewer_products(case):
    route = plan_of(case._replace(options=case.options | {"alone": True})).route
    assert route == ("library", "nothing to fuse, and no algorithm with fewer products")
    tensors, reference = draw(case, torch.float32), lambda x, w, b: F.conv2d(x, w, b, **convolution(case))
    grad_output = torch.randn_like(reference(*tensors))
    got, want = (run(f, tensors, grad_output) for f in (alone(case), reference))
    for name, result in want.items():
        torch.testing.assert_close(got[name], result)


def convolution(case: Case) -> dict:
    return {name: value for name, value in case.options.items() if name not in ALONE}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_library_has_its_own_instructions_for_16_bits(dtype):
    with routing.recording() as calls:
        assert conv_relu_pool(*draw(CASES[0], dtype), **CASES[0].options).dtype == dtype
    assert [call.backend for call in calls] == [f"cpu-{extension.isa} library"]


def test_any_strides_of_input_and_gradient():
    case = CASES[2]
    x, w, b = draw(case, torch.float32)
    grad_output = torch.randn_like(alone(case)(x, w, b))
    want = run(alone(case), (x, w, b), grad_output)
    wide = torch.cat([x, x], -1)[..., ::2].copy_(x)
    for name, result in run(alone(case), (wide, w, b), grad_output).items():
        torch.testing.assert_close(result, want[name])
    turned = grad_output.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for activation in (None, "relu"):
        function = alone(case._replace(options=case.options | {"activation": activation}))
        results = [run(function, (x, w, b), g) for g in (grad_output, turned)]
        for name in want:
            assert torch.equal(results[0][name], results[1][name]), name
    ones = torch.ones(()).expand_as(grad_output)
    for name, result in run(alone(case), (x, w, b), ones).items():
        assert torch.equal(result, run(alone(case), (x, w, b), ones.contiguous())[name]), name


@pytest.mark.parametrize("case", [CASES[3], CASES[4]], ids=str)
def test_bits_do_not_depend_on_run_or_threads(case, threads):
    tensors, results = draw(case, torch.float32), []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(run(alone(case), tensors, torch.ones_like(alone(case)(*tensors))))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", [CASES[0], *OTHERS[:-1]], ids=str)
def test_scale_and_residual(case, adds, channels_last):
    """In inference there is something to fuse, and any algorithm may do it."""
    tensors, geometry = draw(case, torch.float32, channels_last), geometry_of(case)
    reference = lambda *t: op.reference(*t[:3], *geometry, *t[3:], relu=False)  # noqa: E731
    residual = torch.randn_like(reference(*tensors, None, None)) if adds else None
    tensors = (*tensors, torch.randn(case.w[0]), residual)
    with torch.no_grad(), routing.recording() as calls:
        y = conv_relu_pool(*tensors[:3], **case.options, scale=tensors[3], residual=residual)
    kernel = plan_of(case._replace(options=case.options | {"activation": "relu"})).route.kernel
    assert [call.backend for call in calls] == [f"cpu-{extension.isa} {kernel}"]
    assert_close("y", y, reference(*tensors), reference(*double(tensors)))


@pytest.mark.parametrize("case", [SMALL, OTHERS[2]], ids=str)
def test_scale_has_a_gradient(case):
    tensors = [t.requires_grad_() for t in (*draw(case, torch.float64), torch.rand(case.w[0], dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *t: conv_relu_pool(*t[:3], **case.options, scale=t[3]), tensors)


def test_what_relu_cuts_off_has_no_gradient_whatever_comes():
    x, w = torch.randn(1, 8, 6, 6, requires_grad=True), torch.randn(4, 8, 3, 3, requires_grad=True)
    y = conv_relu_pool(x, w, padding=1, pool=None)
    grad_output = torch.where(y > 0, 1.0, torch.nan)
    for grad in torch.autograd.grad(y, (x, w), grad_output):
        assert grad.isfinite().all()


def test_gradcheck():
    tensors = [t.requires_grad_() for t in draw(SMALL, torch.float64)]
    assert plan_of(SMALL).route.kernel == "winograd"
    assert torch.autograd.gradcheck(alone(SMALL), tensors)
    assert torch.autograd.gradgradcheck(alone(SMALL), tensors)


def test_opcheck():
    for channels_last in (False, True):
        x, w, b = draw(CASES[0], torch.float32, channels_last)
        geometry = geometry_of(CASES[0])
        torch.library.opcheck(op.fwd, (x, w, b, *geometry, "winograd", False, None, None, False))
        y, index = op.fwd(x, w, b, *geometry, "winograd", False, None, None, False)
        torch.library.opcheck(op.bwd, (torch.randn_like(y), x, w, index, *geometry, "winograd", [True] * 3))


def test_saved_memory():
    tensors, saved = [t.requires_grad_() for t in draw(CASES[0], torch.float32)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        alone(CASES[0])(*tensors)
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in tensors)


def test_transforms_go_through_the_reference():
    x, w, b = draw(CASES[0], torch.float64)
    f = lambda w: alone(CASES[0])(x, w, b).square().sum()  # noqa: E731
    want = torch.autograd.grad(f(w.requires_grad_()), w)[0]
    torch.testing.assert_close(torch.func.grad(f)(w.detach()), want)
    each = torch.func.vmap(lambda x: alone(CASES[0])(x, w.detach(), b))(x.unsqueeze(1))
    torch.testing.assert_close(each.squeeze(1), F.conv2d(x, w.detach(), b, padding=1))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"activation": None}, "want activation 'relu', or None without a pool, got None and pool 'max'"),
        ({"activation": "gelu", "pool": None}, "want activation 'relu', or None without a pool, got 'gelu'"),
    ],
)
def test_errors(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        conv_relu_pool(*draw(CASES[0], torch.float32), **options)


def test_direct_calls_stay_in_bounds():
    x, w, b = draw(CASES[0], torch.float32)
    geometry, pooled = geometry_of(CASES[0]), geometry_of(CASES[0]._replace(options={}))
    without = (None, None, False)
    for arguments in ((*pooled, "winograd", False), (*geometry, "winograd", True), (*geometry, "library", False)):
        with pytest.raises(ValueError, match="without ReLU want neither pool nor index nor a library's convolution"):
            op.fwd(x, w, b, *arguments, *without)
    y, index = op.fwd(x, w, b, *geometry, "winograd", False, *without)
    for arguments in ((*geometry, "direct"), (*geometry._replace(stride=(2, 2)), "winograd")):
        with pytest.raises(ValueError, match="want"):
            op.bwd(y, x, w, index, *arguments, [True] * 3)
    with pytest.raises(ValueError, match="want grad_output and index"):
        op.bwd(y[..., 1:], x, w, index, *geometry, "winograd", [True] * 3)


# --- the layer


def layers(*args, **options) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    theirs = nn.Conv2d(*args, **options)
    torch.manual_seed(0)
    return fastarch.nn.Conv2d(*args, **options), theirs


@pytest.mark.parametrize(
    ("args", "options", "kernels"),
    [
        ((8, 5, 3), {"padding": 1}, ["winograd"]),
        ((8, 5, 3), {"padding": "same", "bias": False}, ["winograd"]),
        ((8, 5, 3), {"padding": 1, "padding_mode": "reflect"}, []),
        ((8, 5, 3), {"stride": 2}, []),
        ((8, 4, 3), {"groups": 4}, []),
        ((8, 5, (3, 1)), {}, []),
    ],
)
def test_the_layer_is_torchs(args, options, kernels):
    ours, theirs = layers(*args, **options)
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for x in (torch.randn(2, 8, 7, 6), torch.randn(8, 7, 6)):
        with routing.recording() as calls:
            y = ours(x)
        assert [call.backend for call in calls] == [f"cpu-{extension.isa} {kernel}" for kernel in kernels]
        torch.testing.assert_close(y, theirs(x))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 7, 7, 6),
        torch.randn(2, 8, 2, 6),
        torch.randn(2, 8, 7, 6, dtype=torch.float64),
        torch.randn(8, 7),
        torch.randn(1, 1, 8, 7, 6),
        torch.randint(9, (2, 8, 7, 6)),
    ],
    ids=lambda x: f"{[*x.shape]} {x.dtype}",
)
def test_the_layers_errors_are_torchs(x):
    ours, theirs = layers(8, 5, 3)
    errors = []
    for layer in (ours, theirs):
        with pytest.raises(Exception) as error:
            layer(x)
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]


def test_the_layer_is_copied_pickled_compiled_and_folded():
    ours, theirs = layers(8, 5, 3, padding=1)
    x = torch.randn(2, 8, 7, 6)
    want = theirs(x)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for layer in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), compiled):
        torch.testing.assert_close(layer(x), want)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    torch.testing.assert_close(exported(x[:1]), want[:1])
    norm = nn.BatchNorm2d(5).eval()
    weight, bias = fastarch.nn.fold_batch_norm(ours, norm)
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=1), norm(want))


def test_autocast_leaves_it_to_a_library():
    ours, theirs = layers(8, 5, 3, padding=1)
    x = torch.randn(2, 8, 7, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), routing.recording() as calls:
        y = ours(x)
        assert torch.equal(y, theirs(x))
    assert [call.backend for call in calls] == [f"cpu-{extension.isa} library"]
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_fuse_makes_it_of_torchs_and_back():
    model = nn.Sequential(nn.Conv2d(8, 9, 3), nn.Conv2d(9, 4, 1), nn.Conv2d(4, 8, 3), nn.Sigmoid())
    fused = fastarch.fuse(model)
    assert [type(layer) for layer in fused] == [fastarch.nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.Sigmoid]
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(fused(x), model(x))
    assert [type(layer) for layer in fastarch.unfuse(fused)] == [type(layer) for layer in model]


@pytest.mark.parametrize(
    "make", [lambda: fastarch.nn.Conv2d(8, 5, 3), lambda: Projection(8, 5, 1, 2)], ids=["Conv2d", "Projection"]
)
def test_explain_compares_it_with_pytorchs(make):
    with torch.no_grad():
        (call,) = fastarch.explain(make().eval(), torch.randn(1, 8, 9, 9))
    assert call.operation == "conv_relu_pool"
    assert call.ours.seconds > 0
    assert call.pytorchs.seconds > 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("filters", [5, 32, 40], ids=lambda n: f"{n}_filters")
def test_taps_that_are_read_where_they_lie(filters, stride):
    """1x1 filters over a part of the channels, rows and columns of a channels_last tensor, on integers."""
    whole = torch.randint(-3, 4, (2, 30, 9, 11)).float().contiguous(memory_format=torch.channels_last)
    x, w = whole[:, 3:22, 1:8, 2:9], torch.randint(-3, 4, (filters, 19, 1, 1)).float()
    b, geometry = (
        torch.randn(filters).round(),
        op.Geometry((stride,) * 2, (0, 0), (1, 1), 1, "none", *[(1, 1)] * 2, (0, 0), False),
    )
    for relu in (False, True):
        want = op.reference(x, w, b, *geometry, relu=relu)
        residual = torch.randn_like(want).round().contiguous(memory_format=torch.channels_last)
        for r in (None, residual):
            y, _ = op.fwd(x, w, b, *geometry, "direct", False, None, r, relu)
            assert torch.equal(y, op.reference(x, w, b, *geometry, residual=r, relu=relu))
