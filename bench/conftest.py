"""The options, the `compare` fixture, the progress bar and the tables that every benchmark shares."""

import logging
import os
import random
import statistics
import sys
import warnings
from pathlib import Path

import harness
import peers
import pytest
import records
import torch
from floors import machine, measured
from records import OURS, best_peer, by_mode
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastarch.measure import saved_bytes

RESULTS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    group = parser.getgroup("fastarch")
    group.addoption("--peers", default="", help="comma-separated; all that are installed by default")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--dtype", choices=[str(d).removeprefix("torch.") for d in harness.TOLERANCE])
    group.addoption("--modes", default=",".join(records.MODES), help="comma-separated")
    group.addoption("--budget", type=float, default=30.0, help="seconds for all rounds of a case, three at least")
    group.addoption("--json", default="", help="write machine, floors and timings to this file")
    group.addoption("--record", action="store_true", help="write them to bench/results, one file an operation")
    group.addoption("--progress", action="store_true", help="a progress bar instead of dots")


def pytest_configure(config):
    config.stash[RESULTS] = []
    if unknown := set(chosen_peers(config)) - set(peers.ALL):
        raise pytest.UsageError(f"--peers: want some of {', '.join(peers.ALL)}, got {', '.join(sorted(unknown))}")
    if config.getoption("progress"):
        config.pluginmanager.register(ProgressBar())


def chosen_peers(config) -> list[str]:
    return [name for name in config.getoption("peers").split(",") if name]


def pytest_collection_modifyitems(config, items):
    modes = config.getoption("modes").split(",")
    of_others = [item for item in items if hasattr(item, "callspec") and item.callspec.params["mode"] not in modes]
    if of_others:
        config.hook.pytest_deselected(items=of_others)
        items[:] = [item for item in items if item not in of_others]


class ProgressBar:
    """Drawn between the cases only: a thread that redraws it would take the core from what is timed."""

    def __init__(self):
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # pytest captures the other while a test runs
        self.progress = Progress(*columns, console=Console(file=terminal), auto_refresh=False, transient=True)
        self.cases = self.progress.add_task("")

    def pytest_collection_finish(self, session):
        self.progress.update(self.cases, total=len(session.items))
        self.progress.start()

    def pytest_runtest_logstart(self, nodeid):
        self.progress.update(self.cases, description=nodeid.rpartition("::")[2], refresh=True)

    def pytest_runtest_logfinish(self):
        self.progress.update(self.cases, advance=1, refresh=True)

    def pytest_report_teststatus(self, report):
        return ("passed" if report.when == "call" else "", "", "") if report.passed else None

    def pytest_sessionfinish(self):
        self.progress.stop()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(harness.SEED)
    random.seed(harness.SEED)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def network_dtype(request) -> torch.dtype:
    """Of whole networks: float32 unless another is asked for."""
    return getattr(torch, request.config.getoption("dtype") or "float32")


@pytest.fixture
def dtype(request, device, network_dtype) -> torch.dtype:
    """Of single operations, on a GPU what their users train in."""
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return network_dtype if request.config.getoption("dtype") else default


@pytest.fixture
def compare(request, benchmark):
    """compare(case, mode): checks, times and records one case; pytest-benchmark's own figures are ours alone."""

    def run(case: harness.Case, mode: str) -> None:
        torch._dynamo.reset()
        torch._inductor.config.compile_threads = 1  # its pool of processes would start up while the first case is timed
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        runs, left_out = harness.providers(case, mode, chosen_peers(request.config))
        if all(name.startswith(OURS) for name in runs):
            pytest.skip(f"nobody to compare with: {left_out}")
        timings = harness.time_all(runs, case.device, request.config.getoption("budget"))
        benchmark.pedantic(runs[OURS], rounds=5, iterations=harness.calls_per_round(runs[OURS], case.device))

        floors, flops, moved = measured(case.device), case.flops, case.moved
        if mode == "training":
            flops, moved = 3 * flops, moved + (2 * moved if case.moved_back is None else case.moved_back)
        result = {
            "operation": request.path.stem.removeprefix("bench_"),
            "case": case.name,
            "mode": mode,
            "dtype": str(case.dtype).removeprefix("torch."),
            "flops": flops,
            "moved": moved,
            "floor_seconds": floors.seconds(flops, moved),
            "fresh_floor_seconds": max(flops / floors.flops, moved / floors.huge_bandwidth),
            "timings": {name: timing._asdict() for name, timing in timings.items()},
            "left_out": left_out,
        }
        if case.point:
            result["point"] = case.point._asdict()
        if mode == "training":
            inputs = [t.clone().requires_grad_(t.is_floating_point()) for t in case.inputs]
            result["saved_bytes"] = saved_bytes(case.ours, *inputs)
            result["eager_saved_bytes"] = saved_bytes(case.reference, *inputs)
        benchmark.extra_info.update(result, machine=machine(case.device), floors=floors._asdict())
        request.config.stash[RESULTS].append(result)

    return run


def pytest_terminal_summary(config):
    results = config.stash[RESULTS]
    if not results:
        return
    device = torch.device(config.getoption("device"))
    floors = measured(device)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print("\n" + ", ".join(f"{what} {value}" for what, value in machine(device).items()))
    console.print(
        f"floors: {floors.flops / 1e12:.3g} TFLOP/s, {floors.bandwidth / 1e9:.0f} GB/s copied, "
        f"{floors.fresh_bandwidth / 1e9:.0f} GB/s into fresh memory, {floors.huge_bandwidth / 1e9:.0f} on huge pages"
    )
    for operation in dict.fromkeys(r["operation"] for r in results):
        for mode, part in by_mode([r for r in results if r["operation"] == operation]).items():
            console.print(table(f"{operation}, {mode}", part))
    for r in results:
        for name, reason in r["left_out"].items():
            console.print(f"{r['case']}, {r['mode']}: without {name}: {reason}", markup=False)
    seeds = {"inputs": harness.SEED, "gradients": harness.GRADIENT_SEED}
    run = records.provenance(config.invocation_params.args, seeds)
    record = {"machine": machine(device), "floors": floors._asdict(), "run": run, "results": results}
    if path := config.getoption("json"):
        records.write(record, Path(path))
    if config.getoption("record"):
        console.print("recorded:", *records.keep(record, records.RESULTS))


def table(title: str, results: list[dict]) -> Table:
    """Milliseconds, our share of the floor, and our speed against the best of the others."""
    names = list(dict.fromkeys(name for r in results for name in r["timings"]))
    view = Table(title=f"{title}: ms, median of the rounds")
    kept = any("saved_bytes" in r for r in results)
    verdicts = ["of floor", "into fresh memory", "against the best", "quartiles"]
    for column in ("case", *names, *verdicts, *["saved, of eager's"] * kept):
        view.add_column(column, justify="left" if column == "case" else "right", overflow="fold")
    ratios = []
    for r in results:
        peer, ours = best_peer(r), r["timings"][OURS]["seconds"]
        t = r["timings"][peer]
        ratios.append(t["ratio"])
        saved = [f"{r['saved_bytes'] / r['eager_saved_bytes']:.0%}"] if kept else []
        times = [f"{r['timings'][n]['seconds'] * 1e3:.3g}" if n in r["timings"] else "" for n in names]
        low, high = (f"{t[q]:.2f}" for q in ("ratio_low", "ratio_high"))
        shares = [f"{r[floor] / ours:.0%}" for floor in ("floor_seconds", "fresh_floor_seconds")]
        view.add_row(r["case"], *times, *shares, f"{t['ratio']:.2f}x {peer}", f"{low} to {high}", *saved)
    view.caption = (
        f"geometric mean against the best: {statistics.geometric_mean(ratios):.2f}x, least {min(ratios):.2f}x"
    )
    return view
