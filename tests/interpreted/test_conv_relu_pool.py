"""kernels/conv_relu_pool.py under the interpreter: both algorithms, against the reference in float64."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from fastarch.kernels import conv_relu_pool as conv
from fastarch.kernels.conv_relu_pool_fwd import pixels_at
from fastarch.ops import conv_relu_pool as op  # noqa: F401  its fakes say how outputs are laid out
from fastarch.ref.conv_relu_pool import conv_relu_pool as reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

ALGORITHMS = ("implicit_gemm", "library")
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
    "pool 16x15": Case(n=1, c=1, k=2, image=(16, 15), pool_size=(16, 15), pool_stride=(1, 1)),
    "ceil": Case(image=(7, 9), pool_size=(3, 3), ceil_mode=True),
    "stride": Case(stride=(2, 3), padding=(2, 0)),
    "dilation": Case(dilation=(2, 1), padding=(2, 3)),
    "rectangular": Case(taps=(2, 5), padding=(0, 2)),
    "stem": Case(n=1, c=3, k=8, image=(18, 14), taps=(7, 7), stride=(2, 2), padding=(3, 3), pool_size=(3, 3), pool_padding=(1, 1)),
    "groups": Case(c=3, k=2, groups=3),
    "depthwise": Case(c=1, k=1, groups=5, stride=(2, 1)),
    "everything": Case(
        c=2, k=3, groups=2, taps=(3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1),
        pool_size=(3, 2), pool_stride=(2, 2), pool_padding=(1, 1), ceil_mode=True,
    ),
}  # fmt: skip
SOME = [CASES[name] for name in ("plain", "avg", "none", "vectors", "pool 3x3 stride 2 padding 1", "groups")]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize("case", SOME, ids=("plain", "avg", "none", "vectors", "overlap", "groups"))
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Tiles so small that small shapes have many, with a last one that is not full."""
    if "tile" not in request.fixturenames:
        monkeypatch.setattr(conv, "TILES", {key: tile._replace(m=16, n=16, k=16) for key, tile in conv.TILES.items()})
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
            rows, columns = (
                slice(k, k + s * (n - 1) + 1, s) for k, s, n in zip((i, j), case.pool_stride, shape[2:])
            )
            yield i * case.pool_size[1] + j, (..., rows, columns)


def padded(case, v, shape, value):
    """The convolution v with what windows [PH, PW] see around it."""
    (top, left), ends = case.pool_padding, [
        s * (n - 1) + k - p - o
        for n, s, k, p, o in zip(shape[2:], case.pool_stride, case.pool_size, case.pool_padding, v.shape[2:])
    ]
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
        return conv.conv_relu_pool_fwd(x, w, b, *case.geometry, algorithm, True)
    return conv.conv_relu_pool_bwd(dy, x, w, index, *case.geometry, algorithm, mask)


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
    assert_equal("index", index, index_of(case, convolve(case, *(None if t is None else t.double() for t in (x, w, b)))))


@every_algorithm
@every_case
def test_backward(case, algorithm):
    x, w, b, dy = draw(case)
    index = index_of(case, convolve(case, x, w, b))
    check_backward(case, algorithm, x, w, dy, index)


@every_algorithm
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.pool != "avg"], ids=str)
def test_integers_are_exact_with_all_their_ties(case, dtype, algorithm):
    ...
