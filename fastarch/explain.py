"""fastarch.explain: which kernel served each layer of a model, why, at what cost, and what is left to PyTorch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from fastarch import routing
from fastarch.costs import Cost, Costs
from fastarch.fuse import fuse, fusions
from fastarch.fusion import programs, swaps, transformers


class Explanation(NamedTuple):
    """One call of an operation: the layer that made it (its path in the model), its kernel and why that one.

    `ours` is what the call costs on that kernel, `pytorchs` with PyTorch's own functions. None where that was not
    measured: without `timed`, on the reference (which is PyTorch's functions), or where it cannot be run again.
    """

    layer: str
    operation: str
    shapes: dict[str, tuple[int, ...]]
    kernel: str
    reason: str
    ours: Cost | None = None
    pytorchs: Cost | None = None


class Unfused(NamedTuple):
    """A part of a model (`layer`, its path) that PyTorch's operations serve, what it is, and why."""

    layer: str
    what: str
    reason: str


class Explanations(list[Explanation]):
    """A list that prints as a table, and as another one of what is `unfused`."""

    def __init__(self):
        super().__init__()
        self.unfused: list[Unfused] = []

    def __rich__(self):
        from rich.console import Group

        return Group(*([table_of_calls(self)] if self or not self.unfused else []), *table_of_rest(self.unfused))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def table_of_calls(calls: list[Explanation]):
    from rich.table import Table

    measured = any(call.ours for call in calls)
    table = Table()
    for heading in ("layer", "operation", "shapes", "kernel", "why"):
        table.add_column(heading, overflow="fold")
    for heading in ("ms", "PyTorch\nms", "MB\nkept", "PyTorch\nMB kept") if measured else ():
        table.add_column(heading, justify="right", no_wrap=True)
    if measured:
        table.caption = "ms: a call without gradients, median. MB kept: by autograd, for the backward of a call."
    for call in calls:
        sizes = " ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in call.shapes.items())
        kernel = f"[red]{call.kernel}" if call.kernel == routing.REFERENCE else call.kernel
        both = (call.ours or Cost(None, None), call.pytorchs or Cost(None, None))
        costs = [number(cost.seconds, 1e3) for cost in both] + [number(cost.saved_bytes, 1e-6) for cost in both]
        table.add_row(call.layer, call.operation, sizes, kernel, call.reason, *(costs if measured else ()))
    return table


def table_of_rest(unfused: list[Unfused]) -> Iterator:
    from rich.table import Table
    from rich.text import Text

    if unfused:
        table = Table("layer", "on PyTorch's operations", "because", title="Not fused", title_justify="left")
        for row in unfused:
            table.add_row(*map(Text, row))  # no markup: an error's message may have brackets
        yield table


def number(value: float | None, unit: float) -> str:
    """Three digits."""
    if value is None:
        return ""
    value *= unit
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def explain(model: nn.Module, *inputs, timed: bool = True) -> Explanations:
    """Run model(*inputs) once, without gradients, and tell which kernel served each call of an operation of fastarch.

    The model runs as it is, in training or in evaluation; one that torch.compile made runs uncompiled. Afterwards its
    buffers (running statistics) and torch's random number generators are what they were before.

    Args:
        model: with parameters and inputs on any device.
        timed: measure each call, on our kernel and with PyTorch's own functions (torch.nn.functional's, nn.GRU;
            fastarch.ref where PyTorch has none): seconds, the median of calls without gradients that take turns, and
            the bytes that autograd keeps for the backward. The measured calls come after the run, on random numbers in
            tensors laid out as those of the call; calls that are alike are measured once. By default, because whether
            a kernel pays is what one looks for, and the price is bounded: some 0.1 s for each kind of call, 10 s in
            all, after which calls have no figures. False for one run of the model and nothing else.

    Returns:
        A list with an `Explanation` of each call, whose attribute `unfused` lists the layers and chains of layers that
        run on PyTorch's operations but are of the kinds that `fastarch.fuse` takes, each with the reason. What is in
        neither is not in fastarch. Print the result for tables.

    Raises:
        TypeError: no torch.nn.Module.
        Whatever model(*inputs) raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: want a torch.nn.Module, got {type(model).__name__}")
    found, path, thread = Explanations(), [], threading.get_ident()
    names = {id(module): name or "(model)" for name, module in model.named_modules()}

    def credit():
        """The calls since the last time were made by the innermost layer that runs now."""
        found.extend(Explanation(path[-1], *call_fields(call)) for call in calls[len(found) :])

    def enter(module, _):
        if threading.get_ident() != thread:  # the hooks see what every thread runs
            return
        credit()
        path.append(names.get(id(module)) or path[-1])

    def leave(*_):
        if threading.get_ident() != thread:
            return
        credit()
        path.pop()

    # hooks of all modules: of its own hooks a layer's result may depend, for chains of layers go through none
    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    with unchanged(model, inputs), torch.compiler.set_stance("force_eager"), torch.no_grad():
        try:
            with routing.recording() as calls, Costs(calls) if timed else nullcontext() as costs:
                model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if costs is not None:
            measured = costs.measured()
            found[:] = [call._replace(ours=o, pytorchs=p) for call, (o, p) in zip(found, measured)]
    found.unfused = unfused(model)
    return found


def call_fields(call: routing.Call) -> tuple[str, dict, str, str]:
    return call.operation, call.shapes, call.backend, call.reason


@contextmanager
def unchanged(model: nn.Module, inputs: tuple) -> Iterator[None]:
    """Puts buffers and random number generators back."""
    before = [
        (module._buffers, name, buffer, buffer.clone(), None if buffer.is_inference() else buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]
    tensors = [t for t in (*model.parameters(), *model.buffers(), *tree_leaves(inputs)) if isinstance(t, Tensor)]
    with torch.random.fork_rng({t.device.index for t in tensors if t.device.type == "cuda"}):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffers, name, buffer, value, version in before:
                    buffers[name] = buffer
                    if version is None or buffer._version != version:
                        buffer.copy_(value)


def unfused(model: nn.Module) -> list[Unfused]:
    """What fuse would take, or says that it leaves; a copy is fused to find out."""
    try:
        report = fusions(fuse(model))
    except Exception as error:  # whatever copying a module of the user raises
        return [Unfused("(model)", type(model).__name__, f"fastarch.fuse cannot take it: {error}")]
    rows = []
    for layer, what, became, left in report:
        module = model.get_submodule("" if layer == "(model)" else layer)
        if left:
            rows.append(Unfused(layer, what, left))
        elif not is_fused(module):
            rows.append(Unfused(layer, what, f"not fused: fastarch.fuse makes it {became}"))
    return rows


def is_fused(module: nn.Module) -> bool:
    """Whether fuse has been here."""
    return type(module) in swaps.OURS or programs.is_rewritten(module) or transformers.MARK in module.__dict__
