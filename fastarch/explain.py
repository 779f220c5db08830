"""fastarch.explain: which kernel served each layer of a model, and why."""

import threading
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastarch import routing


class Explanation(NamedTuple):
    """One call of an operation: the layer that made it (its path in the model), its kernel and why that one."""

    layer: str
    operation: str
    shapes: dict[str, tuple[int, ...]]
    kernel: str
    reason: str


class Explanations(list[Explanation]):
    """A list that prints as a table."""

    def __rich__(self):
        from rich.table import Table

        table = Table("layer", "operation", "shapes", "kernel", "why")
        for layer, operation, shapes, kernel, reason in self:
            sizes = " ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
            table.add_row(layer, operation, sizes, f"[red]{kernel}" if kernel == routing.REFERENCE else kernel, reason)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def explain(model: nn.Module, *inputs) -> Explanations:
    """Run model(*inputs) once, without gradients, and tell which kernel served each call of an operation of fastarch.

    What is not listed ran on torch's own operations. Print the result for a table.
    """
    found, path, thread = Explanations(), [], threading.get_ident()
    names = {id(module): name or "(model)" for name, module in model.named_modules()}

    def credit():
        """The calls since the last time were made by the innermost layer that runs now."""
        found.extend(Explanation(path[-1], *call_fields(call)) for call in calls)
        calls.clear()

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
    with routing.recording() as calls, torch.no_grad():
        try:
            model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return found


def call_fields(call: routing.Call) -> tuple[str, dict, str, str]:
    return call.operation, call.shapes, call.backend, call.reason
