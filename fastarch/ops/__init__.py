"""The fused operations, as functions."""

from fastarch.ops.batch_norm import batch_norm
from fastarch.ops.conv_relu_pool import conv_relu_pool

__all__ = ["batch_norm", "conv_relu_pool"]
