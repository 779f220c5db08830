"""The fused operations, as functions."""

from fastarch.ops.batch_norm import batch_norm
from fastarch.ops.conv_relu_pool import conv_relu_pool
from fastarch.ops.gru import gru, gru_cell

__all__ = ["batch_norm", "conv_relu_pool", "gru", "gru_cell"]
