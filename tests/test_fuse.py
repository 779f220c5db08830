"""fuse converts layers and chains of a torch model and changes nothing else; unfuse takes all of it back."""

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from closeness import assert_all_close
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastarch
from fastarch import nn as ours

nn = torch.nn


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Layers are so small here that threads wait for each other most of the time."""
    threads(1)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Classifier(nn.Module):
    """A sequence read by a GRU, classified from its last state."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        _, h = self.gru(x)
        return self.head(self.norm(h[-1]))


class Pair(nn.Module):
    """A Transformer as a model of one input."""

    def __init__(self, **options):
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True, **options)

    def forward(self, x):
        return self.transformer(x, x.flip(1), tgt_mask=torch.full((x.shape[1],) * 2, -torch.inf).triu(1).to(x))


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            projection = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def vgg() -> nn.Module:
    features = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True)]
    features += [nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), nn.AvgPool2d(2)]
    head = [nn.Flatten(), nn.Linear(6 * 4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Sequential(*features), nn.Sequential(*head))


class Functional(nn.Module):
    """Everything as function or method: two convolutions, a sum of two norms, attention with dropout in training."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.dropout = 0.0

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2), stride=2)
        x = F.avg_pool2d(self.norms[0](self.conv2(x)).relu_(), 2, ceil_mode=True)
        x = F.relu(torch.add(self.norms[1](x), self.norms[2](x)))
        q = x.flatten(2).mT.unsqueeze(1)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, q, q, dropout_p=dropout).flatten(1)


def stem_of_another_shape() -> nn.Module:
    """A strided, dilated convolution of groups, pools with padding, one module twice."""
    relu = nn.ReLU()
    convs = [nn.Conv2d(3, 6, 3, stride=2, groups=3, padding="valid"), nn.Conv2d(6, 6, 3, dilation=2, padding="same")]
    return nn.Sequential(convs[0], relu, nn.AvgPool2d(3, 1, 1), convs[1], relu, nn.MaxPool2d(3, 2, 1), nn.Flatten())


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3, momentum=None), (2, 3, 4, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3, affine=False), (2, 3, 2, 3, 4)),
    "SyncBatchNorm": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 4, 5)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (5, 3)),
    "gru classifier": (Classifier, (4, 5, 3)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, batch_first=True), (2, 5, 8)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
        (2, 5, 8),
    ),
    "Transformer": (Pair, (2, 5, 8)),
}
CHAINS = {
    "resnet": (ResNet, (2, 3, 33, 32)),
    "vgg": (vgg, (3, 3, 8, 9)),
    "functional": (Functional, (2, 3, 9, 8)),
    "stem": (stem_of_another_shape, (2, 3, 12, 11)),
}
MODELS = LAYERS | CHAINS


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, the gradient of every parameter and of x, buffers after the pass, and what evaluation alone gives."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = {"x": x} | dict(model.named_parameters())
    grads = torch.autograd.grad((y * weights).sum() + (y * y).mean(), list(leaves.values()), allow_unused=True)
    named = {f"d{name}": g for name, g in zip(leaves, grads) if g is not None}
    with torch.no_grad():  # takes ways of its own
        evaluated = {} if model.training else {"without gradients": model(x)}
    return {"y": y.detach()} | evaluated | named | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=lambda m: f"{name}: {m}")  # noqa: B023


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model in float64 with running statistics of its own, and a fused one that shares nothing with it."""
    model = make().double()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
    return model, fastarch.fuse(copy.deepcopy(model), inplace=True)


def compared(model: nn.Module, fused: nn.Module, shape: tuple[int, ...]) -> None:
    """In training, which moves running statistics, then in evaluation."""
    for training in (True, False):
        x = double(*shape)
        assert_same(results(fused.train(training), x), results(model.train(training), x))


def became(model: nn.Module) -> set[tuple[str, str]]:
    return {(f.layer, f.what) for f in fastarch.fusions(model) if f.became}


def left(model: nn.Module) -> dict[str, str]:
    return {f.layer: f.left for f in fastarch.fusions(model) if f.left}


@pytest.mark.parametrize("name", MODELS)
def test_values_gradients_and_statistics_are_those_of_the_original(name):
    make, shape = MODELS[name]
    model, fused = twins(make)
    assert became(fused)
    compared(model, fused, shape)


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_gives_back_what_there_was(name):
    make, shape = MODELS[name]
    model, fused = twins(make)
    fused(double(*shape))
    model.load_state_dict(fused.state_dict())
    assert fastarch.unfuse(fused) is fused
    assert len([*fused.modules()]) == len([*model.modules()])
    for (path, module), twin in zip(fused.named_modules(), model.modules()):
        assert type(module) is type(twin), path
        assert module.__dict__.keys() == twin.__dict__.keys(), path
    for training in (True, False):
        x = double(*shape)
        got, want = (results(m.train(training), x) for m in (fused, model))
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_names_are_the_same(name, inplace):
    model = MODELS[name][0]()
    model.eval()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys, paths = list(model.state_dict()), [path for path, _ in model.named_modules()]
    classes = [type(m) for m in model.modules()]
    fused = fastarch.fuse(model, inplace=inplace)
    after = {**dict(fused.named_parameters()), **dict(fused.named_buffers())}
    assert (fused is model) == inplace
    assert after.keys() == before.keys()
    assert all(after[k] is before[k] for k in before)
    assert list(fused.state_dict()) == keys
    assert [path for path, _ in fused.named_modules()] == paths
    assert not any(m.training for m in fused.modules())
    if not inplace:
        assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_fused_and_can_be_unfused(name, how):
    make, shape = MODELS[name]
    model, fused = twins(make)
    fused.eval(), model.eval()
    twin = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
    x = double(*shape)
    assert torch.equal(twin(x), fused(x))
    assert [type(m).__mro__[1:] for m in twin.modules()] == [type(m).__mro__[1:] for m in fused.modules()]
    with torch.no_grad():
        next(fused.parameters(), torch.zeros(1)).add_(1)  # which the copy must not see
    assert torch.equal(fastarch.unfuse(twin)(x), model(x))
    assert [vars(m).keys() for m in twin.modules()] == [vars(m).keys() for m in model.modules()]


def test_sync_batch_norm_runs_on_cpus():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    fused = fastarch.fuse(model)
    assert type(fused[0]) is ours.SyncBatchNorm
    assert fused(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert type(fastarch.unfuse(fused)[0]) is nn.SyncBatchNorm


def test_training_gives_the_same_loss_curve():
    model, fused = twins(Classifier)
    x, labels = double(16, 5, 3), torch.randint(4, (16,))
    assert losses(fused, x, labels) == pytest.approx(losses(model, x, labels), rel=1e-9)


def losses(model: nn.Module, x: Tensor, labels: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    curve = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


class Shifted(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


def replaced_forward() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda x: x
    return norm


LEFT = {
    "a subclass": (lambda: Shifted(3), "Shifted is another class than BatchNorm2d"),
    "a forward of its own": (replaced_forward, "its forward was replaced"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.GRU(3, 4), "weight_ih_l0"), "its weight_ih_l0 is computed"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.GRUCell(3, 4), "weight_hh"), "ParametrizedGRUCell"),
    "lazy": (nn.LazyBatchNorm2d, "LazyBatchNorm2d is another class"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_shared_with_a_copy():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    fused, x = fastarch.fuse(model), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        model[0].weight_g.mul_(2)
    assert torch.equal(fused(x), model(x))
    assert not became(fused)


def test_a_layer_that_was_parametrized_since_stays_so():
    fused = fastarch.fuse(nn.Sequential(nn.GRUCell(3, 4), nn.BatchNorm1d(4)))
    parametrizations.weight_norm(fused[0], "weight_hh")
    x = torch.randn(2, 3)
    want = fused(x)
    assert isinstance(fastarch.unfuse(fused)[0], ours.GRUCell)
    assert type(fused[1]) is nn.BatchNorm1d
    torch.testing.assert_close(fused(x), want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_float32_is_as_exact_as_torch(training, layout):
    """By the rule of all tests: at most twice eager's error, of the output and of all gradients."""
    truth, _ = twins(ResNet)
    model = copy.deepcopy(truth).float().to(memory_format=layout)
    fused = fastarch.fuse(copy.deepcopy(model))
    x = torch.randn(8, 3, 33, 32).to(memory_format=layout)
    got, eager, exact = (
        {k: v for k, v in results(m.train(training), x.to(m.fc.weight.dtype)).items() if k[0] in "yd"}
        for m in (fused, model, truth)
    )
    assert_all_close(got, eager, exact)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    model, fused = twins(ResNet)
    model, fused = (m.float().train(training) for m in (model, fused))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (m(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)) for m in (fused, model))
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_is_left_with_the_reason(name):
    make, reason = LEFT[name]
    module = make()
    layer = type(module)
    fused = fastarch.fuse(nn.Sequential(module), inplace=True)
    assert type(fused[0]) is layer
    assert reason in left(fused)["0"]
    assert reason.split()[0] in str(fastarch.fusions(fused))


def test_what_torch_may_run_on_nested_tensors_is_left_as_a_whole():
    class Encoder(nn.TransformerEncoder):
        pass

    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = Encoder(layer, 2).eval()
    fused = fastarch.fuse(model)
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    with torch.no_grad():
        assert torch.equal(fused(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding))
    assert not became(fused)
    assert "nested" in left(fused)["layers.1.self_attn"]


def test_hooks_still_fire():
    seen = []
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    fused = fastarch.fuse(model)
    fused(torch.randn(4, 3))
    assert len(seen) == 1


def test_fused_twice_is_fused_once():
    model, fused = twins(Classifier)
    again = fastarch.fuse(fused)
    assert became(again) == became(fused)
    assert [type(m) for m in fastarch.unfuse(again).modules()] == [type(m) for m in model.modules()]


def test_our_own_layers_stay_ours():
    model = fastarch.unfuse(fastarch.fuse(nn.Sequential(ours.BatchNorm2d(3, activation="relu"))))
    assert type(model[0]) is ours.BatchNorm2d
    assert model[0].activation == "relu"


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"fuse: want a torch.nn.Module, got function"):
        fastarch.fuse(F.relu)
    with pytest.raises(ValueError, match=r"fusions: want a model that fastarch.fuse returned, got Linear"):
        fastarch.fusions(nn.Linear(1, 1))


CHAINS_FOUND = {
    "resnet": {
        ("(model)", "conv1 -> bn1 -> relu -> maxpool"),
        ("layer1.0", "conv1 -> bn1 -> relu"),
        ("layer2.0", "conv2 -> bn2 -> iadd -> relu"),
    },
    "vgg": {("0", "0 -> 1"), ("0", "2 -> 3 -> 4"), ("0", "5 -> 6 -> 7 -> 8"), ("1", "2 -> 3")},
    "functional": {
        ("(model)", "conv1 -> relu -> max_pool2d"),
        ("(model)", "conv2 -> norms.0 -> relu_ -> avg_pool2d"),
        ("(model)", "norms.2 -> add -> relu_1"),
        ("(model)", "scaled_dot_product_attention"),
    },
    "stem": {("(model)", "0 -> 1 -> 2"), ("(model)", "3 -> 1 -> 5")},
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_found(name):
    assert CHAINS_FOUND[name] <= became(fastarch.fuse(CHAINS[name][0]()))


@pytest.mark.parametrize("training", [True, False])
def test_our_kernels_serve_chains(training):
    fused = fastarch.fuse(ResNet()).train(training)
    calls = [(call.layer, call.operation) for call in fastarch.explain(fused, torch.randn(2, 3, 32, 32))]
    stem = [("(model)", "batch_norm" if training else "conv_relu_pool")]
    block = [("layer1.0", "batch_norm" if training else "conv_relu_pool")] * 2
    assert calls[:3] == stem + block
    assert len(calls) == 10 + 3 * training  # in training convolutions of 8 channels and more by themselves
    with torch.no_grad():
        calls = fastarch.explain(fused.eval(), torch.randn(2, 3, 32, 32))
    assert [call.operation for call in calls] == ["conv_relu_pool"] * 10  # the projection too


@pytest.mark.parametrize("name", CHAINS)
def test_losses_of_a_chain_are_the_same(name):
    make, shape = CHAINS[name]
    model, fused = twins(make)
    x, labels = double(*shape), torch.randint(4, shape[:1])
    assert losses(fused, x, labels) == pytest.approx(losses(model, x, labels), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "shape", "training"),
    [(ResNet, (2, 3, 16, 16), True), (ResNet, (2, 3, 16, 16), False), (Classifier, (4, 5, 3), False)],
)
def test_compiled_and_exported(make, shape, training):
    fused = fastarch.fuse(make()).train(training)
    x = torch.randn(shape)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(copy.deepcopy(fused), (x,)).module()
    want = fused(x)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(exported(x), want)


def test_hooks_on_a_chain_see_what_they_saw():
    """Whether they were there before or come later."""
    seen = []
    hook = lambda module, args, output: seen.append(output.detach().clone())  # noqa: E731
    model, fused = twins(vgg)
    for m in (model, fused):
        m[0][1].register_forward_hook(hook)
        m[0][4].register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0].clone()))
    again = fastarch.fuse(fused)  # a deepcopy takes hooks along
    x = double(3, 3, 8, 9)
    for m in (model, fused, again):
        m(x).sum().backward()
    want = seen[:2]
    assert len(seen) == 6
    for got in (seen[2:4], seen[4:]):
        torch.testing.assert_close(got, want)
    assert left(again)["0.1"] == left(again)["0.4"] == "it has a hook: no chain goes through it"


def test_what_is_changed_after_fusing_counts():
    model, fused = twins(vgg)
    for m in (model, fused):
        m[0][3] = nn.GELU()
        m[0].append(nn.Sigmoid())
        m[1][2].eval()
        del m[1][0:1]
        m[1].insert(0, nn.Flatten())
    compared(model, fused, (3, 3, 8, 9))


class Changing(nn.Module):
    """Reads an attribute and a keyword argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 2.0

    def forward(self, x, residual=None, *, shift=0.0):
        x = self.norm(self.conv(x)) * self.scale
        x = F.relu(self.norm(x)) + shift
        return x if residual is None else x + residual


def test_attributes_and_arguments_are_not_baked_in():
    model, fused = twins(Changing)
    assert became(fused) >= {("(model)", "norm -> relu")}
    x, y = double(2, 3, 4, 4), double(2, 3, 4, 4)
    for scale in (2.0, 3.0, torch.tensor(4.0)):
        model.scale = fused.scale = scale
        for arguments, options in [((x,), {}), ((x, y), {}), ((x,), {"shift": 2.0}), ((), {"x": x, "residual": y})]:
            torch.testing.assert_close(fused(*arguments, **options), model(*arguments, **options))


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    images = {"image_size": 16, "patch_size": 4}
    resnet = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
    models = [
        (transformers.ResNetModel(resnet), double(2, 3, 32, 32)),
        (transformers.ViTModel(transformers.ViTConfig(**small, **images)), double(2, 3, 16, 16)),
        (transformers.BertModel(transformers.BertConfig(vocab_size=30, **small)), torch.randint(30, (2, 7))),
    ]
    for model, x in models:
        model.double().eval()
        fused = fastarch.fuse(model)
        torch.testing.assert_close(fused(x)[0], model(x)[0])
        assert list(fused.state_dict()) == list(model.state_dict())
        if x.shape[-1] == 32:
            assert ("embedder.embedder", "convolution -> normalization -> activation") in became(fused)


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 4, 8, 8), torch.randn(2, 3, 1, 1), torch.randn(8, 8), torch.ones(2, 3, 8, 8, dtype=torch.long)],
    ids=["channels", "too small", "dimensions", "dtype"],
)
@pytest.mark.parametrize("training", [True, False])
def test_errors_are_those_of_torch(training, x):
    model = vgg().train(training)
    with pytest.raises(Exception) as wanted:
        model(x)
    with pytest.raises(wanted.type) as got:
        fastarch.fuse(model)(x)
    assert str(got.value) == str(wanted.value)


def test_attention_takes_what_torch_takes():
    class Attention(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k)

    model = Attention()
    fused = fastarch.fuse(model)
    for shape in [(2, 3, 4, 5), (3, 4, 5), (2, 2, 3, 4, 5)]:
        q, k = double(*shape), double(*shape)
        torch.testing.assert_close(fused(q, k), model(q, k))
    assert [call.operation for call in fastarch.explain(fused, double(2, 3, 4, 5), double(2, 3, 4, 5))] == [
        "scaled_dot_product_attention"
    ]


def test_a_pickle_is_loaded_by_another_process(tmp_path):
    fused, x = fastarch.fuse(vgg()).eval(), torch.randn(3, 3, 8, 9)
    with torch.no_grad():
        torch.save((fused, x, fused(x)), tmp_path / "fused.pt")
    code = """
import sys, torch
torch.set_num_threads(1)
fused, x, want = torch.load(sys.argv[1], weights_only=False)
import fastarch
assert type(fused[0]).__mro__[1].__module__ == "fastarch.fusion.programs"
with torch.no_grad():
    assert torch.equal(fused(x), want)
    torch.testing.assert_close(fastarch.unfuse(fused)(x), want)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "fused.pt"], check=True)


def test_the_signature_is_kept_and_torch_fx_sees_what_the_user_wrote():
    model = ResNet()
    fused = fastarch.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert inspect.signature(fastarch.fuse(model).forward) == inspect.signature(model.forward)
    assert [node.op for node in torch.fx.symbolic_trace(fused).graph.nodes] == [
        *("placeholder", "call_module", "call_module", "output")
    ]


def test_derivatives_of_second_order_and_transforms():
    model, fused = twins(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)))
    model.eval(), fused.eval()
    x = double(2, 3, 8, 8).requires_grad_()
    first = [torch.autograd.grad((m(x) ** 3).sum(), x, create_graph=True)[0] for m in (fused, model)]
    second = [torch.autograd.grad(gradient.square().sum(), x)[0] for gradient in first]
    torch.testing.assert_close(*second)
    got, want = (torch.func.vmap(m)(x.detach().unsqueeze(1)) for m in (fused, model))
    torch.testing.assert_close(got, want)
