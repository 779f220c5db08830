"""The model zoo: what every architecture promises, one property a test."""

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastarch
from fastarch import extension, models
from fastarch.nn import ConvReLUPool2d

PARAMETERS = {
    "alexnet": 61_100_840,
    "lenet5": 61_706,
    "notes_cnn": 421_642,
    "notes_fnn": 418_666,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
}
SMALL = ["lenet5", "notes_cnn", "notes_fnn"]
SHAPES = {"lenet5": (2, 1, 32, 32), "notes_cnn": (2, 1, 28, 28), "notes_fnn": (2, 1, 28, 28)}  # others: 1x3x64x64
# torchvision's indices of the convolutions in features and of the linear layers in classifier
TORCHVISION = {
    "alexnet": ("0 3 6 8 10", "1 4 6"),
    "vgg11": ("0 3 6 8 11 13 16 18", "0 3 6"),
    "vgg13": ("0 2 5 7 10 12 15 17 20 22", "0 3 6"),
    "vgg16": ("0 2 5 7 10 12 14 17 19 21 24 26 28", "0 3 6"),
    "vgg19": ("0 2 5 7 10 12 14 16 19 21 23 25 28 30 32 34", "0 3 6"),
}


def linear(sizes: list[int]) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return layers[:-1]


def named(names: str, layers: list[nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict(zip(names.split(), layers, strict=True)))


def torch_lenet5() -> nn.Module:
    names = "c1 relu1 pool1 c3 relu3 pool3 flatten c5 relu5 f6 relu6 output"
    first, second = ([nn.Conv2d(*sizes, 5), nn.ReLU(), nn.MaxPool2d(2)] for sizes in ((1, 6), (6, 16)))
    return named(names, [*first, *second, nn.Flatten(), *linear([400, 120, 84, 10])])


def torch_notes_cnn() -> nn.Module:
    names = "conv1 relu1 pool1 conv2 relu2 pool2 flatten fc1 relu3 fc2"
    first, second = ([nn.Conv2d(*sizes, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)] for sizes in ((1, 32), (32, 64)))
    return named(names, [*first, *second, nn.Flatten(), *linear([3136, 128, 10])])


def torch_notes_fnn() -> nn.Module:
    return named("flatten fc1 relu1 fc2 relu2 fc3", [nn.Flatten(), *linear([784, 512, 32, 10])])


def torchvision(features: list[nn.Module], side: int, classifier: list[nn.Module]) -> nn.Module:
    layers = [nn.Sequential(*features), nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Sequential(*classifier)]
    return named("features avgpool flatten classifier", layers)


def torchvision_alexnet() -> nn.Module:
    features = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for sizes in ((192, 384), (384, 256), (256, 256)):
        features += [nn.Conv2d(*sizes, 3, padding=1), nn.ReLU()]
    first, relu, second, *rest = linear([256 * 36, 4096, 4096, 1000])
    return torchvision([*features, nn.MaxPool2d(3, 2)], 6, [nn.Dropout(), first, relu, nn.Dropout(), second, *rest])


def torchvision_vgg(letters: str) -> Callable[[], nn.Module]:
    """A network by torchvision's configuration: a convolution by its output channels, M for a pool."""

    def build() -> nn.Module:
        features, channels = [], 3
        for letter in letters.split():
            if letter == "M":
                features.append(nn.MaxPool2d(2))
            else:
                features += [nn.Conv2d(channels, channels := int(letter), 3, padding=1), nn.ReLU()]
        first, relu1, second, relu2, third = linear([512 * 49, 4096, 4096, 1000])
        return torchvision(features, 7, [first, relu1, nn.Dropout(), second, relu2, nn.Dropout(), third])

    return build


# the same architectures of torch's own layers, with the same names
TWINS = {
    "alexnet": torchvision_alexnet,
    "lenet5": torch_lenet5,
    "notes_cnn": torch_notes_cnn,
    "notes_fnn": torch_notes_fnn,
    "vgg11": torchvision_vgg("64 M 128 M 256 256 M 512 512 M 512 512 M"),
    "vgg13": torchvision_vgg("64 64 M 128 128 M 256 256 M 512 512 M 512 512 M"),
    "vgg16": torchvision_vgg("64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M"),
    "vgg19": torchvision_vgg("64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M"),
}


@pytest.fixture(scope="module", params=models.__all__)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(name) -> nn.Module:
    """Built once for all tests, which must not change it."""
    torch.manual_seed(0)
    return getattr(models, name)().eval()


@pytest.fixture
def images(name) -> Tensor:
    return torch.randn(SHAPES.get(name, (1, 3, 64, 64)))


def on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return factory()


def sharing(factory: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """A network with these very tensors as parameters, without dropout."""
    network = on_meta(factory)
    network.load_state_dict(state, assign=True)
    return network.eval()


def doubled(network: nn.Module) -> dict[str, Tensor]:
    return {key: t.double() for key, t in network.state_dict().items()}


def gradients(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of its square for every parameter."""
    parameters = {key.removeprefix("_orig_mod."): p for key, p in network.named_parameters()}  # of torch.compile
    output = network(images)
    return {"y": output.detach()} | dict(
        zip(parameters, torch.autograd.grad(output.square().sum(), list(parameters.values())))
    )


def test_parameter_count(name):
    assert sum(p.numel() for p in on_meta(getattr(models, name)).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", TORCHVISION)
def test_state_dict_has_torchvisions_keys(name):
    places = [
        f"{part}.{i}" for part, indices in zip(("features", "classifier"), TORCHVISION[name]) for i in indices.split()
    ]
    keys = list(on_meta(getattr(models, name)).state_dict())
    assert keys == [f"{place}.{kind}" for place in places for kind in ("weight", "bias")]


def test_state_dict_has_the_twins_keys_and_shapes(name):
    ours, twins = (on_meta(factory).state_dict() for factory in (getattr(models, name), TWINS[name]))
    assert [(key, t.shape) for key, t in ours.items()] == [(key, t.shape) for key, t in twins.items()]


def test_classes_are_an_argument(name):
    with FakeTensorMode():
        images = torch.empty(SHAPES.get(name, (1, 3, 64, 64)))
        assert getattr(models, name)(classes=7)(images).shape == (len(images), 7)


@pytest.mark.parametrize(("name", "side"), [("alexnet", 63), ("vgg11", 32), ("vgg19", 32)])
def test_smallest_image(name, side):
    with FakeTensorMode():
        network = getattr(models, name)()
        assert network(torch.empty(2, 3, side, side)).shape == (2, 1000)
        with pytest.raises(ValueError, match="conv_relu_pool: want something to compute"):
            network(torch.empty(2, 3, side - 1, side))


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
def test_kernels_serve_every_fused_layer(network, images):
    calls = fastarch.explain(network, images)
    assert [call.layer for call in calls] == [n for n, m in network.named_modules() if isinstance(m, ConvReLUPool2d)]
    assert all(call.kernel.startswith(f"cpu-{extension.isa} ") for call in calls), calls


def test_outputs_are_as_exact_as_the_twins(name, network, images):
    state = network.state_dict()
    truth = sharing(TWINS[name], doubled(network))
    with torch.no_grad():
        assert_close("y", network(images), sharing(TWINS[name], state)(images), truth(images.double()))


@pytest.mark.parametrize("name", [*SMALL, "alexnet", "vgg11"], indirect=True)
def test_gradients_equal_the_twins_and_the_references(name, network, images):
    """In float64: in float32 rounding may make another element the maximum, in the twin as in ours."""
    state, images = doubled(network), images.double()
    ours = sharing(getattr(models, name), state)
    want = gradients(sharing(TWINS[name], state), images)
    with fastarch.reference():
        got = gradients(ours, images)
    assert all(torch.equal(got[key], want[key]) for key in want)
    got = gradients(ours, images)
    for key in want:
        assert (got[key] - want[key]).norm() <= 1e-12 * want[key].norm(), key


@pytest.mark.parametrize("name", [n for n in models.__all__ if n.startswith("vgg")], indirect=True)
def test_vgg_starts_as_torchvisions(network):
    for key, parameter in network.named_parameters():
        if parameter.dim() == 1:
            assert not parameter.any(), key
            continue
        want = (2 / (9 * len(parameter))) ** 0.5 if parameter.dim() == 4 else 0.01
        assert parameter.std().item() == pytest.approx(want, rel=0.1), key


def test_state_dict_round_trip(name, network, images):
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = sharing(getattr(models, name), torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))


def test_inference_gives_the_same_bits_again(network, images):
    with torch.no_grad():
        assert torch.equal(network(images), network(images))


def test_channels_last_gives_the_same(name, network, images):
    last = {"memory_format": torch.channels_last}
    state = {key: t.contiguous(**last) if t.dim() == 4 else t for key, t in network.state_dict().items()}
    with torch.no_grad():
        got = sharing(getattr(models, name), state)(images.contiguous(**last))
        want = network(images)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_an_empty_batch(network, images):
    assert network(images[:0]).shape == (0, *network(images).shape[1:])


@pytest.mark.parametrize("name", SMALL, indirect=True)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(network, images, copied):
    other, before = copied(network), network(images)
    assert torch.equal(other(images), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(network(images), before)
    assert not other(images).any()


@pytest.mark.parametrize("name", SMALL, indirect=True)
def test_compiled_gives_the_same(network, images):
    torch._dynamo.reset()
    got, want = gradients(torch.compile(network, fullgraph=True), images), gradients(network, images)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")  # noqa: B023
