"""A drop-in for torch.nn.functional: every name of it, and the fused operations in place of torch's."""

from torch.nn import functional as torch_functional

from fastarch.ops import attention_decode, scaled_dot_product_attention

__all__ = ["attention_decode", "scaled_dot_product_attention"]


def __getattr__(name: str):
    return getattr(torch_functional, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(torch_functional)})
