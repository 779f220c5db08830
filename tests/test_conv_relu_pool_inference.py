"""conv_relu_pool with a scale and a residual: a batch norm and a skip connection in the convolution."""

import importlib

import pytest
import torch
from closeness import assert_close
from conv_relu_pool_cases import CASES, Case, double, draw, geometry_of
from torch import Tensor

from fastarch import extension, routing
from fastarch.ops import conv_relu_pool

op = importlib.import_module("fastarch.ops.conv_relu_pool")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALGORITHMS = ["direct", "winograd", "polyphase", "library"]
MANY = Case((1, 33, 7, 5), (100, 33, 3, 3), {"padding": 1, "pool": None})  # filters that outweigh the input
BLOCKS = [
    MANY,
    Case((2, 64, 6, 7), (48, 64, 1, 1), {"pool": None}),
    Case((2, 40, 5, 3), (68, 40, 3, 3), {"padding": 1, "pool": None}),  # the last task's channels share a vector
    Case((3, 5, 19, 18), (7, 5, 3, 3), {"padding": 1, "pool": None}),  # two images share a vector
    Case((1, 3, 14, 13), (17, 3, 5, 5), {"stride": 2, "padding": 2, "pool": None}, bias=False),
    Case((2, 12, 9, 9), (24, 4, 3, 3), {"padding": 1, "groups": 3, "pool": None}),
]

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


def extras(case: Case, dtype: torch.dtype, channels_last: bool = False) -> tuple[Tensor, Tensor | None]:
    """A scale, and where nothing is pooled a residual."""
    geometry = geometry_of(case)
    scale = torch.randn(case.w[0]).to(torch.promote_types(dtype, torch.float32))
    if geometry.pool != "none":
        return scale, None
    residual = torch.randn(case.x[0], case.w[0], *geometry.conv_size(case.x[2:], case.w[2:])).to(dtype)
    return scale, residual.contiguous(memory_format=torch.channels_last) if channels_last else residual


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + BLOCKS, ids=str)
def test_values(case, dtype, channels_last):
    tensors, (scale, residual) = draw(case, dtype, channels_last), extras(case, dtype, channels_last)
    geometry = geometry_of(case)
    with torch.no_grad():
        y = conv_relu_pool(*tensors, **case.options, scale=scale, residual=residual)
    eager = op.reference(*tensors, *geometry, scale, residual)
    truth = op.reference(*double(tensors), *geometry, *double((scale, residual)))
    assert_close("y", y, eager, truth)
    assert y.stride() == torch.empty_like(y, memory_format=op.memory_format(tensors[0])).stride()


@pytest.mark.parametrize("threads_of_torch", [1, 2, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES + BLOCKS, ids=str)
def test_integers_are_exact_by_every_algorithm(case, algorithm, threads_of_torch, threads):
    """Channels are cut among threads where filters outweigh the input, places where they do not."""
    x, _, b = (None if t is None else 648 * (2 * t).round() for t in draw(case, torch.float32))
    w, (scale, residual) = 648 * torch.randint(-1, 2, case.w).float(), extras(case, torch.float32)
    scale = 2.0 ** scale.round()
    residual = None if residual is None else 648 * 648 * residual.round()
    geometry = geometry_of(case)
    if algorithm == "library":
        w, scale = op.scaled(w, scale), None
    want = op.reference(x / 648, w, b, *geometry, scale, residual)
    if algorithm != "library":
        threads(threads_of_torch)  # here: torch's own are not seen by make races
    try:
        y, _ = op.fwd(x / 648, w, b, *geometry, algorithm, False, scale, residual)
    except ValueError as error:
        assert f"{algorithm} wants" in str(error)
        return
    assert torch.equal(y, want)


@pytest.mark.parametrize("algorithm", ALGORITHMS[:3])
@pytest.mark.parametrize("pool", ["max", None])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype, pool, algorithm, threads):
    """Of a training step's forward as well, whose channels are cut among threads likewise."""
    for case in (MANY, BLOCKS[2]):
        case = case._replace(options={"padding": 1, "pool": pool})
        tensors, (scale, _) = draw(case, dtype), extras(case, dtype)
        results = []
        for n in (1, 2, 3, 5):
            threads(n)
            results.append(op.fwd(*tensors, *geometry_of(case), algorithm, True, scale, None))
        for output, index in results[1:]:
            assert torch.equal(output, results[0][0])
            assert torch.equal(index, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_residuals_of_any_strides(dtype):
    x, w, b = draw(MANY, dtype)
    base = torch.randn(2, 100, 14, 5).to(dtype)
    for residual in (base[:1, :, ::2], base[:1, :, :7].mT.contiguous().mT, base[:1, :1, :7].expand(1, 100, 7, 5)):
        with torch.no_grad():
            y = conv_relu_pool(x, w, b, padding=1, pool=None, residual=residual)
            want = conv_relu_pool(x, w, b, padding=1, pool=None, residual=residual.contiguous())
        assert torch.equal(y, want)


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_nan_and_infinities_of_a_residual_stay_where_they_are(case):
    x, w, b = draw(case, torch.float32)
    _, residual = extras(case, torch.float32)
    residual.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e38])
    with torch.no_grad():
        y = conv_relu_pool(x, w, b, **case.options, residual=residual).view(-1)
    assert y[0].isnan()
    assert y[1:3].tolist() == [float("inf"), 0]
    assert y[3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"pool_size": 3, "pool_stride": 2}, {"pool": None}, {"pool": "avg"}], ids=str)
def test_nan_of_either_sign_and_infinities_go_through_the_pool(options, dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.randn(2, 1, 12, 14).to(dtype)
    x[:, 0, 0, :8] = torch.tensor([nan, -nan, inf, -inf, 3e38, -3e38, 0.0, -0.0]).to(dtype)
    x[1, 0, 5, 3], x[1, 0, 8, 4] = torch.tensor(-nan).copysign(torch.tensor(-1.0)).to(dtype), inf
    w = torch.ones(20, 1, 1, 1, dtype=dtype)
    assert x[1, 0, 5, 3].signbit() or dtype == torch.bfloat16  # whose conversion drops the sign
    with torch.no_grad():
        y = conv_relu_pool(x, w, **options)
    want = op.reference(x, w, None, *geometry_of(Case(x.shape, w.shape, options)))
    torch.testing.assert_close(y, want, rtol=2e-2 if options.get("pool") == "avg" else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pool", ["max", None])
def test_every_gradient(pool):
    x, w = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    b, scale = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    residual = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, w, b, scale, residual)]

    def function(x, w, b, scale, residual):
        return conv_relu_pool(x, w, b, padding=1, pool=pool, scale=scale, residual=residual)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradcheck(lambda *t: function(*t, None), tensors[:4])


def test_what_no_kernel_adds_is_seen_to_go_to_the_reference():
    x, w, b = draw(MANY, torch.float32)
    scale, residual = extras(MANY, torch.float32)
    with routing.recording() as calls:
        conv_relu_pool(x, w, b, padding=1, pool=None, scale=scale, residual=residual)  # where gradients may be wanted
        with torch.no_grad():
            conv_relu_pool(x, w, b, padding=1, scale=scale, residual=residual)  # pooled
            conv_relu_pool(x, w, b, padding=1, pool=None, scale=scale, residual=residual)
            half = (t.bfloat16() for t in (x, w, b))
            conv_relu_pool(*half, padding=1, pool=None, scale=scale, residual=residual.bfloat16())
    assert [call.backend.split()[-1] for call in calls] == ["reference", "reference", "winograd", "reference"]
    assert calls[0].reason == "a residual is added on CPUs, in inference, in full precision and without a pool"


def test_contract_of_the_operation():
    x, w, b = draw(MANY, torch.float32)
    scale, residual = extras(MANY, torch.float32)
    arguments = (x, w, b, *geometry_of(MANY), "winograd", False, scale, residual)
    torch.library.opcheck(op.fwd, arguments)
    torch.library.opcheck(op.fwd, (*arguments[:-1], None))


@torch.no_grad()
def test_compiled_with_any_batch():
    w, b = torch.randn(6, 4, 3, 3), torch.randn(6)
    scale = torch.randn(6)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x, residual):
        return conv_relu_pool(x, w, b, padding=1, pool=None, scale=scale, residual=residual)

    for n in (2, 3, 5):
        x, residual = torch.randn(n, 4, 9, 8), torch.randn(n, 6, 9, 8)
        want = op.reference(
            x, w, b, *geometry_of(Case(x.shape, w.shape, {"padding": 1, "pool": None})), scale, residual
        )
        torch.testing.assert_close(compiled(x, residual), want)


def test_unbatched():
    x, w, b = draw(MANY, torch.float32)
    scale, residual = extras(MANY, torch.float32)
    with torch.no_grad():
        y = conv_relu_pool(x[0], w, b, padding=1, pool=None, scale=scale, residual=residual[0])
        want = conv_relu_pool(x, w, b, padding=1, pool=None, scale=scale, residual=residual)
    assert torch.equal(y, want[0])


X, W, B = draw(MANY, torch.float32)
SCALE, RESIDUAL = extras(MANY, torch.float32)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"scale": SCALE[:-1]}, ValueError, r"want scale \[100\], got \[99\]"),
        ({"scale": SCALE.double()}, TypeError, r"input is torch.float32 on cpu, scale is torch.float64 on cpu"),
        ({"scale": 2.0}, TypeError, r"want scale as a tensor, got float"),
        ({"residual": RESIDUAL[..., 1:]}, ValueError, r"want residual \[1, 100, 7, 5\], got \[1, 100, 7, 4\]"),
        ({"residual": RESIDUAL.half()}, TypeError, r"input is torch.float32 on cpu, residual is torch.float16 on cpu"),
        ({"residual": RESIDUAL.to("meta")}, TypeError, r"residual is torch.float32 on meta"),
    ],
)
def test_errors_name_what_was_wanted(wrong, error, message):
    with pytest.raises(error, match="conv_relu_pool: .*" + message), torch.no_grad():
        conv_relu_pool(X, W, B, padding=1, pool=None, **wrong)


@pytest.mark.parametrize(
    ("scale", "residual", "options"),
    [
        (SCALE[:-1], None, ()),
        (SCALE.double(), None, ()),
        (SCALE.view(1, -1), None, ()),
        (None, RESIDUAL[:, 1:], ()),
        (None, RESIDUAL.double(), ()),
        (None, RESIDUAL, ("winograd", True)),
        (SCALE, None, ("library", False)),
    ],
)
def test_direct_calls_stay_in_bounds(scale, residual, options):
    with pytest.raises((ValueError, TypeError), match="conv_relu_pool: "):
        op.fwd(X, W, B, *geometry_of(MANY), *(options or ("winograd", False)), scale, residual)
    with pytest.raises(ValueError, match=r"want a residual .* with neither pool nor index"):
        op.fwd(X, W, B, *geometry_of(MANY._replace(options={"padding": 1})), "winograd", False, None, RESIDUAL)
