"""A drop-in for torch.nn: every name of torch.nn, and the fused layers beside them."""

from torch import nn as torch_nn

from fastarch.nn import functional  # before __getattr__ exists, which knows torch's
from fastarch.nn.alignment import BahdanauAttention, DotAttention
from fastarch.nn.attention import MultiheadAttention, SinusoidalPositionalEncoding
from fastarch.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, fold_batch_norm
from fastarch.nn.conv_bn_relu_pool import conv_bn_relu_pool
from fastarch.nn.conv_relu_pool import Conv2d, ConvReLUPool1d, ConvReLUPool2d
from fastarch.nn.gru import GRU, GRUCell
from fastarch.nn.gru_weights import convert_gru_weights
from fastarch.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastarch.nn.truncated_bptt import bptt_chunks, detach_state

__all__ = [
    "GRU",
    "BahdanauAttention",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv2d",
    "ConvReLUPool1d",
    "ConvReLUPool2d",
    "DotAttention",
    "GRUCell",
    "MultiheadAttention",
    "SinusoidalPositionalEncoding",
    "SyncBatchNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "bptt_chunks",
    "conv_bn_relu_pool",
    "convert_gru_weights",
    "detach_state",
    "fold_batch_norm",
    "functional",
]

attention = torch_nn.attention  # what chooses SDPA's backends; importing our file of that name hid it


def __getattr__(name: str):
    return getattr(torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(torch_nn)})
