"""Checks that two processes run together. One launch serves all checks of a worker, a file that a test has started."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch import distributed as dist

RANKS = 2
is_available = dist.is_available() and dist.is_gloo_available()


def outcomes(worker: ModuleType, folder: Path) -> list[dict]:
    """Of each rank: the checks that it ran, and the tracebacks of those that failed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*launch, worker.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def assert_passed(outcomes: list[dict], check: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert check in outcome["ran"]
        assert check not in outcome["failures"], f"rank {rank}:\n{outcome['failures'][check]}"


def run(checks: dict[str, Callable[[], None]]) -> None:
    """What a worker does: torchrun --standalone --nproc_per_node 2 WORKER FOLDER."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))  # a rank that waits for one that failed
    failures = {}
    for name, check in checks.items():
        try:
            check()
        except Exception:
            failures[name] = traceback.format_exc()
    results = Path(sys.argv[1]) / f"{dist.get_rank()}.json"
    results.write_text(json.dumps({"ran": [*checks], "failures": failures}))
    dist.destroy_process_group()


def mine(t: Tensor | None, first: int) -> Tensor | None:
    """This rank's share of a whole batch: rank 0 has the first ones, with the strides of the whole."""
    return t if t is None else t[:first] if dist.get_rank() == 0 else t[first:]
