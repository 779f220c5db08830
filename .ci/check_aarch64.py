"""The kernels compiled for aarch64 and emulated by qemu-aarch64 compute what those compiled for this machine do.

Debian: g++-aarch64-linux-gnu, qemu-user.
"""

import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-DFASTARCH_ISA=generic", "-Icsrc"]
SOURCES = [*sorted(Path("csrc/cpu").glob("*_kernels.cpp")), Path(".ci/kernels_alone.cpp")]
# of the larger of 1 and the number: sums in another order; values of 16 bits may round to their neighbours
TOLERANCES = {"float32": 1e-4, "float64": 1e-12, "bfloat16": 3e-2, "float16": 4e-3}


def program(compiler: str, folder: Path) -> Path:
    def compiled(source: Path) -> Path:
        target = folder / f"{compiler}_{source.stem}.o"
        subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, SOURCES))
    subprocess.run([compiler, "-static", *map(str, objects), "-o", str(folder / compiler)], check=True)
    return folder / compiler


def printed(*command: str) -> list[list[str]]:
    return [line.split() for line in subprocess.check_output(command, text=True).splitlines()]


with tempfile.TemporaryDirectory() as folder:
    here, there = (program(compiler, Path(folder)) for compiler in ("g++", "aarch64-linux-gnu-g++"))
    want, got = printed(str(here)), printed("qemu-aarch64", str(there))
assert len(got) == len(want)
for (dtype, name, a), (*same, b) in zip(got, want):
    assert [dtype, name] == same
    error = abs(float(a) - float(b))
    assert error <= TOLERANCES[dtype] * max(1, abs(float(b))), f"{dtype} {name}: got {a}, want {b}"
print(f"aarch64: {len(got)} numbers of {len({(dtype, name) for dtype, name, _ in got})} kinds as here")
