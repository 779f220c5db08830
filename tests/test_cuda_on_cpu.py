"""The CUDA C++ kernels executed on the CPU (tests/cuda_on_cpu), torch side and launches included, against fastarch.ref.

FASTARCH_SANITIZE=1 builds them with AddressSanitizer and UndefinedBehaviorSanitizer, as `test_sanitized` does.
"""

import os
import shutil
import subprocess
from itertools import product

import pytest
import torch
from closeness import assert_close
from conv_relu_pool_cases import Case, double, draw, geometry_of, reference_of, run
from cuda_on_cpu import build
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastarch import extension
from fastarch.ops.conv_relu_pool import Geometry, memory_format, route

pytestmark = pytest.mark.skipif(shutil.which(build.cxx()) is None, reason=f"no C++ compiler {build.cxx()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SANITIZE = os.environ.get("FASTARCH_SANITIZE") == "1"

POOL3 = {"pool_size": 3, "pool_stride": 2}
CASES = {
    "smallest": Case((1, 1, 1, 1), (1, 1, 1, 1), {"pool": None}),
    "lenet_c1": Case((2, 1, 13, 15), (6, 1, 5, 5), {}),
    "notes_conv1": Case((3, 1, 15, 13), (33, 1, 3, 3), {"padding": 1}),
    "alexnet_conv1": Case((1, 3, 67, 71), (7, 3, 11, 11), {"stride": 4, "padding": 2, **POOL3}),
    "resnet_stem": Case((2, 3, 37, 29), (64, 3, 7, 7), {"stride": 2, "padding": 3, "pool_padding": 1, **POOL3}),
    "four channels": Case((1, 4, 11, 9), (65, 4, 3, 3), {"padding": 1}),
    "two channels, two tiles": Case((1, 2, 65, 70), (8, 2, 3, 3), {"padding": 1}),
    "dilation": Case((1, 2, 19, 17), (7, 2, 3, 3), {"dilation": (2, 3)}),
    "dilation and stride": Case(
        (1, 3, 31, 29), (9, 3, 5, 4), {"stride": (2, 3), "padding": (3, 2), "dilation": (3, 2), "pool_padding": 1}
    ),
    "common factor of dilation and stride": Case(
        (1, 1, 40, 44), (5, 1, 4, 5), {"stride": (4, 6), "padding": (2, 1), "dilation": (6, 4), "pool": None}
    ),
    "wide dilation": Case((1, 1, 9, 90), (3, 1, 2, 5), {"dilation": (5, 17)}),
    "stride beyond the filter": Case((2, 3, 21, 23), (4, 3, 2, 1), {"stride": (4, 3)}),
    "padding beyond the filter": Case((1, 2, 5, 6), (6, 2, 3, 2), {"padding": (5, 4)}),
    "no pool": Case((2, 3, 12, 10), (16, 3, 3, 3), {"stride": 2, "padding": 1, "pool": None}),
    "no bias": Case((2, 1, 12, 11), (12, 1, 3, 3), {}, bias=False),
    "pool 2x3": Case((1, 1, 14, 19), (10, 1, 3, 2), {"pool_size": (2, 3), "pool_stride": (1, 2), "pool_padding": 1}),
    "pool 5x7": Case((1, 1, 17, 22), (6, 1, 3, 3), {"pool_size": (5, 7), "pool_stride": (2, 3), "pool_padding": 2}),
    "pool of 255": Case((1, 1, 17, 20), (3, 1, 1, 2), {"pool_size": (15, 17), "pool_stride": 1}),
    "pool with gaps": Case((1, 1, 20, 18), (8, 1, 3, 3), {"pool_stride": (3, 4)}),
    "ceil_mode": Case((2, 1, 14, 16), (7, 1, 3, 3), {"ceil_mode": True, **POOL3}),
    "ceil_mode, 2x2": Case((1, 1, 15, 13), (9, 1, 3, 3), {"ceil_mode": True}),
    "ceil_mode, padded": Case(
        (1, 2, 13, 12), (5, 2, 2, 2), {"padding": (1, 0), "pool_padding": 1, "ceil_mode": True, **POOL3}
    ),
    "avg": Case((2, 3, 12, 14), (17, 3, 3, 3), {"pool": "avg"}),
    "avg, overlapping": Case((1, 1, 12, 13), (6, 1, 3, 3), {"pool": "avg", "pool_size": (2, 4), "pool_stride": (1, 2)}),
    "avg, ceil_mode, padded": Case(
        (1, 2, 12, 11),
        (4, 2, 3, 3),
        {"stride": 2, "padding": 1, "pool": "avg", "pool_size": (2, 3), "pool_stride": 2, "pool_padding": 1}
        | {"ceil_mode": True},
    ),
    "one dimension": Case((2, 1, 1, 700), (8, 1, 1, 10), {"stride": (1, 5), "pool_size": (1, 3), "pool_stride": 2}),
    "wide": Case((1, 1, 3, 1100), (3, 1, 3, 3), {"padding": 1}),
    "tall": Case((1, 1, 600, 3), (3, 1, 3, 2), {"padding": 1}),
    "484 taps": Case((1, 4, 13, 14), (9, 4, 11, 11), {"padding": (2, 3)}),
    "512 taps in a row": Case((1, 1, 2, 530), (2, 1, 1, 512), {"pool": None}),
    "many filters": Case((10, 1, 5, 4), (1000, 1, 2, 2), {}),  # a block sums over several images
    "empty batch": Case((0, 3, 8, 8), (4, 3, 3, 3), {}),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory):
    torch.ops.load_library(build.operation("conv_relu_pool", tmp_path_factory.mktemp("cuda_on_cpu"), SANITIZE))


def inputs(case: Case, dtype=torch.float32, whole=False):
    """x, w, b, a gradient of y, and the geometry. `whole`: small integers, whose sums are exact and often equal."""
    geometry = geometry_of(case)
    x, w, b = draw(case, dtype)
    dy = torch.randn(len(x), len(w), *geometry.pooled_size(geometry.conv_size(x.shape[2:], w.shape[2:]))).to(dtype)
    if whole:
        x, w, b, dy = (None if t is None else torch.randint_like(t, -2, 3) for t in (x, w, b, dy))
    return x, w, b, dy, geometry


def fwd(x, w, b, geometry, save_index=True):
    return torch.ops.fastarch.conv_relu_pool_direct_fwd(x, w, b, *geometry, save_index)


def bwd(dy, x, w, index, geometry, output_mask=(True, True, True)):
    return torch.ops.fastarch.conv_relu_pool_direct_bwd(dy, x, w, index, *geometry, output_mask)


def run_direct(x, w, b, dy, geometry):
    """As `run` in conv_relu_pool_cases."""
    y, index = fwd(x, w, b, geometry)
    results = dict(zip(("y", "dx", "dw", "db"), (y, *bwd(dy, x, w, index, geometry))))
    return results if b is not None else {name: t for name, t in results.items() if name != "db"}


def window_index(x, w, b, geometry):
    """`index` as ops/conv_relu_pool.py defines it, in plain torch."""
    conv = F.conv2d(x, w, b, geometry.stride, geometry.padding, geometry.dilation)
    (OH, OW), (h, w) = conv.shape[2:], geometry.pool_size
    PH, PW = geometry.pooled_size((OH, OW))
    best = conv.new_zeros(*conv.shape[:2], PH, PW)
    index = torch.full(best.shape, 0 if geometry.pool == "avg" else 255, dtype=torch.int64)
    rows = torch.arange(PH)[:, None] * geometry.pool_stride[0] - geometry.pool_padding[0]
    columns = torch.arange(PW) * geometry.pool_stride[1] - geometry.pool_padding[1]
    for i, j in product(range(h), range(w)):
        row, column = rows + i, columns + j
        inside = (row >= 0) & (row < OH) & (column >= 0) & (column < OW)
        value = conv[:, :, row.clamp(0, OH - 1), column.clamp(0, OW - 1)]
        if geometry.pool == "avg":
            index |= (inside & ~(value <= 0)).long() << (i * w + j)
        else:
            takes = inside & ((value > best) | value.isnan())
            best = torch.where(takes, value, best)
            index = torch.where(takes, i * w + j, index)
    return index.byte()


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(case, dtype):
    x, w, b, dy, geometry = inputs(case, dtype)
    got = run_direct(x, w, b, dy, geometry)
    eager = run(reference_of(geometry), (x, w, b), dy)
    truth = run(reference_of(geometry), double((x, w, b)), dy.double())
    assert got.keys() == truth.keys()
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])


@each_case
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_integers_are_exact(case, order, monkeypatch):
    """Also the test for races: a result that leans on the order of threads is wrong in one of the two."""
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    x, w, b, dy, geometry = inputs(case, whole=True)
    _, index = fwd(x, w, b, geometry)
    assert index.dtype == torch.uint8 and torch.equal(index, window_index(x, w, b, geometry))
    got, want = run_direct(x, w, b, dy, geometry), run(reference_of(geometry), (x, w, b), dy)
    rounding = 1e-5 if geometry.pool == "avg" else 0  # of the division
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rounding, atol=rounding, msg=named(name))


def named(name: str):
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("pool", ["max", "avg", None])
def test_nan(pool):
    x, w, b, dy, geometry = inputs(Case((2, 3, 15, 14), (7, 3, 3, 3), {"padding": 1, "pool": pool}), whole=True)
    x[0, 1, 4, 5] = x[1, 2, 14, 13] = float("nan")
    _, index = fwd(x, w, b, geometry)
    assert torch.equal(index, window_index(x, w, b, geometry))
    got, want = run_direct(x, w, b, dy, geometry), run(reference_of(geometry), (x, w, b), dy)
    for name in ("y", "dx", "db"):  # dw is NaN in fewer places: what carries no gradient is not multiplied by it
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, equal_nan=True, msg=named(name))


def strided(t):
    """Equal values in a larger tensor, at strides that are neither contiguous nor channels_last."""
    padded = t.new_full([2 * n + 3 for n in t.shape], float("nan") if t.is_floating_point() else 0)
    view = padded[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    return view.copy_(t)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def transposed(t):
    return t.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = {"contiguous": torch.clone, "channels_last": channels_last, "strided": strided, "transposed": transposed}


@pytest.mark.parametrize("name", ["resnet_stem", "avg", "ceil_mode, 2x2"])
@pytest.mark.parametrize("grad_layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(name, layout, grad_layout):
    """Any strides give the same bits; results come in the input's memory format."""
    x, w, b, dy, geometry = inputs(CASES[name])
    y, index = fwd(x, w, b, geometry)
    want = [y, index, *bwd(dy, x, w, index, geometry)]

    x, w, dy = layout(x), layout(w), grad_layout(dy)
    y, index = fwd(x, w, b, geometry)
    got = [y, index, *bwd(dy, x, w, grad_layout(index), geometry)]
    assert all(torch.equal(a, e) for a, e in zip(got, want))
    for t in got[:3]:
        assert t.is_contiguous(memory_format=memory_format(x))
    assert got[3].is_contiguous(memory_format=memory_format(w))


def test_expanded():
    """Strides of 0: y.sum() sends such a gradient."""
    x, w, b, dy, geometry = inputs(CASES["notes_conv1"])
    x, dy = x[:1].expand(3, -1, -1, -1), dy[:1, :1, :1, :1].expand_as(dy)
    got = run_direct(x, w, b[:1].expand_as(b), dy, geometry)
    want = run_direct(x.contiguous(), w, b[:1].expand_as(b).contiguous(), dy.contiguous(), geometry)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_offsets_beyond_32_bits():
    """Elements more than 2^31 apart, in memory that is reserved but hardly touched."""
    far = 2**31 + 11
    x, w, b, dy, geometry = inputs(Case((2, 1, 9, 8), (2, 1, 3, 3), {}), torch.float16)
    y, index = fwd(x, w, b, geometry)
    want = [y, *bwd(dy, x, w, index, geometry)]

    def spread(t):
        N, K, H, W = t.shape
        return t.new_empty(far * (N * K - 1) + H * W).as_strided(t.shape, (far * K, far, W, 1)).copy_(t)

    torch.utils.deterministic.fill_uninitialized_memory = False  # or all of it would be touched
    try:
        x, dy, index = spread(x), spread(dy), spread(index)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    got = [fwd(x, w, b, geometry)[0], *bwd(dy, x, w, index, geometry)]
    assert all(torch.equal(a, e) for a, e in zip(got, want))


@pytest.mark.parametrize("output_mask", [*product([True, False], repeat=3)], ids=str)
def test_output_mask(output_mask):
    x, w, b, dy, geometry = inputs(CASES["lenet_c1"])
    _, index = fwd(x, w, b, geometry)
    every = bwd(dy, x, w, index, geometry)
    for got, want, wanted in zip(bwd(dy, x, w, index, geometry, output_mask), every, output_mask):
        assert torch.equal(got, want) if wanted else got.shape == (0,)


def test_without_index():
    x, w, b, _, geometry = inputs(CASES["lenet_c1"])
    y, index = fwd(x, w, b, geometry, save_index=False)
    assert torch.equal(y, fwd(x, w, b, geometry)[0]) and index.shape == (0,) and index.dtype == torch.uint8


@pytest.mark.parametrize("name", ["resnet_stem", "two channels, two tiles", "avg, overlapping"])
def test_same_bits_in_any_order(name, monkeypatch):
    """Run again, with blocks and threads in another order: not one bit differs."""
    x, w, b, dy, geometry = inputs(CASES[name])

    def everything():
        y, index = fwd(x, w, b, geometry)
        return [y, index, *bwd(dy, x, w, index, geometry)]

    want = everything()
    for order in ("ascending", "descending", "1", "2"):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        assert all(torch.equal(a, e) for a, e in zip(everything(), want)), order


@pytest.mark.parametrize("code", [200, 254, 255])
@pytest.mark.parametrize("name", ["resnet_stem", "pool of 255", "avg"])
def test_any_index_is_safe(name, code):
    """A byte that no forward would write must not lead a read astray: the sanitizers watch."""
    x, w, _, dy, geometry = inputs(CASES[name])
    bwd(dy, x, w, torch.full(dy.shape, code, dtype=torch.uint8), geometry)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_routed_here_fits(monkeypatch, data):
    """The rule in ops/conv_relu_pool.py is simpler than what the kernels can do, and never sends them more."""

    def pair(least, most):
        return data.draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    dilated = data.draw(st.booleans())  # half of them not, for of large dilated filters few are routed here
    geometry = Geometry(
        *(pair(1, 5), (0, 0), pair(1, 40) if dilated else (1, 1), 1),
        *("max", pair(1, 15), pair(1, 20), (0, 0), data.draw(st.booleans())),
    )
    size = pair(1, 9) if dilated else pair(1, 24)
    w = torch.zeros(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5)), *size)
    monkeypatch.setattr(extension, "cuda", extension)
    chosen = route("cuda", torch.float32, 1, tuple(w.shape), geometry).kernel
    size = geometry.footprint(w.shape[2:])
    assume(chosen == "direct")
    x = torch.zeros(1, w.shape[1], *size)
    y, index = fwd(x, w, None, geometry)
    bwd(y, x, w, index, geometry)


def test_large_dilated_filters_are_not_routed_here(monkeypatch):
    monkeypatch.setattr(extension, "cuda", extension)
    for stride, dilation in (((1, 6), (1, 6)), ((1, 1), (1, 8))):
        geometry = Geometry(stride, (0, 0), dilation, 1, "max", (1, 1), (1, 1), (0, 0), False)
        assert route("cuda", torch.float32, 1, (1, 1, 18, 17), geometry).kernel == "library"


def test_errors():
    x, w, b, dy, g = inputs(CASES["lenet_c1"])
    _, index = fwd(x, w, b, g)
    for error, message, call in (
        (ValueError, "want input", lambda: fwd(x[0], w, b, g)),
        (ValueError, "want input", lambda: fwd(x, w.expand(-1, 2, -1, -1), b, g)),
        (ValueError, "groups", lambda: fwd(x, w, b, g._replace(groups=2))),
        (TypeError, "want weight", lambda: fwd(x, w.double(), b, g)),
        (TypeError, "want bias", lambda: fwd(x, w, b.half(), g)),
        (ValueError, "want bias", lambda: fwd(x, w, b[1:], g)),
        (TypeError, "want float32", lambda: fwd(x.long(), w.long(), b.long(), g)),
        (ValueError, "want pool", lambda: fwd(x, w, b, g._replace(pool="min"))),
        (ValueError, "want stride", lambda: fwd(x, w, b, g._replace(stride=(0, 1)))),
        (ValueError, "want padding", lambda: fwd(x, w, b, g._replace(padding=(0, -1)))),
        (ValueError, "want dilation", lambda: fwd(x, w, b, g._replace(dilation=(1, 1 << 20)))),
        (ValueError, "elements in a window", lambda: fwd(x, w, b, g._replace(pool="avg", pool_size=(3, 3)))),
        (ValueError, "elements in a window", lambda: fwd(x, w, b, g._replace(pool="none"))),
        (ValueError, "pool_padding", lambda: fwd(x, w, b, g._replace(pool_padding=(2, 0)))),
        (ValueError, "leave a convolution", lambda: fwd(x, w, b, g._replace(dilation=(4, 1)))),
        (ValueError, "leave a convolution", lambda: fwd(x[:, :, :5], w, b, g)),
        (ValueError, "at most 4 input channels", lambda: fwd(x.expand(-1, 5, -1, -1), w.expand(-1, 5, -1, -1), b, g)),
        (
            ValueError,
            "fit shared memory",
            lambda: fwd(x, w[:, :, :1, :1], b, g._replace(stride=(99, 99), pool="none", pool_size=(1, 1))),
        ),
        (ValueError, "want grad_output", lambda: bwd(dy[:, :, 1:], x, w, index, g)),
        (ValueError, "want grad_output", lambda: bwd(dy, x, w, index[:, 1:], g)),
        (TypeError, "want index", lambda: bwd(dy, x, w, index.int(), g)),
        (TypeError, "want grad_output", lambda: bwd(dy.double(), x, w, index, g)),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.sanitized
def test_sanitized():
    """The tests above under AddressSanitizer and UndefinedBehaviorSanitizer, float32 for the values."""
    chosen = "not (float64 or float16 or shim or 32_bits or order or descending or (values and many))"
    build.run_sanitized(__file__, chosen)


# tests/cuda_on_cpu itself

SOUND = ["reverse", "fixed", "warp", "grid barrier", "limits", "unwritten", "waiting loop", "mma"]
RACES = ["no barrier", "warp barrier"]
REFUSED = {"deadlock": "deadlock", "no cooperation": "cooperative launch", "endless loop": "deadlock"}
OVERFLOWS = ["shared overflow", "global overflow", "fixed overflow"]
each_order = pytest.mark.parametrize("order", ["ascending", "descending", "1"])


@pytest.fixture(scope="session")
def shim_programs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "sanitized")]
    return [build.program(build.HERE / "shim_test.cu", folder, folder.name.startswith("san")) for folder in folders]


def run_shim(program, case, order):
    environment = {**os.environ, "CUDA_ON_CPU_ORDER": order}
    return subprocess.run([program, case], env=environment, capture_output=True, text=True)


@each_order
@pytest.mark.parametrize("case", SOUND)
def test_shim_runs_sound_kernels(shim_programs, case, order):
    for program in shim_programs:
        done = run_shim(program, case, order)
        assert done.returncode == 0, done.stderr


@each_order
@pytest.mark.parametrize("case", RACES)
def test_shim_shows_a_race(shim_programs, case, order):
    assert run_shim(shim_programs[0], case, order).returncode == 1


@each_order
@pytest.mark.parametrize("case", REFUSED)
def test_shim_refuses_what_would_hang(shim_programs, case, order):
    done = run_shim(shim_programs[0], case, order)
    assert done.returncode != 0 and REFUSED[case] in done.stderr


@pytest.mark.parametrize("case", OVERFLOWS)
def test_shim_catches_an_access_out_of_bounds(shim_programs, case):
    assert "heap-buffer-overflow" in run_shim(shim_programs[1], case, "ascending").stderr
