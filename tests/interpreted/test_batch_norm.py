"""kernels/batch_norm.py under the interpreter: through the operation and by its launchers, against float64."""

from importlib import import_module
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from batch_norm_cases import CASES, EPS, Case, as_rows, double, draw, in_torch, run
from closeness import assert_close
from fastarch.kernels import batch_norm as norm
from fastarch.kernels.batch_norm_fwd import elements_at, rows_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fastarch.routing import Route

ops = import_module("fastarch.ops.batch_norm")  # the function of that name hides the module
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of masked lanes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(3, 5), (2, 7, 13, 11), (3, 24, 5, 5), (2, 1, 9, 10)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_layouts = pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Tiles so small that small shapes have many, with a last one that is not full."""
    if "tiles_as_they_are" not in request.fixturenames:
        monkeypatch.setattr(
            norm, "TILES", {key: tile._replace(row=32, elements=1024) for key, tile in norm.TILES.items()}
        )
        monkeypatch.setattr(norm, "PROGRAMS", 12)
        monkeypatch.setattr(norm, "MERGE", norm.MERGE | dict(BLOCK_C=16, BLOCK_SPLITS=16))


@pytest.fixture
def tiles_as_they_are():
    pass


@pytest.fixture
def ours(monkeypatch):
    """The operation with these launchers behind it, as it calls them on CUDA."""
    monkeypatch.setattr(ops, "stats", norm.batch_norm_stats)
    monkeypatch.setattr(ops, "fwd", lambda *args: norm.batch_norm_fwd(*args[:-1]))
    monkeypatch.setattr(ops, "bwd", lambda *args: norm.batch_norm_bwd(*args[:-2], args[-1]))
    monkeypatch.setattr(ops, "route", lambda *args: Route("two_pass", "for this test"))
    return ops.batch_norm


def laid_out(t, channels_last):
    return as_rows(t) if channels_last else t


def arguments(shape, dtype=torch.float32, channels_last=False):
    """x, residual and dy, in the layout, then weight and bias, in float32."""
    x, r, dy = (laid_out(torch.randn(shape).to(dtype), channels_last) for _ in range(3))
    return x + 1, r, dy, torch.randn(shape[1]), torch.randn(shape[1])


def forward(x, r=None, w=None, b=None, mean=None, var=None, relu=False, save_mask=False):
    return norm.batch_norm_fwd(x, r, w, b, mean, var, EPS, relu, save_mask)


def backward(dy, x, mask, w, b, mean, var, means=(None, None), relu=False, training=True, wanted=(True,) * 4):
    return norm.batch_norm_bwd(dy, x, mask, w, b, mean, var, *means, EPS, relu, training, wanted)


def exact_statistics(x):
    """In float64."""
    values = x.double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1, correction=0)


def beside(t, x):
    """A channel's value beside each of its elements."""
    return t.view(-1, *(1 for _ in x.shape[2:]))


def unpacked(mask, x):
    """The mask shaped as x, after its padding was found to be 0."""
    rows = ops.is_rows(x)
    values = x.movedim(1, -1) if rows else x
    inner = x.shape[1] if rows else x[0, 0].numel()
    bits = (mask[:, :, None] >> torch.arange(8) & 1).flatten(1).bool()
    assert mask.shape == (x.numel() // inner, (inner + 7) // 8)
    assert not bits[:, inner:].any(), "padding bits"
    passed = bits[:, :inner].reshape(values.shape)
    return passed.movedim(-1, 1) if rows else passed


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def check_operation(ours, case, dtype, channels_last, change=lambda t: t):
    drawn = {
        name: t if t is None or t.dim() == 1 else change(t) for name, t in draw(case, dtype, channels_last).items()
    }
    dy = change(laid_out(torch.randn(case.x).to(dtype), channels_last))
    got = run(ours, drawn, dy, **case.options)
    eager = run(in_torch, drawn, dy, **case.options)
    truth = run(in_torch, double(drawn), dy.double(), **case.options)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])


@both_layouts
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(ours, case, dtype, channels_last):
    check_operation(ours, case, dtype, channels_last)


@both_layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", [(70, 130), (2, 3, 75, 80), (3, 20, 14, 14), (2, 70, 7, 7), (3, 300, 2, 2)], ids=str)
def test_every_tile_of_the_table(ours, shape, dtype, channels_last, tiles_as_they_are):
    check_operation(ours, Case(shape, residual=True, relu=True), dtype, channels_last)


VIEWS = {
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda t: torch.stack((t, t), 4).flatten(3)[..., ::2],
    "expanded": lambda t: t[:, :, :1].expand_as(t),
    "off by one": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view_as(t),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@every_dtype
def test_any_strides(ours, dtype, view):
    check_operation(ours, Case((3, 10, 6, 5), residual=True, relu=True), dtype, False, view)


@both_layouts
@pytest.mark.parametrize("change", [as_rows, torch.clone, *VIEWS.values()], ids=["rows", "planes", *VIEWS])
def test_residual_and_gradient_may_have_other_strides_than_the_input(change, channels_last):
    x, r, dy, w, b = arguments((3, 10, 6, 5), torch.float32, channels_last)
    x, r, dy = x, change(r), change(dy)
    y, mean, var, mask = forward(x, r, w, b, relu=True, save_mask=True)
    same_r, same_dy = (laid_out(t.contiguous(), channels_last) for t in (r, dy))
    assert_same(y, forward(x, same_r, w, b, relu=True)[0])
    want = backward(same_dy, x, mask, w, b, mean, var, relu=True)
    for got, other in zip(backward(dy, x, mask, w, b, mean, var, relu=True), want):
        assert_same(got, other)


@both_layouts
@every_dtype
@pytest.mark.parametrize("residual", (True, False), ids=("residual", "no_residual"))
@every_shape
def test_mask_is_what_is_not_at_most_zero(shape, dtype, residual, channels_last):
    x, r, _, w, b = arguments(shape, dtype, channels_last)
    r = r if residual else None
    mean, var = norm.batch_norm_stats(x)
    x[(0,) * x.dim()] = torch.nan  # which passes
    y, *_, mask = forward(x, r, w, b, mean, var, relu=True, save_mask=True)
    passed = unpacked(mask, x)

    z = (x.double() - beside(mean, x)) / (beside(var, x) + EPS).sqrt() * beside(w, x) + beside(b, x)
    z = z if r is None else z + r
    assert passed.any() and not passed.all()
    clear = z.isnan() | (z.abs() > 1e-5)
    assert_same(passed[clear], ~(z <= 0)[clear])
    if dtype == torch.float32:  # in which the output tells the sign as well
        before = forward(x, r, w, b, mean, var)[0]
        assert_same(passed, ~(before <= 0))
        assert_same(y, before.relu())


@both_layouts
@every_dtype
@every_shape
def test_backward_finds_again_what_passed(shape, dtype, channels_last):
    """Where z is 0 up to rounding, for as many elements as there can be."""
    x, _, dy, w, b = arguments(shape, dtype, channels_last)
    first = x.movedim(1, 0).flatten(1)[:, 0]
    mean, var = norm.batch_norm_stats(x)
    x = torch.where(torch.rand(shape) < 0.5, beside(first, x), x)  # the statistics below are given, so stay
    x = laid_out(x.contiguous(), channels_last)
    b = -((first - mean) * (w / (var + EPS).sqrt()))
    mask = forward(x, None, w, b, mean, var, relu=True, save_mask=True)[3]
    _, dz, *_ = backward(torch.ones_like(dy), x, None, w, b, mean, var, relu=True)
    assert_same(dz.bool(), unpacked(mask, x))
    with_mask = backward(dy, x, mask, w, b, mean, var, relu=True)
    for got, want in zip(backward(dy, x, None, w, b, mean, var, relu=True), with_mask):
        assert_same(got, want)


@both_layouts
@every_shape
def test_given_statistics_are_used_and_not_returned(shape, channels_last):
    x, r, _, w, b = arguments(shape, torch.float32, channels_last)
    y, mean, var, _ = forward(x, r, w, b)
    assert_same((mean, var), norm.batch_norm_stats(x))
    strided = (torch.stack((t, t), 1)[:, 0] for t in (w, b, mean, var))
    again, *empty, mask = forward(x, r, *strided)
    assert_same(again, y)
    assert [t.shape for t in (*empty, mask)] == [(0,)] * 3


@both_layouts
@every_shape
def test_given_means_replace_those_of_the_batch(shape, channels_last):
    x, _, dy, w, b = arguments(shape, torch.float32, channels_last)
    mean, var = norm.batch_norm_stats(x)
    means = torch.randn(2, shape[1]).chunk(2)
    means = [t.squeeze(0) for t in means]
    dx, _, dw, db = backward(dy, x, None, w, b, mean, var, means)
    rstd = 1 / (var.double() + EPS).sqrt()
    xhat = (x.double() - beside(mean, x)) * beside(rstd, x)
    want = beside(w * rstd, x) * (dy - beside(means[0], x) - xhat * beside(means[1], x))
    torch.testing.assert_close(dx.double(), want, rtol=1e-5, atol=1e-5)
    for got, batch in zip((dw, db), backward(dy, x, None, w, b, mean, var)[2:]):
        assert_same(got, batch)

    # what several ranks do, with one: the sums, the means of them, the rest
    count = x.numel() // shape[1]
    dw, db = backward(dy, x, None, w, b, mean, var, wanted=(False, False, True, True))[2:]
    dx = backward(dy, x, None, w, b, mean, var, (db / count, dw / count), wanted=(True, False, False, False))[0]
    torch.testing.assert_close(dx, backward(dy, x, None, w, b, mean, var)[0], rtol=1e-5, atol=1e-5)


@both_layouts
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("relu", ("mask", "computed", None), ids=str)
def test_each_gradient_wanted_or_not(relu, training, channels_last):
    x, _, dy, w, b = arguments((3, 10, 6, 5), torch.bfloat16, channels_last)
    _, mean, var, mask = forward(x, None, w, b, relu=True, save_mask=True)
    saved = dy, x, mask if relu == "mask" else None, w, b, mean, var
    options = dict(relu=relu is not None, training=training)
    together = backward(*saved, **options)
    for wanted in product((False, True), repeat=4):
        for got, all_of_them, want in zip(backward(*saved, wanted=wanted, **options), together, wanted):
            assert_same(got, all_of_them if want else all_of_them.new_empty(0))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 10, 6, 5),
        as_rows(torch.randn(3, 10, 6, 5)),
        as_rows(torch.randn(3, 10, 2, 3, 4)),
        torch.randn(3, 10, 5, 6).transpose(2, 3),
        torch.randn(4, 9),
        torch.randn(9, 4).T,
        torch.randn(4, 9, 1, 1),
        as_rows(torch.randn(4, 9, 1, 1)),
        torch.randn(4, 9, 1, 2)[..., ::2],
        torch.randn(4, 1, 3, 3),
        torch.randn(1, 1).expand(4, 6),
        torch.randn(0, 9, 3, 3),
        as_rows(torch.randn(0, 9, 3, 3)),
        torch.randn(0, 9),
    ],
    ids=lambda x: f"{[*x.shape]} strides {[*x.stride()]}",
)
def test_results_are_laid_out_as_the_fakes_say(x):
    C = x.shape[1]
    w, b, mean, var = torch.randn(4, C).abs().unbind()
    masks = (False, True) if x.numel() else (False,)
    with FakeTensorMode() as mode:
        fake = {t: None if t is None else mode.from_tensor(t) for t in (None, x, w, b, mean, var)}

    def same(got, want):
        for t, other in zip(got, want, strict=True):
            assert (t.shape, t.stride(), t.dtype) == (other.shape, other.stride(), other.dtype)

    with mode:
        want_stats = ops.stats(fake[x])
    same(norm.batch_norm_stats(x), want_stats)
    for save_mask, statistics in product(masks, ((None, None), (mean, var))):
        with mode:
            want = ops.fwd(fake[x], None, fake[w], fake[b], *map(fake.get, statistics), EPS, True, save_mask, "")
        same(forward(x, None, w, b, *statistics, relu=True, save_mask=save_mask), want)
    for wanted in product((False, True), repeat=4):
        tensors = (x, x, None, w, b, mean, var, None, None)
        with mode:
            want = ops.bwd(*map(fake.get, tensors), EPS, True, True, "", wanted)
        same(norm.batch_norm_bwd(*tensors, EPS, True, True, wanted), want)


@both_layouts
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3, 3), (3, 5, 0), (3, 0, 4)], ids=str)
def test_an_empty_batch_has_zero_statistics_and_gradients(shape, channels_last):
    x, r, dy, w, b = arguments(shape, torch.float32, channels_last)
    zero = torch.zeros(shape[1])
    y, mean, var, mask = forward(x, r, w, b, relu=True, save_mask=True)
    assert y.shape == x.shape and mask.numel() == 0
    assert_same((mean, var), (zero, zero))
    assert_same(norm.batch_norm_stats(x), (zero, zero))
    dx, dr, dw, db = backward(dy, x, mask, w, b, mean, var, relu=True)
    assert dx.shape == dr.shape == x.shape
    assert_same((dw, db), (zero, zero))


FAR = {
    "large mean": lambda x: x + 1e4,
    "the first value is an outlier": lambda x: at_the_start(x + 3, 1e6),
    "all but the first value are far": lambda x: at_the_start(x + 1e4, 0),
    "one value is the whole variance": lambda x: at_the_start(x * 0 + 1e4, 1.1e4),
    "small": lambda x: x * 1e-6 + 1,
}


def at_the_start(x, value):
    x[0, :, 0, 0] = value
    return x


@both_layouts
@pytest.mark.parametrize("size", ("tiles_as_they_are", "small"))
@pytest.mark.parametrize("move", FAR.values(), ids=FAR)
def test_variance_is_not_cancelled(move, size, channels_last, request):
    shape = (3, 5, 61, 67)
    if size == "small":
        shape = (2, 5, 30, 31)
    else:
        request.getfixturevalue(size)
    x = laid_out(move(torch.randn(shape)), channels_last)
    mean, var = norm.batch_norm_stats(x)
    want_mean, want_var = exact_statistics(x)
    assert ((mean - want_mean).abs() <= 1e-7 * want_mean.abs() + 1e-6 * want_var.sqrt()).all()
    torch.testing.assert_close(var.double(), want_var, rtol=1e-5, atol=0)


@both_layouts
def test_a_constant_channel_has_next_to_no_variance(channels_last):
    x = laid_out(torch.full((3, 6, 7, 9), 0.1), channels_last)
    mean, var = norm.batch_norm_stats(x)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1), rtol=2e-7, atol=0)
    assert (var >= 0).all() and (var < 1e-15).all()


@both_layouts
@every_dtype
def test_nan_and_infinity_stay_in_their_channel_and_pass_relu(ours, dtype, channels_last):
    drawn = draw(Case((3, 10, 6, 5), residual=True, relu=True), dtype, channels_last)
    drawn["input"][1, 3, 2, 4] = torch.nan
    drawn["input"][2, 7, 0, 0] = torch.inf
    drawn["residual"][0, 5, 1, 1] = torch.nan
    y = run(ours, drawn, training=True, eps=EPS, activation="relu")["y"]
    want = run(in_torch, drawn, training=True, eps=EPS, activation="relu")["y"]
    assert_same(y.isnan(), want.isnan())
    assert y.isnan().sum() == 2 * 3 * 30 + 1


@both_layouts
@every_dtype
def test_the_same_bits_again(dtype, channels_last):
    x, r, dy, w, b = arguments((3, 10, 6, 5), dtype, channels_last)
    first = forward(x, r, w, b, relu=True, save_mask=True)
    assert_same(forward(x, r, w, b, relu=True, save_mask=True), first)
    _, mean, var, mask = first
    grads = [backward(dy, x, mask, w, b, mean, var, relu=True) for _ in range(2)]
    assert_same(*grads)


@pytest.mark.parametrize("channels", (1, 3, 40, 2048, 100000))
@pytest.mark.parametrize("values", (1, 49, 12544, 2**22 + 1))
def test_the_tile_does_not_depend_on_the_batch(values, channels, tiles_as_they_are):
    for layouts in (
        [norm.Layout(1, n, channels, values) for n in (1, 7, 4096)],
        [norm.Layout(0, 1, channels, n * values) for n in (1, 7, 4096)],
    ):
        plans = [norm.plan(layout, torch.empty(0)) for layout in layouts]
        assert all(plan.options == plans[0].options for plan in plans)
        for (grid,), splits, (*_, steps), options in plans:
            assert 1 <= splits <= steps and splits <= norm.PROGRAMS <= norm.MERGE["BLOCK_SPLITS"]
            assert grid == splits * -(-channels // options["BLOCK_C"])
            assert options["BLOCK_C"] * options["BLOCK_S"] <= max(tile.elements for tile in norm.TILES.values())


@triton.jit
def offsets_kernel(
    out,
    step,
    block,
    N,
    C,
    S,
    AXIS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    BLOCK_ROW: tl.constexpr = BLOCK_C if AXIS == 0 else BLOCK_S
    row, live, column = rows_of(step, block, N, C, S, AXIS, BLOCK_C, BLOCK_S)
    at, live = elements_at(row, live, column, C if AXIS == 0 else S, BLOCK_ROW)
    lane = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_ROW + tl.arange(0, BLOCK_ROW)[None, :]
    tl.store(out + lane, tl.where(live, at, -1))


@pytest.mark.parametrize("n, c, s", [(3000, 70, 30001), (1, 5, 2**31 + 7), (2**20, 300, 49)], ids=str)
@pytest.mark.parametrize("axis", (0, 1))
def test_offsets_past_31_bits(axis, n, c, s):
    n, s = (1, n * s) if axis == 0 else (n, s)
    block_c, block_s = 8, 16
    shape = (block_s, block_c) if axis == 0 else (block_c, block_s)
    steps, blocks = n * -(-s // block_s), -(-c // block_c)
    for step, block in product((0, steps // 2, steps - 1), (0, blocks - 1)):
        out = torch.empty(shape, dtype=torch.int64)
        offsets_kernel[(1,)](out, step, block, n, c, s, axis, shape[0], block_c, block_s)
        at_s = (step // n * block_s + torch.arange(block_s)).view(-1, 1)
        at_c = (block * block_c + torch.arange(block_c)).view(1, -1)
        want = at_s * c + at_c if axis == 0 else (step % n * c + at_c) * s + at_s
        want = torch.where((at_s < s) & (at_c < c), want, -1)  # [s, c]
        assert_same(out, want if axis == 0 else want.T)
