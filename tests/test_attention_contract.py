"""Attention on CPUs: what PyTorch's users count on beside the values: derivatives, compilation, strides, errors."""

import importlib
import itertools
import math

import pytest
import torch
from attention_cases import (
    DTYPES,
    FULL,
    NAMES,
    PLAIN,
    SMALL,
    Case,
    arguments_of_bwd,
    arguments_of_fwd,
    double,
    draw,
    in_torch,
    leaves_of,
    ours,
    run,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastarch
from fastarch import extension, routing
from fastarch.ops import attention_decode, attention_varlen, scaled_dot_product_attention

op = importlib.import_module("fastarch.ops.attention")

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)

OPTIONS = [
    SMALL,
    SMALL._replace(causal=True),
    SMALL._replace(mask="float hij", softcap=1.5),
    SMALL._replace(H=4, Hkv=2, window=(2, 1), lower_right=True),
    SMALL._replace(mask="bool ij", Dv=3, alibi=True, dropout=0.3),
]


def named(name: str):
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_gradcheck(case):
    drawn = double(draw(case, torch.float64))
    leaves = leaves_of(drawn)

    def function(*tensors):
        torch.manual_seed(3)  # of dropout
        return ours(case, drawn | dict(zip(leaves, tensors)))

    assert torch.autograd.gradcheck(function, list(leaves.values()))
    assert torch.autograd.gradgradcheck(function, list(leaves.values()))


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("case", [PLAIN, FULL, SMALL._replace(mask="bool bj")], ids=str)
def test_opcheck(case, tokens_first):
    torch.library.opcheck(op.fwd, tuple(arguments_of_fwd(case, torch.float32, tokens_first).values()))
    arguments = arguments_of_bwd(case, torch.bfloat16, tokens_first)
    torch.library.opcheck(op.bwd, tuple(arguments.values()))
    without = {"grad_lse": None, "output_mask": [False, True, False, False]}
    torch.library.opcheck(op.bwd, tuple((arguments | without).values()))


@pytest.mark.parametrize("case", [PLAIN, FULL], ids=str)
def test_only_the_gradients_that_are_asked_for(case):
    drawn = draw(case, torch.float32)
    grad_output = torch.randn(case.B, case.H, case.Lq, case.Dv or case.D)
    want = run(ours, case, drawn, grad_output)
    names = [name for name in NAMES if drawn[name] is not None]
    for needed in itertools.product([True, False], repeat=len(names)):
        chosen = {name: drawn[name].clone().requires_grad_() for name, need in zip(names, needed) if need}
        torch.manual_seed(7)
        o = ours(case, drawn | chosen)[0]
        assert o.requires_grad == any(needed)
        if chosen:
            for name, grad in zip(chosen, torch.autograd.grad(o, list(chosen.values()), grad_output)):
                assert torch.equal(grad, want[NAMES[name]]), name


def strided(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    padded = torch.full([2 * size + 3 for size in t.shape], math.nan, dtype=t.dtype)
    sliced = padded[tuple(slice(1, 2 * size, 2) for size in t.shape)].copy_(t)
    return {
        "sliced": sliced,
        "reversed": t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "tokens first": t.transpose(1, 2).contiguous().transpose(1, 2),
        "a third": torch.cat([t, t, t], -1)[..., t.shape[3] : 2 * t.shape[3]],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype):
    drawn = draw(FULL, dtype)
    grad_output = torch.randn(2, 4, 39, 12).to(dtype)
    want = run(ours, FULL, drawn, grad_output)
    for name in NAMES:
        for how, variant in strided(drawn[name]).items():
            got = run(ours, FULL, drawn | {name: variant}, grad_output)
            assert all(torch.equal(got[key], want[key]) for key in want), f"{name} {how}"
    for how, variant in strided(grad_output).items():
        got = run(ours, FULL, drawn, variant)
        assert all(torch.equal(got[key], want[key]) for key in want), f"grad_output {how}"
    drawn, one = draw(PLAIN, dtype), torch.ones((), dtype=dtype)
    got, want = (run(ours, PLAIN, drawn, t) for t in (one.expand(2, 3, 33, 24), one.repeat(2, 3, 33, 24)))
    assert all(torch.equal(got[key], want[key]) for key in want), "grad_output expanded"


def test_layout_of_the_output_is_that_of_query():
    for tokens_first in (False, True):
        drawn = draw(PLAIN, torch.float32, tokens_first)
        o = ours(PLAIN, drawn)[0]
        assert (o.transpose(1, 2) if tokens_first else o).is_contiguous()


@pytest.mark.parametrize("case", [PLAIN, FULL], ids=str)
def test_compile_with_dynamic_shapes(case):
    torch._dynamo.reset()

    def function(drawn):
        o, lse = scaled_dot_product_attention(**drawn, **(case.options | {"dropout_p": 0.0}), return_lse=True)
        return o * 2, lse

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (39, 50):
        drawn = draw(case._replace(Lq=length), torch.float32)
        results = []
        for f in (compiled, function):
            leaves = leaves_of(drawn)
            o, lse = f(drawn | leaves)
            results.append((o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), list(leaves.values()))))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)


def test_compile_with_inductor_and_dropout():
    torch._dynamo.reset()
    q, k, v = torch.zeros(2, 4, 100, 8), torch.zeros(2, 4, 200, 8), torch.ones(2, 4, 200, 8)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True)
    kept = [compiled(q, k, v, dropout_p=0.3)[..., 0] * 0.7 for _ in range(2)]
    assert all(abs(o.mean().item() - 0.7) < 0.01 for o in kept)
    assert not torch.equal(*kept), "the seed is a constant of the graph"


def test_export_keeps_the_operation():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = torch.randn(3, 2, 4, 20, 8)
    length = {2: torch.export.Dim("length", min=2)}
    program = torch.export.export(Attend(), (q, k, v), dynamic_shapes=(length, length, length))
    assert any("fastarch.attention_fwd" in str(node.target) for node in program.graph.nodes)
    q, k, v = torch.randn(3, 2, 4, 31, 8)
    torch.testing.assert_close(program.module()(q, k, v), Attend()(q, k, v))


def test_checkpointing_draws_the_same_dropout():
    case = PLAIN._replace(dropout=0.4)
    grads = []
    for how in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        drawn = draw(case, torch.float32)
        torch.manual_seed(1)
        leaves = leaves_of(draw(case, torch.float32))
        torch.manual_seed(2)
        o = how(lambda *t: ours(case, drawn | dict(zip(leaves, t)))[0], *leaves.values())  # noqa: B023
        grads.append(torch.autograd.grad(o.square().sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_autocast():
    q, k, v = (torch.randn(2, 3, 20, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        o = scaled_dot_product_attention(q, k.bfloat16(), v)
        assert o.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert torch.autograd.grad(o.float().sum(), q)[0].dtype == torch.float32


def test_autocast_of_the_other_operations():
    q, k, v = (torch.randn(2, 3, 20, 16) for _ in range(3))
    ends = torch.tensor([0, 2], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_decode(q, k.bfloat16(), v).dtype == torch.bfloat16
        o = attention_varlen(q[:, :, 0], k[:, :, 0].bfloat16(), v[:, :, 0], ends, ends, 2, 2)
    assert o.dtype == torch.bfloat16


def test_the_reference_is_of_float32_inside_under_autocast():
    q, k, v = (torch.randn(2, 3, 20, 16).bfloat16() for _ in range(3))
    with fastarch.reference():
        want = scaled_dot_product_attention(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(scaled_dot_product_attention(q, k, v), want)


def test_transforms_go_through_the_reference():
    q, k, v = torch.randn(3, 4, 2, 5, 8, dtype=torch.float64)
    f = lambda q: scaled_dot_product_attention(q, k[0], v[0], is_causal=True)  # noqa: E731
    want = torch.stack([f(q[i]) for i in range(4)])
    torch.testing.assert_close(torch.func.vmap(f)(q), want)
    leaf = q[0].clone().requires_grad_()
    gradient = torch.autograd.grad(f(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda q: f(q).square().sum())(q[0]), gradient)


def test_second_derivative_is_not_lost():
    drawn = double(draw(SMALL, torch.float64))
    seconds = []
    for function in (ours, in_torch):
        leaves = leaves_of(drawn)
        o = function(SMALL, drawn | leaves)[0]
        firsts = torch.autograd.grad(o.square().sum(), list(leaves.values()), create_graph=True)
        seconds.append(torch.autograd.grad(sum(f.square().sum() for f in firsts), list(leaves.values())))
    for got, want in zip(*seconds):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", [Case(1, 1, 1030, 1030, 40, causal=True), Case(2, 4, 150, 300, 32, Hkv=2)], ids=str)
def test_bits_do_not_depend_on_run_or_threads(case, threads):
    drawn, grad_output = draw(case, torch.float32), torch.randn(case.B, case.H, case.Lq, case.D)
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(run(ours, case, drawn, grad_output))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_give_nothing(dtype):
    case = Case(2, 2, 60, 50, 16, mask="bool bij")
    drawn = draw(case, dtype)
    drawn["attn_mask"][0, :, 7], drawn["attn_mask"][1] = False, False
    got = run(ours, case, drawn, torch.randn(2, 2, 60, 16).to(dtype), torch.randn(2, 2, 60).to(op.softmax_dtype(dtype)))
    assert not got["o"][0, :, 7].any()
    assert not got["dq"][0, :, 7].any()
    assert not any(got[name][1].any() for name in ("o", "dq", "dk", "dv"))
    assert (got["lse"][1] == -math.inf).all()
    assert all(not got[name].isnan().any() for name in got)


def test_nan_stays_in_its_rows():
    drawn = draw(PLAIN, torch.float32)
    drawn["query"][1, 2, 5, 3] = math.nan
    o = ours(PLAIN, drawn)[0]
    assert o[1, 2, 5].isnan().all()
    assert o.isnan().sum() == 24
    drawn = draw(PLAIN, torch.float32)
    drawn["key"][0, 1, 40, 0] = math.nan
    assert ours(PLAIN, drawn)[0].isnan().all(-1)[0, 1].all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 8), (2, 2, 0, 5, 8), (2, 2, 5, 0, 8), (2, 2, 5, 5, 0)], ids=str)
def test_empty_tensors(shape):
    case = Case(*shape, Dv=4)
    got = run(ours, case, draw(case, torch.float32), torch.ones(*shape[:3], 4))
    assert got["o"].shape == (*shape[:3], 4)
    if shape[3] == 0:
        assert not got["o"].any()


def test_saved_memory():
    drawn = draw(PLAIN, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        o, lse = ours(PLAIN, drawn | leaves_of(drawn))
    want = [*(drawn[name] for name in ("query", "key", "value")), o, lse]
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_varlen_is_attention_of_each_sequence(dtype):
    lengths = [(5, 9), (0, 3), (140, 150), (7, 0), (33, 20)]
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(ns)], dtype=torch.int32) for ns in zip(*lengths))
    q, k, v = torch.randn(185, 4, 16), torch.randn(182, 2, 16), torch.randn(182, 2, 8)
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    slopes = torch.rand(5, 4)
    options = {"is_causal": True, "window": (20, 0), "softcap": 3.0}
    o, lse = attention_varlen(q, k, v, cu_q, cu_k, 150, 150, **options, alibi_slopes=slopes, return_lse=True)
    pieces, lses = [], []
    for b in range(5):
        at = [slice(cu[b], cu[b + 1]) for cu in (cu_q, cu_k, cu_k)]
        one = [t[of].transpose(0, 1)[None] for t, of in zip((q, k, v), at)]
        of_one = options | {"enable_gqa": True, "causal_alignment": "lower_right", "alibi_slopes": slopes[b]}
        piece, lse_of_one = scaled_dot_product_attention(*one, **of_one, return_lse=True)
        pieces.append(piece[0].transpose(0, 1))
        lses.append(lse_of_one[0].T)
    want, want_lse = torch.cat(pieces), torch.cat(lses)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(lse, want_lse)
    grad_output = torch.randn(o.shape).to(dtype)
    results = [torch.autograd.grad(t, (q, k, v), grad_output) for t in (o, want)]
    for name, got, expected in zip("qkv", *results):
        torch.testing.assert_close(got, expected, msg=named(name))


def test_decode_is_attention_to_the_filled_part():
    q, k, v = torch.randn(3, 6, 2, 24), torch.randn(3, 2, 300, 24), torch.randn(3, 2, 300, 40)
    filled = torch.tensor([300, 1, 77], dtype=torch.int32)
    o, lse = attention_decode(q, k, v, filled, window=(150, 0), return_lse=True)
    for b, n in enumerate(filled.tolist()):
        one = q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        options = {"is_causal": True, "enable_gqa": True, "window": (150, 0), "causal_alignment": "lower_right"}
        want, want_lse = scaled_dot_product_attention(*one, **options, return_lse=True)
        torch.testing.assert_close(o[b], want[0])
        torch.testing.assert_close(lse[b], want_lse[0])
    torch.testing.assert_close(attention_decode(q, k, v), attention_decode(q, k, v, torch.full((3,), 300).int()))


def test_reference_context_and_routes(monkeypatch):
    drawn = draw(FULL, torch.float32)
    with routing.recording() as calls:
        got = run(ours, FULL, drawn)
        with fastarch.reference():
            want = run(ours, FULL, drawn)
        scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 300))
        scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8), dropout_p=1.0)
        monkeypatch.setattr(extension, "cpu", None)
        scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=named(name))
    assert [call.operation for call in calls] == ["scaled_dot_product_attention"] * 5
    assert [call.backend for call in calls] == [f"cpu-{extension.isa} flash", *["reference"] * 4]
    assert [call.reason for call in calls[1:]] == [
        "inside fastarch.reference()",
        "kernels serve heads of up to 256 elements",
        "dropout_p = 1 drops everything",
        "fastarch._C is not built",
    ]


Q, CU = torch.zeros(2, 4, 5, 8), torch.tensor([0, 5], dtype=torch.int32)
T = torch.zeros(5, 4, 8)
sdpa = scaled_dot_product_attention
BAD = [
    (TypeError, "want query as a floating tensor, got list", lambda: sdpa([1.0], Q, Q)),
    (TypeError, "want key as a floating tensor, got torch.int64", lambda: sdpa(Q, Q.long(), Q)),
    (TypeError, "query is torch.float32 on cpu, value is torch.float64 on cpu", lambda: sdpa(Q, Q, Q.double())),
    (ValueError, "want query, key and value", lambda: sdpa(Q[None], Q, Q)),
    (ValueError, r"want key \[..., Lk, D\] and value", lambda: sdpa(Q, Q[..., :7], Q)),
    (ValueError, "want heads .or enable_gqa=True. that are the same or 1", lambda: sdpa(Q, Q[:, :2], Q[:, :2])),
    (ValueError, "want heads of query that are a multiple", lambda: sdpa(Q, Q[:, :3], Q[:, :3], enable_gqa=True)),
    (ValueError, "want batch sizes that are the same or 1", lambda: sdpa(Q, *(torch.zeros(3, 4, 5, 8),) * 2)),
    (TypeError, "want attn_mask of bool, float32 or", lambda: sdpa(Q, Q, Q, torch.zeros(5, 5).long())),
    (ValueError, r"want attn_mask that broadcasts to \[2, 4, 5, 5\], got", lambda: sdpa(Q, Q, Q, Q[0, 0, :, :4])),
    (ValueError, r"want dropout_p in \[0, 1\], got 1.5", lambda: sdpa(Q, Q, Q, dropout_p=1.5)),
    (ValueError, "want softcap >= 0, where 0 is none, got -1", lambda: sdpa(Q, Q, Q, softcap=-1)),
    (TypeError, "want window as .left, right. or None, got int", lambda: sdpa(Q, Q, Q, window=3)),
    (ValueError, "want window .left, right., integers >= -1", lambda: sdpa(Q, Q, Q, window=(-2, 0))),
    (ValueError, r"want alibi_slopes \[4\] or \[2, 4\], got \[3\]", lambda: sdpa(Q, Q, Q, alibi_slopes=torch.ones(3))),
    (ValueError, "want causal_alignment 'upper_left' or", lambda: sdpa(Q, Q, Q, causal_alignment="right")),
    (ValueError, "want cu_seqlens_q from 0 to 5 by steps in", lambda: attention_varlen(T, T, T, CU, CU, 4, 5)),
    (TypeError, "want cu_seqlens_k as int32", lambda: attention_varlen(T, T, T, CU, CU.long(), 5, 5)),
    (ValueError, r"want q \[total_q, Hq, D\]", lambda: attention_varlen(T, T[:4], T, CU, CU, 5, 5)),
    (ValueError, r"want cache_seqlens in \[0, 5\], got", lambda: attention_decode(Q, Q, Q, CU.new_tensor([6, 1]))),
    (ValueError, r"want q \[B, Hq, Lq, D\], k_cache", lambda: attention_decode(Q, Q[:1], Q)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_errors_say_what_was_wanted_and_what_came(error, message, call):
    with pytest.raises(error, match=message):
        call()


def nonsense(arguments: dict) -> list[dict]:
    """Each argument of fwd or bwd in turn replaced by something that does not fit."""
    q = arguments["q"]
    bad = [{name: arguments[name][..., :-1]} for name in ("q", "k", "mask", "alibi_slopes")]
    bad += [{name: arguments[name].double()} for name in ("q", "k", "v", "alibi_slopes", "mask")]
    bad += [{name: arguments[name][0]} for name in ("q", "k", "v", "mask")]
    bad += [{"k": arguments["k"][:, :, :0], "v": arguments["v"][:, :, :0]}, {"k": arguments["k"][:1]}]
    bad += [{"v": arguments["v"][:, :, :-1]}, {"v": arguments["v"][:, :1]}]
    bad += [{"seqlens_k": torch.tensor(ends, dtype=torch.int32)} for ends in ([71, 0], [-1, 5], [3])]
    bad += [{"seed": None}, {"seed": torch.zeros(1)}, {"algorithm": "magic"}, {"window_left": -2}, {"dropout_p": 1.0}]
    ends = torch.tensor([0, 5], dtype=torch.int32)
    bad += [{"cu_seqlens_q": ends, "cu_seqlens_k": ends}, {"cu_seqlens_q": ends}, {"softcap": -1.0}]
    wide = torch.zeros(*q.shape[:3], 300)
    return [*bad, {"q": wide, "k": torch.zeros(*arguments["k"].shape[:3], 300)}]


def test_nonsense_in_direct_calls_raises():
    given = arguments_of_fwd(FULL, torch.float32)
    for wrong in nonsense(given):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            op.fwd(**given | wrong)
    given = arguments_of_bwd(FULL, torch.float32)
    bad = [{name: given[name][..., :-1]} for name in ("grad_output", "output", "lse", "grad_lse")]
    bad += [{name: given[name].double()} for name in ("grad_output", "output", "lse", "grad_lse")]
    bad.append({"mask": None})
    for wrong in [*nonsense(given), *bad]:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            op.bwd(**given | wrong)
    packed = {name: given[name][:1] for name in ("q", "k", "v")} | {"mask": None, "alibi_slopes": None}
    for ends in ([0, 9], [1, 39], [0, 50, 39]):
        ends_q = torch.tensor(ends, dtype=torch.int32)
        ends_k = torch.tensor([*range(len(ends) - 1), 70], dtype=torch.int32)
        with pytest.raises(ValueError, match="want cu_seqlens_q rising from 0 to 39"):
            op.fwd(**arguments_of_fwd(FULL, torch.float32) | packed | {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k})


def test_sinusoidal_positions():
    layer = fastarch.nn.SinusoidalPositionalEncoding(6, 100)
    y = layer(torch.zeros(1, 100, 6))[0]
    for t, i in itertools.product((0, 1, 57, 99), range(3)):
        angle = t / 10000 ** (2 * i / 6)
        assert abs(y[t, 2 * i].item() - math.sin(angle)) < 1e-6
        assert abs(y[t, 2 * i + 1].item() - math.cos(angle)) < 1e-6
    assert torch.equal(layer(torch.zeros(2, 1, 6), start=57)[1, 0], y[57])
    assert not layer.state_dict()
    with pytest.raises(ValueError, match=r"want .*6. with positions up to 100"):
        layer(torch.zeros(1, 101, 6))
