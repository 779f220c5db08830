"""The persistent CUDA kernels of gru executed on the CPU (tests/cuda_on_cpu), against fastarch.ref.

FASTARCH_SANITIZE=1 builds them with AddressSanitizer and UndefinedBehaviorSanitizer, as `test_sanitized` does.
"""

import os
import shutil

import pytest
import torch
from cuda_on_cpu import build
from gru_cases import CASES, FULL, GRADIENTS, PLAIN, Case, compare, draw, draw_gradients, op

pytestmark = pytest.mark.skipif(shutil.which(build.cxx()) is None, reason=f"no C++ compiler {build.cxx()}")

SANITIZE = os.environ.get("FASTARCH_SANITIZE") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = (True,) * 6
INPUTS = ("input", "h0", "w_ih", "w_hh", "b_ih", "b_hh", "lengths")
WALKED = [case for case in CASES if case.reset_after and case.T < 50]  # a thread of the GPU is a fiber here
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory):
    torch.ops.load_library(build.operation("gru", tmp_path_factory.mktemp("cuda_on_cpu"), SANITIZE))


@pytest.fixture
def device(monkeypatch):
    """Sets the size of the device: multiprocessors, and KB of shared memory in each."""

    def resize(multiprocessors: int, shared: int) -> None:
        monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", str(multiprocessors))
        monkeypatch.setenv("CUDA_ON_CPU_SHARED", str(shared * 1024))

    return resize


def fwd(drawn: dict, reverse: bool, save_gates: bool = True, tf32: bool = False):
    given = (drawn[name] for name in INPUTS)
    return torch.ops.fastarch.gru_persistent_fwd(*given, reverse, True, save_gates, tf32)


def bwd(drawn: dict, gradients, output, gates, reverse: bool, tf32: bool = False, wanted=ALL):
    given = (drawn[name] for name in INPUTS[:4])
    return torch.ops.fastarch.gru_persistent_bwd(
        *gradients, *given, output, gates, drawn["lengths"], reverse, True, tf32, wanted
    )


def everything(case: Case, drawn: dict, gradients, tf32: bool = False) -> dict:
    output, h_n, gates = fwd(drawn, case.reverse, tf32=tf32)
    grads = dict(zip(GRADIENTS, bwd(drawn, gradients, output, gates, case.reverse, tf32)))
    grads = {name: g for name, g in grads.items() if name[1:] not in drawn or drawn[name[1:]] is not None}
    return {"output": output, "h_n": h_n} | grads


class Persistent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lengths, reverse, *tensors):
        drawn = dict(zip(INPUTS, (*tensors, lengths)))
        output, h_n, gates = fwd(drawn, reverse)
        ctx.saved = drawn, output, gates, reverse
        return output, h_n

    @staticmethod
    def backward(ctx, *gradients):
        grads = bwd(ctx.saved[0], gradients, *ctx.saved[1:])
        return None, None, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[2:]))


def persistent(lengths, reverse, reset_after, **tensors):
    return Persistent.apply(lengths, reverse, *(tensors[name] for name in INPUTS[:6]))


def check(case: Case, dtype: torch.dtype) -> None:
    compare(persistent, case, dtype, most=3)


@each_dtype
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_values_and_gradients(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize(
    ("multiprocessors", "shared"),
    [(1, 227), (2, 100), (3, 64), (16, 227), (7, 48)],
)
def test_devices_of_other_sizes(multiprocessors, shared, device):
    """One block has all units, or few; there are as many batch slices as fit, or one."""
    device(multiprocessors, shared)
    check(Case(3, 21, 5, 50, lengths=True), torch.bfloat16)
    check(Case(3, 9, 4, 33, reverse=True), torch.float32)


def test_tf32(device):
    """Rounded to 10 bits of mantissa before they are multiplied: 2**-11 of each product, as on tensor cores."""
    case = Case(3, 9, 20, 40, reverse=True)
    drawn, gradients = draw(case, torch.float32), draw_gradients(case, torch.float32)
    exact, rounded = (everything(case, drawn, gradients, tf32) for tf32 in (False, True))
    for name, want in exact.items():
        difference = (rounded[name] - want).abs().max() / want.abs().max()
        assert 0 < difference < 2**-8, name


@pytest.mark.usefixtures("products_row_by_row")
@pytest.mark.parametrize("reverse", [False, True])
def test_what_stands_in_padding_counts_for_nothing(reverse):
    case = FULL._replace(reverse=reverse)
    drawn, gradients = draw(case, torch.bfloat16), draw_gradients(case, torch.bfloat16)
    want = everything(case, drawn, gradients)
    padding = (torch.arange(case.T).unsqueeze(1) >= drawn["lengths"]).unsqueeze(-1)
    drawn["input"] = drawn["input"].masked_fill(padding, float("nan"))
    got = everything(case, drawn, (gradients[0].masked_fill(padding, float("nan")), gradients[1]))
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("order", ["descending", "1", "2"])
def test_bits_do_not_depend_on_order_or_run(order, monkeypatch):
    case = Case(4, 19, 5, 37, lengths=True)
    drawn, gradients = draw(case, torch.bfloat16), draw_gradients(case, torch.bfloat16)
    want = everything(case, drawn, gradients)
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    for name, got in everything(case, drawn, gradients).items():
        assert torch.equal(got, want[name]), name


def test_gradients_that_are_not_wanted_or_not_given():
    drawn, gradients = draw(PLAIN, torch.float32), draw_gradients(PLAIN, torch.float32)
    output, _, gates = fwd(drawn, False)
    want = bwd(drawn, gradients, output, gates, False)
    for i in range(6):
        wanted = [j == i for j in range(6)]
        for j, got in enumerate(bwd(drawn, gradients, output, gates, False, wanted=wanted)):
            assert torch.equal(got, want[j]) if j == i else not got.numel()
    for i in range(2):
        absent, zeros = list(gradients), list(gradients)
        absent[i], zeros[i] = None, torch.zeros_like(gradients[i])
        for got, other in zip(*(bwd(drawn, g, output, gates, False) for g in (absent, zeros))):
            assert torch.equal(got, other)
    assert not fwd(drawn, False, save_gates=False)[2].numel()


def test_strides():
    drawn, gradients = draw(FULL, torch.float32), draw_gradients(FULL, torch.float32)
    want = everything(FULL, drawn, gradients)
    laid_out = {name: torch.stack([t, t], -1)[..., 1] for name, t in drawn.items()}
    got = everything(FULL, laid_out, [g.transpose(0, 1).contiguous().transpose(0, 1) for g in gradients])
    for name in want:
        torch.testing.assert_close(got[name], want[name])


DEVICES = {"A100": (108, 163), "H100": (132, 227), "small": (20, 99), "one": (1, 48)}


@pytest.mark.parametrize("name", DEVICES)
def test_the_router_knows_what_fits(name, device):
    multiprocessors, shared = DEVICES[name]
    device(multiprocessors, shared)
    for dtype in (torch.float32, torch.bfloat16):
        edge = next(
            H for H in range(16, 8192, 16) if not op.fits_on_chip(H, dtype.itemsize, multiprocessors, shared * 1024)
        )
        drawn = draw(Case(1, 1, 1, edge), dtype)
        with pytest.raises(ValueError, match=r"gru_persistent_fwd: the recurrent weights of H = \d+ .* do not fit"):
            fwd(drawn, False)
        if edge == 16:
            continue
        # just below, there is a plan: it is looked at after the weights, and before anything is allocated or launched
        drawn = draw(Case(1, 1, 1, edge - 16), dtype)
        drawn["input"] = drawn["input"].expand(2**32, 1, 1)
        with pytest.raises(ValueError, match=r"gru_persistent_fwd: want less than \d+ steps, got 4294967296"):
            fwd(drawn, False)
        if edge <= 400:  # what fits is launched, where that takes no time
            case = Case(2, 1, 1, edge - 16)
            everything(case, draw(case, dtype), draw_gradients(case, dtype))


def test_nonsense_in_direct_calls_raises():
    drawn, gradients = draw(FULL, torch.float32), draw_gradients(FULL, torch.float32)
    output, _, gates = fwd(drawn, False)
    refused = (ValueError, TypeError, RuntimeError)
    for name in INPUTS:
        t = drawn[name]
        for bad in (t[:0], t[..., :-1], t.unsqueeze(0), t.int(), t.double()):
            with pytest.raises(refused):
                fwd(drawn | {name: bad}, False)
    for i, t in enumerate((*gradients, output, gates)):
        for bad in (t[:-1], t[..., :-1], t.unsqueeze(0), t.double()):
            arguments = [*gradients, output, gates]
            arguments[i] = bad
            with pytest.raises(refused):
                bwd(drawn, arguments[:2], *arguments[2:], False)
    with pytest.raises(ValueError, match="want reset_after"):
        torch.ops.fastarch.gru_persistent_fwd(*(drawn[name] for name in INPUTS), False, False, True, False)


@pytest.mark.sanitized
def test_sanitized():
    build.run_sanitized(__file__, "(values and T7) or nonsense or not_wanted")
