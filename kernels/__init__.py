"""Triton kernels, installed as fastarch.kernels (the top-level name `kernels` belongs to another package)."""

import importlib.util

from torch.torch_version import TorchVersion

from fastarch.version import TRITON

if __name__ != "fastarch.kernels":
    raise ImportError("import fastarch.kernels: this folder is part of fastarch and no package of its own")
if importlib.util.find_spec("triton") is not None:
    import triton

    if TorchVersion(triton.__version__) < TRITON:
        raise ImportError(f"fastarch.kernels: want Triton {TRITON} or newer, got {triton.__version__}")
