"""A drop-in for torch.nn: every name of torch.nn, and the fused layers beside them."""

from torch import nn as torch_nn

from fastarch.nn.conv_relu_pool import ConvReLUPool1d, ConvReLUPool2d

__all__ = ["ConvReLUPool1d", "ConvReLUPool2d"]


def __getattr__(name: str):
    return getattr(torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(torch_nn)})
