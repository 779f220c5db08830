"""Every CUDA kernel compiled for every architecture: no spill, no stack, and it can be launched as it is bounded."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a"]
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v"]

REGISTERS = 64 * 1024  # of a multiprocessor
SHARED = 48 * 1024  # bytes of fixed size that a block may have

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def resources(log: str) -> dict[str, dict[str, int]]:
    """By kernel, from what ptxas -v says."""
    found = {}
    for match in ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[match["name"]] = {
            **{what: int(match[what]) for what in ("stack", "stores", "loads", "registers")},
            "shared": int(shared[1]) if shared else 0,
        }
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_without_spills(source, architecture, tmp_path):
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-c", *FLAGS, target, f"-I{ROOT / 'csrc'}", str(source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = resources(done.stderr)
    assert kernels, done.stderr
    report = "\n".join(f"{name}: {used}" for name, used in kernels.items())
    for name, used in kernels.items():
        assert used["stack"] == used["stores"] == used["loads"] == 0, f"{name} spills\n{report}"
        assert used["shared"] <= SHARED, f"{name} has too much shared memory\n{report}"
        assert used["registers"] * 256 <= REGISTERS, f"{name} does not fit in blocks of 256 threads\n{report}"


def test_sources_are_found():
    assert SOURCES
