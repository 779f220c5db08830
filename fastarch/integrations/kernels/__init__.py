"""Hugging Face's kernels with our layers.

    from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
    from fastarch.integrations.kernels import mapping

    @use_kernel_forward_from_hub("GRU")
    class Recurrence(torch.nn.GRU): ...

    with use_kernel_mapping(mapping()):
        kernelize(model, mode=Mode.TRAINING)  # each Recurrence in it is on our kernels

kernels reads this folder as a repository on disk: `metadata.json` says what it is, `layers` holds what it may take.
"""

from pathlib import Path

from fastarch.integrations.kernels import layers
from kernels import LocalLayerRepository

__all__ = ["layers", "mapping"]
DEVICES = ("cpu", "cuda")


def mapping() -> dict[str, dict[str, LocalLayerRepository]]:
    """Our layers by the names of torch.nn's, for CPUs and CUDA: for kernels' register_ or use_kernel_mapping."""
    repositories = {name: LocalLayerRepository(Path(__file__).parent, layer_name=name) for name in layers.__all__}
    return {name: dict.fromkeys(DEVICES, repository) for name, repository in repositories.items()}
