"""Compiles CUDA sources with plain g++ over tests/cuda_on_cpu, to run them without nvcc and without a GPU."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).parent

# a * b + c becomes one instruction where this machine has it, as in nvcc's code
FLAGS = ["-march=native", "-ffp-contract=fast", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def run(*command) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def cxx() -> str:
    return os.environ.get("CXX", "g++")


def compile_kernel(source: Path, folder: Path, sanitize: bool) -> Path:
    target = folder / f"{source.stem}.o"
    options = ["-std=c++17", *FLAGS, *(["-O1", *SANITIZE] if sanitize else ["-O2"])]
    run(cxx(), "-x", "c++", *options, "-c", source, "-o", target)
    return target


def compile_torch_side(source: Path, folder: Path, sanitize: bool) -> Path:
    target = folder / f"{source.stem}.o"
    includes = ["-isystem", TORCH / "include", "-isystem", TORCH / "include/torch/csrc/api/include"]
    options = ["-std=c++20", "-O1", *FLAGS, *(SANITIZE if sanitize else []), *includes, "-include", "torch_side.h"]
    run(cxx(), *options, "-c", source, "-o", target)
    return target


def program(source: Path, folder: Path, sanitize: bool = False) -> Path:
    """An executable from one .cu file that has a main."""
    target = folder / source.stem
    run(cxx(), compile_kernel(source, folder, sanitize), *(SANITIZE if sanitize else []), "-o", target)
    return target


def operation(name: str, folder: Path, sanitize: bool = False) -> Path:
    """A library for torch.ops.load_library in which csrc/cuda's operation `name` serves CPU tensors."""
    sources = ROOT / "csrc/cuda"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_torch_side, sources / f"{name}.cpp", folder, sanitize)]
        jobs += [pool.submit(compile_kernel, p, folder, sanitize) for p in sorted(sources.glob(f"{name}*.cu"))]
        objects = [job.result() for job in jobs]
    target = folder / f"lib{name}.so"
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    run(cxx(), "-shared", *objects, *(SANITIZE if sanitize else []), *libraries, "-o", target)
    return target


def run_sanitized(tests: str, chosen: str) -> None:
    """The chosen tests of a file, in a process of their own under AddressSanitizer and UndefinedBehaviorSanitizer."""
    # libstdc++ too: the sanitizer has to find __cxa_throw when it starts
    find = [[cxx(), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    runtimes = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in find]
    environment = {
        **os.environ,
        "FASTARCH_SANITIZE": "1",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until it exits
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
