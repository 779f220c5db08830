"""The forward of one module as a torch.fx graph over its children, if the graph computes the same on every call.

torch.fx runs forward once, on values that stand for tensors, and writes down what is done to them. All else that
forward did then is done with: a number that was read, a branch that was taken, a flag that was set. So this file looks
at the Python code that ran, and refuses whatever depends on more than the arguments, the children and attributes that
can be compared on each call, or does more than compute a result.
"""

import dis
import functools
import gc
import inspect
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device, FunctionType, BuiltinFunctionType, type)
COLLECTIONS = (dict, list, tuple, torch.Size)
OWN_ATTRIBUTES = set(nn.Module().__dict__) - {"training"}  # read by nn.Module's own methods; children are compared
METHODS_AND_TENSORS = (MethodType, FunctionType, nn.Module, Tensor, fx.Proxy)
PACKAGES = {"torch", "math", "operator", "typing", "collections"}  # whose functions depend on their arguments alone,
CALLABLE = (  # files of torch whose functions forward may call: none that checkpoints, compiles, or sets a mode
    *("torch.nn.functional", "torch.nn.modules", "torch.fx", "torch.functional", "torch._jit_internal"),
    *("torch.overrides", "torch._tensor", "torch._VF"),
)
BUILTINS = {  # or these
    *("len", "range", "zip", "enumerate", "reversed", "tuple", "list", "dict", "slice", "isinstance", "super"),
    *("int", "float", "bool", "str", "min", "max", "sum", "abs", "getattr"),
}
OTHERS = {"torch", "_frozen_importlib", "_frozen_importlib_external", *sys.stdlib_module_names}  # run by torch.fx
EFFECTS = {
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), "sets an attribute"),
    **dict.fromkeys(("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"), "writes into what it indexes"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "sets a variable outside"),
    **dict.fromkeys(("WITH_EXCEPT_START", "SETUP_WITH", "BEFORE_WITH"), "has a with statement"),
    **dict.fromkeys(("IMPORT_NAME", "YIELD_FROM", "SEND"), "imports or yields"),
}


class Refused(Exception):  # noqa: N818
    """Why forward is left as it is."""


class Trace(NamedTuple):
    """A graph of forward, and what has to be as it was then for the graph to stand for it."""

    graph: fx.Graph
    constants: dict[str, object]  # attributes of the module
    structure: dict[str, tuple[str, ...]]  # names of the children of the module and of its containers, by path
    shared: list[list[str]]  # paths of one and the same module


def trace(module: nn.Module) -> Trace:
    """In the mode (training or evaluation) that the module is in; raises Refused."""
    tracer, guard = Tracer(), Guard()
    with recorded_reads(module) as reads, Concrete(), guard:
        try:
            graph = tracer.trace(module)
        except Refused as refusal:
            raise Refused(guard.reason or str(refusal)) from None
        except Exception as error:  # whatever forward or torch.fx raises
            first = str(error).strip().split("\n")[0] or type(error).__name__
            raise Refused(guard.reason or f"torch.fx cannot trace it: {first}") from error
    if guard.reason:
        raise Refused(guard.reason)
    return Trace(graph, constants(reads), structure(module, graph), shared(module, graph))


class Value(fx.Proxy):
    """What stands for a tensor."""

    @property
    def __class__(self):
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return Value
        raise Refused("it asks for the class of a value")


def inplace(name: str):
    """torch.fx would write x += y down as x + y, and so lose that x changes."""
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(Value, f"__{name}__", inplace(name))


class Tracer(fx.Tracer):
    """Children are not entered; arguments with a default have it."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def call_module(self, m: nn.Module, forward, args: tuple, kwargs: dict):
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def create_args_for_root(self, root_fn, is_module: bool, concrete_args=None):
        if not isinstance(root_fn, FunctionType) or is_of_torch(root_fn.__globals__["__name__"]):
            raise Refused("its forward is no plain function")
        names = required(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def getattr(self, attr: str, attr_val, parameter_proxy_cache: dict):
        if attr_val is None:
            raise Refused(f"it reads {attr}, which is None")
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a):
        if type(a) is not Value and not isinstance(a, fx.Proxy):
            if isinstance(a, Tensor):
                raise Refused("it uses a tensor that is no parameter and no buffer")
            if is_dataclass(a) or (isinstance(a, (dict, list, tuple)) and type(a) not in COLLECTIONS):
                raise Refused(f"it makes a {type(a).__name__}")
        return super().create_arg(a)


def required(forward: FunctionType) -> list[str]:
    """Names of the arguments behind self that have no default."""
    _, *parameters = inspect.signature(forward).parameters.values()
    wanted = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.kind is p.KEYWORD_ONLY for p in wanted):
        raise Refused("it takes an argument by keyword only")
    return [p.name for p in wanted]


@contextmanager
def recorded_reads(root: nn.Module) -> Iterator[dict[tuple[str, str], object]]:
    """(path of a module, attribute) to value, of all that is read of the module and its descendants but its methods."""
    paths, reads = {id(module): path for path, module in root.named_modules()}, {}

    def read(module, name):
        value = object.__getattribute__(module, name)
        if id(module) not in paths or name in OWN_ATTRIBUTES or name.startswith("__"):
            return value
        if name in object.__getattribute__(module, "__dict__") or not isinstance(value, METHODS_AND_TENSORS):
            reads[paths[id(module)], name] = value
        return value

    nn.Module.__getattribute__ = read
    try:
        yield reads
    finally:
        del nn.Module.__getattribute__


def constants(reads: dict[tuple[str, str], object]) -> dict[str, object]:
    """Of the attributes that were read, those that are to be compared on each call."""
    compared = {}
    for (path, name), value in reads.items():
        if path:
            raise Refused(f"it reads {path}.{name}")
        if not all(isinstance(v, CONSTANTS) for v in (value if type(value) is tuple else (value,))):
            raise Refused(f"it reads {name}, a {type(value).__name__}, which may change")
        if name != "training":  # there is a graph for either mode
            compared[name] = value
    return compared


def structure(root: nn.Module, graph: fx.Graph) -> dict[str, tuple[str, ...]]:
    """Names of children, wherever forward may have gone through them."""
    paths = {""}
    for node in graph.nodes:
        if node.op == "call_module":
            *parents, _ = node.target.split(".")
            paths |= {".".join(parents[: i + 1]) for i in range(len(parents))}
    queue = [("", root)]
    while queue:
        path, module = queue.pop()
        for name, child in module.named_children():
            if type(child).forward is nn.Module.forward:  # a ModuleList or ModuleDict, which is gone through
                paths.add(f"{path}.{name}" if path else name)
                queue.append((f"{path}.{name}" if path else name, child))
    return {path: tuple(root.get_submodule(path)._modules) for path in sorted(paths)}


def shared(root: nn.Module, graph: fx.Graph) -> list[list[str]]:
    """Which paths lead to one module, for the graph knows modules by the first."""
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    paths: dict[int, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    for node in graph.nodes:
        if node.op == "get_attr" and sum(t is dict(tensors)[node.target] for _, t in tensors) > 1:
            raise Refused(f"it reads {node.target}, which has other names")
    return [same for same in paths.values() if len(same) > 1 and called & set(same)]


class Concrete(TorchFunctionMode):
    """Refuses functions of torch that are called on no value: their result would be the same for ever."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs or {}))):
            raise Refused(f"it calls {getattr(func, '__name__', func)} on no argument of its own")
        return func(*args, **(kwargs or {}))


class Guard:
    """Looks at the code of every Python function that runs, and keeps the first reason to refuse."""

    reason: str | None = None

    def __enter__(self):
        self.before, self.collecting = sys.getprofile(), gc.isenabled()
        gc.disable()  # it would run functions that forward does not call
        sys.setprofile(self.watch)
        return self

    def __exit__(self, *_):
        sys.setprofile(self.before)
        if self.collecting:
            gc.enable()

    def watch(self, frame: FrameType, event: str, _) -> None:
        if event == "call" and self.reason is None and (reason := why_not(frame)):
            self.reason = reason
            raise Refused(reason)  # before the function begins


def why_not(frame: FrameType) -> str | None:
    """Why what a function computes may change, or is not all it does."""
    home, caller = (f.f_globals.get("__name__", "") for f in (frame, frame.f_back))
    if is_of_torch(home) and caller != __name__ and caller.split(".")[0] not in OTHERS:
        return f"it runs {home}"
    if home.split(".")[0] in OTHERS or home == __name__:
        return None
    code = frame.f_code
    if effect := effect_of(code):
        return f"{code.co_name} {effect}"
    for name in globals_of(code):
        value = frame.f_globals.get(name, frame)
        if value is frame:
            if name not in BUILTINS and not is_error(frame.f_builtins.get(name)):
                return f"{code.co_name} calls {name}"
        elif not is_pure(value):
            return f"{code.co_name} reads the global {name}"
    for name in code.co_freevars:
        value = frame.f_locals.get(name)
        if type(value) is not Value and not isinstance(value, (*CONSTANTS, nn.Module)):
            return f"{code.co_name} reads {name} of the function around it"
    return None


def is_of_torch(home: str) -> bool:
    """Whether a file is one of torch whose functions may do more than they return."""
    return home.split(".")[0] == "torch" and not home.startswith(CALLABLE)


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def is_pure(value: object) -> bool:
    """Whether a global may be used: Python functions are looked at themselves when they run."""
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0] in PACKAGES
    home = getattr(value, "__module__", None) or getattr(getattr(value, "__self__", None), "__name__", "")
    if isinstance(value, BuiltinFunctionType):
        return isinstance(getattr(value, "__self__", None), type) or home.split(".")[0].lstrip("_") in PACKAGES
    if isinstance(value, FunctionType):
        return home.split(".")[0] in PACKAGES or home.split(".")[0] not in sys.stdlib_module_names
    return isinstance(value, type)


@functools.lru_cache
def effect_of(code: CodeType) -> str | None:
    if asking := [name for name in code.co_names if name.startswith("is_")]:
        return f"asks {asking[0]}"  # is_grad_enabled, is_scripting, ...
    for instruction in dis.get_instructions(code):
        if instruction.opname in EFFECTS:
            return EFFECTS[instruction.opname]
        if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return "sets a variable outside"
    return None


@functools.lru_cache
def globals_of(code: CodeType) -> tuple[str, ...]:
    return tuple({i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")})
