"""Compile the tiles that `fastarch tune` compares, as triton_ahead_of_time.py compiles the safe ones; print the same.

    python tests/candidates_ahead_of_time.py SHARD SHARDS

compiles a few of them for Hopper, or for Ampere where the key says so. FASTARCH_EVERY_GPU=1: all.
"""

import json
import os
import sys
from typing import NamedTuple
from unittest import mock

import launches
import torch
import tune
from fastarch.kernels import tiles
from launches import Launch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton_ahead_of_time import Driver, compile_only, resources

# workloads by table, but so small that drawing them takes no time; they take the same keys
LARGEST = {
    "CONV_RELU_POOL": dict(N=1, H=32, W=32),
    "BATCH_NORM": dict(N=1, H=16, W=16),
    "GRUS": dict(T=2, N=8),
    "ATTENTION": dict(B=1, H=2, Lq=64, Lk=64),
    "DECODE": dict(B=1, Lk=64),
}
SMALL = {
    table: {
        name: workload._replace(**{size: min(n, getattr(workload, size)) for size, n in largest.items()})
        for name, workload in getattr(launches, table).items()
    }
    for table, largest in LARGEST.items()
}
EVERY = 1 if os.environ.get("FASTARCH_EVERY_GPU") == "1" else 23
CPU = torch.device("cpu")


class Candidate(NamedTuple):
    operation: str
    key: tuple
    tile: tuple

    @property
    def gpu(self) -> int:
        return 80 if "half, sm_80" in self.key else 90

    def compile(self) -> list:
        """By the first launch that takes the key."""
        module = launches.MODULES[self.operation]
        launch = next(launch for launch in launches.of(self.operation) if self.is_taken_by(launch))
        with mock.patch.object(JITFunction, "run", lambda *args, **options: None):
            run = launch.prepare(CPU)
        with mock.patch.dict(module.TILES, {self.key: self.tile}):
            return compile_only(run, self.gpu)

    def is_taken_by(self, launch: Launch) -> bool:
        return launch.kernel == self.key[0] and self.key in tune.keys_taken(self.operation, launch, CPU)


CANDIDATES = [
    Candidate(operation, key, tile)
    for operation in tiles.OPERATIONS
    for key, found in launches.MODULES[operation].CANDIDATES.items()
    for tile in found
]


def main(shard: int, shards: int) -> None:
    torch.randn = lambda *size, dtype=None, device=None: torch.zeros(*size, dtype=dtype)  # nothing will be computed
    vars(launches).update(SMALL)
    for candidate in CANDIDATES[::EVERY][shard::shards]:
        driver.set_active(Driver(candidate.gpu))
        label = dict(gpu=candidate.gpu, case=repr(candidate))
        try:
            compiled = candidate.compile()
        except Exception as error:
            print(json.dumps(label | dict(error=f"{type(error).__name__}: {error}")), flush=True)
            continue
        for name, _, _, kernel in compiled:
            print(json.dumps(label | dict(kernel=name) | resources(kernel)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
