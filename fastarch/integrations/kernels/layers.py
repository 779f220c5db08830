"""Forwards for layers of torch.nn, or with their attributes: kernels puts a forward into a layer that exists.

It takes a class that has no constructor and no member but forward, of the arguments of the one that it replaces, and
two flags. So each forward looks at the layer that it finds itself in as at one of ours.
"""

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastarch import nn as ours

__all__ = ["GRU", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GRUCell", "MultiheadAttention"]


# What our layers read of themselves, by name: torch.compile of torch 2.11 knows a module's attributes only one by one.
NAMES = {
    layer: tuple(vars(layer(*(1,) * sizes, device="meta")))
    for layer, sizes in {
        **dict.fromkeys((ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d), 1),
        **dict.fromkeys((ours.GRU, ours.GRUCell, ours.MultiheadAttention), 2),
    }.items()
}


def run(layer: type[nn.Module], module: nn.Module, attributes: dict[str, object], *args):
    """The forward of one of our layers over what a module has, and the attributes that torch's twin lacks."""
    view = layer.__new__(layer)
    for name, value in attributes.items():
        view.__dict__[name] = value
    for name in NAMES[layer]:
        if name in module.__dict__:  # a bias that attention may have is a parameter or an attribute
            view.__dict__[name] = module.__dict__[name]
    return layer.forward(view, *args)


class BatchNorm1d(nn.Module):
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return run(ours.BatchNorm1d, self, {"activation": None}, input)


class BatchNorm2d(nn.Module):
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return run(ours.BatchNorm2d, self, {"activation": None}, input)


class BatchNorm3d(nn.Module):
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return run(ours.BatchNorm3d, self, {"activation": None}, input)


class GRUCell(nn.Module):
    can_torch_compile = True

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return run(ours.GRUCell, self, {"reset_after": True}, input, hx)


class GRU(nn.Module):
    can_torch_compile = False  # torch.compile refuses whatever is a torch.nn.GRU

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        return run(ours.GRU, self, {"reset_after": True}, input, hx)


class MultiheadAttention(nn.Module):
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return run(ours.MultiheadAttention, self, {}, query, key, value, *masks)
