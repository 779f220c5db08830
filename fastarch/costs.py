"""What the calls of a run cost on our kernels and with PyTorch's functions; fastarch.explain shows it."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fastarch import autocast, counterparts, routing
from fastarch.measure import medians, saved_bytes

SECONDS = 10.0  # for all measurements of a run


class Cost(NamedTuple):
    """`seconds` of one call without gradients; `saved_bytes` that autograd keeps for its backward, None if unknown."""

    seconds: float | None
    saved_bytes: int | None


class Like(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def draw(self) -> Tensor:
        """One of random numbers; where elements share memory (broadcast heads) they share it here too."""
        size = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        return torch.randn(size, dtype=self.dtype, device=self.device).as_strided(self.shape, self.stride)


class Costs(TorchDispatchMode):
    """Sees with what arguments recorded calls run our operations, below autograd and autocast.

    Of activations it keeps how they lie in memory alone, so that a large model's need not all live at once; weights,
    masks, lengths and statistics by channel as they are.
    """

    supports_higher_order_operators = True  # torch.cond, flex_attention: passed on

    def __init__(self, calls: list[routing.Call]):
        super().__init__()
        self.calls = calls
        self.kinds: dict[int, tuple] = {}  # by the number of a call: what calls that are alike have in common
        self.arguments: dict[tuple, list] = {}  # of one call of each kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        number = len(self.calls) - 1
        is_ours = isinstance(func, OpOverload) and func.namespace == "fastarch" and not types  # no fake tensors
        if is_ours and self.calls and number not in self.kinds:
            self.kinds[number] = (self.calls[number].operation, func, *(described(a) for a in args))
            self.arguments.setdefault(self.kinds[number], self.keep(args))
        return func(*args, **(kwargs or {}))

    def keep(self, arguments: tuple) -> list:
        """What is needed to make arguments like these again."""
        return [kept(a) for a in arguments]

    def measured(self) -> list[tuple[Cost | None, Cost | None]]:
        """Of each call, ours and PyTorch's."""
        end, costs = time.perf_counter() + SECONDS, {}
        with torch.inference_mode(False), torch.no_grad():
            for kind, arguments in self.arguments.items():
                operation, function, *_ = kind
                # something else runs first where a rank does not compute by itself: statistics of several ranks
                if function.__name__.endswith("_fwd.default") and time.perf_counter() < end:
                    costs[kind] = compare(operation, [made(a) for a in arguments])
        return [costs.get(self.kinds.get(i), (None, None)) for i in range(len(self.calls))]


def described(argument):
    if isinstance(argument, Tensor):
        return Like(tuple(argument.shape), argument.stride(), argument.dtype, argument.device)
    return tuple(argument) if isinstance(argument, list) else argument


def kept(argument):
    if isinstance(argument, Tensor) and not isinstance(argument, nn.Parameter):
        return described(argument) if argument.is_floating_point() and argument.dim() > 1 else argument
    return argument


def made(argument):
    if isinstance(argument, Like):
        return argument.draw()
    if isinstance(argument, Tensor) and argument.is_inference():
        return argument.clone()  # which can have a gradient
    return argument


def compare(operation: str, arguments: list) -> tuple[Cost | None, Cost | None]:
    """Ours and PyTorch's; None for what cannot be run here."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with warnings.catch_warnings(), autocast.done(device.type):
        warnings.simplefilter("ignore")
        try:
            tensors, *functions = counterparts.OF[operation](*arguments)
        except Exception:  # whatever PyTorch says of a case that it does not have
            return None, None
        costs = [None if function is None else tried(function, tensors) for function in functions]
        runs = [i for i, cost in enumerate(costs) if cost is not None]
        seconds = medians([partial(functions[i], *tensors) for i in runs], device) if runs else []
        for i, time_of in zip(runs, seconds):
            costs[i] = costs[i]._replace(seconds=time_of)
    return tuple(costs)


def tried(function: Callable[..., object], tensors: tuple[Tensor | None, ...]) -> Cost | None:
    """What a first call says, with and else without gradients: no time yet. None where neither can be had."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    try:
        with torch.enable_grad():
            return Cost(None, saved_bytes(function, *leaves))
    except Exception:  # whatever the function raises: no kernel, no memory
        pass
    try:
        function(*tensors)
    except Exception:
        return None
    return Cost(None, None)
