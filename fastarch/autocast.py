"""torch.autocast for the operations: cast where torch casts the operation that ours replaces."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# torch.compile of torch 2.11 does not trace that question, and the other raises for devices that have no autocast
KINDS = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "xla", "hpu", "mtia") if torch.amp.is_autocast_available(kind)
)


def is_on(device: str) -> bool:
    """Whether autocast casts on a kind of device now."""
    return device in KINDS and torch.is_autocast_enabled(device)


def cast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast: floating tensors in its dtype, float64 excepted, as in torch. The casts are differentiable."""
    if not is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and eligible(t) else t for t in tensors)


def done(device: str) -> AbstractContextManager:
    """In which torch's own operations cast no more: what is of float32 is meant to be."""
    return torch.autocast(device, enabled=False) if device in KINDS else nullcontext()


def eligible(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64
