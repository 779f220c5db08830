"""Layers of the Transformer: torch.nn's own, on our attention.

Vaswani et al. 2017, arXiv 1706.03762; norm_first is Xiong et al. 2020, arXiv 2002.04745, figure 1b. src and its output
[S, N, E], tgt and its output [T, N, E]; with batch_first [N, S, E] and [N, T, E], without a batch [S, E] and [T, E].
Masks are as `fastarch.nn.MultiheadAttention` takes them, and attention never returns its weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastarch.nn.attention import MultiheadAttention
from fastarch.nn.leaf import Leaf


class TransformerEncoderLayer(Leaf, nn.TransformerEncoderLayer):
    """h = norm1(x + A(x)), y = norm2(h + F(h)), or with norm_first h = x + A(norm1(x)), y = h + F(norm2(h)).

    A is attention to x itself, F(x) = linear2(activation(linear1(x))), with dropout inside and behind both.
    `torch.nn.TransformerEncoderLayer`'s arguments, defaults, initialisation, errors and state_dict. In evaluation, too,
    it runs on our attention, where torch's may run on one fused operation of its own. Nested tensors are refused.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention  # same parameters, our forward
        self.activation_relu_or_gelu = 0  # else torch.nn.TransformerEncoder would make nested tensors for us

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            h = src + self._sa_block(self.norm1(src), *masks)
            return h + self._ff_block(self.norm2(h))
        h = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(h + self._ff_block(h))


class TransformerDecoderLayer(Leaf, nn.TransformerDecoderLayer):
    """h = norm1(x + A(x)), g = norm2(h + A(h, memory)), y = norm3(g + F(g)); norm_first as in TransformerEncoderLayer.

    `torch.nn.TransformerDecoderLayer`'s arguments, defaults, initialisation, errors and state_dict.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention  # same parameters, our forward


class TransformerEncoder(Leaf, nn.TransformerEncoder):
    """num_layers copies of encoder_layer, one after the other, and a norm behind them.

    `torch.nn.TransformerEncoder`'s arguments, defaults, errors and state_dict. is_causal=None looks whether `mask` is
    the causal mask, but not while torch.compile or torch.export traces: then it is taken as any mask. No nested tensors
    are made, whatever enable_nested_tensor and mask_check say: outputs at padding are numbers like others, where torch
    has 0 in evaluation.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ):
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if is_causal is None:
            is_causal = is_causal_mask(mask, src, self.layers[0].self_attn.batch_first)
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(Leaf, nn.TransformerDecoder):
    """num_layers copies of decoder_layer, one after the other, each attending to memory, and a norm behind them.

    `torch.nn.TransformerDecoder`'s arguments, defaults, errors and state_dict; tgt_is_causal=None as is_causal=None of
    TransformerEncoder.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if tgt_is_causal is None:
            tgt_is_causal = is_causal_mask(tgt_mask, tgt, self.layers[0].self_attn.batch_first)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal)
        return super().forward(tgt, memory, *masks)


class Transformer(Leaf, nn.Transformer):
    """decoder(tgt, encoder(src)), both of layers as above.

    `torch.nn.Transformer`'s arguments, defaults, initialisation, errors and state_dict.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        of_layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        placed = {"device": device, "dtype": dtype}
        if custom_encoder is None:
            norm = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **placed)
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*of_layer, **placed), num_encoder_layers, norm)
        if custom_decoder is None:
            norm = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **placed)
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*of_layer, **placed), num_decoder_layers, norm)
        # torch would make its own layers; what it is given it initialises as it would those, by the same draws
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )


def is_causal_mask(mask: Tensor | None, x: Tensor, batch_first: bool) -> bool:
    """Whether mask is the causal mask of x, which a kernel knows without reading it."""
    if mask is None or torch.compiler.is_compiling():  # which cannot look at values
        return False
    length = x.shape[1] if batch_first and x.dim() == 3 else x.shape[0]
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask == -torch.inf, later) and not mask.tril().any()
