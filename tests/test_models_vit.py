"""vit_b_16 and smaller ones: what test_models.py does not ask of every architecture."""

import copy
import pickle

import pytest
import torch
from closeness import assert_all_close
from model_twins import TorchvisionViT
from torch import Tensor, nn

from fastarch import models
from fastarch.models.vit import VisionTransformer

SIZES = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 40}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def build(**options) -> nn.Module:
    network = VisionTransformer(**SIZES | options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)  # the head's weight starts as zeros
        for block in network.encoder.layers:
            block.self_attention.in_proj_weight.mul_(4)  # attention looks somewhere, not everywhere
    return network.eval()


def twin(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    other = TorchvisionViT(*SIZES.values())
    other.load_state_dict(network.state_dict())
    return other.to(dtype).eval()


def gradients(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of its square."""
    images = images.detach().requires_grad_()
    output = network(images)
    wanted = {"images": images} | dict(network.named_parameters())
    return {"output": output} | dict(zip(wanted, torch.autograd.grad(output.square().sum(), list(wanted.values()))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_as_exact_as_the_twins(dtype):
    """Over six draws together: in single ones our greatest error was 0.7 to 2.3 of eager's (on average 1.03)."""
    results = []
    for _ in range(6):
        network, images = build().to(dtype), torch.randn(3, 3, 32, 32).to(dtype)
        got, eager = gradients(network, images), gradients(twin(network, dtype), images)
        results.append((got, eager, gradients(twin(network, torch.float64), images.double())))
    assert_all_close(*({name: torch.stack([of[name] for of in each]) for name in each[0]} for each in zip(*results)))


def test_starts_as_published():
    """The projection of patches by what it sums, the head at zero, the mlp as Glorot and Bengio 2010 have it."""
    network = models.vit_b_16()
    assert network.conv_proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.01)
    assert not network.conv_proj.bias.any()
    assert not network.class_token.any()
    assert not network.heads.head.weight.any()
    assert network.encoder.pos_embedding.std().item() == pytest.approx(0.02, rel=0.01)
    for block in network.encoder.layers:
        for linear in (block.mlp[0], block.mlp[3]):
            assert linear.weight.std().item() == pytest.approx((2 / (768 + 3072)) ** 0.5, rel=0.01)
            assert linear.weight.abs().max() <= (6 / (768 + 3072)) ** 0.5  # uniform
            assert 0 < linear.bias.abs().max() < 1e-5


@pytest.mark.parametrize("size", [8, 48])
def test_images_of_any_multiple_of_the_patch(size):
    network = build(image_size=size)
    assert network.encoder.pos_embedding.shape == (1, 1 + (size // 8) ** 2, 24)
    assert network(torch.randn(2, 3, size, size)).shape == (2, 1000)


def test_patches_know_where_they_are():
    """Without positions the class token would see a set of patches."""
    network, images = build(), torch.randn(1, 3, 32, 32)
    moved = images.roll(8, 3)
    assert (network(images) - network(moved)).abs().max() > 1e-2
    with torch.no_grad():
        network.encoder.pos_embedding.zero_()
    torch.testing.assert_close(network(images), network(moved))


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_is_for_training(kind):
    network, images = build(**{kind: 0.5}), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images), twin(network, torch.float32)(images))
    network.train()
    assert not torch.equal(network(images), network(images))


def test_dropout_is_of_embeddings_and_of_what_blocks_add():
    """Where all of these are dropped, zeros are left."""
    network = build(dropout=1.0).train()
    want = network.heads(network.encoder.ln.bias).expand(2, -1)
    torch.testing.assert_close(network(torch.randn(2, 3, 32, 32)), want)


def test_loads_the_keys_of_published_files():
    network = build()
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    state = {}
    for key, t in network.state_dict().items():
        for new, old in names.items():
            key = key.replace(new, old)
        state[key] = t
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in state
    other = VisionTransformer(**SIZES)
    assert other.load_state_dict(state) == ([], [])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.eval()(images), network(images))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_is_one_graph(training):
    torch._dynamo.reset()
    network, images = build().train(training), torch.randn(2, 3, 32, 32)
    got, want = (gradients(f, images) for f in (torch.compile(network, fullgraph=True, backend="aot_eager"), network))
    for key in want:
        found = got[key if key in got else f"_orig_mod.{key}"]
        torch.testing.assert_close(found, want[key], rtol=1e-4, atol=1e-4, msg=lambda m: f"{key}: {m}")  # noqa: B023


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copied):
    network, images = build(), torch.randn(2, 3, 32, 32)
    other, before = copied(network), network(images)
    assert torch.equal(other(images), before)
    with torch.no_grad():
        other.class_token.add_(1)
    assert torch.equal(network(images), before)
    assert not torch.equal(other(images), before)


@pytest.mark.parametrize(("image_size", "patch_size"), [(30, 8), (4, 8), (0, 8)])
def test_patches_fill_images(image_size, patch_size):
    with pytest.raises(ValueError, match=f"^vit: want an image_size that is a multiple of {patch_size}, got"):
        VisionTransformer(**SIZES | {"image_size": image_size, "patch_size": patch_size})


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (2, 3, 40, 32), (3, 32, 32), (2, 3, 16, 16)], ids=str)
def test_images_have_the_size_that_the_network_was_built_for(shape):
    with pytest.raises(ValueError, match=r"^vit: want images \[N, 3, 32, 32\], got"):
        build()(torch.randn(shape))
