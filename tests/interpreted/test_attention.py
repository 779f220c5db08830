"""kernels/attention.py under the interpreter: through the operation and by its launchers, against float64."""

import itertools
import math

import pytest
import torch
from attention_cases import (
    CASES,
    FULL,
    NAMES,
    PLAIN,
    Case,
    arguments_of_fwd,
    double,
    draw,
    in_eager,
    in_torch,
    op,
    ours,
    run,
)
from closeness import assert_close
from fastarch.kernels import attention as kernels
from torch.nn import functional as F

import fastarch
from fastarch.ops import attention_decode, attention_varlen, scaled_dot_product_attention

# of infinities on their way through exponentials, and of masked lanes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """The operation with these launchers behind it, as it calls them on CUDA, and as on a Hopper GPU."""
    monkeypatch.setattr(kernels, "generation", lambda: 90)
    monkeypatch.setattr(op, "fwd", op.triton_fwd)
    monkeypatch.setattr(op, "bwd", op.triton_bwd)


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks so small that small shapes have three, of which the last is not full."""
    small = kernels.Tile(32, 64, 4, 2)
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, small))


def small(case: Case) -> Case:
    """Few blocks: each takes the interpreter milliseconds."""
    return case._replace(Lq=min(case.Lq, 90), Lk=min(case.Lk, 150))


FEW = [small(case) for case in CASES]
PAIRS = [*((case, torch.float32) for case in FEW), *zip(FEW[1::2], itertools.cycle(HALF)), *((FULL, d) for d in HALF)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_values_lse_and_gradients(case, dtype):
    compare(case, dtype)


def compare(case: Case, dtype: torch.dtype) -> None:
    """Over three draws of float32: where few elements are drawn, eager's largest error is small now and then."""
    results = []
    for draw_number in range(3 if dtype == torch.float32 else 1):
        torch.manual_seed(draw_number)
        drawn = draw(case, dtype)
        grad_output = torch.randn(case.B, case.H, case.Lq, case.Dv or case.D).to(dtype)
        grad_lse = torch.randn(case.B, case.H, case.Lq)
        results.append(
            (
                run(ours, case, drawn, grad_output, grad_lse),
                run(in_eager, case, drawn, grad_output, grad_lse),
                run(in_torch, case, double(drawn), grad_output.double(), grad_lse.double()),
            )
        )
    got, eager, truth = ({name: torch.stack([r[name] for r in each]) for name in each[0]} for each in zip(*results))
    assert got.keys() == truth.keys()
    for name in truth:
        if name == "dmask" and case.mask == "float ":
            continue  # one sum of all scores' gradients, which cancel
        assert_close(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("supply", ["plain", "options"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_tile_of_the_table(width, supply, monkeypatch):
    """The tiles as they are, and no others at hand: a wrong choice is an error."""
    these = {key: tile for key, tile in kernels.TILES.items() if key[1:] == ("half", width, supply)}
    monkeypatch.setattr(kernels, "TILES", these)
    case = Case(1, 2, 70, 150, width, causal=True) if supply == "plain" else FULL._replace(B=1, D=width, Dv=width)
    compare(case, torch.bfloat16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", [FULL, PLAIN], ids=str)
def test_without_descriptors(case, monkeypatch):
    """As on GPUs before Hopper."""
    monkeypatch.setattr(kernels, "generation", lambda: 80)
    compare(case, torch.float32)


@pytest.mark.usefixtures("small_tiles")
def test_dropout_of_blocks_of_32_keys(monkeypatch):
    tile = kernels.Tile(32, 32, 4, 2)
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, tile))
    compare(FULL._replace(B=1), torch.float32)


VIEWS = {
    "sliced": lambda t: torch.stack((t, t), -1)[..., 0],
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "a third": lambda t: torch.cat([t, t, t], -1)[..., t.shape[3] : 2 * t.shape[3]],
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype, view):
    case = FULL._replace(H=2, Hkv=1)
    drawn, grad_output = draw(case, dtype), torch.randn(2, 2, 39, 12).to(dtype)
    strided = {name: VIEWS[view](t) if name in NAMES else t for name, t in drawn.items()}
    got, want = run(ours, case, strided, VIEWS[view](grad_output)), run(ours, case, drawn, grad_output)
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.usefixtures("small_tiles")
def test_described_and_addressed_tensors_give_the_same(monkeypatch):
    case = Case(2, 4, 70, 90, 16, 32, Hkv=2, causal=True)
    drawn, grad_output = draw(case, torch.float32), torch.randn(2, 4, 70, 32)
    answers = []
    by_layout = kernels.can_be_described
    monkeypatch.setattr(kernels, "can_be_described", lambda *args: answers.append(by_layout(*args)) or answers[-1])
    want = run(ours, case, drawn, grad_output)
    assert answers == [True] * 3
    monkeypatch.setattr(kernels, "can_be_described", lambda *_: False)
    got = run(ours, case, drawn, grad_output)
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.usefixtures("small_tiles")
def test_slopes_of_any_strides():
    """Kernels read them one after the other."""
    case = Case(2, 4, 20, 30, 16, alibi=True)
    drawn = draw(case, torch.float32)
    slopes = drawn["alibi_slopes"]
    for strided in (
        torch.stack((slopes, slopes + 9), -1)[..., 0],
        slopes.T.contiguous().T,
        slopes[:1, :1].expand(2, 4),
    ):
        got, want = (run(ours, case, drawn | {"alibi_slopes": t}) for t in (strided, strided.contiguous()))
        assert torch.equal(got["o"], want["o"])


def test_what_is_copied_and_what_is_not():
    """TMA and vectors want steps of whole 16 bytes; a row is filled up with zeros."""
    t = torch.randn(2, 3, 5, 24)
    for same in (t, t[..., :16], t[:, :, ::2], t.transpose(1, 2), t[:1].expand(2, -1, -1, -1)):
        assert kernels.readable(same) is same
    for other in (
        t[..., 1:],
        t[..., :6],
        t.transpose(2, 3),
        torch.randn(2, 3, 5, 25)[..., :24],
        t.bfloat16()[..., :20],
    ):
        copy = kernels.readable(other)
        assert torch.equal(copy[..., : other.shape[3]], other)
        assert copy.is_contiguous()
        assert copy.shape[3] * copy.element_size() % 16 == 0
        assert not copy[..., other.shape[3] :].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", [FULL, PLAIN._replace(causal=True)], ids=str)
def test_only_the_gradients_that_are_asked_for(case):
    drawn = draw(case, torch.float32)
    grad_output = torch.randn(case.B, case.H, case.Lq, case.Dv or case.D)
    want = run(ours, case, drawn, grad_output)
    names = [name for name in NAMES if drawn[name] is not None]
    for name in names:
        chosen = drawn[name].clone().requires_grad_()
        torch.manual_seed(7)
        (grad,) = torch.autograd.grad(ours(case, drawn | {name: chosen})[0], chosen, grad_output)
        assert torch.equal(grad, want[NAMES[name]]), name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(scale):
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    results = [f(q, k, v, scale=scale) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention)]
    torch.testing.assert_close(*results)
    for got, want in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in results)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_rows_without_keys_give_nothing():
    case = Case(2, 2, 60, 50, 16, mask="bool bij")
    drawn = draw(case, torch.float32)
    drawn["attn_mask"][0, :, 7], drawn["attn_mask"][1] = False, False
    got = run(ours, case, drawn, torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60))
    assert not got["o"][0, :, 7].any()
    assert not got["dq"][0, :, 7].any()
    assert not any(got[name][1].any() for name in ("o", "dq", "dk", "dv"))
    assert (got["lse"][1] == -math.inf).all()
    assert all(not got[name].isnan().any() for name in got)


TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
PACKED = [(5, 9), (0, 3), (80, 70), (7, 0), (33, 20)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_sequences(dtype, dropout_p):
    """As by the reference; what is NaN in one sequence stays there."""
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(ns)], dtype=torch.int32) for ns in zip(*PACKED))
    q, k, v = torch.randn(125, 4, 16), torch.randn(102, 2, 16), torch.randn(102, 2, 8)
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    options = {"is_causal": True, "window": (50, 0), "alibi_slopes": torch.rand(5, 4), "dropout_p": dropout_p}
    grads = torch.randn(125, 4, 8).to(dtype), torch.randn(125, 4)

    def results(q, k, v):
        torch.manual_seed(3)
        o, lse = attention_varlen(q, k, v, cu_q, cu_k, 80, 70, **options, return_lse=True)
        return o, lse, *torch.autograd.grad((o, lse), (q, k, v), grads)

    got = results(q, k, v)
    with fastarch.reference():
        want = results(q, k, v)
    for ours_, theirs in zip(got, want):
        torch.testing.assert_close(ours_, theirs, **TOLERANCE[dtype])
    poisoned = [t.detach().clone() for t in (q, k, v)]
    for t, cu in zip(poisoned, (cu_q, cu_k, cu_k)):
        t[cu[2] : cu[3]] = math.nan
    poisoned = results(*(t.requires_grad_() for t in poisoned))
    for name, ours_, clean in zip(("o", "lse", "dq", "dk", "dv"), poisoned, got):
        ends = cu_k if name in ("dk", "dv") else cu_q
        others = torch.ones(len(clean), dtype=torch.bool)
        others[ends[2] : ends[3]] = False
        assert torch.equal(ours_[others], clean[others]), name


@pytest.mark.usefixtures("small_tiles")
def test_ends_out_of_range_reach_nothing_else():
    """Ends are not read before the launch; the kernels cut them to what there is."""
    q, k = torch.randn(20, 2, 8), torch.randn(30, 2, 8)
    wild = torch.tensor([0, 7, 99], dtype=torch.int32), torch.tensor([-4, 30, 1000], dtype=torch.int32)
    given = [q.transpose(0, 1)[None], *(k.transpose(0, 1)[None],) * 2, None, None, *wild, None, None, 20, 30]
    o, _ = op.fwd(*given, 1.0, -1, -1, True, 0.0, 0.0, "flash")
    assert o[0, :, :7].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 3, 100])
def test_decode(dtype, parts, monkeypatch):
    """Against the reference; what a cache holds beyond its filled part counts for nothing."""
    monkeypatch.setattr(kernels, "processors", lambda _: parts)
    q, k, v = torch.randn(3, 6, 3, 24), torch.randn(3, 2, 300, 24), torch.randn(3, 2, 300, 40)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    filled = torch.tensor([300, 1, 77], dtype=torch.int32)
    for b, n in enumerate(filled.tolist()):
        k[b, :, n:], v[b, :, n:] = math.nan, math.nan
    clean = k.nan_to_num(0), v.nan_to_num(0)
    for options in ({}, {"window": (150, 0), "softcap": 2.0, "alibi_slopes": torch.rand(3, 6)}):
        got = attention_decode(q, k, v, filled, **options, return_lse=True)
        with fastarch.reference():
            want = attention_decode(q, *clean, filled, **options, return_lse=True)
        for ours_, theirs in zip(got, want):
            torch.testing.assert_close(ours_, theirs, **TOLERANCE[dtype])


def test_decode_with_a_mask_of_heads():
    """Which no public function passes, but the schema takes."""
    case = Case(2, 4, 3, 90, 16, Hkv=2, mask="float bhij")
    given = arguments_of_fwd(case, torch.float32)
    want = in_torch(case, dict(list(given.items())[:5]))
    got = op.triton_fwd(*(given | {"algorithm": "split"}).values())
    for ours_, theirs in zip(got, want):
        torch.testing.assert_close(ours_, theirs)


@pytest.mark.usefixtures("small_tiles")
def test_the_same_bits_again():
    drawn, grad_output = draw(FULL, torch.bfloat16), torch.randn(2, 4, 39, 12).bfloat16()
    first, second = (run(ours, FULL, drawn, grad_output) for _ in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_nonsense_in_direct_calls_raises():
    given = arguments_of_fwd(FULL, torch.float32)
    q, k, v = (given[name] for name in "qkv")
    bad = [
        {"k": k[:1]},
        {"k": k[..., :-1]},
        {"v": v[:, :, :-1]},
        {"q": q[:, :3]},
        {"v": v.double()},
        {"mask": given["mask"][..., :-1]},
        {"alibi_slopes": torch.zeros(3)},
        {"alibi_slopes": torch.zeros(3, 4)},
        {"seqlens_k": torch.zeros(3, dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([0, 39], dtype=torch.int32)},
        {"seed": None},
        {"algorithm": "magic"},
        {"algorithm": "split"},  # with dropout
    ]
    for wrong in bad:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            op.triton_fwd(*(given | wrong).values())
    output, lse = op.triton_fwd(*given.values())
    *rest, _ = given.values()
    empty = [torch.empty_like(t) for t in (q, k, v, given["mask"])]
    results = {"grad_output": output, "grad_lse": lse, "output": output, "lse": lse}
    for name in results:
        some = results | {name: results[name][..., :-1]}
        saved = some["output"], some["lse"]
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            kernels.attention_bwd(some["grad_output"], some["grad_lse"], *rest[:9], *saved, *rest[9:], *empty)


def test_the_launch_does_not_depend_on_lengths_or_the_batch():
    """As Triton would compile again for others."""
    constants = []
    for B, length in ((1, 16), (3, 97), (64, 4096)):
        q = torch.empty(B, 2, length, 64, device="meta")
        problem = kernels.Problem(q, q, q, *(None,) * 6, length, length, 1.0, -1, 0, False, 0.0, 0.0, 64, 64)
        constants.append(kernels.launch_of("fwd", problem, q, q, q))
    assert constants[0] == constants[1] == constants[2]


def test_float32_products_follow_torchs_setting(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, name in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = setting
            assert kernels.precision() == name
    finally:
        matmul.fp32_precision = before
