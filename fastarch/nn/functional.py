"""torch.nn.functional with the fused operations in place of its own, and those it lacks beside them."""

from torch.nn import functional as torch_functional

from fastarch.ops import (
    attention_decode,
    attention_varlen,
    batch_norm,
    conv_relu_pool,
    gru,
    gru_cell,
    scaled_dot_product_attention,
)

__all__ = [
    "attention_decode",
    "attention_varlen",
    "batch_norm",
    "conv_relu_pool",
    "gru",
    "gru_cell",
    "scaled_dot_product_attention",
]


def __getattr__(name: str):
    return getattr(torch_functional, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(torch_functional)})
