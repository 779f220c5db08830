"""Times one case on every provider, fairly: correct first, then interleaved round by round in one process."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from floors import measured

ROUNDS = 15
ROUND_SECONDS = 0.02  # the least that one provider is timed for in a round
BUDGET_SECONDS = 20.0  # for all rounds of a case
PAUSE_SECONDS = 0.005  # lets the threads of the provider before stop spinning


class Case(NamedTuple):
    """One workload: `ours` and `reference` are modules with the same parameters; operations and traffic are the floor's."""

    name: str
    ours: torch.nn.Module
    reference: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    flops: float  # of the forward, done directly
    moved: float  # bytes that the forward must read and write


class Timing(NamedTuple):
    seconds: float  # median over the rounds
    best: float
    ratio: float  # median over the rounds of this provider's time by ours
    ratio_low: float  # quartiles
    ratio_high: float


def compare(providers: dict[str, Callable[[], object]], ours: str, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Interleaved timings; `ours` names the provider that ratios refer to."""
    calls = {name: calibrate(run) for name, run in providers.items()}
    times = {name: [] for name in providers}
    deadline = time.perf_counter() + BUDGET_SECONDS
    gc.disable()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name in random.sample(list(providers), len(providers)):
            time.sleep(PAUSE_SECONDS)
            providers[name]()  # wakes its threads and warms the caches
            start = time.perf_counter()
            for _ in range(calls[name]):
                providers[name]()
            times[name].append((time.perf_counter() - start) / calls[name])
    gc.enable()
    return {name: summary(times[name], times[ours]) for name in providers}


def calibrate(run: Callable[[], object]) -> int:
    """How often to call in one round."""
    run()
    start = time.perf_counter()
    run()
    return max(1, round(ROUND_SECONDS / (time.perf_counter() - start)))


def summary(times: list[float], ours: list[float]) -> Timing:
    ratios = [t / o for t, o in zip(times, ours)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(statistics.median(times), min(times), middle, low, high)


def saved_bytes(run: Callable[[], torch.Tensor]) -> int:
    """What autograd keeps for the backward of run()."""
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def share_of_floor(seconds: float, flops: float, moved: float) -> float:
    """The floor's part of a time: 1 is as fast as the machine can be without a better algorithm."""
    return measured().seconds(flops, moved) / seconds
