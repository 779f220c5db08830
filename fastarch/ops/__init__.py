"""The fused operations, as functions."""

from fastarch.ops.conv_relu_pool import conv_relu_pool

__all__ = ["conv_relu_pool"]
