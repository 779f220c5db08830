"""The `compare` fixture, the table and the plot that every benchmark shares."""

import json
import logging
import statistics
import warnings
from pathlib import Path

import harness
import pytest
import torch
from floors import machine, measured
from rich.console import Console
from rich.table import Table
from tables import OURS, best_peer

from fastarch.measure import saved_bytes

MODES = ("inference", "forward", "training")
RESULTS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    group = parser.getgroup("fastarch")
    group.addoption("--peers", default="", help="comma-separated; all that are installed by default")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--budget", type=float, default=30.0, help="seconds for all rounds of a case, three at least")
    group.addoption("--record", default="", help="write machine, floors and timings as JSON")
    group.addoption("--plot", default="", help="write speed-ups as a PNG")


def pytest_configure(config):
    config.stash[RESULTS] = []


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def compare(request, benchmark):
    """compare(case, mode): checks, times and records one case; pytest-benchmark's own figures are ours alone."""

    def run(case: harness.Case, mode: str) -> None:
        torch._dynamo.reset()
        torch._inductor.config.compile_threads = 1  # its pool of processes would start up while the first case is timed
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        chosen = [name for name in request.config.getoption("peers").split(",") if name]
        runs = harness.providers(case, mode, chosen)
        harness.check(runs, case, mode)
        timings = harness.time_all(runs, case.device, request.config.getoption("budget"))
        benchmark.pedantic(runs[OURS], rounds=5, iterations=10)

        floors, flops, moved = measured(case.device), case.flops, case.moved
        if mode == "training":
            flops, moved = 3 * flops, moved + (2 * moved if case.moved_back is None else case.moved_back)
        result = {
            "case": case.name,
            "mode": mode,
            "floor_seconds": floors.seconds(flops, moved),
            "fresh_floor_seconds": max(flops / floors.flops, moved / floors.huge_bandwidth),
            "timings": {name: timing._asdict() for name, timing in timings.items()},
        }
        if mode == "training":
            inputs = [t.clone().requires_grad_() for t in case.inputs]
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
    console = Console(width=200)
    console.print("\n" + ", ".join(f"{what} {value}" for what, value in machine(device).items()))
    console.print(
        f"floors: {floors.flops / 1e12:.3g} TFLOP/s, {floors.bandwidth / 1e9:.0f} GB/s copied, "
        f"{floors.fresh_bandwidth / 1e9:.0f} GB/s into fresh memory, {floors.huge_bandwidth / 1e9:.0f} on huge pages"
    )
    for mode in MODES:
        if chosen := [r for r in results if r["mode"] == mode]:
            console.print(table(mode, chosen))
    if path := config.getoption("record"):
        record = {"machine": machine(device), "floors": floors._asdict(), "results": results}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    if path := config.getoption("plot"):
        plot(results, Path(path))


def table(mode: str, results: list[dict]) -> Table:
    """Milliseconds, our share of the floor, and our speed against the best of the others."""
    names = list(dict.fromkeys(name for r in results for name in r["timings"]))
    view = Table(title=f"{mode}: ms, median of the rounds")
    for column in (
        "case",
        *names,
        "of floor",
        "into fresh memory",
        "against the best",
        "quartiles",
        "saved, of eager's",
    ):
        view.add_column(column, justify="left" if column == "case" else "right")
    ratios = []
    for r in results:
        peer, ours = best_peer(r), r["timings"][OURS]["seconds"]
        t = r["timings"][peer]
        ratios.append(t["ratio"])
        saved = f"{r['saved_bytes'] / r['eager_saved_bytes']:.0%}" if "saved_bytes" in r else ""
        times = [f"{r['timings'][n]['seconds'] * 1e3:.3g}" if n in r["timings"] else "" for n in names]
        low, high = (f"{t[q]:.2f}" for q in ("ratio_low", "ratio_high"))
        shares = [f"{r[floor] / ours:.0%}" for floor in ("floor_seconds", "fresh_floor_seconds")]
        view.add_row(r["case"], *times, *shares, f"{t['ratio']:.2f}x {peer}", f"{low} to {high}", saved)
    view.caption = (
        f"geometric mean against the best: {statistics.geometric_mean(ratios):.2f}x, least {min(ratios):.2f}x"
    )
    return view


def plot(results: list[dict], path: Path) -> None:
    """Speed-up of fastarch over every provider, by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    modes = [m for m in MODES if any(r["mode"] == m for r in results)]
    figure, axes = plt.subplots(len(modes), 1, figsize=(11, 4 * len(modes)), squeeze=False, constrained_layout=True)
    for axis, mode in zip(axes[:, 0], modes):
        chosen = [r for r in results if r["mode"] == mode]
        others = [n for n in dict.fromkeys(n for r in chosen for n in r["timings"]) if not n.startswith(OURS)]
        for i, name in enumerate(others):
            t = [r["timings"][name] for r in chosen]
            x = [j + (i - (len(others) - 1) / 2) * 0.8 / len(others) for j in range(len(chosen))]
            spread = [
                [max(0, v["ratio"] - v["ratio_low"]) for v in t],
                [max(0, v["ratio_high"] - v["ratio"]) for v in t],
            ]
            axis.bar(
                x, [v["ratio"] for v in t], 0.8 / len(others), yerr=spread, label=name, error_kw={"linewidth": 0.8}
            )
        axis.axhline(1, color="black", linewidth=1)
        axis.set(yscale="log", ylabel="times as long as fastarch", title=mode)
        axis.set_xticks(range(len(chosen)), [r["case"] for r in chosen], rotation=20)
        axis.legend(ncols=len(others), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
