"""What this machine can do at best, measured in the same run as everything that is compared with it."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch


class Floors(NamedTuple):
    flops: float  # fused multiply-adds, counted as two operations, per second
    bandwidth: float  # bytes read and written per second, streaming

    def seconds(self, flops: float, moved: float) -> float:
        """The least time in which so many operations and bytes of traffic can be done."""
        return max(flops / self.flops, moved / self.bandwidth)


@functools.cache
def floors(threads: int) -> Floors:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floors.so"
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC", "-std=c++17"]
        subprocess.run(["c++", *flags, Path(__file__).with_suffix(".cpp"), "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
        loaded.multiply_add_rate.restype = loaded.copy_rate.restype = ctypes.c_double
        return Floors(loaded.multiply_add_rate(threads), loaded.copy_rate(threads))


def measured() -> Floors:
    return floors(torch.get_num_threads())
