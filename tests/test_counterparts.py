"""A call as PyTorch's functions make it gives what ours gives, so that their times can be compared."""

import pytest
import torch
from torch import nn

from fastarch import counterparts, extension, ops
from fastarch.costs import Costs
from fastarch.routing import recording

N, T, C, H = 3, 7, 4, 5
pytestmark = pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def gru_arguments(bias: bool = True):
    parameters = (draw(3 * H, C), draw(3 * H, H), *((draw(3 * H), draw(3 * H)) if bias else (None, None)))
    return (draw(T, N, C), draw(N, H), *parameters)


def heads(Lq: int = 6, Lk: int = 9, Hkv: int = 4):
    return draw(2, 4, Lq, 8), draw(2, Hkv, Lk, 8), draw(2, Hkv, Lk, 8)


def sdpa(*args, **options):
    return lambda: ops.scaled_dot_product_attention(*args, **options)


def packed(**options):
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    return lambda: ops.attention_varlen(draw(5, 4, 8), draw(5, 2, 8), draw(5, 2, 8), ends, ends, 3, 3, **options)


def decode(**options):
    q, k, v = heads(1, 9, 2)
    return lambda: ops.attention_decode(q, k, v, **options)


lengths = torch.tensor([7, 1, 4])
filled = torch.tensor([9, 5], dtype=torch.int32)
causal = torch.ones(6, 9, dtype=torch.bool).tril()
x, statistics = draw(N, C, 6, 6), (draw(C), draw(C).abs())

CASES = {
    "conv": lambda: ops.conv_relu_pool(x, draw(8, C, 3, 3), draw(8), padding="same", pool_size=3, pool_stride=2),
    "conv_avg": lambda: ops.conv_relu_pool(x, draw(8, C, 3, 3), pool="avg", pool_padding=1, ceil_mode=True),
    "conv_folded": lambda: ops.conv_relu_pool(x, draw(8, C, 3, 3), pool=None, scale=draw(8), residual=draw(N, 8, 4, 4)),
    "conv_alone": lambda: ops.conv_relu_pool(x, draw(8, 1, 3, 2), stride=2, dilation=2, groups=C, pool=None),
    "norm_training": lambda: ops.batch_norm(x, *statistics, draw(C), draw(C), training=True),
    "norm_residual": lambda: ops.batch_norm(x, None, None, None, draw(C), True, residual=x.flip(0), activation="relu"),
    "norm_evaluation": lambda: ops.batch_norm(x, *statistics, draw(C), draw(C), activation="relu"),
    "gru": lambda: ops.gru(*gru_arguments()),
    "gru_reverse": lambda: ops.gru(*gru_arguments(bias=False), reverse=True),
    "gru_lengths": lambda: ops.gru(*gru_arguments(), lengths=lengths),
    "gru_lengths_reverse": lambda: ops.gru(*gru_arguments(), lengths=lengths, reverse=True),
    "gru_one_bias": lambda: ops.gru(*gru_arguments()[:5]),
    "gru_reset_before": lambda: ops.gru(*gru_arguments(), lengths=lengths, reverse=True, reset_after=False),
    "cell": lambda: ops.gru_cell(draw(N, C), *gru_arguments()[1:]),
    "cell_reset_before": lambda: ops.gru_cell(draw(N, C), *gru_arguments()[1:], reset_after=False),
    "sdpa": sdpa(*heads(), scale=0.3),
    "sdpa_causal": sdpa(*heads(), is_causal=True),
    "sdpa_mask": sdpa(*heads(), causal, enable_gqa=True),
    "sdpa_mask_causal": sdpa(*heads(), torch.randn(9) > 0, is_causal=True),
    "sdpa_added": sdpa(*heads(Hkv=2), draw(2, 1, 6, 9), enable_gqa=True, window=(3, 4)),
    "sdpa_added_16_bits": sdpa(*(t.bfloat16() for t in heads()), draw(6, 9).float()),
    "sdpa_window": sdpa(*heads(), window=(2, 1), causal_alignment="lower_right"),
    "sdpa_lower_right": sdpa(*heads(), is_causal=True, causal_alignment="lower_right"),
    "sdpa_softcap_alibi": sdpa(*heads(), softcap=2.0, alibi_slopes=draw(4).abs(), window=(3, -1)),
    "varlen": packed(),
    "varlen_causal": packed(is_causal=True),
    "varlen_window_softcap": packed(window=(1, 0), softcap=3.0),
    "decode": decode(),
    "decode_cache": decode(cache_seqlens=filled, window=(4, 0)),
    "decode_softcap": decode(cache_seqlens=filled, softcap=2.0),
}


class WithValues(Costs):
    def keep(self, arguments):
        return [*arguments]


def arguments_of(call):
    """The operation of a call, and the arguments that it runs with, with the values that they have, as in inference."""
    with torch.no_grad(), recording() as calls, WithValues(calls) as costs:
        call()
    (call,), (arguments,) = calls, costs.arguments.values()
    return call.operation, arguments


def outputs(results) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


@pytest.mark.parametrize("case", CASES)
def test_pytorch_gives_what_ours_gives(case):
    operation, arguments = arguments_of(CASES[case])
    tensors, ours, pytorchs = counterparts.OF[operation](*arguments)
    pairs = list(zip(outputs(ours(*tensors)), outputs(pytorchs(*tensors))))
    assert pairs
    for got, want in pairs:
        rounding = {"rtol": 2e-2, "atol": 1e-2} if want.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(got, want, **rounding)


@pytest.mark.parametrize("case", CASES)
def test_ours_is_the_call_that_was_made(case):
    operation, arguments = arguments_of(CASES[case])
    tensors, ours, _ = counterparts.OF[operation](*arguments)
    again, arguments_again = arguments_of(lambda: ours(*tensors))
    assert again == operation
    for got, want in zip(arguments_again, arguments, strict=True):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        else:
            assert got == want


def test_every_operation_has_counterparts():
    assert set(counterparts.OF) == set(ops.__all__)


def test_pytorch_is_not_asked_to_write_huge_scores(monkeypatch):
    monkeypatch.setattr(counterparts, "LARGEST_SCORES", 2 * 4 * 6 * 9 - 1)
    for options in ({"softcap": 2.0}, {"dropout_p": 0.1}):
        operation, arguments = arguments_of(sdpa(*heads(), **options))
        assert counterparts.OF[operation](*arguments).pytorchs is None
    operation, arguments = arguments_of(packed(softcap=1.0))
    monkeypatch.setattr(counterparts, "LARGEST_SCORES", 1)
    assert counterparts.OF[operation](*arguments).pytorchs is None


def test_only_what_writes_scores_is_refused(monkeypatch):
    monkeypatch.setattr(counterparts, "LARGEST_SCORES", 0)
    operation, arguments = arguments_of(sdpa(*heads(), window=(2, 2)))
    assert counterparts.OF[operation](*arguments).pytorchs is not None


@pytest.mark.parametrize("call", [sdpa(*heads()), sdpa(*heads(), is_causal=True), sdpa(*heads(1), window=(-1, 8))])
def test_pytorch_has_its_fastest_call(call):
    """Masks and grouped heads keep it from some of its kernels."""
    operation, arguments = arguments_of(call)
    options = counterparts.OF[operation](*arguments).pytorchs.keywords
    assert options["attn_mask"] is None
    assert options["enable_gqa"] is False


def test_ours_has_options_by_which_plans_are_looked_up():
    operation, arguments = arguments_of(CASES["conv"])
    hash(tuple(counterparts.OF[operation](*arguments).ours.keywords.values()))


def test_dropout_drops_as_often():
    operation, arguments = arguments_of(sdpa(*heads(64, 64), dropout_p=0.5))
    tensors, _, pytorchs = counterparts.OF[operation](*arguments)
    tensors = (*tensors[:2], torch.ones_like(tensors[2]))
    assert pytorchs(*tensors).mean().item() == pytest.approx(1, abs=0.1)
    assert pytorchs(*tensors).std().item() > 0.1


def test_the_layer_of_torch_keeps_for_the_backward_what_it_always_does():
    """No copies of weights that would count against PyTorch, nothing that turning the sequence adds."""
    from fastarch.measure import saved_bytes

    kept = []
    for reverse in (False, True):
        operation, arguments = arguments_of(lambda reverse=reverse: ops.gru(*gru_arguments(), reverse=reverse))
        tensors, _, pytorchs = counterparts.OF[operation](*arguments)
        kept.append(saved_bytes(pytorchs, *(t.requires_grad_() for t in tensors)))
    layer = nn.GRU(C, H, dtype=torch.float64)
    assert kept[0] == saved_bytes(layer, draw(T, N, C).requires_grad_(), draw(1, N, H).requires_grad_())
    assert kept[1] == kept[0]
