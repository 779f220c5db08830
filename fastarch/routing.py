"""Which kernel serves a call, and why. `fastarch.explain` reads what the operations note here."""

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


_reference_only = False
_calls: list[Call] | None = None


@contextmanager
def reference() -> Iterator[None]:
    """Run every operation on its plain torch reference inside this block (in all threads of the process)."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect the calls that operations make inside this block (in all threads of the process)."""
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def record(
    operation: str, backend: Callable[[str, str], str], device: str, kernel: str, reason: str, **tensors
) -> None:
    if _calls is not None:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        _calls.append(Call(operation, backend(device, kernel), reason, shapes))


def reference_reason() -> str | None:
    """Why no kernel may serve a call now, whatever the operation; None if one may."""
    if _reference_only:
        return "inside fastarch.reference()"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform, which differentiates through the reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation goes through the reference"
    return None
