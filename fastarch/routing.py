"""Which kernel serves a call, and why. `fastarch.explain` reads what the operations note here."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

REFERENCE = "reference"


class Route(NamedTuple):
    """What serves a call ("reference", or an algorithm of the operation's schema), and the rule that chose it."""

    kernel: str
    reason: str


class Call(NamedTuple):
    """One recorded call of an operation: `backend` is for people ("cpu-avx512 winograd"), `shapes` by argument name."""

    operation: str
    backend: str
    reason: str
    shapes: dict[str, tuple[int, ...]]


# Of each thread: what one does is no business of others. A ContextVar torch.compile does not trace (torch 2.13).
_local = threading.local()
_KEY = "fastarch.reference"  # of what torch hands on to the threads in which autograd runs a CUDA device's backward


def _set_reference_only(on: bool) -> None:
    _local.reference_only = on
    if not torch.compiler.is_compiling():
        torch._C._stash_obj_in_tls(_KEY, on)


def _reference_only() -> bool:
    if torch.compiler.is_compiling():  # it guards on a threading.local, and cannot trace what is stashed
        return getattr(_local, "reference_only", False)
    # autograd's threads have what is stashed only: a checkpoint runs its forward again there
    return torch._C._is_key_in_tls(_KEY) and torch._C._get_obj_in_tls(_KEY)


@contextmanager
def reference() -> Iterator[None]:
    """Run every operation on its plain torch reference inside this block (in this thread and its backward passes)."""
    before = getattr(_local, "reference_only", False)
    _set_reference_only(True)
    try:
        yield
    finally:
        _set_reference_only(before)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect the calls that operations make inside this block (in this thread)."""
    before, _local.calls = getattr(_local, "calls", None), []
    try:
        yield _local.calls
    finally:
        _local.calls = before


def record(
    operation: str, backend: Callable[[str, str], str], device: str, kernel: str, reason: str, **tensors
) -> None:
    calls = getattr(_local, "calls", None)
    if calls is not None:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        calls.append(Call(operation, backend(device, kernel), reason, shapes))


def reference_reason() -> str | None:
    """Why no kernel may serve a call now, whatever the operation; None if one may."""
    if _reference_only():
        return "inside fastarch.reference()"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform, which differentiates through the reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation goes through the reference"
    return None
