"""Checks that two processes run together. One launch serves all checks of a worker, a file that a test has started."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

RANKS = 2
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@functools.cache
def outcomes(worker: ModuleType) -> list[dict]:
    """Of each rank: the checks that it ran, the tracebacks of those that failed, and what the launch said."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, worker.__file__, folder]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            said = f"status {done.returncode}\n{done.stderr}"
        except subprocess.TimeoutExpired as error:  # kept as well: every check would launch again
            said = str(error)
        files = [Path(folder, f"{rank}.json") for rank in range(RANKS)]
        found = [json.loads(file.read_text()) if file.exists() else {"ran": [], "failures": {}} for file in files]
    return [outcome | {"launch": said} for outcome in found]


def assert_passed(worker: ModuleType, check: str) -> None:
    """On both ranks."""
    for rank, outcome in enumerate(outcomes(worker)):
        assert check in outcome["ran"], outcome["launch"]
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
