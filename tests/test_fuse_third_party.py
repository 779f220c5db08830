"""fuse on models that others wrote: Hugging Face's transformers, from configs, with random weights; torch.nn's own."""

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from closeness import assert_all_close, assert_close
from model_twins import TorchSequenceClassifier, basic, torch_lenet5, torchvision_resnet
from torch import Tensor, nn

import fastarch

transformers = pytest.importorskip("transformers", reason="most of the models are Hugging Face's")

STEPS = 20
TEXT = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {"image_size": 16, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # ours drops other elements
STAGES = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]  # by name; floating point where not integers
    became: dict[str, int]  # how many of what `fusions` tells


def image(side: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, side, side)}


def tokens() -> dict[str, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(31, (3, 9)), "attention_mask": mask}


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def whisper() -> nn.Module:
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in [("layers", 1), ("ffn_dim", 24)]}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": 31, "num_mel_bins": 8, "d_model": 16, "dropout": 0.0}
    lengths = {"max_source_positions": 12, "max_target_positions": 12}
    return transformers.WhisperModel(transformers.WhisperConfig(**sizes, **lengths, **layers, **heads, **tokens))


class Translator(nn.Module):
    """torch.nn.Transformer with the mask of a decoder."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(16, 2, 1, 1, 24, 0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.transformer(source, target, tgt_mask=mask)


ATTENTION = "attention of transformers"
LAYERS = ("TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoder", "TransformerDecoderLayer")
CASES = {
    "resnet": Case(
        lambda: transformers.ResNetModel(transformers.ResNetConfig(**STAGES, layer_type="basic")),
        lambda: image(32),
        {"chain of 3": 3, "chain of 2": 3, "BatchNorm2d": 6, "Conv2d": 1},
    ),
    "regnet": Case(
        lambda: transformers.RegNetModel(transformers.RegNetConfig(**STAGES, groups_width=4)),
        lambda: image(32),
        {"chain of 3": 5, "chain of 2": 6, "BatchNorm2d": 9},
    ),
    "convnext": Case(  # layer norms and GELU: nothing is ours
        lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
        ),
        lambda: image(32),
        {},
    ),
    "vit": Case(
        lambda: transformers.ViTModel(transformers.ViTConfig(**TEXT, **IMAGES, **NO_DROPOUT)), image, {ATTENTION: 1}
    ),
    "bert": Case(lambda: transformers.BertModel(transformers.BertConfig(**TEXT, **NO_DROPOUT)), tokens, {ATTENTION: 1}),
    "gpt2": Case(gpt2, tokens, {ATTENTION: 1}),
    "llama": Case(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=1)),
        tokens,
        {ATTENTION: 1},
    ),
    "whisper": Case(
        whisper,
        lambda: {"input_features": torch.randn(3, 8, 24), "decoder_input_ids": torch.randint(31, (3, 5))},
        {ATTENTION: 1},
    ),
    "transformer": Case(
        Translator,
        lambda: {"source": torch.randn(3, 7, 16), "target": torch.randn(3, 5, 16)},
        {**dict.fromkeys(LAYERS, 1), "MultiheadAttention": 3},
    ),
    "gru classifier": Case(
        lambda: TorchSequenceClassifier(nn.GRU),
        lambda: {"x": torch.randn(3, 6, 28)},
        {"GRU": 1},
    ),
    "resnet18": Case(
        lambda: torchvision_resnet(basic, 1, [1, 1, 1, 1]),
        lambda: {"input": torch.randn(3, 3, 64, 64)},
        {"chain of 4": 5, "chain of 3": 4, "chain of 2": 3, "BatchNorm2d": 12, "Conv2d": 5},
    ),
    "lenet5": Case(torch_lenet5, lambda: {"input": torch.randn(3, 1, 32, 32)}, {"chain of 3": 2}),
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def kind(fusion: NamedTuple) -> str:
    """The class of a layer, or how many operations were in a chain."""
    return f"chain of {fusion.what.count('->') + 1}" if "->" in fusion.what else fusion.what


def three(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The original and fused in float32, and the original in float64, with the same values."""
    torch.manual_seed(0)
    model = CASES[name].make()
    return model, fastarch.fuse(copy.deepcopy(model), inplace=True), copy.deepcopy(model).double()


def step(model: nn.Module, inputs: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """One step of gradient descent towards some output: the output, gradients, and parameters after it."""
    dtype = next(model.parameters()).dtype
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    model.zero_grad()
    output = model(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    target = torch.arange(output.numel(), dtype=torch.float64).cos().view_as(output)
    loss = (output - target.to(dtype)).square().mean()
    loss.backward()
    found = {"output": output.detach(), "loss": loss.detach()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad.clone()
                parameter -= rate * parameter.grad
                found[name] = parameter.clone()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_original(name):
    model, fused, exact = three(name)
    inputs = CASES[name].inputs()
    want, got, truth = (step(m.train(), inputs, 0.01) for m in (model, fused, exact))
    # a gradient that is 0 but for rounding (of a bias before a batch norm, of keys' biases) is nothing to be judged by
    largest = max(t.norm() for n, t in truth.items() if n.startswith("gradient"))
    judged = [n for n, t in truth.items() if t.norm() > 1e-6 * largest]
    assert len(judged) > len(truth) / 2
    assert_all_close(*({n: found[n] for n in judged} for found in (got, want, truth)))


@pytest.mark.parametrize("name", CASES)
def test_the_loss_curve_is_that_of_the_original(name):
    model, fused, exact = three(name)
    inputs = CASES[name].inputs()
    curves = [torch.stack([step(m.train(), inputs, 1e-4)["loss"] for _ in range(STEPS)]) for m in (fused, model, exact)]
    assert curves[2][-1] < curves[2][0]
    assert_close("loss", *curves)


@pytest.mark.parametrize("name", CASES)
def test_what_is_fused(name):
    fused = fastarch.fuse(CASES[name].make())
    assert Counter(kind(f) for f in fastarch.fusions(fused) if not f.left) == CASES[name].became


def test_models_of_transformers_attend_with_our_kernels_until_unfused():
    model = gpt2()
    fused = fastarch.fuse(model)
    served = {call.operation for call in fastarch.explain(fused, torch.randint(31, (2, 5)))}
    assert "scaled_dot_product_attention" in served
    assert (fused.config._attn_implementation, model.config._attn_implementation) == ("fastarch", "sdpa")
    fastarch.unfuse(fused)
    assert fused.config._attn_implementation == "sdpa"


def test_what_a_config_asks_for_keeps_its_attention():
    model = gpt2()
    model.set_attn_implementation("eager")
    (fusion,) = (f for f in fastarch.fusions(fastarch.fuse(model)) if f.what == ATTENTION)
    assert fusion.left == "its attention is eager, not sdpa"


def test_a_pickled_model_of_transformers_is_loaded_by_a_process_that_has_not_registered(tmp_path):
    torch.manual_seed(0)
    fused, ids = fastarch.fuse(gpt2()), torch.randint(31, (2, 5))
    torch.save((fused, ids, fused(ids).logits), tmp_path / "model.pt")
    script = (
        f"import torch\nfused, ids, want = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(fused(ids).logits, want)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
