"""In an environment with a CUDA build of torch, on a machine without a GPU: the CUDA extension loads and registers."""

import importlib

import torch

import fastarch
from fastarch import extension

assert torch.version.cuda, f"{torch.__version__} is no CUDA build"
assert extension.cuda is not None, "fastarch._cuda was not built"
modules = {importlib.import_module(getattr(fastarch.ops, name).__module__) for name in fastarch.ops.__all__}
algorithms = {module.__name__.rpartition(".")[2]: getattr(module, "CUDA_ALGORITHM", None) for module in modules}
algorithms = {name: algorithm for name, algorithm in sorted(algorithms.items()) if algorithm}
operations = [f"fastarch::{name}_{algorithm}_{d}" for name, algorithm in algorithms.items() for d in ("fwd", "bwd")]
for operation in operations:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operation, "CUDA"), f"{operation} has no CUDA implementation"
print(f"fastarch._cuda for {extension.cuda.architectures} with torch {torch.__version__}: {', '.join(operations)}")
