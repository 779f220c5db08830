"""make bench-check: is ours slower, relative to eager, than when this machine recorded it? A short set of cases.

Fails (status 1) only where all of ATTEMPTS stay below TOLERANCE of the recorded ratio: a neighbour that takes the cores
for a while does not make it fail. bench/ratios/<device>.json holds the ratios, written by `python bench/check.py
--record`; on a device without it nothing is compared.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import records
import torch
from floors import machine
from records import REFERENCE
from rich.console import Console
from rich.table import Table

RATIOS = Path(__file__).with_name("ratios")
ATTEMPTS = 3
TOLERANCE = 0.8
CASES = [
    "bench_conv_relu_pool.py::test_conv_relu_pool[lenet_c1-inference]",
    "bench_conv_relu_pool.py::test_conv_relu_pool[lenet_c3-training]",
    "bench_conv_relu_pool.py::test_conv_relu_pool[notes_conv2-training]",
    "bench_batch_norm.py::test_batch_norm[64x32x14x14-relu-NCHW-forward]",
    "bench_batch_norm.py::test_batch_norm[64x512x28x28-add_relu-NCHW-training]",
    "bench_gru.py::test_gru[char-inference]",
    "bench_gru.py::test_gru[bidir-training]",
    "bench_gru.py::test_gru[decode-inference]",
    "bench_attention.py::test_attention[vit-inference]",
    "bench_attention.py::test_attention[gpt2-training]",
]
console = Console()


def measure(cases: list[str]) -> dict[str, float]:
    """By pytest's name of a case, eager's time by ours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        options = ["-q", "--benchmark-disable", "--peers=eager", "--budget=1.5", f"--json={file}"]
        command = [sys.executable, "-m", "pytest", *options, *(str(records.ROOT / "bench" / case) for case in cases)]
        with console.status(f"{len(cases)} cases"):
            run = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stdout + run.stderr)
        results = json.loads(file.read_text())["results"]
    return {case: r["timings"][REFERENCE]["ratio"] for case, r in zip(cases, results, strict=True)}


def slower(recorded: dict[str, float], measure: Callable[[list[str]], dict[str, float]]) -> dict[str, list[float]]:
    """The cases that are, each with the ratios of all attempts."""
    tried = {case: [] for case in recorded}
    for _ in range(ATTEMPTS):
        left = [case for case, ratios in tried.items() if all(r < TOLERANCE * recorded[case] for r in ratios)]
        for case, ratio in (measure(left) if left else {}).items():
            tried[case].append(ratio)
    return {case: ratios for case, ratios in tried.items() if max(ratios) < TOLERANCE * recorded[case]}


def main(arguments: list[str]) -> int:
    here = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    file = RATIOS / f"{records.slug(here)}.json"
    if arguments == ["--record"]:
        attempts = [measure(CASES) for _ in range(ATTEMPTS)]
        ratios = {case: round(sorted(a[case] for a in attempts)[ATTEMPTS // 2], 3) for case in CASES}
        records.write({"machine": here, "run": records.provenance(["--record"], {}), "ratios": ratios}, file)
        console.print(f"recorded: {file}")
        return 0
    if not file.exists():
        console.print(f"No ratios were recorded on this device ({file.stem}): nothing to compare with.")
        return 0
    recorded = json.loads(file.read_text())
    failed = slower(recorded["ratios"], measure)
    view = Table("case", "recorded", *(f"attempt {i + 1}" for i in range(ATTEMPTS)), title="eager's time by ours")
    for case, ratios in failed.items():
        view.add_row(case.partition("::")[2], *(f"{r:.2f}" for r in (recorded["ratios"][case], *ratios)))
    if failed:
        console.print(view)
    console.print(f"{len(failed)} of {len(recorded['ratios'])} cases are slower than recorded, relative to eager.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
