"""torch.autocast for the operations: cast where torch casts the operation that ours replaces."""

import torch
from torch import Tensor


def cast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, floating tensors (float64 excepted, as in torch) in the autocast dtype; the casts are differentiable."""
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
