"""A drop-in for torch.nn: every name of torch.nn, and the fused layers beside them."""

from torch import nn as torch_nn

from fastarch.nn.attention import SinusoidalPositionalEncoding
from fastarch.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, fold_batch_norm
from fastarch.nn.conv_bn_relu_pool import conv_bn_relu_pool
from fastarch.nn.conv_relu_pool import ConvReLUPool1d, ConvReLUPool2d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConvReLUPool1d",
    "ConvReLUPool2d",
    "SinusoidalPositionalEncoding",
    "SyncBatchNorm",
    "conv_bn_relu_pool",
    "fold_batch_norm",
]


def __getattr__(name: str):
    return getattr(torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(torch_nn)})
