"""make gpu: all that needs a CUDA device, the most valuable first, until the time is up. Run again, it goes on there.

python bench/gpu.py [--minutes 9] [--folder out/gpu]

The folder gets a log of each stage, the tables of measured tiles, the records of the benchmarks, a page of plots, and
`stages.json`: what has been done, on which commit. Nothing is downloaded. Status 1 if a stage failed, 3 if all is well
so far but stages are left.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import records
import typer
from rich.console import Console
from rich.table import Table

PYTHON = [sys.executable]
PYTEST = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
OPERATIONS = ("attention", "gru", "batch_norm", "conv_relu_pool")
WITH_CUDA_SOURCES = ("gru", "batch_norm", "conv_relu_pool")
TUNING = 100  # seconds: what they leave unmeasured, the next run goes on with
LEFT = 75  # the status of a stage that ended by itself with more to do: EX_TEMPFAIL, which nobody else here ends with
console = Console()


class Stage(NamedTuple):
    name: str
    command: list[str]


class Outcome(NamedTuple):
    status: int | None  # None: its time was up
    seconds: float


def stages(folder: Path) -> list[Stage]:
    install = [*PYTHON, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", "."]
    bench = [*PYTHON, "-m", "fastarch.cli", "bench", "--device=cuda", "--record"]
    found = [Stage("build", install)]
    found += [Stage(f"tests of {o}", [*PYTEST, f"tests/test_{o}_gpu.py"]) for o in OPERATIONS]
    found.append(Stage("tune", [*PYTHON, "-m", "fastarch.cli", "tune", f"--budget={TUNING}"]))  # the benchmarks use it
    found += [Stage(f"bench of {o}", [*bench, "--budget=3", f"--json={folder / o}.json", o]) for o in OPERATIONS]
    found.append(Stage("tests of memory", [*PYTEST, "tests/test_memory_gpu.py"]))
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            check = [sanitizer, f"--tool={tool}", "--error-exitcode=9", *PYTEST, "-k", "strides and not compile"]
            found += [Stage(f"{tool} of {o}", [*check, f"tests/test_{o}_gpu.py"]) for o in WITH_CUDA_SOURCES]
    found.append(Stage("bench of models", [*bench, "--budget=3", f"--json={folder}/models.json", "models"]))
    return found


def run(stage: Stage, folder: Path, seconds: float) -> Outcome:
    """Its output goes to a log; it is ended, with all that it started, when the time is up."""
    started = time.monotonic()
    with (folder / f"{stage.name.replace(' ', '_')}.log").open("w") as log:
        where = {"cwd": records.ROOT, "env": {**os.environ, "PYTHONSAFEPATH": "1"}}
        process = subprocess.Popen(stage.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **where)
        try:
            status = process.wait(seconds)
            status = None if status == LEFT else status
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(status, time.monotonic() - started)


def go_on(found: list[Stage], folder: Path, seconds: float, commit: str) -> dict[str, Outcome]:
    """Run what this commit has not passed yet, in order, as far as the time goes: what failed before comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    file, deadline = folder / "stages.json", time.monotonic() + seconds
    state = json.loads(file.read_text()) if file.exists() else {}
    done = {k: Outcome(*v) for k, v in state.get("stages", {}).items()} if state.get("commit") == commit else {}
    left = [stage for stage in found if stage.name not in done or done[stage.name].status != 0]
    for stage in sorted(left, key=lambda stage: stage.name in done and done[stage.name].status is not None):
        if (remaining := deadline - time.monotonic()) < 1:
            break
        with console.status(stage.name):
            done[stage.name] = run(stage, folder, remaining)
        file.write_text(json.dumps({"commit": commit, "stages": done}, indent=1) + "\n")
        if stage.name == "build" and done["build"].status != 0:
            break
    return done


def main(
    minutes: Annotated[float, typer.Option(min=0, help="for all stages together")] = 9,
    folder: Annotated[Path, typer.Option(help="where logs, records and plots go")] = Path("out/gpu"),
) -> None:
    folder = folder.resolve()
    found, made = stages(folder), records.provenance([], {})
    done = go_on(found, folder, 60 * minutes, f"{made['commit']}{' changed' * bool(made['dirty'])}")
    shutil.copytree(records.ROOT / "kernels/tuned", folder / "tuned", dirs_exist_ok=True)
    if recorded := [file for file in sorted(folder.glob("*.json")) if file.name != "stages.json"]:
        subprocess.run([*PYTHON, records.ROOT / "bench/report.py", folder / "report", *recorded], check=True)
    view = Table("stage", "outcome", "seconds")
    words = {0: "passed", None: "[yellow]out of time"}
    for stage in found:
        outcome = done.get(stage.name)
        word = words.get(outcome.status, f"[red]status {outcome.status}") if outcome else "[yellow]not begun"
        view.add_row(stage.name, word, f"{outcome.seconds:.0f}" if outcome else "")
    console.print(view)
    statuses = [done[stage.name].status if stage.name in done else None for stage in found]
    raise typer.Exit(1 if any(statuses) else 3 if None in statuses else 0)


if __name__ == "__main__":
    typer.run(main)
