"""Chains of layers and functions in a graph that become one operation of ours.

    x -> Conv2d -> [BatchNorm2d] -> ReLU -> [MaxPool2d or AvgPool2d]      run_convolution
    x -> Conv2d -> BatchNorm2d -> [+ residual -> ReLU]                    run_convolution
    x -> BatchNorm -> [+ residual] -> ReLU                                run_norm
    scaled_dot_product_attention                                          run_attention

In the graph a chain becomes a call of one of these, over the same layers. On every call they look again whether the
layers are plain, and else do what stood there before: a hook that was added since sees what it would have seen.
"""

import operator
from collections.abc import Iterator
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastarch import autocast, ops
from fastarch import nn as ours
from fastarch.fusion.swaps import why_special
from fastarch.nn.batch_norm import scale_and_bias
from fastarch.ops.conv_relu_pool import adds_residual

OUR_NORMS = (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d, ours.SyncBatchNorm)
NORMS_OF_IMAGES = (ours.BatchNorm2d, ours.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv2d, ours.Conv2d)
NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *OUR_NORMS}
ATTENTION = F.scaled_dot_product_attention.__name__
POOLS = {"max": F.max_pool2d, "avg": F.avg_pool2d}

# what may stand between the parts of a chain, as a skip connection's own layers do: it changes none of its inputs
HARMLESS_LAYERS = {nn.Sequential, nn.Identity, nn.Conv1d, *CONVOLUTIONS, nn.Conv3d, nn.Linear, *NORMS} | {
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Dropout)
}
HARMLESS_FUNCTIONS = {operator.add, operator.mul, torch.add, torch.mul, torch.cat, torch.relu, F.pad}


class Window(NamedTuple):
    """A pool."""

    kind: str
    size: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    ceil_mode: bool


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling a module is its class's forward and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in classes and not hooks and "forward" not in module.__dict__


def is_hooked(module: nn.Module) -> bool:
    """Whether a layer could be part of a chain but for its hooks."""
    known = type(module) in {*CONVOLUTIONS, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, *NORMS}
    return known and not is_plain(module, type(module))


def is_worth_tracing(module: nn.Module) -> bool:
    """Whether forward, or a method that it may call, is written by the user and may have a chain in it."""
    layer = type(module)
    if layer.__module__.split(".")[0] in ("torch", "fastarch") and layer is not nn.Sequential:
        return False
    if any(begins_chain(module)):
        return True
    functions = [f for c in layer.__mro__ for f in vars(c).values() if isinstance(f, FunctionType)]
    return any(ATTENTION in f.__code__.co_names for f in functions if not f.__module__.startswith("torch."))


def begins_chain(module: nn.Module) -> Iterator[bool]:
    """Of the children, through containers, whether they may begin a chain."""
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            yield from begins_chain(child)
        yield type(child) in {*CONVOLUTIONS, *NORMS}


def is_relu(relu: nn.Module | bool | None) -> bool:
    return relu is None or isinstance(relu, bool) or is_plain(relu, nn.ReLU)


def run_norm(x: Tensor, norm: nn.Module, residual: Tensor | None, inplace_add: bool, relu: nn.Module | bool) -> Tensor:
    """relu(norm(x) + residual); relu is a layer, or says whether the function worked in place."""
    if is_plain(norm, *OUR_NORMS) and norm.activation is None and is_relu(relu) and fits(x, residual):
        return norm.normalize(x, residual, "relu")
    y = norm(x)
    if residual is not None:
        y = operator.iadd(y, residual) if inplace_add else y + residual
    return F.relu(y, relu) if isinstance(relu, bool) else relu(y)


def fits(x: Tensor, residual: Tensor | None) -> bool:
    """Whether nothing is broadcast or promoted."""
    return residual is None or (
        isinstance(residual, Tensor)
        and (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
    )


def run_convolution(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None,
    residual: Tensor | None,
    inplace_add: bool,
    relu: nn.Module | bool | None,
    pool: nn.Module | Window | None,
) -> Tensor:
    """pool(relu(norm(conv(x)) + residual)); relu is a layer, or says whether the function worked in place.

    With relu None it is norm(conv(x)).
    """
    window = window_of(pool) if isinstance(pool, nn.Module) else pool
    if (
        is_plain(conv, *CONVOLUTIONS)
        and conv.padding_mode == "zeros"
        and (norm is None or may_fold(conv, norm))
        and is_relu(relu)
        and (pool is None or window is not None)
        and conv_takes(x, conv)
        and may_add(x, residual)
        and (relu is not None or adds_residual(x))
    ):
        try:
            return in_one(x, conv, norm, residual, None if relu is None else "relu", window)
        except ValueError:  # sizes that leave nothing to compute: torch shall say so itself
            pass
    y = conv(x)
    if relu is None:
        return norm(y)
    if norm is not None:
        y = run_norm(y, norm, residual, inplace_add, relu)
    else:
        y = F.relu(y, relu) if isinstance(relu, bool) else relu(y)
    if isinstance(pool, nn.Module):
        return pool(y)
    return y if pool is None else POOLS[pool[0]](y, *pool[1:4], ceil_mode=pool[4])


def in_one(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module | None,
    residual: Tensor | None,
    activation: str | None,
    window: Window | None,
) -> Tensor:
    scale, bias = (None, conv.bias) if norm is None else scale_and_bias(conv, norm)
    kind, size, stride, padding, ceil_mode = window or (None, 2, None, 0, False)
    return ops.conv_relu_pool(
        x,
        conv.weight,
        bias,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        pool=kind,
        pool_size=size,
        pool_stride=stride,
        pool_padding=padding,
        ceil_mode=ceil_mode,
        activation=activation,
        scale=scale,
        residual=residual,
    )


def may_add(x: Tensor, residual: Tensor | None) -> bool:
    """Whether a kernel adds it to the convolution of x, unless their shapes differ."""
    return residual is None or (
        adds_residual(x) and isinstance(residual, Tensor) and (residual.dtype, residual.device) == (x.dtype, x.device)
    )


def may_fold(conv: nn.Conv2d, norm: nn.Module) -> bool:
    return (
        is_plain(norm, *NORMS_OF_IMAGES)
        and norm.activation is None
        and not norm.training
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
    )


def conv_takes(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether x is what a convolution takes; of anything else torch shall say itself what is wrong with it."""
    return (
        x.dim() == 4
        and x.shape[1] == conv.in_channels
        and (x.dtype == conv.weight.dtype or autocast.is_on(x.device.type))
        and x.device == conv.weight.device
    )


def window_of(pool: nn.Module) -> Window | None:
    """The window of a pool that ours can stand for."""
    if is_plain(pool, nn.MaxPool2d) and pool.dilation in (1, (1, 1)) and not pool.return_indices:
        return Window("max", pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
    if is_plain(pool, nn.AvgPool2d) and pool.count_include_pad and pool.divisor_override is None:
        return Window("avg", pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
    return None


def run_attention(query: Tensor, key: Tensor, value: Tensor, *args, **options) -> Tensor:
    if not any(t.is_nested for t in (query, key, value)):
        try:
            return ops.scaled_dot_product_attention(query, key, value, *args, **options)
        except (TypeError, ValueError):  # more dimensions than ours takes, or an error that torch shall name itself
            pass
    return F.scaled_dot_product_attention(query, key, value, *args, **options)


class Graph:
    """A graph of a module's forward, whose chains can be replaced."""

    def __init__(self, graph: fx.Graph, root: nn.Module):
        self.graph, self.root = graph, root

    def layer(self, node: fx.Node, *classes: type[nn.Module]) -> nn.Module | None:
        """The layer that a node calls on one value, if it is plain and of one of these classes."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        module = self.root.get_submodule(node.target)
        return module if is_plain(module, *classes) and why_special(module) is None else None

    def fuse(self) -> list[str]:
        """Replace all chains; what they were, for people."""
        found = []
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
                node.target = run_attention
                found.append(ATTENTION)
            elif (relu := self.relu(node)) is not None and (chain := self.ending_in(node, relu)):
                found.append(chain)
        for node in list(self.graph.nodes):
            if self.layer(node, *NORMS) and self.makes_images_for(node) and (chain := self.folded(node)):
                found.append(chain)
        for node in reversed(self.graph.nodes):
            if node.op == "get_attr" and not node.users:  # made for a chain that was none
                self.graph.erase_node(node)
        return found

    def ending_in(self, relu: fx.Node, argument: fx.Node | bool) -> str | None:
        """Replace the chain around a ReLU, if there is one."""
        before = relu.args[0]
        if len(before.users) > 1:
            return None
        if self.layer(before, *CONVOLUTIONS):
            return self.convolution(before, None, relu, argument)
        if self.layer(before, *NORMS):
            conv = before.args[0]
            if self.makes_images_for(before):
                return self.convolution(conv, before, relu, argument)
            return self.replace([before, relu], run_norm, (before.args[0], self.module(before), None, False, argument))
        if (sides := self.sum(before)) is None:
            return None
        candidates = [(norm, other) for norm, other in sides if len(norm.users) == 1 and self.layer(norm, *NORMS)]
        if not candidates:
            return None
        places = {node: place for place, node in enumerate(self.graph.nodes)}
        norm, residual = max(candidates, key=lambda pair: places[pair[0]])
        inplace = before.target in (operator.iadd, "add_")
        adding = (self.module(norm), residual, inplace, argument)
        if self.makes_images_for(norm):
            conv = norm.args[0]
            arguments = (conv.args[0], self.module(conv), *adding, None)
            return self.replace([conv, norm, before, relu], run_convolution, arguments) or self.replace(
                [norm, before, relu], run_norm, (conv, *adding)
            )
        return self.replace([norm, before, relu], run_norm, (norm.args[0], *adding))

    def makes_images_for(self, norm: fx.Node) -> bool:
        """Whether what a batch norm takes is the output of a Conv2d, which nothing else takes."""
        conv = norm.args[0]
        return len(conv.users) == 1 and self.layer(conv, *CONVOLUTIONS) and not self.layer(norm, nn.BatchNorm1d)

    def folded(self, norm: fx.Node) -> str | None:
        """Replace a batch norm and the convolution before it, of which no longer chain was made."""
        conv = norm.args[0]
        arguments = (conv.args[0], self.module(conv), self.module(norm), None, False, None, None)
        return self.replace([conv, norm], run_convolution, arguments)

    def convolution(self, conv: fx.Node, norm: fx.Node | None, relu: fx.Node, argument: fx.Node | bool) -> str | None:
        pool = window = None
        if len(relu.users) == 1:
            pool = next(iter(relu.users))
            window = self.module(pool) if self.is_pool_layer(pool) else window_of_call(pool)
        chain = [node for node in (conv, norm, relu, pool if window is not None else None) if node is not None]
        norm = None if norm is None else self.module(norm)
        return self.replace(
            chain, run_convolution, (conv.args[0], self.module(conv), norm, None, False, argument, window)
        )

    def is_pool_layer(self, node: fx.Node) -> bool:
        pool = self.layer(node, nn.MaxPool2d, nn.AvgPool2d)
        return pool is not None and window_of(pool) is not None

    def module(self, node: fx.Node) -> fx.Node:
        """A node whose value is the layer that a node calls."""
        with self.graph.inserting_before(node):
            return self.graph.create_node("get_attr", node.target)

    def relu(self, node: fx.Node) -> fx.Node | bool | None:
        """If a node is a ReLU of one value: its layer, or whether the function works in place."""
        if self.layer(node, nn.ReLU):
            return self.module(node)
        if not node.args or not isinstance(node.args[0], fx.Node) or len(node.args) > 1:
            return None
        if node.op == "call_function" and node.target is F.relu and set(node.kwargs) <= {"inplace"}:
            inplace = node.kwargs.get("inplace", False)
            return inplace if isinstance(inplace, bool) else None
        if node.kwargs:
            return None
        if (node.op, node.target) in (("call_function", torch.relu), ("call_method", "relu")):
            return False
        if (node.op, node.target) in (("call_function", torch.relu_), ("call_method", "relu_")):
            return True
        return None

    def sum(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
        """If a node adds two values: (either, the other), but of a sum in place only the one that it changes."""
        if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            return None
        a, b = node.args
        if a is b:
            return None
        if node.op == "call_function" and node.target in (operator.add, torch.add):
            return [(a, b), (b, a)]
        if (node.op, node.target) == ("call_method", "add"):
            return [(a, b), (b, a)]
        if (node.op, node.target) in (("call_function", operator.iadd), ("call_method", "add_")):
            return [(a, b)]
        return None

    def replace(self, chain: list[fx.Node], function, arguments: tuple) -> str | None:
        """One call in the place of the last, unless that would put parts of the chain behind what may change them."""
        modules = {id(m) for node in chain if node.op == "call_module" for m in self.called(node).modules()}
        inside = False
        for node in list(self.graph.nodes):
            if inside and node not in chain and not self.is_harmless(node, modules):
                return None
            inside = (inside or node is chain[0]) and node is not chain[-1]
        described = " -> ".join(str(node.target if isinstance(node.target, str) else node.name) for node in chain)
        with self.graph.inserting_before(chain[-1]):
            new = self.graph.call_function(function, arguments)
        chain[-1].replace_all_uses_with(new)
        for node in reversed(chain):
            self.graph.erase_node(node)
        return described

    def called(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(node.target)

    def is_harmless(self, node: fx.Node, modules: set[int]) -> bool:
        """Whether a node neither changes a tensor that it did not make nor shares state with these modules."""
        if node.op == "call_module":
            return all(
                is_plain(m, *HARMLESS_LAYERS) and not getattr(m, "inplace", False) and id(m) not in modules
                for m in self.called(node).modules()
            )
        return node.op in ("placeholder", "get_attr") or node.target in HARMLESS_FUNCTIONS


ARGUMENTS = {
    "max": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
}
DEFAULTS = {"stride": None, "padding": 0, "ceil_mode": False}
AS_OURS = {
    "dilation": (1, (1, 1)),
    "return_indices": (False,),
    "count_include_pad": (True,),
    "divisor_override": (None,),
}


def window_of_call(node: fx.Node) -> Window | None:
    """The window of F.max_pool2d or F.avg_pool2d, if ours can stand for the call."""
    kind = next((kind for kind, pool in POOLS.items() if node.op == "call_function" and node.target is pool), None)
    if kind is None or any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None
    given = dict(zip(ARGUMENTS[kind], node.args[1:])) | node.kwargs
    if any(name in AS_OURS and value not in AS_OURS[name] for name, value in given.items()):
        return None
    if not set(given) <= set(ARGUMENTS[kind]) or not isinstance(given.get("kernel_size"), (int, tuple, list)):
        return None
    size, stride, padding, ceil_mode = ((DEFAULTS | given).get(n) for n in ("kernel_size", *DEFAULTS))
    return Window(kind, size, stride, padding, ceil_mode)
