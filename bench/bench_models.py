"""Whole networks, a training step and inference, against the same networks on torch's own layers.

Without dropout, which draws other elements in ours. Inference is of one input, and of a batch.
"""

import pytest
import torch
from harness import Case, First, whole_network
from model_twins import TWINS
from torch import nn
from workloads import MODELS, Network

import fastarch

OPTIONS = {"seq2seq": {"attention": "additive"}, "transformer": {"dropout": 0.0}, "gpt2": {"dropout": 0.0}}


def case(name: str, network: Network, batch: int, mode: str, device: torch.device, dtype: torch.dtype) -> Case:
    ours, reference = getattr(fastarch.models, name)(**OPTIONS.get(name, {})), TWINS[name]()
    reference.load_state_dict(ours.state_dict())
    ours, reference = (First(model).to(device, dtype).train(mode == "training") for model in (ours, reference))
    for dropout in (m for model in (ours, reference) for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    if network.vocabulary:
        inputs = [torch.randint(network.vocabulary, (batch, *shape)).to(device) for shape in network.shapes]
    else:
        inputs = [torch.randn(batch, *shape).to(device, dtype) for shape in network.shapes]
    return whole_network(f"{name} {batch}x", ours, reference, *inputs)


@pytest.mark.parametrize(("mode", "single"), [("training", False), ("inference", True), ("inference", False)])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, mode, single, compare, device, network_dtype):
    network = MODELS[name]
    compare(case(name, network, 1 if single else network.batch, mode, device, network_dtype), mode)
