"""A call of one of our operations, as our function makes it and as PyTorch's own functions do.

Both are made of the arguments that the operation behind the function (`fastarch::<op>_fwd`) was called with. Of the
functions in `fastarch.ref` PyTorch's way is made only where PyTorch has no function for the case.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastarch import ops
from fastarch.ref.attention import attention as attention_reference
from fastarch.ref.batch_norm import batch_norm as batch_norm_reference
from fastarch.ref.conv_relu_pool import conv_relu_pool as conv_relu_pool_reference
from fastarch.ref.gru import gru as gru_reference
from fastarch.ref.gru import gru_cell as gru_cell_reference

LARGEST_SCORES = 1 << 27  # elements of a matrix of attention scores: half a gigabyte in float32, several times over


class Counterparts(NamedTuple):
    """Two functions of the same tensors, those that have a gradient; None where PyTorch's would be absurdly large."""

    tensors: tuple[Tensor | None, ...]
    ours: Callable[..., object]
    pytorchs: Callable[..., object] | None


def conv_relu_pool(input, weight, bias, *rest) -> Counterparts:
    geometry = [tuple(v) if isinstance(v, list) else v for v in rest[:9]]
    scale, residual, relu = rest[11:] + (None, None, True)[len(rest) - 11 :]  # a dispatcher leaves defaults out
    names = ("stride", "padding", "dilation", "groups", "pool", "pool_size", "pool_stride", "pool_padding", "ceil_mode")
    options = dict(zip(names, geometry))
    if options["pool"] == "none":
        options["pool"] = None

    def ours(input, weight, bias, scale, residual, **options):
        activation = "relu" if relu else None
        return ops.conv_relu_pool(input, weight, bias, activation=activation, scale=scale, residual=residual, **options)

    def pytorchs(input, weight, bias, scale, residual):
        return conv_relu_pool_reference(input, weight, bias, *geometry, scale, residual, relu)

    return Counterparts((input, weight, bias, scale, residual), partial(ours, **options), pytorchs)


def batch_norm(input, residual, weight, bias, mean, var, eps, relu, *_) -> Counterparts:
    def call(function, input, residual, weight, bias):
        options = {"residual": residual, "activation": "relu" if relu else None}
        return function(input, mean, var, weight, bias, mean is None, 0.0, eps, **options)

    tensors = (input, residual, weight, bias)
    return Counterparts(tensors, partial(call, ops.batch_norm), partial(call, batch_norm_reference))


def gru(input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, reset_after, *_) -> Counterparts:
    tensors = (input, h0, w_ih, w_hh, b_ih, b_hh)
    options = {"reverse": reverse, "lengths": lengths, "reset_after": reset_after}
    if reset_after and (b_ih is None) == (b_hh is None):
        pytorchs = gru_layer(*tensors, lengths, reverse)
    else:
        pytorchs = partial(gru_reference, **options)
    return Counterparts(tensors, partial(ops.gru, **options), pytorchs)


def gru_layer(input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse) -> Callable[..., tuple[Tensor, Tensor]]:
    """By a torch.nn.GRU, which has its weights where cuDNN wants them."""
    like = {"device": input.device, "dtype": input.dtype}
    layer = nn.GRU(w_ih.shape[1], w_hh.shape[1], bias=b_ih is not None, **like)
    with torch.no_grad():
        for to, parameter in zip(layer.all_weights[0], (w_ih, w_hh, b_ih, b_hh)):
            to.copy_(parameter)
    turned = partial(from_the_end, lengths=lengths) if reverse else lambda x: x

    def run(input, h0, *_):
        x = turned(input)
        if lengths is None:
            output, h_n = layer(x, h0.unsqueeze(0))
        else:
            packed, h_n = layer(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False), h0.unsqueeze(0))
            output, _ = pad_packed_sequence(packed, total_length=len(x))
        return turned(output), h_n.squeeze(0)

    return run


def from_the_end(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [T, N, C] with each sequence turned round, and its padding behind it as before."""
    if lengths is None:
        return x.flip(0)  # keeps nothing for the backward, as gather does
    steps = torch.arange(len(x), device=x.device).unsqueeze(1)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, order.unsqueeze(2).expand(x.shape))


def gru_cell(input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, reset_after, *_) -> Counterparts:
    pytorchs = torch.gru_cell if reset_after else partial(gru_cell_reference, reset_after=False)
    tensors = (input.squeeze(0), h0, w_ih, w_hh, b_ih, b_hh)  # a sequence of one step
    return Counterparts(tensors, partial(ops.gru_cell, reset_after=reset_after), pytorchs)


class Attention(NamedTuple):
    """The arguments of attention_fwd behind its tensors."""

    length_q: int
    length_k: int
    scale: float
    left: int
    right: int
    lower_right: bool
    softcap: float
    dropout_p: float
    algorithm: str


def scaled_dot_product_attention(
    q, k, v, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqlens_k, seed, *options
) -> Counterparts:
    options = Attention(*options)
    ours = partial(
        ops.scaled_dot_product_attention,
        attn_mask=mask,
        dropout_p=options.dropout_p,
        scale=options.scale,
        enable_gqa=True,
        window=(options.left, options.right),
        softcap=options.softcap,
        alibi_slopes=alibi_slopes,
        causal_alignment="lower_right" if options.lower_right else "upper_left",
    )
    pytorchs = attention_of_pytorch(q, k, mask, alibi_slopes, (None, None, None, seed), options)
    return Counterparts((q, k, v), ours, pytorchs)


def attention_decode(
    q, k, v, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqlens_k, seed, *options
) -> Counterparts:
    options = Attention(*options)
    ours = partial(
        ops.attention_decode,
        cache_seqlens=seqlens_k,
        scale=options.scale,
        window=(options.left, options.right),
        softcap=options.softcap,
        alibi_slopes=alibi_slopes,
    )
    pytorchs = attention_of_pytorch(q, k, None, alibi_slopes, (None, None, seqlens_k, seed), options)
    return Counterparts((q, k, v), ours, pytorchs)


def attention_varlen(
    q, k, v, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqlens_k, seed, *options
) -> Counterparts:
    options = Attention(*options)
    packed = tuple(t[0].transpose(0, 1) for t in (q, k, v))
    ours = partial(
        ops.attention_varlen,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=options.length_q,
        max_seqlen_k=options.length_k,
        scale=options.scale,
        window=(options.left, options.right),
        softcap=options.softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=options.dropout_p,
    )
    if alibi_slopes is not None or options.softcap:
        dense = attention_of_pytorch(q, k, None, alibi_slopes, (cu_seqlens_q, cu_seqlens_k, None, seed), options)
        sequences = [] if dense is None else [((slice(None), slice(None)), dense)]
    else:
        at_q, at_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        parts = [(slice(*at_q[b : b + 2]), slice(*at_k[b : b + 2])) for b in range(len(at_q) - 1)]
        sequences = [
            (part, attention_of_pytorch(q[:, :, part[0]], k[:, :, part[1]], None, None, (None,) * 4, options))
            for part in parts
        ]
    if not sequences or any(attend is None for _, attend in sequences):
        return Counterparts(packed, ours, None)

    def one_by_one(q, k, v):
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        outputs = [attend(q[:, :, i], k[:, :, j], v[:, :, j]) for (i, j), attend in sequences]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    return Counterparts(packed, ours, one_by_one)


def attention_of_pytorch(q, k, mask, alibi_slopes, rest, options: Attention) -> Callable[..., Tensor] | None:
    """A function of (q, k, v): SDPA wherever a mask, made before anything is timed, can say what is looked at.

    A mask that is added counts as constant: with a gradient SDPA would leave its fused kernels.
    """
    (B, H, Lq, _), Lk, seqlens_k = q.shape, k.shape[2], rest[2]
    writes_scores = alibi_slopes is not None or options.softcap or options.dropout_p
    if writes_scores and B * H * Lq * Lk > LARGEST_SCORES:
        return None
    if alibi_slopes is not None or options.softcap:
        rest = (mask, alibi_slopes, *rest, *options[2:8])
        return lambda q, k, v: attention_reference(q, k, v, *rest)[0]

    straight = seqlens_k is None and (Lq == Lk or not options.lower_right)
    causal = straight and mask is None and (options.left, options.right) == (-1, 0)
    if not causal:
        live = looked_at(q, Lk, seqlens_k, options)
        if mask is None:
            mask = None if live.all() else live
        elif mask.dtype == torch.bool:
            mask = mask & live
        else:  # in q's dtype, without which CUDA's fused kernels refuse it
            mask = mask.to(q.dtype).masked_fill(~live, -torch.inf)
    return partial(
        F.scaled_dot_product_attention,
        attn_mask=mask,
        dropout_p=options.dropout_p,
        is_causal=causal,
        scale=options.scale,
        enable_gqa=k.shape[1] != H,
    )


def looked_at(q: Tensor, Lk: int, seqlens_k: Tensor | None, options: Attention) -> Tensor:
    """[B or 1, 1, Lq, Lk]: whether a query looks at a key."""
    Lq = q.shape[2]
    lengths = torch.tensor([Lk], device=q.device) if seqlens_k is None else seqlens_k.long()
    lengths = lengths.view(-1, 1, 1, 1)
    j = torch.arange(Lk, device=q.device)
    diagonal = torch.arange(Lq, device=q.device).view(Lq, 1) + (lengths - Lq if options.lower_right else 0)
    live = j < lengths
    if options.left >= 0:
        live = live & (j - diagonal >= -options.left)
    if options.right >= 0:
        live = live & (j - diagonal <= options.right)
    return live.expand(-1, -1, Lq, -1)


OF = {
    function.__name__: function
    for function in (
        *(conv_relu_pool, batch_norm, gru, gru_cell),
        *(scaled_dot_product_attention, attention_decode, attention_varlen),
    )
}
