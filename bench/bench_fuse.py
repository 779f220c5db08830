"""Models that others wrote, as they are and after fastarch.fuse: a training step and inference."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import transformers
from harness import Case, First, whole_network
from model_twins import TWINS, TorchSequenceClassifier
from torch import Tensor, nn

import fastarch


class Translator(nn.Module):
    """torch.nn.Transformer that reads and writes the same."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x, x, tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(64))


class Workload(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False


def of_transformers(name: str, **options) -> Callable[[], nn.Module]:
    """A model with its config's own sizes and random weights, without dropout, which draws other elements in ours."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**options)
        for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(config, rate):
                setattr(config, rate, 0.0)
        return getattr(transformers, f"{name}Model")(config)

    return make


def whisper_encoder() -> nn.Module:
    sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "dropout": 0.0}
    return transformers.WhisperModel(transformers.WhisperConfig(**sizes)).encoder


SMALL_LLAMA = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
WORKLOADS = {
    "lenet5": Workload(TWINS["lenet5"], (64, 1, 32, 32)),
    "vgg11": Workload(TWINS["vgg11"], (2, 3, 224, 224)),
    "resnet18": Workload(TWINS["resnet18"], (8, 3, 224, 224)),
    "ResNet, transformers": Workload(
        of_transformers("ResNet", layer_type="basic", depths=[2, 2, 2, 2]), (4, 3, 224, 224)
    ),
    "RegNet": Workload(of_transformers("RegNet", depths=[1, 2, 4, 1]), (2, 3, 224, 224)),
    "ConvNeXt": Workload(of_transformers("ConvNext"), (1, 3, 224, 224)),
    "GRU classifier": Workload(lambda: TorchSequenceClassifier(nn.GRU), (64, 28, 28)),
    "Transformer": Workload(Translator, (4, 64, 512)),
    "ViT-B/16": Workload(of_transformers("ViT"), (1, 3, 224, 224)),
    "BERT base": Workload(of_transformers("Bert"), (2, 128), tokens=True),
    "GPT-2 small": Workload(of_transformers("GPT2"), (1, 256), tokens=True),
    "Llama, small": Workload(
        of_transformers("Llama", vocab_size=4000, intermediate_size=1376, **SMALL_LLAMA), (2, 256), tokens=True
    ),
    "Whisper tiny, encoder": Workload(whisper_encoder, (1, 80, 3000)),
}


def case(name: str, workload: Workload, mode: str, device: torch.device, dtype: torch.dtype) -> Case:
    reference = First(workload.make()).to(device, dtype).train(mode == "training")
    for dropout in (m for m in reference.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    x = torch.randint(1000, workload.shape) if workload.tokens else torch.randn(workload.shape, dtype=dtype)
    return whole_network(name, fastarch.fuse(reference), reference, x.to(device))


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_fuse(name, mode, compare, device, network_dtype):
    compare(case(name, WORKLOADS[name], mode, device, network_dtype), mode)
