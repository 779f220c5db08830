"""Layers of torch.nn that become ours: the same object with the same attributes, of another class."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fastarch import nn as ours
from fastarch.nn import leaf
from fastarch.nn.conv_relu_pool import has_fewer_products

MARK = "fastarch_before"  # the attribute of a fused module that says what it was


class Absent:
    """Stands for an attribute that was not there."""


class Before(NamedTuple):
    """What a module was: its class, and attributes that were others then."""

    layer: type[nn.Module]
    attributes: dict[str, object]


class Swap(NamedTuple):
    """A class of ours, and the attributes that its __init__ gives beyond those of torch's."""

    layer: type[nn.Module]
    attributes: dict[str, object] = {}  # noqa: RUF012


SWAPS = {
    nn.Conv2d: Swap(ours.Conv2d),
    nn.BatchNorm1d: Swap(ours.BatchNorm1d, {"activation": None}),
    nn.BatchNorm2d: Swap(ours.BatchNorm2d, {"activation": None}),
    nn.BatchNorm3d: Swap(ours.BatchNorm3d, {"activation": None}),
    nn.SyncBatchNorm: Swap(ours.SyncBatchNorm, {"activation": None}),
    nn.GRU: Swap(ours.GRU, {"reset_after": True}),
    nn.GRUCell: Swap(ours.GRUCell, {"reset_after": True}),
    nn.MultiheadAttention: Swap(ours.MultiheadAttention),
    nn.TransformerEncoderLayer: Swap(ours.TransformerEncoderLayer, {"activation_relu_or_gelu": 0}),
    nn.TransformerDecoderLayer: Swap(ours.TransformerDecoderLayer),
    nn.TransformerEncoder: Swap(ours.TransformerEncoder),
    nn.TransformerDecoder: Swap(ours.TransformerDecoder),
}
STACKS = {nn.TransformerEncoder: nn.TransformerEncoderLayer, nn.TransformerDecoder: nn.TransformerDecoderLayer}
OURS = {swap.layer for swap in SWAPS.values()}


def why_special(module: nn.Module) -> str | None:
    """Why a module of a known class may compute something else than its class does."""
    attributes = module.__dict__
    if "forward" in attributes:
        return "its forward was replaced"
    if computed := [name for name, value in attributes.items() if isinstance(value, Tensor)]:
        return f"its {computed[0]} is computed, no parameter"  # weight_norm and other hooks that make weights
    return None


def why_left(module: nn.Module) -> str | None:
    """Why a layer that has a twin here is left as it is; None if it may become ours."""
    if type(module) not in SWAPS:
        return f"{type(module).__name__} is another class than {twin(module).__name__}"
    stack = STACKS.get(type(module))
    if stack and not all(type(layer) is stack and why_special(layer) is None for layer in module.layers):
        return f"not all of its layers are plain {stack.__name__}s"
    return why_special(module)


def twin(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn with a twin here, faster for what it computes, that a module is of, or derives from."""
    if type(module) in OURS:
        return None
    layers = (*type(module).__mro__, getattr(type(module), "cls_to_become", None))  # what a lazy layer will be
    layer = next((layer for layer in layers if layer in SWAPS), None)
    return None if layer is nn.Conv2d and not has_fewer_products(module) else layer


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(path, module, why it is left or None) of every layer that has a twin here."""
    inside_left = {}  # id of a module: the stack around it
    for path, module in model.named_modules():
        if twin(module) is None:
            continue
        reason = why_left(module)
        if id(module) in inside_left:
            reason = f"inside {inside_left[id(module)]}, which is left and may make nested tensors"
        elif reason and isinstance(module, nn.TransformerEncoder):
            inside_left |= {
                id(m): path or "the model"
                for m in module.modules()
                if not isinstance(m, nn.modules.batchnorm._BatchNorm)
            }
        yield path, module, reason


def swap(module: nn.Module) -> None:
    new = SWAPS[type(module)]
    attributes = new.attributes | leaf.ATTRIBUTES
    become(module, new.layer, {name: module.__dict__.get(name, Absent) for name in attributes}, attributes)


def become(module: nn.Module, layer: type[nn.Module], before: dict[str, object], attributes: dict[str, object]) -> None:
    """Make a module one of another class, with a note of what it was."""
    module.__dict__.update(attributes, **{MARK: Before(type(module), before)})
    module.__class__ = layer


def restore(module: nn.Module) -> None:
    """Undo `become`."""
    layer, attributes = module.__dict__.pop(MARK)
    for name, value in attributes.items():
        module.__dict__.pop(name)
        if value is not Absent:
            module.__dict__[name] = value
    module.__class__ = layer
