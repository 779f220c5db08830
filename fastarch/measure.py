"""What a call costs: its time, and the bytes that autograd keeps for its backward."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

ROUNDS = 25
SECONDS = 0.05  # for all rounds of one comparison; one round at least


def now(device: torch.device) -> float:
    """Seconds, when all work that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def saved_bytes(function: Callable[..., object], *inputs: Tensor | None) -> int:
    """What autograd keeps for the backward of function(*inputs), each storage counted once, parameters included."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function(*inputs)  # held, or a kept tensor's address could be used again
    del output
    return sum(kept.values())


def medians(functions: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of a call of each, which take turns. The first round warms up, unless it takes all the time there is."""
    rounds, end = [], now(device) + SECONDS
    while not rounds or (len(rounds) <= ROUNDS and rounds[-1][-1] < end):
        times = [now(device)]
        for function in functions:
            function()
            times.append(now(device))
        rounds.append(times)
    counted = rounds[1:] or rounds
    return [median(times[i + 1] - times[i] for times in counted) for i in range(len(functions))]
