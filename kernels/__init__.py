"""Triton kernels, installed as fastarch.kernels (the top-level name `kernels` belongs to another package)."""

if __name__ != "fastarch.kernels":
    raise ImportError("import fastarch.kernels: this folder is part of fastarch and no package of its own")
