"""Times one case on every provider, fairly: correct first, then interleaved round by round in one process."""

import copy
import gc
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import peers
import torch
from records import OURS, REFERENCE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SEED = 0  # of weights, inputs and the order of the providers in a round
GRADIENT_SEED = 1  # not the seed that drew the inputs
ROUNDS = 15
ROUND_SECONDS = 0.02  # the least that one provider is timed for in a round
PAUSE_SECONDS = 0.005  # lets the threads of the provider before stop spinning
# Of the norm, for outputs and for gradients. Which of two elements is a window's maximum, where they are equal but for
# rounding, moves a gradient to another place: a few of a million windows in float32, a few of a hundred in 16 bits.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (1e-2, 0.1), torch.float16: (2e-3, 0.05)}
L2_BYTES = 256 * 2**20  # written between two timed calls on a GPU: more than any L2 holds

OURS_CHANNELS_LAST = "fastarch channels_last"
OURS_COMPILED = "fastarch compile"


class Point(NamedTuple):
    """A case's place in a series of cases in which one size grows."""

    series: str
    axis: str
    size: int


class Case(NamedTuple):
    """One workload: `ours` and `reference` are modules with equal parameters, called with `inputs`, on one device."""

    name: str
    ours: nn.Module
    reference: nn.Module
    inputs: tuple[Tensor, ...]
    flops: float  # of the forward, done directly; a training step is taken as three
    moved: float  # bytes that the forward must at least read and write
    moved_back: float | None = None  # and the backward; twice as many unless given
    layers: int = 1  # one after another: each amplifies the rounding of those before it
    of_inputs: bool = True  # whether a step wants the gradients of the inputs as well
    in_any_format: bool = True  # the memory format of the inputs is the provider's choice, not the case's
    drops: bool = False  # elements by chance, and each provider others: results are compared in eval mode
    compiled: bool = False  # whether ours is also timed under torch.compile, where the reference is
    point: Point | None = None

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs, or of the parameters where the inputs are tokens."""
        tensors = (*self.inputs, *self.reference.parameters())
        return next(t.dtype for t in tensors if t.is_floating_point())

    def in_float64(self) -> "Case":
        reference = copy.deepcopy(self.reference).double()
        inputs = tuple(t.double() if t.is_floating_point() else t for t in self.inputs)
        return self._replace(reference=reference, inputs=inputs)


class First(nn.Module):
    """A model, and the first of its results."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        y = self.model(*inputs)
        return y if isinstance(y, Tensor) else y[0]


def whole_network(name: str, ours: nn.Module, reference: nn.Module, *inputs: Tensor) -> Case:
    """Every parameter is read, the inputs read and the output written, whatever stands between."""
    with FlopCounterMode(display=False) as counter:
        y = reference(*inputs)  # with gradients: without, Transformers take a path whose operations are not counted
    moved = sum(t.nbytes for t in (*reference.parameters(), *inputs, y))
    flops, images = counter.get_total_flops(), inputs[0].dim() == 4
    return Case(name, ours, reference, inputs, flops, moved, layers=10, of_inputs=False, in_any_format=images)


class Timing(NamedTuple):
    seconds: float  # median over the rounds
    best: float
    ratio: float  # median over the rounds of this provider's time by ours: above 1 we are faster
    ratio_low: float  # quartiles
    ratio_high: float
    nanoseconds: list[int]  # round by round: those of one round were timed side by side


Run = Callable[[], tuple[Tensor, ...]]  # the case once, and its results: the output, and in training every gradient


def providers(case: Case, mode: str, chosen: list[str]) -> tuple[dict[str, Run], dict[str, str]]:
    """By name, who runs the case and gets what the reference gets in float64; and why the other peers do not.

    In float32 torch's own batch norm of 64x64x112x112 in channels_last is off by 5e-5, and its gradients by 5e-3.
    """
    exact = case.in_float64()
    want = provider(peers.eager, sure(exact.reference, case), exact, mode)()
    modules = candidates(case, mode, chosen)
    runs = {}
    left_out = {name: f"does not do {mode} of such a case" for name in chosen if name not in modules}
    for name, (prepare, module) in modules.items():
        try:
            run = provider(prepare, module, case, mode)
            sure_run = provider(prepare, sure(module, case), case, mode) if case.drops else run
            check(sure_run(), want, case)
        except Exception as error:  # exporters and compilers raise what they like
            if name.startswith(OURS) or name == REFERENCE:
                raise
            left_out[name] = reason(error)
        else:
            runs[name] = run
    return runs, left_out


def sure(module: nn.Module, case: Case) -> nn.Module:
    """The module, without what it draws."""
    return copy.deepcopy(module).eval() if case.drops else module


def reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def candidates(case: Case, mode: str, chosen: list[str]) -> dict[str, tuple[Callable, nn.Module]]:
    known = peers.of(case.device, mode)
    modules = {OURS: (peers.eager, case.ours), OURS_CHANNELS_LAST: (peers.channels_last, case.ours)}
    if (
        case.device.type == "cuda" and case.in_any_format
    ):  # where tensor cores want channels_last, and everybody uses it
        modules = {OURS: (peers.channels_last, case.ours)}
    if case.compiled and "compile" in (chosen or known):
        modules[OURS_COMPILED] = (peers.compiled, case.ours)
    modules |= {name: (known[name], case.reference) for name in chosen or known if name in known}
    if not case.in_any_format:
        modules = {name: module for name, module in modules.items() if "channels_last" not in name}
    return modules


def provider(prepare: Callable, module: nn.Module, case: Case, mode: str) -> Run:
    inputs = tuple(t.clone().requires_grad_(mode != "inference" and case.of_inputs) for t in case.inputs)
    return {"inference": inference, "forward": forward, "training": step}[mode](prepare(module, inputs))


def inference(call: peers.Call) -> Run:
    def run():
        with torch.no_grad():
            return (call.run(),)

    return run


def forward(call: peers.Call) -> Run:
    """The forward half of a step, which saves what the backward needs."""
    return lambda: (call.run(),)


def step(call: peers.Call) -> Run:
    """Forward and backward, down to the inputs."""
    leaves = [t for t in (*call.inputs, *call.module.parameters()) if t.requires_grad]
    generator = torch.Generator().manual_seed(GRADIENT_SEED)
    output = call.run().detach()
    grad_output = torch.randn(output.shape, generator=generator).to(output).contiguous(memory_format=layout(output))

    def run():
        y = call.run()
        return y, *torch.autograd.grad(y, leaves, grad_output, allow_unused=True, materialize_grads=True)

    return run


def layout(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 and not t.is_contiguous() else torch.contiguous_format


def check(results: tuple[Tensor, ...], want: tuple[Tensor, ...], case: Case) -> None:
    """Nothing is timed whose results differ from the reference in float64, as far as the case's dtype can tell.

    A gradient may be 0 but for what the others, which are sums of the same terms, round to: that of keys' biases is.
    """
    rounding = torch.finfo(case.dtype).eps * max((b.norm().item() for b in want[1:]), default=0.0)
    for i, (a, b) in enumerate(zip(results, want, strict=True)):
        error, scale = (a - b).norm().item(), b.norm().item()
        if not error <= case.layers * (TOLERANCE[case.dtype][i > 0] * scale + rounding * (i > 0)):
            raise AssertionError(f"result {i} is off by {error:.3g} where the norm is {scale:.3g}")


def time_all(runs: dict[str, Run], device: torch.device, budget: float) -> dict[str, Timing]:
    """Interleaved timings; ratios refer to ours."""
    timed = timer(device)
    calls = {name: calls_per_round(run, device) for name, run in runs.items()}
    times = {name: [] for name in runs}
    deadline = time.perf_counter() + budget
    gc.disable()
    for done in range(ROUNDS):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name in random.sample(list(runs), len(runs)):
            time.sleep(PAUSE_SECONDS)
            runs[name]()  # wakes its threads and warms the caches
            times[name].append(timed(runs[name], calls[name]))
    gc.enable()
    return {name: summary(times[name], times[OURS]) for name in runs}


def timed_on_cpu(run: Callable[[], object], calls: int) -> float:
    """Seconds of one call: the median, for one of hundreds that waits 8 ms for a core is not the library's doing."""
    times = [time.perf_counter()]
    for _ in range(calls):
        run()
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(times))


def timed_on_gpu(run: Callable[[], object], calls: int) -> float:
    """The same by the GPU's clock, from an L2 that holds none of its data."""
    other = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        other.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def timer(device: torch.device) -> Callable[[Callable, int], float]:
    return timed_on_gpu if device.type == "cuda" else timed_on_cpu


def calls_per_round(run: Callable[[], object], device: torch.device) -> int:
    run()
    return max(1, round(ROUND_SECONDS / timer(device)(run, 1)))


def summary(times: list[float], ours: list[float]) -> Timing:
    low, middle, high = statistics.quantiles([t / o for t, o in zip(times, ours)], n=4)
    return Timing(statistics.median(times), min(times), middle, low, high, [round(t * 1e9) for t in times])
