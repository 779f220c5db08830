"""The fused operations, as functions."""

from fastarch.ops.attention import attention_decode, attention_varlen, scaled_dot_product_attention
from fastarch.ops.batch_norm import batch_norm
from fastarch.ops.conv_relu_pool import conv_relu_pool
from fastarch.ops.gru import gru, gru_cell

__all__ = [
    "attention_decode",
    "attention_varlen",
    "batch_norm",
    "conv_relu_pool",
    "gru",
    "gru_cell",
    "scaled_dot_product_attention",
]
