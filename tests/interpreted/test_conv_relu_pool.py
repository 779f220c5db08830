"""kernels/conv_relu_pool.py under the interpreter: both algorithms, against the reference in float64."""

import mmap
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from fastarch.kernels import conv_relu_pool as conv
from fastarch.kernels.conv_relu_pool_fwd import pixels_at
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastarch.ops.conv_relu_pool import Geometry, bwd, fwd
from fastarch.ref.conv_relu_pool import conv_relu_pool as reference

ALGORITHMS = ("implicit_gemm", "library")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of masked lanes
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of rounding, at 1


class Case(NamedTuple):
    n: int = 2
    c: int = 5  # per group, as k
    k: int = 7
    image: tuple = (13, 11)
    taps: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    pool: str = "max"
    pool_size: tuple = (2, 2)
    pool_stride: tuple = (2, 2)
    pool_padding: tuple = (0, 0)
    ceil_mode: bool = False
    bias: bool = True

    @property
    def geometry(self):
        return self[5:14]


NONE = dict(pool="none", pool_size=(1, 1), pool_stride=(1, 1))
CASES = {
    "plain": Case(),
    "one": Case(n=1, c=1, k=1, image=(1, 1), taps=(1, 1), padding=(0, 0), **NONE),
    "one window": Case(n=1, c=1, k=1, image=(2, 2), taps=(1, 1), padding=(0, 0)),
    "no bias": Case(bias=False),
    "first layer": Case(c=1, k=6, image=(12, 12), taps=(5, 5), padding=(0, 0)),
    "second layer": Case(c=6, k=16, image=(8, 8), taps=(5, 5), padding=(0, 0)),
    "vectors": Case(n=1, c=16, k=32, image=(6, 6)),
    "uneven vectors": Case(n=1, c=48, k=17, image=(4, 4)),
    "none": Case(**NONE),
    "avg": Case(pool="avg"),
    "avg 3x2 padded ceil": Case(pool="avg", pool_size=(3, 2), pool_stride=(2, 1), pool_padding=(1, 1), ceil_mode=True),
    "avg 1x8": Case(pool="avg", pool_size=(1, 8), pool_stride=(1, 3)),
    "pool 1x2": Case(pool_size=(1, 2), pool_stride=(1, 2)),
    "pool 2x3": Case(pool_size=(2, 3), pool_stride=(2, 3)),
    "pool 3x3 stride 2": Case(pool_size=(3, 3)),
    "pool 3x3 stride 2 padding 1": Case(pool_size=(3, 3), pool_padding=(1, 1)),
    "pool 3x3 stride 1": Case(n=1, image=(6, 5), pool_size=(3, 3), pool_stride=(1, 1)),
    "pool with gaps": Case(pool_stride=(3, 4)),
    "pool 16x15": Case(
        n=1, c=1, k=2, image=(17, 15), taps=(1, 1), padding=(0, 0), pool_size=(16, 15), pool_stride=(1, 1)
    ),
    "ceil": Case(image=(7, 9), pool_size=(3, 3), ceil_mode=True),
    "stride": Case(stride=(2, 3), padding=(2, 0)),
    "dilation": Case(dilation=(2, 1), padding=(2, 3)),
    "rectangular": Case(taps=(2, 5), padding=(0, 2)),
    "stem": Case(
        n=1, c=3, k=8, image=(18, 14), taps=(7, 7), stride=(2, 2), padding=(3, 3),
        pool_size=(3, 3), pool_padding=(1, 1),
    ),
    "groups": Case(c=3, k=2, groups=3),
    "depthwise": Case(c=1, k=1, groups=5, stride=(2, 1)),
    "everything": Case(
        c=2, k=3, groups=2, taps=(3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1),
        pool_size=(3, 2), pool_stride=(2, 2), pool_padding=(1, 1), ceil_mode=True,
    ),
}  # fmt: skip
SOME = {
    "plain": Case(image=(9, 7)),
    "avg": Case(image=(9, 7), pool="avg"),
    "none": Case(n=1, image=(6, 7), **NONE),
    "vectors": CASES["vectors"],
    "overlap": Case(n=1, image=(8, 7), pool_size=(3, 3), pool_padding=(1, 1)),
    "groups": Case(image=(6, 7), c=3, k=2, groups=2),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize("case", SOME.values(), ids=SOME)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Tiles so small that small shapes have many, with a last one that is not full."""
    if "tile" not in request.fixturenames:
        monkeypatch.setattr(conv, "TILES", {key: tile._replace(m=16, n=64, k=16) for key, tile in conv.TILES.items()})
        monkeypatch.setattr(conv, "PROGRAMS", 8)


def draw(case, dtype=torch.float32, integers=False):
    """x, w, b, and dy shaped as the output, on which every dtype computes exactly if they are integers."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    x = tensor(case.n, case.c * case.groups, *case.image)
    w = tensor(case.k * case.groups, case.c, *case.taps)
    b = tensor(case.k * case.groups) if case.bias else None
    return x, w, b, tensor(*reference(x.double(), w.double(), None, *case.geometry).shape)


def convolve(case, x, w, b):
    return F.conv2d(x, w, b, case.stride, case.padding, case.dilation, case.groups)


def windows(case, shape):
    """Each element of a pool window: its number, and where all the windows [PH, PW] have it in `padded`."""
    for i in range(case.pool_size[0]):
        for j in range(case.pool_size[1]):
            rows, columns = (slice(k, k + s * (n - 1) + 1, s) for k, s, n in zip((i, j), case.pool_stride, shape[2:]))
            yield i * case.pool_size[1] + j, (..., rows, columns)


def padded(case, v, shape, value):
    """The convolution v with what windows [PH, PW] see around it."""
    (top, left), ends = (
        case.pool_padding,
        [
            s * (n - 1) + k - p - o
            for n, s, k, p, o in zip(shape[2:], case.pool_stride, case.pool_size, case.pool_padding, v.shape[2:])
        ],
    )
    bottom, right = (max(0, end) for end in ends)
    return F.pad(v, (left, right, top, bottom), value=value)


def index_of(case, v):
    """The index, by torch's own pooling of the convolution v."""
    window = case.pool_size, case.pool_stride, case.pool_padding
    v = v.relu()
    if case.pool == "avg":
        index = torch.zeros_like(F.avg_pool2d(v, *window, case.ceil_mode), dtype=torch.uint8)
        passed = ~(padded(case, v, index.shape, value=0) <= 0)
        for element, here in windows(case, index.shape):
            index |= passed[here].to(torch.uint8) << element
        return index
    y, flat = F.max_pool2d(v, *window, 1, case.ceil_mode, True)
    row, column = (
        place + p - s * torch.arange(n)
        for place, p, s, n in zip(
            (flat.transpose(2, 3) // v.shape[3], flat % v.shape[3]), case.pool_padding, case.pool_stride, y.shape[2:]
        )
    )
    return torch.where((y > 0) | y.isnan(), row.transpose(2, 3) * case.pool_size[1] + column, 255).to(torch.uint8)


def before_pool(case, dy, index, v):
    """dy carried back by the index through the pool and ReLU, shaped as the convolution v."""
    g = padded(case, torch.zeros_like(v, dtype=dy.dtype), dy.shape, value=0)
    area = 1
    if case.pool == "avg":
        ends = (n + 2 * p for n, p in zip(v.shape[2:], case.pool_padding))
        height, width = (
            (s * torch.arange(n) + k).clamp(max=end) - s * torch.arange(n)
            for end, n, s, k in zip(ends, dy.shape[2:], case.pool_stride, case.pool_size)
        )
        area = height[:, None] * width
    for element, here in windows(case, dy.shape):
        named = index >> element & 1 != 0 if case.pool == "avg" else index == element
        g[here] += torch.where(named, dy / area, 0)
    (top, left), (height, width) = case.pool_padding, v.shape[2:]
    return g[:, :, top : top + height, left : left + width]


def gradients(case, dy, x, w, index):
    """dx, dw, db, by torch's convolution in dy's dtype."""
    x, w = x.to(dy.dtype), w.to(dy.dtype)
    g = before_pool(case, dy, index, convolve(case, x, w, None))
    args = case.stride, case.padding, case.dilation, False, (0, 0), case.groups
    return torch.ops.aten.convolution_backward(g, x, w, [len(w)], *args, [True] * 3)


def assert_as_good(name, got, peer, truth):
    """Within twice the error of torch in the same dtype, and a rounding unit at the truth's scale."""
    assert got.dtype == peer.dtype and got.shape == truth.shape, name
    torch.testing.assert_close(got.isnan(), truth.isnan(), msg=lambda m: f"{name}, NaN: {m}")
    error, allowed = ((t.double() - truth).nan_to_num(0).abs().max() for t in (got, peer))
    unit = UNIT[got.dtype] * truth.nan_to_num(0).abs().max()
    assert error <= 2 * allowed + unit, f"{name}: error {error:.2e}, torch's {allowed:.2e}, unit {unit:.2e}"


def assert_equal(name, got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")


def run(case, algorithm, x, w, b, dy=None, index=None, mask=(True, True, True)):
    if dy is None:
        return conv.conv_relu_pool_fwd(x, w, b, Geometry(*case.geometry), algorithm, True)
    return conv.conv_relu_pool_bwd(dy, x, w, index, Geometry(*case.geometry), algorithm, mask)


def check_forward(case, algorithm, x, w, b):
    y, index = run(case, algorithm, x, w, b)
    truth = reference(x.double(), w.double(), None if b is None else b.double(), *case.geometry)
    assert_as_good("y", y, reference(x, w, b, *case.geometry), truth)
    return y, index


def check_backward(case, algorithm, x, w, dy, index):
    truths = gradients(case, dy.double(), x, w, index)
    peers = gradients(case, dy, x, w, index)
    for name, got, peer, truth in zip(("dx", "dw", "db"), run(case, algorithm, x, w, None, dy, index), peers, truths):
        assert_as_good(name, got, peer, truth)


@every_case
def test_the_truth_of_these_tests_is_the_reference(case):
    x, w, b, dy = draw(case, torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    y = reference(x, w, b, *case.geometry)
    index = index_of(case, convolve(case, x, w, b).detach())
    for want, got in zip(torch.autograd.grad(y, leaves, dy), gradients(case, dy, x.detach(), w.detach(), index)):
        torch.testing.assert_close(got, want)


@every_algorithm
@every_case
def test_forward(case, algorithm):
    x, w, b, _ = draw(case)
    _, index = check_forward(case, algorithm, x, w, b)
    assert_equal(
        "index", index, index_of(case, convolve(case, *(None if t is None else t.double() for t in (x, w, b))))
    )


@every_algorithm
@every_case
def test_backward(case, algorithm):
    x, w, b, dy = draw(case)
    index = index_of(case, convolve(case, x, w, b))
    check_backward(case, algorithm, x, w, dy, index)


@every_algorithm
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("name", [name for name in SOME if name != "avg"])  # a share of an integer is none
def test_integers_are_exact_and_their_ties_go_to_the_first(name, dtype, algorithm):
    case = SOME[name]
    x, w, b, dy = draw(case, dtype, integers=True)
    y, index = run(case, algorithm, x, w, b)
    v = convolve(case, *(t.double() for t in (x, w, b)))
    assert_equal("index", index, index_of(case, v))
    assert_equal("y", y, reference(x.double(), w.double(), b.double(), *case.geometry).to(dtype))
    for name, got, want in zip(
        ("dx", "dw", "db"), run(case, algorithm, x, w, b, dy, index), gradients(case, dy.double(), x, w, index)
    ):
        assert_equal(name, got, want.to(dtype))


@every_algorithm
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@some_cases
def test_half(case, dtype, algorithm):
    x, w, b, dy = draw(case, dtype)
    y, index = check_forward(case, algorithm, x, w, b)
    check_backward(case, algorithm, x, w, dy, index)
    if case.pool != "avg":  # roundings may move a maximum, but only to an element that rounds to it
        v = padded(case, convolve(case, *(t.double() for t in (x, w, b))).relu(), y.shape, value=0)
        named = torch.zeros_like(y, dtype=torch.float64)
        for element, here in windows(case, y.shape):
            named += torch.where(index == element, v[here], 0)
        torch.testing.assert_close(named, y.double(), rtol=0, atol=float(4 * UNIT[dtype] * y.abs().max()))


@every_algorithm
@pytest.mark.parametrize("kind", ("half", "tf32", "ieee"))
@pytest.mark.parametrize("tile", ("narrow", "wide", "odd"))
def test_every_tile_of_the_table(tile, kind, algorithm, monkeypatch, request):
    """The tiles as they are, and no others at hand: a wrong choice is a KeyError."""
    monkeypatch.setattr(
        conv, "TILES", {key: value for key, value in conv.TILES.items() if key[0] == "pool" or key[1:] == (kind, tile)}
    )
    before = torch.backends.cudnn.conv.fp32_precision
    request.addfinalizer(lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", before))
    torch.backends.cudnn.conv.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    channels = {"narrow": 16, "wide": 80, "odd": 5}[tile]
    case = Case(c=channels, k=channels, image=(9, 6))
    x, w, b, dy = draw(case, torch.bfloat16 if kind == "half" else torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    _, index = check_forward(case, algorithm, x, w, b)
    check_backward(case, algorithm, x, w, dy, index)


@every_algorithm
@some_cases
def test_nan_passes_as_in_torch(case, algorithm):
    x, w, b, dy = draw(case)
    x[0, 1, 2, 3] = x[-1, 0, 0, 0] = torch.nan
    _, index = check_forward(case, algorithm, x, w, b)
    assert_equal("index", index, index_of(case, convolve(case, x, w, b)))
    check_backward(case, algorithm, x, w, dy, index)


@every_algorithm
@some_cases
def test_what_relu_cut_off_passes_nothing_on(case, algorithm):
    x, w, b, dy = draw(case)
    y, index = run(case, algorithm, x, w, b - 1000)
    assert_equal("y", y, torch.zeros_like(y))
    assert_equal("index", index, torch.full_like(index, 0 if case.pool == "avg" else 255))
    for name, grad in zip(("dx", "dw", "db"), run(case, algorithm, x, w, b, dy * torch.inf, index)):
        assert_equal(name, grad, torch.zeros_like(grad))


@every_algorithm
@some_cases
def test_the_same_bits_again(case, algorithm):
    x, w, b, dy = draw(case)
    y, index = run(case, algorithm, x, w, b)
    assert_equal("y", run(case, algorithm, x, w, b)[0], y)
    for first, second in zip(*(run(case, algorithm, x, w, b, dy, index) for _ in range(2))):
        assert_equal("gradients", second, first)


VIEWS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda t: torch.stack((t, t), 4).flatten(3)[..., ::2],
    "expanded": lambda t: t[:, :1, :, :1].expand_as(t),
}


@every_algorithm
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view, algorithm):
    case = CASES["everything"]
    x, w, b, dy = draw(case)
    x, w, dy, b = view(x), view(w), view(dy), torch.stack((b, b), 1)[:, 0]
    _, index = check_forward(case, algorithm, x, w, b)
    check_backward(case, algorithm, x, w, dy, index)


@every_algorithm
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize(
    "sizes",
    (dict(), dict(k=1), dict(c=1, k=3), dict(n=0), dict(n=1, image=(2, 2))),
    ids=("plain", "k 1", "c 1", "n 0", "output 1x1"),
)
def test_results_are_laid_out_as_the_fakes_say(sizes, view, algorithm):
    case = Case(**dict(image=(5, 4)) | sizes)
    x, w, b, _ = draw(case)
    x, w = view(x), view(w)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, w, b)]
        want = [fwd(*fakes, *case.geometry, algorithm, save) for save in (True, False)]
    got = [conv.conv_relu_pool_fwd(x, w, b, Geometry(*case.geometry), algorithm, save) for save in (True, False)]
    for t, fake in zip(sum(got, ()), sum(want, ())):
        assert (t.shape, t.stride(), t.dtype) == (fake.shape, fake.stride(), fake.dtype)
    y, index = got[0]
    for mask in torch.cartesian_prod(*[torch.tensor((False, True))] * 3).tolist():
        with mode:
            want = bwd(*(mode.from_tensor(t) for t in (y, x, w, index)), *case.geometry, algorithm, mask)
        for t, fake in zip(run(case, algorithm, x, w, b, y, index, mask), want, strict=True):
            assert (t.shape, t.stride(), t.dtype) == (fake.shape, fake.stride(), fake.dtype)


@every_algorithm
def test_each_gradient_alone_is_the_same(algorithm):
    case = Case()
    x, w, b, dy = draw(case)
    _, index = run(case, algorithm, x, w, b)
    together = run(case, algorithm, x, w, b, dy, index)
    for i in range(3):
        alone = run(case, algorithm, x, w, b, dy, index, [i == j for j in range(3)])
        assert_equal("gradient", alone[i], together[i])
        assert [t.numel() for j, t in enumerate(alone) if j != i] == [0, 0]


@every_algorithm
def test_an_empty_batch_gives_zero_gradients(algorithm):
    case = Case(n=0)
    x, w, b, dy = draw(case)
    y, index = run(case, algorithm, x, w, b)
    assert y.shape == index.shape == dy.shape
    for name, grad, leaf in zip(("dx", "dw", "db"), run(case, algorithm, x, w, b, dy, index), (x, w, b)):
        assert_equal(name, grad, torch.zeros_like(leaf))


def far_apart(t, axis):
    """t, with more than 2^31 elements from its first to its last along the axis. Untouched memory is free."""
    strides = list(t.stride())
    strides[axis] = 2**31 // (t.shape[axis] - 1) + 8
    size = 2 * (1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides)))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("axis", range(4))
def test_offsets_past_31_bits(axis, monkeypatch):
    case = Case(image=(5, 4))
    x, w, b, dy = draw(case, torch.bfloat16)
    far = far_apart(x, axis)
    _, index = check_forward(case, "implicit_gemm", far, w, b)
    empty = conv.empty
    monkeypatch.setattr(conv, "empty", lambda shape, like: far_apart(x, axis) if like is far else empty(shape, like))
    check_backward(case, "implicit_gemm", far, w, dy, index)


@triton.jit
def pixels_at_kernel(out, tile, HEIGHT, WIDTH, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    n, row, column = pixels_at(tile, BLOCK, lanes, HEIGHT, WIDTH)
    tl.store(out + lanes, n)
    tl.store(out + BLOCK + lanes, row)
    tl.store(out + 2 * BLOCK + lanes, column)


@pytest.mark.parametrize("tile", (0, 1, 12345, 2**30 - 1))
@pytest.mark.parametrize("size", ((1, 1), (3, 5), (112, 112), (40000, 53000)), ids=str)
def test_pixels_are_counted_past_31_bits(tile, size):
    out = torch.empty(3, 64, dtype=torch.int32)
    pixels = tile * 64 + torch.arange(64)
    area = size[0] * size[1]
    pixels_at_kernel[(1,)](out, tile, *size, 64)
    for got, want in zip(out, (pixels // area, pixels % area // size[1], pixels % size[1])):
        if pixels[-1] // area < 2**31:
            assert_equal("digit", got, want.int())


def test_tf32_follows_the_convolutions_setting(request):
    before = torch.backends.cudnn.conv.fp32_precision
    request.addfinalizer(lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", before))
    for setting in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = setting
        assert conv.precision(torch.empty(0)) == setting


def test_an_unknown_algorithm_is_refused():
    case = Case()
    x, w, b, _ = draw(case)
    with pytest.raises(ValueError, match="winograd"):
        run(case, "winograd", x, w, b)
