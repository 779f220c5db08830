"""fastarch.fuse: the layers and chains of layers of a model that exists, on our kernels."""

import copy
from typing import NamedTuple

from torch import Tensor, nn

from fastarch.fusion import chains, programs, swaps, transformers
from fastarch.fusion.tracing import Refused

REPORT = "fastarch_fusions"  # the attribute of a fused model that `fusions` reads


class Fusion(NamedTuple):
    """A part of a model (`layer`, its path), what was looked at there, what it became, or why it was left."""

    layer: str
    what: str
    became: str
    left: str


class Fusions(list[Fusion]):
    """A list that prints as a table."""

    def __rich__(self):
        from rich.table import Table
        from rich.text import Text

        table = Table("layer", "what", "became", "left, because")
        for layer, what, became, left in self:
            table.add_row(*map(Text, (layer, what, became)), Text(left, "red"))  # no markup: an error may have brackets
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model on our kernels: same parameters and buffers, state_dict keys, hooks and modes, other arithmetic.

    Layers that are exactly torch.nn's BatchNorm1d, 2d, 3d, SyncBatchNorm, GRU, GRUCell, MultiheadAttention,
    TransformerEncoder, TransformerDecoder or one of their layers become ours, and Conv2d of 3x3 at stride 1. Where the
    forward of a module can be written down as a graph of its children, chains in it become one call each, whether of
    layers, functions or methods:

        Conv2d -> [BatchNorm2d] -> ReLU -> [MaxPool2d or AvgPool2d]
        Conv2d -> BatchNorm2d -> [sum with another value -> ReLU]
        BatchNorm -> [sum with another value] -> ReLU
        scaled_dot_product_attention

    A module with such chains gets a class of its own, derived from the one it had. Its forward runs the graph where
    that surely gives the same, and otherwise, for other arguments or after changes, what the user wrote. What may
    differ (control flow on values, hooks on the layers of a chain, subclasses, weights that are computed) is left
    alone, and `fusions(model)` says why.

    A model of Hugging Face's transformers that is on "sdpa" gets our attention (fastarch.integrations.transformers)
    by the name of it in its config.

    Args:
        inplace: change the model itself. Otherwise it stays as it is, and the result is a copy of its modules that
            shares its parameters and buffers.

    Returns:
        The fused model. It can be copied, pickled, compiled, exported and trained as the original; state_dicts fit
        both. `unfuse` undoes it. Fused again, it is first unfused.

    Differences that remain: dropout in attention and between the layers of a GRU drops other elements; a GRU is no
    torch.nn.GRU to isinstance; TransformerEncoder gives numbers at padding, where torch in evaluation may give 0; hooks
    of all modules (torch.nn.modules.module.register_module_forward_hook) do not see the layers of a chain; a model of
    transformers that is asked for attention weights raises, where on "sdpa" it returns none of them.

    Raises:
        TypeError: no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: want a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        attributes = [value for module in model.modules() for value in vars(module).values()]
        loose = [value for value in attributes if isinstance(value, Tensor)]
        model = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers(), *loose)})
    unfuse(model)
    report, layers, forwards = Fusions(), list(swaps.candidates(model)), []
    attentions = [(path, module, transformers.why_left(module)) for path, module in transformers.models(model)]
    for path, module in model.named_modules():
        path, name = path or "(model)", type(module).__name__
        if chains.is_worth_tracing(module):
            try:
                made, found = programs.programs(module)
            except Refused as refusal:
                report.append(Fusion(path, f"forward of {name}", "", str(refusal)))
                continue
            if found:
                forwards.append((module, made))
                report.extend(Fusion(path, chain, "one call", "") for chain in found)
        if chains.is_hooked(module):
            report.append(Fusion(path, name, "", "it has a hook: no chain goes through it"))
    for path, module, reason in layers:
        name = type(module).__name__
        report.append(Fusion(path or "(model)", name, "" if reason else f"fastarch.nn.{name}", reason or ""))
        if reason is None:
            swaps.swap(module)
    for path, module, reason in attentions:
        report.append(Fusion(path or "(model)", "attention of transformers", "" if reason else "ours", reason or ""))
        if reason is None:
            transformers.change(module)
    for module, made in forwards:
        programs.install(module, made)
    order = {path or "(model)": place for place, (path, _) in enumerate(model.named_modules())}
    model.__dict__[REPORT] = Fusions(sorted(report, key=lambda fusion: order[fusion.layer]))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place: modules get back the class, configs the attention that they had. Returns the model.

    A module that has become something else since (parametrized, say) stays what it is.
    """
    for module in model.modules():
        if swaps.MARK in module.__dict__ and (type(module) in swaps.OURS or programs.is_rewritten(module)):
            swaps.restore(module)
        if transformers.MARK in module.__dict__:
            transformers.restore(module)
        module.__dict__.pop(REPORT, None)
    return model


def fusions(model: nn.Module) -> Fusions:
    """What `fuse` found in a model and did with it. Print it for a table."""
    if REPORT not in model.__dict__:
        raise ValueError(f"fusions: want a model that fastarch.fuse returned, got {type(model).__name__}")
    return model.__dict__[REPORT]
