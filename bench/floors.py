"""What this machine can do at best, measured in the same run as everything that is compared with it."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import fastarch
from fastarch import extension

# what decides how fast a processor multiplies, here and in the peers' libraries
FLAGS = [
    "avx",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
]
FLAGS += ["asimd", "bf16", "sve"]  # on ARM


class Floors(NamedTuple):
    flops: float  # fused multiply-adds, counted as two operations, per second
    bandwidth: float  # bytes read and written per second, streaming
    fresh_bandwidth: float  # the same into memory that was never touched, as outputs are: every page faults
    huge_bandwidth: float  # the same where the pages are huge, which our outputs ask for

    def seconds(self, flops: float, moved: float) -> float:
        """The least time in which so many operations and bytes of traffic can be done."""
        return max(flops / self.flops, moved / self.bandwidth)


@functools.cache
def on_cpu(threads: int) -> Floors:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floors.so"
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC", "-std=c++17"]
        subprocess.run(["c++", *flags, Path(__file__).with_suffix(".cpp"), "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
        calls = [(loaded.multiply_add_rate,), (loaded.copy_rate,)]
        calls += [(loaded.fresh_copy_rate, huge) for huge in (False, True)]
        for rate, *_ in calls:
            rate.restype = ctypes.c_double
        return Floors(*(rate(threads, *huge) for rate, *huge in calls))


@functools.cache
def on_gpu() -> Floors:
    """A large product of bfloat16 matrices, and a large copy."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))

    def seconds(run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e4

    bandwidth = 2 * 2**30 / seconds(lambda: target.copy_(source))
    return Floors(2 * n**3 / seconds(lambda: a @ b), bandwidth, bandwidth, bandwidth)


def measured(device: torch.device) -> Floors:
    return on_gpu() if device.type == "cuda" else on_cpu(torch.get_num_threads())


def machine(device: torch.device) -> dict[str, str | int | list[str]]:
    """What a figure must be read with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "fastarch": fastarch.__version__}
    for name in ("triton", "onnxruntime", "openvino"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    if device.type == "cuda":
        clocks = [
            "nvidia-smi",
            "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,driver_version",
            "--format=csv,noheader",
        ]
        state = subprocess.run(clocks, capture_output=True, text=True).stdout.strip()
        from fastarch.kernels import tiles  # here: it imports Triton

        gpu = torch.cuda.get_device_name(device)
        return {"device": gpu, "clocks and driver": state, "tiles": tiles.described(gpu), **versions}
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    flags = set(" ".join(re.findall(r"(?:flags|Features)\s*: (.*)", text)[:1]).split())
    family, model = (re.findall(rf"{name}\s*: (\d+)", text)[:1] for name in ("cpu family", r"\bmodel"))
    return {
        "device": names[0] if names else platform.machine(),
        "model": "-".join(family + model),
        "threads": torch.get_num_threads(),
        "isa": extension.isa,
        "flags": [flag for flag in FLAGS if flag in flags],
        **versions,
    }
