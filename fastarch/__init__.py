"""fastarch: the classic neural architectures on hand-written fused kernels."""

from fastarch import models, nn, ops
from fastarch.explain import explain
from fastarch.fuse import fuse, fusions, unfuse
from fastarch.routing import reference
from fastarch.version import __version__

__all__ = ["__version__", "explain", "fuse", "fusions", "models", "nn", "ops", "reference", "unfuse"]
