"""fastarch: the classic neural architectures on hand-written fused kernels."""

from fastarch import models, nn, ops
from fastarch.routing import reference
from fastarch.version import __version__

__all__ = ["__version__", "models", "nn", "ops", "reference"]
