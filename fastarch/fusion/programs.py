"""A module whose forward is a fused graph wherever that stands for its own."""

import functools
import importlib
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fastarch.fusion.chains import Graph
from fastarch.fusion.swaps import Absent, become
from fastarch.fusion.tracing import Refused, Trace, trace

NOTHING = nn.Module()
PROGRAMS = "fastarch_programs"  # the attribute of a fused module that holds one for each mode


class Program:
    """The source of a forward over tensors, and when it stands for the module's own."""

    def __init__(
        self,
        source: str,
        names: dict[str, object],
        inputs: int,
        constants: dict[str, object],
        structure: dict[str, tuple[str, ...]],
        shared: list[list[str]],
    ):
        self.arguments = (source, names, inputs, constants, structure, shared)
        self.inputs, self.constants, self.structure, self.shared = inputs, constants, structure, shared
        scope = {name: found(value) for name, value in names.items()}
        exec(compile(source, "<fastarch.fuse>", "exec"), scope)
        self.run: Callable[..., object] = scope["forward"]

    def __reduce__(self):
        return Program, self.arguments

    def serves(self, module: nn.Module, args: tuple) -> bool:
        """Whether the module is as it was when it was traced, and is called as it was."""
        return (
            len(args) == self.inputs
            and all(isinstance(a, Tensor) for a in args)
            and all(is_same(getattr(module, name, None), value) for name, value in self.constants.items())
            and all(tuple(at(module, path)._modules) == names for path, names in self.structure.items())
            and all(at(module, path) is at(module, first) for first, *others in self.shared for path in others)
        )


def is_same(value: object, other: object) -> bool:
    return value is other or (type(value) is type(other) and value == other)


def at(module: nn.Module, path: str) -> nn.Module:
    """The module at a path, or an empty one."""
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        module = NOTHING if child is None else child
    return module


class Reference(NamedTuple):
    """A module of Python, or what one of them holds under a name, where pickle has no name for it."""

    module: str
    name: str | None


def reference(value: object) -> object:
    """What stands for a value of a graph's code in a pickle."""
    if isinstance(value, ModuleType):
        return Reference(value.__name__, None)
    name = getattr(value, "__name__", None)
    if name and getattr(F, name, None) is value:
        return Reference(F.__name__, name)
    try:
        pickle.dumps(value)
    except Exception as error:  # whatever __reduce__ raises
        raise Refused(f"it calls {name or value}, which cannot be pickled") from error
    return value


def found(value: object) -> object:
    if not isinstance(value, Reference):
        return value
    module = importlib.import_module(value.module)
    return module if value.name is None else getattr(module, value.name)


def in_place_of(forward: Callable) -> Callable:
    @functools.wraps(forward)  # whose signature others look at
    def program_or_forward(self, *args, **kwargs):
        program = self.fastarch_programs[self.training]
        if kwargs or not program.serves(self, args):
            return forward(self, *args, **kwargs)
        return program.run(self, *args)

    return program_or_forward


class Rewritten:
    """Comes before a class of the user in a class whose forward takes the place of the user's."""

    def __reduce_ex__(self, protocol):
        function, (layer, *args), *rest = super().__reduce_ex__(max(protocol, 2))
        return rebuilt, (function, layer.__mro__[2], *args), *rest


def rebuilt(function: Callable, layer: type[nn.Module], *args) -> nn.Module:
    return function(rewritten_class(layer), *args)


@functools.cache
def rewritten_class(layer: type[nn.Module]) -> type[nn.Module]:
    """The class of fused modules of a class, by the same name."""
    attributes = {name: getattr(layer, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(layer)(layer.__name__, (Rewritten, layer), attributes | {"forward": in_place_of(layer.forward)})


def is_rewritten(module: nn.Module) -> bool:
    return type(module).__mro__[1] is Rewritten


def programs(module: nn.Module) -> tuple[dict[bool, Program], list[str]]:
    """The module's forward with its chains fused, for training and for evaluation, and what they were.

    Raises Refused where forward cannot be traced, or its class cannot have a successor.
    """
    layer, training = type(module), module.training
    if "forward" in module.__dict__:
        raise Refused("its forward was replaced")
    if layer.__reduce_ex__ is not object.__reduce_ex__ or layer.__reduce__ is not object.__reduce__:
        raise Refused(f"{layer.__name__} has its own way to be pickled")
    if any("__init_subclass__" in vars(c) for c in layer.__mro__[:-1]):
        raise Refused(f"{layer.__name__} takes note of its subclasses")
    made, found = {}, []
    try:
        for mode in (True, False):
            module.training = mode
            traced = trace(module)
            found += [chain for chain in Graph(traced.graph, module).fuse() if chain not in found]
            made[mode] = program(traced)
    finally:
        module.training = training
    return made, found


def program(trace: Trace) -> Program:
    trace.graph.lint()
    code = trace.graph.python_code("self")
    names = {name: reference(value) for name, value in code.globals.items()}
    inputs = sum(node.op == "placeholder" for node in trace.graph.nodes)
    return Program(code.src, names, inputs, *trace[1:])


def install(module: nn.Module, made: dict[bool, Program]) -> None:
    become(module, rewritten_class(type(module)), {PROGRAMS: Absent}, {PROGRAMS: made})
