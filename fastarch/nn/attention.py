"""Layers of attention: many heads side by side, and positions, which attention by itself does not see."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastarch import ops
from fastarch.nn.leaf import Leaf

NAME = "MultiheadAttention"


class MultiheadAttention(Leaf, nn.MultiheadAttention):
    """y = concat(y_1, ..., y_H) W_o' + b_o, y_h = softmax(q_h k_h' / sqrt(D)) v_h; q, k, v = x W' + b, each of H heads.

    query [L, N, E], key [S, N, kdim], value [S, N, vdim] -> y as query; with batch_first [N, L, E] and so on, without a
    batch [L, E] and so on. `torch.nn.MultiheadAttention`'s arguments, defaults, initialisation, errors and state_dict.
    `fastarch.ops.scaled_dot_product_attention`, which states precision, reads q, k and v where their product left them.

    need_weights: also return the softmax, after dropout: [N, L, S], the mean over heads, or [N, H, L, S]. Both results
        then come from plain torch operations, in float32 (float64 for float64), and are returned in y's dtype.
    key_padding_mask [N, S], attn_mask [L, S] or [N * H, L, S]: bool, True for what may not be looked at, or added, and
        then of q's dtype or float32; one may be bool while the other is added. Padding alone stays [N, 1, 1, S].
    is_causal: a promise that attn_mask is the causal mask. Where no weights are needed and no keys added (add_bias_kv,
        add_zero_attn) the promise alone counts, beside padding too.

    A query that may look nowhere has weights 0 and y = b_o, where torch has NaN or the same. y is contiguous. Nested
    tensors are refused.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        check_inputs(self, query, key, value)
        check_masks(self, query, key, key_padding_mask, attn_mask, is_causal, need_weights)
        q, k, v = (self.heads(t) for t in self.project(query, key, value))
        k, v, added = self.with_added_keys(k, v)
        causal = is_causal and not need_weights and not added
        mask = one_mask(q, None if causal else attn_mask, key_padding_mask, added)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            y, weights = attend(q, k, v, mask, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y, weights = ops.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal), None
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1).contiguous(), weights

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v; one product for all inputs that are the same tensor."""
        weight, bias, E = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        if weight is not None and key is value:
            b_q, b_kv = (None, None) if bias is None else bias.split([E, 2 * E])
            return F.linear(query, weight[:E], b_q), *F.linear(key, weight[E:], b_kv).chunk(2, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))

    def heads(self, t: Tensor) -> Tensor:
        """A view [N, H, L, D] of [L, N, E], [N, L, E] with batch_first, or [L, E]."""
        t = t.unflatten(-1, (self.num_heads, self.head_dim))
        if t.dim() == 3:
            return t.transpose(0, 1).unsqueeze(0)
        return t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3)

    def with_added_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with what the layer puts behind them: a learned token, a token of zeros; and how many that is."""
        length = k.shape[2]
        if self.bias_k is not None:
            one = (1, self.num_heads, 1, self.head_dim)
            k, v = (
                torch.cat([t, bias.view(one).expand(len(t), -1, -1, -1)], 2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return k, v, k.shape[2] - length


def one_mask(q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, added: int) -> Tensor | None:
    """The two as the operation takes one, True for what may be looked at; `added` keys at the end always may."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, q.shape[:2]) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[..., None, None, :])
    forbidden = scores = None
    for mask in masks:
        mask = F.pad(mask, (0, added)) if added else mask
        if mask.dtype == torch.bool:
            forbidden = mask if forbidden is None else forbidden | mask
        else:
            scores = mask if scores is None else scores + mask
    if scores is None:
        return None if forbidden is None else ~forbidden
    if scores.dtype not in (torch.float32, q.dtype):
        raise RuntimeError(f"{NAME}: want masks of torch.bool, torch.float32 or {q.dtype}, got {scores.dtype}")
    scores = scores.to(torch.promote_types(scores.dtype, q.dtype))  # float32 beside float64
    return scores if forbidden is None else torch.where(forbidden, -torch.inf, scores)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention gives, and its weights [N, H, L, S], which that never writes."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT * q.shape[3] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    weights = F.dropout(scores.masked_fill(nowhere, 0).softmax(-1).masked_fill(nowhere, 0), dropout_p)
    return (weights @ v.to(dtype)).to(q.dtype), weights.to(q.dtype)


def shapes(*tensors: Tensor) -> str:
    return ", ".join(str([*t.shape]) for t in tensors)


def check_inputs(layer: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    """What torch.nn's twin refuses, with its class of error; of features and dtypes the products say so themselves."""
    three, E = (query, key, value), layer.embed_dim
    if any(t.is_nested for t in three):
        raise AssertionError(f"{NAME}: want padded tensors, got nested ones")
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        raise AssertionError(f"{NAME}: want query, key and value of two dimensions or of three, got {shapes(*three)}")
    if query.shape[-1] != E:
        raise AssertionError(f"{NAME}: want query of {E} features, got {[*query.shape]}")
    if key.shape[:-1] != value.shape[:-1] or (layer.in_proj_weight is not None and key.shape != value.shape):
        raise AssertionError(f"{NAME}: want key and value of one shape but for kdim and vdim, got {shapes(key, value)}")
    batch = 0 if layer.batch_first else 1
    if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
        raise RuntimeError(f"{NAME}: want query and key of one batch, got {shapes(query, key)}")


def check_masks(
    layer: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
) -> None:
    """The same of the masks."""
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{NAME}: want attn_mask with is_causal, a promise that it is the causal mask, got None")
    for what, mask in {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}.items():
        if mask is not None and not (torch.is_floating_point(mask) or mask.dtype == torch.bool):
            raise AssertionError(f"{NAME}: want {what} of bool or of a floating dtype, got {mask.dtype}")
        if mask is not None and mask.device != query.device:
            raise RuntimeError(f"{NAME}: query is on {query.device}, {what} on {mask.device}")
    if query.dim() == 2:
        L, S, N, padding = len(query), len(key), 1, (len(key),)
    else:
        batch = 0 if layer.batch_first else 1
        L, S, N = query.shape[1 - batch], key.shape[1 - batch], query.shape[batch]
        padding = (N, S)
    if key_padding_mask is not None and key_padding_mask.shape != padding:
        raise AssertionError(f"{NAME}: want key_padding_mask {[*padding]}, got {[*key_padding_mask.shape]}")
    if attn_mask is None or (is_causal and key_padding_mask is None and not need_weights):
        return  # of a promise alone torch takes a mask of any size
    if attn_mask.shape not in ((L, S), (N * layer.num_heads, L, S)):
        error = RuntimeError if attn_mask.dim() in (2, query.dim()) else AssertionError
        want = f"[{L}, {S}] or [{N * layer.num_heads}, {L}, {S}]"
        raise error(f"{NAME}: want attn_mask {want}, got {[*attn_mask.shape]}")


class SinusoidalPositionalEncoding(Leaf):
    """y[..., t, 2i] = x[..., t, 2i] + sin(t / 10000^(2i/d)), y[..., t, 2i + 1] = x[..., t, 2i + 1] + cos(the same).

    Args:
        d_model: d, the size of x's last dimension, even or odd.
        max_len: the largest number of positions; the table is made once and is not part of the state_dict.
        batch_first: x is [N, T, d] (or [T, d]); False for [T, N, d].
        dropout: the probability that an element of y becomes 0 in training.

    forward(x, start=0): `start` is the position of x's first token, as in generation with a cache.

    Raises:
        ValueError: an x whose last size is not d_model, or with positions beyond max_len.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """

    def __init__(self, d_model: int, max_len: int = 5000, *, batch_first: bool = True, dropout: float = 0.0):
        super().__init__()
        self.batch_first, self.dropout = batch_first, nn.Dropout(dropout)
        position = torch.arange(max_len, dtype=torch.float64)[:, None]
        even = torch.arange(0, d_model, 2, dtype=torch.float64)
        angle = position / 10000 ** (even / d_model)  # in float64: in float32 the last of 5000 positions is off by 2e-4
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model]
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        time = 0 if x.dim() == 2 or not self.batch_first else 1
        length, (most, width) = x.shape[time], self.table.shape
        if x.shape[-1] != width or not 0 <= start <= most - length:
            raise ValueError(
                f"SinusoidalPositionalEncoding: want [..., {width}] with positions up to {most}, "
                f"got {[*x.shape]} from position {start}"
            )
        encoding = self.table[start : start + length].to(x.dtype)
        return self.dropout(x + (encoding if time == 1 or x.dim() == 2 else encoding[:, None]))
