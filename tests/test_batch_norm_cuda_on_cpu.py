"""The persistent CUDA kernels of batch_norm executed on the CPU (tests/cuda_on_cpu), against fastarch.ref.

FASTARCH_SANITIZE=1 builds them with AddressSanitizer and UndefinedBehaviorSanitizer, as `test_sanitized` does.
"""

import os
import shutil
from itertools import product

import pytest
import torch
from batch_norm_cases import CASES, EPS, Case, as_rows, double, draw, in_torch, run
from closeness import assert_close
from cuda_on_cpu import build

from fastarch.ops.batch_norm import fake_bwd, fake_fwd, mask_shape, unpacked

pytestmark = pytest.mark.skipif(shutil.which(build.cxx()) is None, reason=f"no C++ compiler {build.cxx()}")

SANITIZE = os.environ.get("FASTARCH_SANITIZE") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = (True, True, True, True)

# Of those in CASES, what the router sends here; and more rows than a few blocks keep, in slices of several widths.
ROWS = [case for case in CASES if case.training and case.x[1] > 1]
LONG = [
    Case((2, 8, 40, 41), residual=True, relu=True),  # slices of 8 channels, hundreds of rows in a tile
    Case((3, 24, 20, 21), relu=True),
    Case((1900, 72), residual=True, relu=True, bias=False),  # several slices, the last one not full
    Case((2, 64, 25, 26), relu=True),
    Case((2, 100, 9, 50), relu=True, weight=False),  # one element at a time: 100 is no multiple of 8
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory):
    torch.ops.load_library(build.operation("batch_norm", tmp_path_factory.mktemp("cuda_on_cpu"), SANITIZE))


@pytest.fixture
def device(monkeypatch):
    """Sets the size of the device: multiprocessors, and KB of shared memory in each."""

    def resize(multiprocessors: int, shared: int) -> None:
        monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", str(multiprocessors))
        monkeypatch.setenv("CUDA_ON_CPU_SHARED", str(shared * 1024))

    return resize


def inputs(case: Case, dtype=torch.float32):
    drawn = draw(case, dtype, channels_last=True)
    return drawn, as_rows(torch.randn(case.x).to(dtype))


def floats(drawn):
    """weight and bias as the public function hands them on."""
    return [None if drawn[name] is None else drawn[name].float() for name in ("weight", "bias")]


def fwd(case, drawn, save_mask=None):
    save_mask = case.relu and case.residual if save_mask is None else save_mask
    return torch.ops.fastarch.batch_norm_persistent_fwd(
        drawn["input"], drawn["residual"], *floats(drawn), EPS, case.relu, save_mask
    )


def bwd(case, drawn, dy, mean, var, mask, wanted=ALL):
    mask = mask if mask.numel() else None
    return torch.ops.fastarch.batch_norm_persistent_bwd(
        dy, drawn["input"], mask, *floats(drawn), mean, var, EPS, case.relu, wanted
    )


def everything(case, drawn, dy):
    y, mean, var, mask = fwd(case, drawn)
    return [y, mean, var, mask, *bwd(case, drawn, dy, mean, var, mask)]


def check(case, dtype):
    drawn, dy = inputs(case, dtype)
    y, mean, var, _, dx, dz, dweight, dbias = everything(case, drawn, dy)
    got = {"y": y, "dx": dx, "dresidual": dz, "dweight": dweight.to(dtype), "dbias": dbias.to(dtype)}
    eager = run(in_torch, drawn, dy, **case.options)
    truth = run(in_torch, double(drawn), dy.double(), **case.options)
    for name in truth.keys() & got.keys():
        assert_close(name, got[name], eager[name], truth[name])
    columns = drawn["input"].transpose(0, 1).flatten(1)
    for name, value, of in (("mean", mean, torch.mean), ("var", var, lambda t, dim: t.var(dim, correction=0))):
        assert_close(name, value, of(columns.float(), 1), of(columns.double(), 1))


@each_dtype
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_values_and_gradients(case, dtype):
    check(case, dtype)


# KB: with 12 nothing stays on chip, with 48 some, with 227 all
@pytest.mark.parametrize("multiprocessors, shared", [(1, 48), (2, 12), (3, 227), (7, 48)])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_devices(case, multiprocessors, shared, device):
    """Fewer blocks than slices, several rounds, and blocks that read some or all of their rows twice."""
    device(multiprocessors, shared)
    for dtype in DTYPES[:2]:
        check(case, dtype)


def z_of(case, drawn, mean, var):
    """What ReLU is applied to, in the kernel's own order: float32, with one rounding for the multiply-add."""
    along = (-1, *(1 for _ in case.x[2:]))
    weight, bias = (torch.full_like(mean, default) if t is None else t for t, default in zip(floats(drawn), (1.0, 0.0)))
    scale = weight * (1 / (var + EPS).sqrt())
    centred = drawn["input"].float() - mean.view(along)
    z = (centred.double() * scale.double().view(along) + bias.double().view(along)).float()
    return z if drawn["residual"] is None else z + drawn["residual"].float()


@each_dtype
@pytest.mark.parametrize("case", [case for case in ROWS + LONG if case.relu], ids=str)
def test_mask(case, dtype, device):
    """Bit by bit, and the backward does not mind whether it gets the bits or finds them itself."""
    device(2, 48)
    drawn, dy = inputs(case, dtype)
    _, mean, var, mask = fwd(case, drawn, save_mask=True)
    passed = ~(z_of(case, drawn, mean, var) <= 0)
    assert mask.dtype == torch.uint8 and mask.shape == mask_shape(drawn["input"])
    assert torch.equal(unpacked(mask, drawn["input"]).bool(), passed)
    if case.x[1] % 8:
        assert not (mask[:, -1] >> case.x[1] % 8).any()
    if not case.residual:
        given, found = (bwd(case, drawn, dy, mean, var, m) for m in (mask, mask[:0]))
        assert all(torch.equal(a, b) for a, b in zip(given, found))


def test_without_mask():
    drawn, _ = inputs(LONG[0])
    y, mean, var, mask = fwd(LONG[0], drawn, save_mask=False)
    assert mask.shape == (0,) and mask.dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip((y, mean, var), fwd(LONG[0], drawn)))


@pytest.mark.parametrize("shared", [48, 227])
@pytest.mark.parametrize("wanted", [*product([True, False], repeat=4)], ids=str)
def test_output_mask(wanted, shared, device):
    device(2, shared)
    case = LONG[1]
    drawn, dy = inputs(case)
    _, mean, var, mask = fwd(case, drawn)
    every = bwd(case, drawn, dy, mean, var, mask)
    for got, want, is_wanted in zip(bwd(case, drawn, dy, mean, var, mask, wanted), every, wanted):
        if not is_wanted:
            assert got.shape == (0,) and got.dtype == want.dtype
        elif want.dim() > 1:
            assert torch.equal(got, want) or not wanted[0]
        torch.testing.assert_close(got, want if is_wanted else got)  # without dx nothing is kept: sums in another order


@pytest.mark.parametrize("first", [None, 0.0, 1e6, -3e4])
@pytest.mark.parametrize("C", [5, 16])
def test_a_large_mean_does_not_cancel_the_variance(C, first, device):
    device(3, 48)
    x = torch.randn(4000, C) + 1e4
    if first is not None:
        x[:3] = first
    _, mean, var, _ = torch.ops.fastarch.batch_norm_persistent_fwd(x, None, None, None, EPS, False, False)
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(0, correction=0), rtol=1e-4, atol=0)


def test_constant_channels():
    x = torch.full((300, 16), 1e4 / 3)
    y, mean, var, _ = torch.ops.fastarch.batch_norm_persistent_fwd(x, None, None, None, EPS, False, False)
    assert torch.equal(mean, x[0]) and not var.any() and not y.any()


@pytest.mark.parametrize("case", LONG[:2], ids=str)
def test_nan(case):
    drawn, dy = inputs(case)
    drawn["input"][1, 3, 2, 1] = float("nan")
    got = everything(case, drawn, dy)
    want = run(in_torch, drawn, dy, **case.options)
    for t, name in zip((got[0], got[4], got[6]), ("y", "dx", "dweight")):
        assert torch.equal(t.isnan(), want[name].isnan()), name
    assert got[0][:, 3].isnan().all() and not got[0][:, 4].isnan().any()


@pytest.mark.parametrize("shared", [48, 227])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_same_bits_in_any_order(case, shared, device, monkeypatch):
    """Run again, with blocks and threads in another order: not one bit differs. A race would show."""
    device(3, shared)
    drawn, dy = inputs(case, torch.bfloat16)
    want = everything(case, drawn, dy)
    for order in ("ascending", "descending", "1"):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        assert all(torch.equal(a, b) for a, b in zip(everything(case, drawn, dy), want)), order


def strided(t):
    """Equal values in a larger tensor, at strides of neither layout."""
    padded = t.new_full([2 * n + 3 for n in t.shape], float("nan"))
    return padded[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)].copy_(t)


def misaligned(t):
    """The same layout, beginning 2 or 4 bytes after a multiple of 16."""
    return t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride()).copy_(t)


LAYOUTS = {"rows": as_rows, "planes": torch.Tensor.contiguous, "strided": strided, "misaligned": misaligned}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, dtype):
    """Residual and gradient have any strides; what comes back has those that the fakes promise."""
    case = LONG[0]
    drawn, dy = inputs(case, dtype)
    want = everything(case, drawn, dy)
    if layout is misaligned:
        drawn["input"] = misaligned(drawn["input"])
    drawn["residual"] = layout(drawn["residual"])
    got = everything(case, drawn, layout(dy))
    promised = [*fake_fwd(drawn["input"], True, True), *fake_bwd(drawn["input"], want[1], ALL)]
    for a, b, p in zip(got, want, promised):
        assert torch.equal(a, b)
        assert (a.shape, a.stride(), a.dtype) == (p.shape, p.stride(), p.dtype)


def test_pixels():
    """[N, C] and images of one pixel are rows at any strides."""
    case = Case((40, 24), relu=True)
    drawn, dy = inputs(case)
    want = everything(case, drawn, dy)
    for reshaped in (lambda t: t.t().contiguous().t(), lambda t: t[:, :, None, None], strided):
        others = drawn | {"input": reshaped(drawn["input"])}
        got = everything(case, others, reshaped(dy))
        promised = [*fake_fwd(others["input"], False, True), *fake_bwd(others["input"], want[1], ALL)]
        for a, b, p in zip(got, want, promised):
            assert torch.equal(a.reshape(b.shape), b) and a.stride() == p.stride()


def test_expanded():
    """Strides of 0: y.sum() sends such a gradient."""
    case = LONG[1]
    drawn, dy = inputs(case)
    _, mean, var, mask = fwd(case, drawn)
    dy = dy[:1, :1, :1, :1].expand_as(dy)
    got, want = (bwd(case, drawn, t, mean, var, mask) for t in (dy, as_rows(dy)))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_errors():
    case = Case((3, 16, 5, 4), residual=True, relu=True)
    drawn, dy = inputs(case)
    _, mean, var, mask = fwd(case, drawn)
    x = drawn["input"]

    def forward(**changed):
        return lambda: fwd(case, drawn | changed)

    def backward(dy=dy, mean=mean, var=var, mask=mask, **changed):
        return lambda: bwd(case, drawn | changed, dy, mean, var, mask)

    for error, message, call in (
        (ValueError, "want an input", forward(input=x.contiguous())),
        (ValueError, "want an input", forward(input=x[:, :1], weight=None, bias=None)),
        (ValueError, "want an input", forward(input=x[:0])),
        (ValueError, "want an input", forward(input=x[0, :, 0, 0])),
        (TypeError, "want float32", forward(input=x.double())),
        (ValueError, "want residual", forward(residual=x[:, :, 1:])),
        (TypeError, "want residual", forward(residual=x.half())),
        (ValueError, "want weight", forward(weight=mean[1:])),
        (ValueError, "want bias", forward(bias=mean[None])),
        (ValueError, "want an input", backward(input=x.contiguous())),
        (ValueError, "want grad_output", backward(dy=dy[1:])),
        (TypeError, "want grad_output", backward(dy=dy.bfloat16())),
        (ValueError, "want mask", backward(mask=mask[1:])),
        (TypeError, "want mask", backward(mask=mask.int())),
        (ValueError, "want mean", backward(mean=mean[1:])),
        (TypeError, "want var", backward(var=var.double())),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.sanitized
def test_sanitized():
    """Some of the tests above under AddressSanitizer and UndefinedBehaviorSanitizer."""
    chosen = "(values and bfloat16) or layouts or pixels or (devices and 1-48)"
    build.run_sanitized(__file__, chosen)
