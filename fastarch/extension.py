"""The compiled extensions, loaded if they were built. Without them CPUs run the reference and CUDA runs Triton."""

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from fastarch.version import TORCH

if torch.__version__ < TORCH[0]:
    raise ImportError(f"fastarch: want torch {TORCH[0]} or newer, below {TORCH[1]}, got {torch.__version__}")
if torch.__version__ >= TORCH[1]:
    warnings.warn(
        f"fastarch: tested with torch {TORCH[0]} and newer, below {TORCH[1]}, got {torch.__version__}", stacklevel=2
    )

failures: dict[str, str] = {}  # by extension: why what was built does not serve


def _load(name: str, consequence: str) -> ModuleType | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        module = importlib.import_module(name)
        if name == "fastarch._C":
            check_built_for(module.torch)
        return module
    except ImportError as error:  # built, but for another torch or another machine: say so, never hide it
        failures[name] = f"{name} was built but cannot be loaded: {error}"
        warnings.warn(f"fastarch: {consequence}: {failures[name]}", stacklevel=2)
        return None


def check_built_for(version: str) -> None:
    """torch's C++ interface is that of one minor version: symbols can be there and mean something else."""
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(f"want torch {version}, for which it was compiled, got {torch.__version__}")


cpu = _load("fastarch._C", "CPUs run the slow reference")
cuda = _load("fastarch._cuda", "CUDA devices run Triton only") if cpu else None
isa = cpu.isa() if cpu else None  # of the CPU kernels; raises where FASTARCH_CPU_ISA names none
no_cpu = failures.get("fastarch._C", "fastarch._C is not built")  # the reason, where `cpu` is None
