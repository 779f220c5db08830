"""Whole networks, a training step and inference, against the same networks on torch's own layers."""

import pytest
import torch
from harness import Case, whole_network
from model_twins import TWINS
from workloads import MODELS

import fastarch


def case(name: str, image: tuple[int, ...], batch: int, mode: str, device: torch.device, dtype: torch.dtype) -> Case:
    ours = getattr(fastarch.models, name)().to(device, dtype)
    reference = TWINS[name]().to(device, dtype)
    reference.load_state_dict(ours.state_dict())
    for model in (ours, reference):
        model.train(mode == "training")
    return whole_network(f"{name} {batch}x", ours, reference, torch.randn(batch, *image).to(device, dtype))


@pytest.mark.parametrize(("mode", "batch"), [("training", 8), ("inference", 1), ("inference", 8)])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, mode, batch, compare, device, network_dtype):
    compare(case(name, MODELS[name], batch, mode, device, network_dtype), mode)
