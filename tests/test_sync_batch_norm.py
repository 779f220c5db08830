"""SyncBatchNorm and batch_norm over a process group: two processes, with unequal batches, equal one with the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sync_batch_norm_worker
from torch import distributed as dist

RANKS = 2

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """Of each rank: the checks that it ran, and the tracebacks of those that failed. One launch serves all checks."""
    results = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    worker = [*launch, str(Path(sync_batch_norm_worker.__file__)), str(results)]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("check", sync_batch_norm_worker.CHECKS)
def test_two_ranks(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert check in outcome["ran"]
        assert check not in outcome["failures"], f"rank {rank}:\n{outcome['failures'][check]}"
