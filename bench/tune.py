"""fastarch tune: which tile of each key of TILES, or of the CANDIDATES beside it, is the fastest on this GPU?

python bench/tune.py [OPERATIONS] [--device cuda] [--budget 600] [--output DIR]

A key's launches are those of bench/launches.py that take it. A candidate is discarded if it does not compile or fit,
if it spills more than the safe tile does, or if its results differ from the safe tile's. The others and the safe one
are timed in turns, from a cold L2; a tile's time is the geometric mean over the launches. The fastest candidate
replaces the safe tile only if in two races of ROUNDS rounds each it needs less than GAIN of the safe tile's time in
three quarters of the rounds. The second race is between these two alone: the best of several looks better than it is.

The table is written after every key, and a later run goes on behind it, as long as it has the same kernels, torch and
Triton. Status 1 if a key could not be measured at all, 75 if the budget ended before the keys did.
"""

import hashlib
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import harness
import launches
import records
import torch
import triton
import typer
from fastarch.kernels import tiles
from gpu import LEFT
from launches import Launch, Run
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from triton.runtime.jit import JITFunction

ROUNDS = 9
CALLS = 10  # of a launch in a round
GAIN = 0.98
FEW_SPILLS = 4  # words that are needed once, before the loop, as tests/test_triton_ahead_of_time.py allows them
console = Console()


class Gpu(NamedTuple):
    """What of the device a choice depends on, so that a test can be the device."""

    launched: Callable[[Run], tuple[tuple[Tensor, ...], int]]  # results, and words that its kernels spill at most
    timed: Callable[[Run, int], float]  # seconds of a call, the median of so many


class Choice(NamedTuple):
    tile: tuple
    seconds: float
    safe_seconds: float
    discarded: dict[tuple, str]  # candidates, and why


class OutOfTimeError(Exception):
    pass


class Clock:
    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTimeError


def launched(run: Run) -> tuple[tuple[Tensor, ...], int]:
    """On the GPU; what does not compile or fit raises."""
    kernels, launch = [], JITFunction.run

    def remember(self, *args, **options):
        kernels.append(launch(self, *args, **options))
        return kernels[-1]

    JITFunction.run = remember
    try:
        results = run()
        torch.cuda.synchronize()
    finally:
        JITFunction.run = launch
    return results, max(kernel.n_spills for kernel in kernels)


def choose(table: dict, key: tuple, candidates: list, runs: list[Run], gpu: Gpu, clock: Clock) -> Choice:
    """The best tile of a key of `table`, the operation's TILES, which is afterwards what it was."""
    safe = table[key]

    def calls(tile):
        return [partial(call_with, table, key, tile, run) for run in runs]

    try:
        want = [gpu.launched(call) for call in calls(safe)]
        discarded = {}
        for tile in candidates:
            clock.check()
            if why := fault(calls(tile), want, gpu):
                discarded[tile] = why
        del want
        left = {tile: calls(tile) for tile in (safe, *candidates) if tile not in discarded}
        times = race(left, gpu, clock)
        best = min(left, key=lambda tile: statistics.median(ratios(times, tile, safe)))
        if best != safe and wins(times, best, safe):
            times = race({tile: left[tile] for tile in (safe, best)}, gpu, clock)
            best = best if wins(times, best, safe) else safe
        else:
            best = safe
        return Choice(best, *(statistics.median(times[tile]) for tile in (best, safe)), discarded)
    finally:
        table[key] = safe


def call_with(table: dict, key: tuple, tile: tuple, run: Run) -> tuple[Tensor, ...]:
    table[key] = tile
    return run()


def fault(calls: list[Run], want: list[tuple[tuple[Tensor, ...], int]], gpu: Gpu) -> str | None:
    """Why a candidate is not to be timed."""
    for call, (results, spilled) in zip(calls, want):
        try:
            got, spills = gpu.launched(call)
        except Exception as error:  # compilers raise what they like
            return harness.reason(error)
        if spills > max(FEW_SPILLS, spilled):
            return f"spills {spills} words, the safe tile {spilled}"
        if not all(map(is_close, got, results)):
            return "its results differ from the safe tile's"
    return None


def is_close(got: Tensor, want: Tensor) -> bool:
    """As the order of sums may differ, in the norm; bits and indices can differ with it."""
    if not want.is_floating_point():
        return True
    error, scale = (got.float() - want.float()).norm().item(), want.float().norm().item()
    return error <= harness.TOLERANCE[want.dtype][0] * scale


def race(calls: dict[tuple, list[Run]], gpu: Gpu, clock: Clock) -> dict[tuple, list[float]]:
    """Of each tile and round, the geometric mean of its calls' seconds; in each round in another order."""
    times = {tile: [] for tile in calls}
    for _ in range(ROUNDS):
        clock.check()
        for tile in random.sample(list(calls), len(calls)):
            times[tile].append(statistics.geometric_mean(gpu.timed(call, CALLS) for call in calls[tile]))
    return times


def ratios(times: dict[tuple, list[float]], tile: tuple, safe: tuple) -> list[float]:
    return [a / b for a, b in zip(times[tile], times[safe])]


def wins(times: dict[tuple, list[float]], tile: tuple, safe: tuple) -> bool:
    return statistics.quantiles(ratios(times, tile, safe), n=4)[2] < GAIN


def keys_taken(operation: str, launch: Launch, device: torch.device) -> list[tuple]:
    """Those that it is to measure, found by launching nothing."""
    module, taken = launches.MODULES[operation], []

    class Recorder(dict):
        def __getitem__(self, key):
            taken.append(key)
            return super().__getitem__(key)

    before, run = module.TILES, JITFunction.run
    module.TILES, JITFunction.run = Recorder(before), lambda *args, **options: None
    try:
        launch.prepare(device)()
    finally:
        module.TILES, JITFunction.run = before, run
    return [key for key in dict.fromkeys(taken) if key[0] == launch.kernel and key in module.CANDIDATES]


def found(operations: list[str], device: torch.device) -> dict[tuple[str, tuple], list[Launch]]:
    """By operation and key, the launches that take it; keys of bfloat16 first."""
    by_key = {}
    for operation in operations:
        for launch in launches.of(operation):
            for key in keys_taken(operation, launch, device):
                by_key.setdefault((operation, key), []).append(launch)
    return dict(sorted(by_key.items(), key=lambda item: item[1][0].dtype != torch.bfloat16))


class Tuned:
    """The table of a GPU: what earlier runs found, and what this one adds, on disk at any time."""

    def __init__(self, folder: Path, gpu: str):
        self.file = folder / tiles.file_name(gpu)
        sources = b"".join(file.read_bytes() for file in sorted((records.ROOT / "kernels").glob("*.py")))
        self.same = {
            "kernels": hashlib.sha256(sources).hexdigest()[:12],
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        self.table = {"gpu": gpu, "operations": {}}
        try:
            tiles.read(self.file, gpu)
            self.table = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (ValueError, RecursionError) as error:
            console.print(f"{self.file} is written anew: {error}", markup=False)

    def has(self, operation: str, key: tuple) -> bool:
        section = self.table["operations"].get(operation, {})
        return self.same.items() <= section.items() and tiles.name_of(key) in section["tiles"]

    def add(self, operation: str, key: tuple, choice: Choice) -> None:
        made, section = records.provenance([], {}), self.table["operations"].get(operation, {})
        measured = section["tiles"] if self.same.items() <= section.items() else {}
        measured[tiles.name_of(key)] = {
            "tile": choice.tile._asdict(),
            "microseconds": round(choice.seconds * 1e6, 2),
            "safe_microseconds": round(choice.safe_seconds * 1e6, 2),
        }
        self.table["operations"][operation] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": f"{made['commit'] or 'unknown'}{' and changes' * bool(made['dirty'])}",
            **self.same,
            "tiles": measured,
        }
        self.write()

    def write(self) -> None:
        """Whole or not at all, whenever the process ends: a line a key."""
        text = json.dumps(self.table, indent=1)
        text = re.sub(r"\{[^{}]*\{[^{}]*\}[^{}]*\}", lambda entry: " ".join(entry[0].split()), text)
        whole = self.file.with_suffix(".new")
        whole.write_text(text + "\n", encoding="utf-8")
        os.replace(whole, self.file)


def tune(by_key: dict, tuned: Tuned, gpu: Gpu, clock: Clock, device: torch.device, report: Callable) -> dict[str, str]:
    """Measures what the table lacks, until the time is up; keys that could not be measured, and why."""
    failed = {}
    for done, ((operation, key), those) in enumerate(by_key.items()):
        name, module = f"{operation} {tiles.name_of(key)}", launches.MODULES[operation]
        report(done, name)
        if tuned.has(operation, key):
            continue
        try:
            clock.check()
            choice = choose(
                module.TILES, key, module.CANDIDATES[key], [launch.prepare(device) for launch in those], gpu, clock
            )
        except OutOfTimeError:
            break
        except Exception as error:  # the safe tile itself: the other keys may be well
            failed[name] = harness.reason(error)
            continue
        tuned.add(operation, key, choice)
        for tile, why in choice.discarded.items():
            console.print(f"{name}: without {tile}: {why}", markup=False)
    return failed


def main(
    operations: Annotated[list[str] | None, typer.Argument(help="all by default")] = None,
    device: Annotated[str, typer.Option(help="a CUDA device")] = "cuda",
    budget: Annotated[float, typer.Option(min=0, help="seconds")] = 600,
    output: Annotated[Path | None, typer.Option(help="the folder of the table, kernels/tuned by default")] = None,
) -> None:
    clock, here = Clock(budget), torch.device(device)
    output = output or Path(os.environ.get("FASTARCH_TUNED") or tiles.FOLDER)
    os.environ["FASTARCH_TUNED"] = ""  # launches take the tile that they are told to
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"want a folder, got {str(output)!r}: {error}", param_hint="--output") from error
    index = here.index or 0
    torch.cuda.set_device(index)
    torch.manual_seed(harness.SEED)
    random.seed(harness.SEED)
    tuned = Tuned(output, torch.cuda.get_device_name(index))
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        by_key = found(operations or list(tiles.OPERATIONS), here)
        bar = progress.add_task("", total=len(by_key))
        failed = tune(by_key, tuned, Gpu(launched, harness.timed_on_gpu), clock, here, partial(show, progress, bar))
    raise typer.Exit(summary(by_key, tuned, failed))


def show(progress: Progress, bar: int, done: int, name: str) -> None:
    progress.update(bar, completed=done, description=name, refresh=True)


def summary(by_key: dict, tuned: Tuned, failed: dict[str, str]) -> int:
    """Prints what is known of the keys; the status of the command."""
    view = Table("operation", "key", "tile", "us", "us, safe", title=str(tuned.file))
    left = 0
    for operation, key in by_key:
        name = tiles.name_of(key)
        if tuned.has(operation, key):
            entry = tuned.table["operations"][operation]["tiles"][name]
            fields = ", ".join(f"{field} {n}" for field, n in entry["tile"].items())
            view.add_row(operation, name, fields, str(entry["microseconds"]), str(entry["safe_microseconds"]))
        elif why := failed.get(f"{operation} {name}"):
            view.add_row(operation, name, f"[red]safe: {escape(why)}")
        else:
            left += 1
    console.print(view)
    if left:
        console.print(f"The time was up before {left} of {len(by_key)} keys were measured: run it again to go on.")
    return 1 if failed else LEFT if left else 0


if __name__ == "__main__":
    typer.run(main)
