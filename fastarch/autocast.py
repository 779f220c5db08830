"""torch.autocast for the operations: cast where torch casts the operation that ours replaces."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast: floating tensors in its dtype, float64 excepted, as in torch. The casts are differentiable."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and eligible(t) else t for t in tensors)


def done(device: str) -> AbstractContextManager:
    """In which torch's own operations cast no more: what is of float32 is meant to be."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def eligible(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64
