"""The model zoo: what every architecture promises, one property a test."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from model_twins import TWINS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastarch
from fastarch import extension, models, routing
from fastarch.models.densenet import DenseNet
from fastarch.models.googlenet import BasicConv2d, Inception
from fastarch.models.resnet import BasicBlock, Bottleneck, ResNet
from fastarch.models.senet import SENet
from fastarch.models.vgg import VGG
from fastarch.models.vit import VisionTransformer
from fastarch.nn import GRU, BatchNorm2d, Conv2d, ConvReLUPool2d, MultiheadAttention, conv_bn_relu_pool
from fastarch.nn.conv_relu_pool import has_fewer_products

PARAMETERS = {
    "alexnet": 61_100_840,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "elman": 21_514,
    "googlenet": 13_004_888,
    "gru_classifier": 61_962,
    "lenet5": 61_706,
    "lstm_classifier": 82_186,
    "notes_cnn": 421_642,
    "notes_fnn": 418_666,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "se_resnet50": 28_088_024,
    "se_resnet152": 66_821_848,
    "senet154": 115_088_984,
    "unet": 31_036_546,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "vit_b_16": 86_567_656,
}
RECURRENT = [
    "elman",
    "gru_classifier",
    "lstm_classifier",
]  # read the rows of an image; more in test_models_recurrent.py
# read something else, in files of their own: test_models_gpt2_bert.py, _transformer.py, _seq2seq.py
TOKENS = ["bert", "gpt2", "seq2seq", "transformer"]
SMALL = ["lenet5", "notes_cnn", "notes_fnn"]
# every kind of block at least once
SHALLOW = {
    "densenet": lambda: DenseNet((2, 1)),
    "googlenet": lambda: nn.Sequential(BasicConv2d(3, 64, 7, 2, 3), Inception(64, 8, 8, 8, 8, 8, 8)),
    "resnet, basic blocks": lambda: ResNet(BasicBlock, (2, 1, 1, 1)),
    "resnet, bottlenecks": lambda: ResNet(Bottleneck, (2, 1, 1, 1)),
    "se_resnet": lambda: SENet((2, 1, 1, 1), wide=False),
    "senet154": lambda: SENet((2, 1, 1, 1), wide=True),
    "unet": lambda: models.unet(channels=3, width=8),
    "vgg_bn": lambda: VGG([[8], [512]], dropout=0.0, batch_norm=True),
}
SHAPES = {
    "lenet5": (2, 1, 32, 32),
    "notes_cnn": (2, 1, 28, 28),
    "notes_fnn": (2, 1, 28, 28),
    "unet": (1, 1, 32, 32),
    "vit_b_16": (1, 3, 224, 224),
    **{name: (2, 28, 28) for name in RECURRENT},
}
DEFAULT = (1, 3, 64, 64)  # shape of the other networks' images
# torchvision's indices of the convolutions in features and of the linear layers in classifier
TORCHVISION = {
    "alexnet": ("0 3 6 8 10", "1 4 6"),
    "vgg11": ("0 3 6 8 11 13 16 18", "0 3 6"),
    "vgg13": ("0 2 5 7 10 12 15 17 20 22", "0 3 6"),
    "vgg16": ("0 2 5 7 10 12 14 17 19 21 24 26 28", "0 3 6"),
    "vgg19": ("0 2 5 7 10 12 14 16 19 21 23 25 28 30 32 34", "0 3 6"),
}
# the number of tensors in the published state_dicts of torchvision and timm, and some of their keys
PUBLISHED = {
    "densenet121": (727, "features.conv0.weight features.denseblock4.denselayer16.norm2.running_var classifier.bias"),
    "densenet201": (1207, "features.transition3.conv.weight features.norm5.running_mean"),
    "googlenet": (
        364,
        "conv1.conv.weight inception3a.branch2.0.bn.weight inception5b.branch4.1.conv.weight aux2.fc1.bias",
    ),
    "resnet18": (122, "conv1.weight bn1.num_batches_tracked layer2.0.downsample.1.running_mean fc.weight"),
    "resnet152": (932, "layer1.0.downsample.0.weight layer3.35.conv3.weight layer4.2.bn3.bias fc.bias"),
    "senet154": (1144, "layer0.conv3.weight layer1.0.se_module.fc1.bias layer4.2.conv2.weight last_linear.bias"),
    "se_resnet50": (384, "layer0.bn1.weight layer2.0.downsample.0.weight layer4.2.se_module.fc2.weight"),
    "vgg11_bn": (62, "features.0.bias features.1.running_mean features.26.num_batches_tracked classifier.6.weight"),
    "vgg19_bn": (118, "features.49.weight features.50.running_var"),
    "vit_b_16": (
        152,
        "class_token conv_proj.bias encoder.pos_embedding encoder.layers.encoder_layer_11.self_attention.in_proj_bias "
        "encoder.layers.encoder_layer_0.self_attention.out_proj.bias encoder.layers.encoder_layer_0.mlp.3.weight "
        "encoder.ln.weight heads.head.bias",
    ),
}


@pytest.fixture(scope="module", params=[name for name in models.__all__ if name not in TOKENS])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(name) -> nn.Module:
    """Built once for all tests, which must not change it."""
    torch.manual_seed(0)
    network = getattr(models, name)()
    settle(network, torch.randn(2, *SHAPES.get(name, DEFAULT)[1:]))
    return network.eval()


@pytest.fixture(scope="module")
def images(name) -> Tensor:
    return torch.randn(SHAPES.get(name, DEFAULT), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def output(network, images) -> Tensor:
    with torch.no_grad():
        return network(images)


@pytest.fixture(scope="module")
def eager(name, network, images) -> Tensor:
    """What the twin computes."""
    with torch.no_grad():
        return sharing(TWINS[name], network.state_dict())(images)


@pytest.fixture(scope="module")
def truth(name, network, images) -> Tensor:
    """What the twin computes in float64."""
    with torch.no_grad():
        return sharing(TWINS[name], copied(network))(images.double())


@torch.no_grad()
def settle(network: nn.Module, images: Tensor) -> None:
    """As after training: weights and running statistics of batch norms that are not 0 or 1, a head that is not 0."""
    if isinstance(network, VisionTransformer):
        nn.init.normal_(network.heads.head.weight, std=0.02)
    norms = [module for module in network.modules() if isinstance(module, BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.2, 0.6)  # small, so that a deep network does not amplify its own rounding
        norm.bias.uniform_(-0.2, 0.2)
        norm.momentum = 1.0
    if norms:
        with fastarch.reference():
            network(images)
    for norm in norms:
        norm.momentum = 0.1


def on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return factory()


def sharing(factory: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """A network with these very tensors as parameters and buffers, in evaluation, and without dropout in training."""
    network = on_meta(factory)
    network.load_state_dict(state, assign=True)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network.eval()


def copied(network: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The state of a network, which training may change."""
    return {
        key: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) for key, t in network.state_dict().items()
    }


def gradients(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of its square for every parameter that it depends on."""
    parameters = {key.removeprefix("_orig_mod."): p for key, p in network.named_parameters()}  # of torch.compile
    outputs = network(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(output.square().sum() for output in outputs)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)  # auxiliary heads in evaluation
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)} | dict(zip(parameters, grads))
    return {key: t for key, t in results.items() if t is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Equal keys, and values whose difference has at most `tolerance` times their norm.

    And a bit: a bias before batch norm has no gradient in training, what is computed for it is all rounding.
    """
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key] - want[key]).norm() <= tolerance * (want[key].norm() + 1e-3), key


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_has_published_keys(name):
    state = on_meta(getattr(models, name)).state_dict()
    count, keys = PUBLISHED[name]
    assert len(state) == count
    assert set(keys.split()) <= state.keys()


def test_classes_are_an_argument(name):
    with FakeTensorMode():
        images = torch.empty(SHAPES.get(name, DEFAULT))
        assert getattr(models, name)(classes=7).eval()(images).shape[:2] == (len(images), 7)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("alexnet", 63),
        ("densenet121", 29),
        ("googlenet", 15),
        ("unet", 16),
        ("vgg11", 32),
        ("vgg19", 32),
        ("vgg11_bn", 32),
    ],
)
def test_smallest_image(name, side):
    with FakeTensorMode():
        network = getattr(models, name)().eval()
        channels = SHAPES.get(name, DEFAULT)[1]
        assert network(torch.empty(2, channels, side, side)).shape[0] == 2
        with pytest.raises((ValueError, RuntimeError), match=r"want something to compute|[Oo]utput size"):
            network(torch.empty(2, channels, side - 1, side))


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
def test_kernels_serve_every_fused_layer(network, images):
    calls = fastarch.explain(network, images, timed=False)
    kinds = (ConvReLUPool2d, BatchNorm2d, GRU, MultiheadAttention)
    followed = isinstance(network, DenseNet)  # its convolutions have no batch norm behind them, to be one call with
    fused = [
        n
        for n, m in network.named_modules()
        if isinstance(m, kinds) or (followed and type(m) is Conv2d and has_fewer_products(m))
    ]
    assert len(calls) == len([n for n in fused if not n.startswith("aux")])  # GoogLeNet's heads are for training
    assert all(call.kernel.startswith(f"cpu-{extension.isa} ") for call in calls), calls


def test_outputs_are_as_exact_as_the_twins(output, eager, truth):
    assert_close("y", output, eager, truth)


@pytest.mark.parametrize(
    "name", [*SMALL, "alexnet", "vgg11", "densenet121", "googlenet", "resnet18", "se_resnet50", "unet"], indirect=True
)
def test_gradients_equal_the_twins(name, network, images):
    """In float64: in float32 rounding may make another element the maximum, in the twin as in ours."""
    state, images = copied(network), images.double()
    ours, twin = sharing(getattr(models, name), state), sharing(TWINS[name], state)
    want = gradients(twin, images)
    folded = any(isinstance(module, BatchNorm2d) for module in ours.modules())  # the same, but for rounding
    with fastarch.reference():
        assert_same(gradients(ours, images), want, 1e-10 if folded else 0)
    assert_same(gradients(ours, images), want, 1e-10 if folded else 1e-12)


@pytest.mark.parametrize(
    "name", ["densenet121", "googlenet", "resnet18", "resnet50", "se_resnet50", "unet", "vgg11_bn"], indirect=True
)
def test_training_equals_the_twins(name, network, images):
    """A step's outputs (auxiliary ones included), gradients and running statistics in float64, outputs in float32."""
    images = torch.cat([images, images.flip(2, 3)])
    factories = (getattr(models, name), TWINS[name])
    ours, twin = (sharing(factory, copied(network)).train() for factory in factories)
    got, want = gradients(ours, images.double()), gradients(twin, images.double())
    assert_same(got, want, 1e-9)
    buffers = ({key: t.double() for key, t in n.named_buffers()} for n in (ours, twin))
    assert_same(*buffers, 1e-12)
    with torch.no_grad():
        results = [sharing(factory, copied(network, torch.float32)).train()(images) for factory in factories]
    for i, outputs in enumerate(zip(*(t if isinstance(t, tuple) else (t,) for t in results), strict=True)):
        assert_close(f"output {i}", *outputs, want[f"output {i}"])


@pytest.mark.parametrize(
    "name", [n for n in models.__all__ if n.startswith(("vgg", "resnet", "se", "densenet"))], indirect=True
)
def test_weights_start_as_published(name, network):
    """Convolutions as He et al. 2015 have it, by outputs or (DenseNet) by inputs; VGG's linear layers by 0.01."""
    for key, parameter in network.named_parameters():
        if parameter.dim() == 4 and parameter.numel() > 1000:
            fan = parameter[0].numel() if name.startswith("densenet") else parameter[:, 0].numel()
            assert parameter.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1), key
        elif name.startswith("vgg") and parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1), key
        elif name.startswith("vgg") and not name.endswith("bn") and parameter.dim() == 1:
            assert not parameter.any(), key


def test_state_dict_round_trip(name, network, images, output):
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = sharing(getattr(models, name), torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(loaded(images), output)


def test_inference_gives_the_same_bits_again_and_changes_nothing(network, images, output):
    before = {key: t.clone() for key, t in network.named_buffers()}
    with torch.no_grad():
        assert torch.equal(network(images), output)
    assert all(torch.equal(t, before[key]) for key, t in network.named_buffers())


@pytest.mark.parametrize("name", [n for n in models.__all__ if n not in RECURRENT + TOKENS], indirect=True)
def test_channels_last_is_as_exact(name, network, images, eager, truth):
    last = {"memory_format": torch.channels_last}
    state = {key: t.contiguous(**last) if t.dim() == 4 else t for key, t in network.state_dict().items()}
    with torch.no_grad():
        got = sharing(getattr(models, name), state)(images.contiguous(**last))
    assert_close("y", got, eager, truth)


def test_an_empty_batch(network, images, output):
    assert network(images[:0]).shape == (0, *output.shape[1:])


@pytest.mark.parametrize("name", [*SMALL, *RECURRENT, "resnet18"], indirect=True)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(name, network, images, output, copied):
    # torch's own LSTM is oneDNN's, whose rounding depends on where memory begins (seen on an AVX2 EPYC)
    equal = torch.allclose if name == "lstm_classifier" else torch.equal
    other = copied(network)
    with torch.no_grad():  # as the output was made
        assert equal(other(images), output)
        for parameter in other.parameters():
            parameter.zero_()
        assert equal(network(images), output)
    assert not other(images).any()


@pytest.mark.parametrize("name", [*SMALL, "gru_classifier"], indirect=True)
def test_compiled_gives_the_same(network, images):
    torch._dynamo.reset()
    got, want = gradients(torch.compile(network, fullgraph=True), images), gradients(network, images)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")  # noqa: B023


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("variant", SHALLOW)
def test_is_one_graph(variant, training):
    """As torch.compile traces and differentiates it; the code for a whole network takes minutes to generate."""
    torch._dynamo.reset()
    network, images = SHALLOW[variant]().train(training), torch.randn(2, 3, 64, 64)
    state = {key: t.clone() for key, t in network.state_dict().items()}
    want = gradients(network, images)
    network.load_state_dict(state)
    got = gradients(torch.compile(network, fullgraph=True, backend="aot_eager"), images)
    assert_same(got, want, 1e-3)


def test_googlenet_without_auxiliary_classifiers():
    network = on_meta(lambda: models.googlenet(aux_logits=False))
    assert sum(p.numel() for p in network.parameters()) == 6_624_904
    with FakeTensorMode():
        images = torch.empty(2, 3, 64, 64)
        assert models.googlenet(aux_logits=False)(images).shape == (2, 1000)
        assert models.googlenet()(images)._fields == ("logits", "aux_logits2", "aux_logits1")


@torch.no_grad()
def test_googlenet_transforms_its_input():
    plain = models.googlenet(aux_logits=False).eval()
    transforming = models.googlenet(aux_logits=False, transform_input=True).eval()
    transforming.load_state_dict(plain.state_dict())
    images = torch.rand(DEFAULT)
    mean, deviation = (torch.tensor(t).view(3, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(transforming((images - mean) / deviation), plain(2 * images - 1))


def test_densenet_loads_the_keys_of_published_files():
    state = on_meta(models.densenet121).state_dict()
    files = {
        key.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv2", "conv.2"): state[key]
        for key in state
    }
    files = {key.replace("conv1", "conv.1"): t for key, t in files.items() if "num_batches_tracked" not in key}
    assert "features.denseblock1.denselayer1.conv.1.weight" in files
    network = on_meta(models.densenet121)
    with FakeTensorMode():
        assert network.load_state_dict(files, assign=True) == ([], [])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_can_start_as_identities(name):
    network = getattr(models, name)(zero_init_residual=True).eval()
    x = torch.rand(1, network.layer1[0].conv1.out_channels * (4 if name == "resnet50" else 1), 4, 4)
    assert torch.equal(network.layer1[1](x), x)


def test_unet_takes_any_size():
    with FakeTensorMode():
        assert models.unet().eval()(torch.empty(1, 1, 17, 39)).shape == (1, 2, 17, 39)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("activation", "pool"), [("relu", None), ("relu", "max"), ("relu", "avg"), (None, None)], ids=str
)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
def test_conv_bn_relu_pool_equals_its_parts(training, activation, pool, padding_mode, adds):
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode).double()
    norms = (BatchNorm2d(8, activation=activation), nn.BatchNorm2d(8))
    bn, plain = (layer.double().train(training) for layer in norms)
    for norm in (bn, plain):
        norm.load_state_dict({key: t.fill_(0.5) for key, t in norm.state_dict().items()})
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    pools = {None: nn.Identity(), "max": nn.MaxPool2d(3, 2, 1), "avg": nn.AvgPool2d(3, 2, 1)}
    residual = torch.randn(2, 8, 9, 9, dtype=torch.float64) if adds else None
    with routing.recording() as calls, torch.no_grad():
        got = conv_bn_relu_pool(images, conv, bn, residual, pool=pool, pool_size=3, pool_stride=2, pool_padding=1)
    y = plain(conv(images))
    y = y + residual if adds else y
    torch.testing.assert_close(got, pools[pool](y.relu() if activation else y))
    torch.testing.assert_close(bn.running_var, plain.running_var)
    in_one = not training and padding_mode == "zeros" and not (adds and pool)
    assert [call.operation for call in calls] == ["conv_relu_pool" if in_one else "batch_norm"]


@pytest.mark.parametrize("activation", ["relu", None])
def test_conv_bn_relu_pool_leaves_a_residual_to_batch_norm_where_no_kernel_adds_it(activation):
    conv, bn = nn.Conv2d(3, 8, 3, padding=1).eval(), BatchNorm2d(8, activation=activation).eval()
    images, residual = torch.randn(2, 3, 9, 9), torch.randn(2, 8, 9, 9)
    with routing.recording() as calls:
        conv_bn_relu_pool(images, conv, bn, residual).sum().backward()  # has gradients
        with torch.no_grad():
            conv_bn_relu_pool(images.bfloat16(), conv.bfloat16(), bn.bfloat16(), residual.bfloat16())
            with torch.autocast("cpu"):
                conv_bn_relu_pool(images, conv.float(), bn.float(), residual.bfloat16())
    assert [call.operation for call in calls] == ["batch_norm"] * 3


def test_conv_bn_relu_pool_refuses_what_it_would_get_wrong():
    images, conv = torch.randn(2, 3, 9, 9), nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match=r"want a BatchNorm of fastarch\.nn, got BatchNorm2d"):
        conv_bn_relu_pool(images, conv, nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="want a BatchNorm with activation 'relu' or no pool, got pool 'max'"):
        conv_bn_relu_pool(images, conv, BatchNorm2d(8), pool="max")
    with pytest.raises(ValueError, match="want pool 'max', 'avg' or None, got 'mean'"):
        conv_bn_relu_pool(images, conv, BatchNorm2d(8, activation="relu"), pool="mean")
