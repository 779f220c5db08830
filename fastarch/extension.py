"""The compiled extensions, loaded if they were built. Without them CPUs run the reference and CUDA runs Triton."""

import importlib
import importlib.util
import warnings
from types import ModuleType


def _load(name: str, consequence: str) -> ModuleType | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:  # built, but for another torch or another machine: say so, never hide it
        warnings.warn(f"fastarch: {name} was built but cannot be loaded, so {consequence}: {error}", stacklevel=2)
        return None


cpu = _load("fastarch._C", "CPUs run the slow reference")
cuda = _load("fastarch._cuda", "CUDA devices run Triton only") if cpu else None
isa = cpu.isa() if cpu else None  # of the CPU kernels; raises where FASTARCH_CPU_ISA names none
