"""The layers of batch_norm stand for torch.nn's, and fold_batch_norm for a BatchNorm behind a convolution."""

import copy
import inspect
import pickle

import pytest
import torch
from closeness import assert_close

from fastarch import nn, routing

C = 6
SIZES = {"BatchNorm1d": (5, C, 9), "BatchNorm2d": (3, C, 5, 7), "BatchNorm3d": (2, C, 3, 4, 5), "SyncBatchNorm": (4, C)}
KINDS = [*SIZES]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 0.3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
    {"bias": False},
]


def named(name: str):
    return lambda message: f"{name}: {message}"


def built(library, kind: str, **options) -> torch.nn.Module:
    """A layer, without a bias as torch makes one so: by its argument, or in torch 2.11, which has none, afterwards."""
    layer = getattr(library, kind)
    if options.get("bias", True) or "bias" in inspect.signature(torch.nn.BatchNorm1d).parameters:
        return layer(C, **options)
    layer = layer(C, **{name: value for name, value in options.items() if name != "bias"})
    layer.register_parameter("bias", None)
    return layer


def twins(kind: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our layer and torch's, with the same parameters, none of them 1 or 0."""
    layer, twin = built(nn, kind, **options), built(torch.nn, kind, **options)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter)
    if twin.track_running_stats:
        torch.nn.init.normal_(twin.running_mean)
        torch.nn.init.uniform_(twin.running_var, 0.5, 2)
    layer.load_state_dict(twin.state_dict())
    return layer, twin


def assert_same_state(got: torch.nn.Module, want: torch.nn.Module) -> None:
    got, want = got.state_dict(), want.state_dict()
    assert [*got] == [*want]
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=named(name))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_statistics_equal_those_of_torch(kind, options):
    layer, twin = twins(kind, dtype=torch.float64, **options)
    for training in (True, True, False, True, False):
        layer.train(training), twin.train(training)
        x = 2 * torch.randn(SIZES[kind], dtype=torch.float64) + 1
        results = []
        for module in (layer, twin):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [leaf, *module.parameters()])])
        for name, got, want in zip(["y", "dx", *(name for name, _ in twin.named_parameters())], *results):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=named(name))
        assert_same_state(layer, twin)
    if twin.track_running_stats:
        assert layer.num_batches_tracked.item() == 3


def test_inputs_of_two_dimensions():
    layer, twin = twins("BatchNorm1d")
    x = torch.randn(7, C)
    torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "input"])
def test_every_precision(dtype, mixed):
    """All of the layer in 16 bits, or the input alone."""
    layer, twin = twins("BatchNorm2d", dtype=torch.float32 if mixed else dtype)
    exact = copy.deepcopy(twin).double()
    x = torch.randn(SIZES["BatchNorm2d"]).to(dtype)
    assert_close("y", layer(x), twin(x), exact(x.double()))
    for name, got in layer.named_buffers():
        if name != "num_batches_tracked":
            assert_close(name, got, twin.state_dict()[name], exact.state_dict()[name])


def test_the_average_of_all_batches_is_as_precise_as_its_dtype():
    """1 / 3 in float32 would be off by 1e-8."""
    layer = nn.BatchNorm1d(C, momentum=None, dtype=torch.float64)
    batches = torch.randn(3, 50, C, dtype=torch.float64)
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(layer.running_var, batches.var(1).mean(0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_and_residual(kind):
    layer, twin = twins(kind, dtype=torch.float64)
    x, residual = torch.randn(2, *SIZES[kind], dtype=torch.float64)
    for training in (True, False):
        layer.train(training), twin.train(training)
        layer.activation = "relu"
        torch.testing.assert_close(layer(x, residual), (twin(x) + residual).relu())
        torch.testing.assert_close(layer(x), twin(x).relu())
        layer.activation = None
        torch.testing.assert_close(layer(x, residual=residual), twin(x) + residual)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_of_the_operation_serves_a_layer(kind):
    x = torch.randn(SIZES[kind])
    with routing.recording() as calls:
        getattr(nn, kind)(C, activation="relu")(x, x)
    assert [call.operation for call in calls] == ["batch_norm"]


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_load_both_ways(kind):
    layer, twin = twins(kind)
    with torch.no_grad():
        layer(torch.randn(SIZES[kind]))
    other = getattr(torch.nn, kind)(C)
    other.load_state_dict(layer.state_dict())
    assert_same_state(layer, other)
    assert layer.state_dict()._metadata == twin.state_dict()._metadata


def test_a_state_dict_from_before_num_batches_tracked_loads():
    layer, twin = twins("BatchNorm2d")
    state = twin.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer.load_state_dict(state)
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype_are_arguments(kind):
    got = getattr(nn, kind)(C, device="meta", dtype=torch.bfloat16).state_dict()
    want = getattr(torch.nn, kind)(C, device="meta", dtype=torch.bfloat16).state_dict()
    assert {n: (t.device.type, t.dtype) for n, t in got.items()} == {
        n: (t.device.type, t.dtype) for n, t in want.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_positional_arguments_are_those_of_torch(kind):
    arguments = (C, 0.25, 0.5, False, True)
    arguments += (None, "meta", torch.float16) if kind == "SyncBatchNorm" else ("meta", torch.float16)
    layer, twin = getattr(nn, kind)(*arguments), getattr(torch.nn, kind)(*arguments)
    assert repr(layer) == repr(twin)
    assert layer.running_mean.dtype == torch.float16
    assert layer.running_mean.device.type == "meta"


def test_repr_shows_the_activation():
    assert repr(nn.BatchNorm2d(C)) == repr(torch.nn.BatchNorm2d(C))
    assert repr(nn.BatchNorm2d(C, activation="relu")).endswith(", activation='relu')")


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_batch_norm_of_torch(kind):
    """So that whatever looks for batch normalization finds it: weight decay, update_bn, converters."""
    layer = getattr(nn, kind)(C)
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    if kind != "SyncBatchNorm":  # which DistributedDataParallel refuses on CPUs
        assert isinstance(layer, getattr(torch.nn, kind))


def test_averaged_statistics_of_swa():
    """torch.optim.swa_utils.update_bn finds the layer, resets it and averages over a loader."""
    model = torch.nn.Sequential(nn.BatchNorm1d(C))
    batches = torch.randn(4, 20, C)
    model(batches[0] + 7)
    torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(model[0].running_mean, batches.mean((0, 1)))
    assert model[0].momentum == 0.1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind, copied):
    layer = twins(kind)[0].eval()
    layer.activation = "relu"
    x = torch.randn(SIZES[kind])
    other, before = copied(layer), layer(x)
    assert repr(other) == repr(layer)
    assert torch.equal(other(x), before)
    other.train()(x)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_torch_refuses_get_an_error_of_the_same_class(kind):
    layer, twin = twins(kind)
    rank = len(SIZES[kind])
    bad = [torch.randn((C,) * r) for r in range(1, 7)] + [torch.randn(1, C, *(1 for _ in range(rank - 2)))]
    bad += [torch.randn(4, 0, *(3 for _ in range(rank - 2)))] if kind == "SyncBatchNorm" else []
    refused = 0
    for x in bad:
        try:
            twin(x)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError):
                layer(x)
        else:
            layer(x)
    assert refused >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_torch_refuses_get_an_error_of_the_same_class(kind):
    for options in ({"eps": 0.0}, {"eps": -1.0}):
        for layer in twins(kind, **options):
            with pytest.raises(ValueError, match=r"batch_norm.* eps .*got "):
                layer(torch.randn(SIZES[kind]))
    for module in (nn, torch.nn):
        with pytest.raises(TypeError):
            getattr(module, kind)(C, nonsense=1)


BAD = [
    (ValueError, rf"^batch_norm: want running_mean \[{C - 1}\] for input", {}, (4, C - 1, 3, 3), torch.float32),
    (ValueError, r"^batch_norm: want activation None or 'relu', got 'tanh'", {"activation": "tanh"}, None, None),
    (
        TypeError,
        r"^batch_norm: input is torch.float32 on cpu, .* is torch.float64",
        {"dtype": torch.float64},
        None,
        None,
    ),
    (TypeError, r"^batch_norm: input is torch.float32 on cpu, .* on meta", {"device": "meta"}, None, None),
    (TypeError, r"^batch_norm: want input as a floating tensor, got torch.int64", {}, None, torch.int64),
]


@pytest.mark.parametrize(
    ("error", "message", "options", "shape", "dtype"), BAD, ids=[message for _, message, *_ in BAD]
)
def test_errors_name_the_operation(error, message, options, shape, dtype):
    layer = nn.BatchNorm2d(C, **options)
    with pytest.raises(error, match=message):
        layer(torch.zeros(shape or SIZES["BatchNorm2d"], dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_stays_channels_last(kind):
    layer, twin = twins(kind)
    x = torch.randn(SIZES[kind]).movedim(1, -1).contiguous().movedim(-1, 1)
    y = layer(x)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, twin(x))


def test_convert_sync_batchnorm():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(C, activation="relu", momentum=None, eps=0.01)
            self.plain = torch.nn.BatchNorm3d(C, affine=False, track_running_stats=False)

    model = torch.nn.Sequential(nn.Conv2d(3, C, 3), Block(), built(nn, "BatchNorm1d", bias=False).eval()).double()
    before = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    want = copy.deepcopy(model[1].norm)(model[0](x))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model, "a group")
    assert converted is model
    layers = [model[1].norm, model[1].plain, model[2]]
    assert all(type(layer) is nn.SyncBatchNorm and layer.process_group == "a group" for layer in layers)
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == before
    assert [layer.activation for layer in layers] == ["relu", None, None]
    assert [layer.training for layer in layers] == [True, True, False]
    assert layers[0].momentum is None
    assert layers[0].eps == 0.01
    torch.testing.assert_close(layers[0](model[0](x)), want)
    alone = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(C))
    assert type(alone) is nn.SyncBatchNorm


def test_sync_batch_norm_without_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert nn.SyncBatchNorm(C)(torch.randn(4, C)).shape == (4, C)


FOLDABLE = {
    "Conv1d": (lambda **o: nn.Conv1d(4, C, 3, **o), "BatchNorm1d", (3, 4, 11)),
    "Conv2d": (lambda **o: nn.Conv2d(4, C, (3, 2), stride=2, padding=1, **o), "BatchNorm2d", (3, 4, 9, 8)),
    "Conv2d_groups": (lambda **o: nn.Conv2d(4, C, 3, groups=2, **o), "BatchNorm2d", (3, 4, 9, 8)),
    "Conv2d_reflect": (
        lambda **o: nn.Conv2d(4, C, 3, padding=1, padding_mode="reflect", **o),
        "BatchNorm2d",
        (2, 4, 5, 5),
    ),
    "Conv3d": (lambda **o: nn.Conv3d(4, C, 2, dilation=2, **o), "BatchNorm3d", (2, 4, 5, 6, 5)),
    "Linear": (lambda **o: nn.Linear(4, C, **o), "BatchNorm1d", (7, 4)),
}


def folded(conv: torch.nn.Module, bn: torch.nn.Module) -> torch.nn.Module:
    """The convolution with bn in it."""
    conv = copy.deepcopy(conv)
    conv.weight, conv.bias = (torch.nn.Parameter(t.detach()) for t in nn.fold_batch_norm(conv, bn))
    return conv


@pytest.mark.parametrize("library", [nn, torch.nn], ids=["ours", "torchs"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", FOLDABLE)
def test_fold(kind, bias, options, library):
    build, norm, shape = FOLDABLE[kind]
    conv = build(bias=bias, dtype=torch.float64)
    bn = built(library, norm, dtype=torch.float64, **options).eval()
    bn.load_state_dict(twins(norm, **options)[1].state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    exact = bn(conv(x))
    largest = exact.abs().max().item()
    torch.testing.assert_close(folded(conv, bn)(x), exact, rtol=0, atol=1e-14 * largest)

    exact = [copy.deepcopy(layer) for layer in (conv, bn)]
    conv, bn = conv.float(), bn.float()
    for one, other in zip(exact, (conv, bn)):
        one.load_state_dict(other.state_dict())  # rounded, as theirs
    draws = torch.randn(10, *shape)
    through = [torch.stack([f(x) for x in draws]) for f in (folded(conv, bn), lambda x: bn(conv(x)))]
    assert_close("y", *through, torch.stack([exact[1](exact[0](x.double())) for x in draws]))


def test_fold_is_differentiable_by_every_parameter():
    conv, bn = nn.Conv2d(4, C, 3, dtype=torch.float64), twins("BatchNorm2d", dtype=torch.float64)[0].eval()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    parameters = [*conv.parameters(), *bn.parameters()]
    weight, bias = nn.fold_batch_norm(conv, bn)
    got = torch.autograd.grad(torch.nn.functional.conv2d(x, weight, bias).pow(3).sum(), parameters)
    want = torch.autograd.grad(bn(conv(x)).pow(3).sum(), parameters)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_fold_rounds_16_bits_once():
    conv, bn = nn.Conv2d(4, C, 3, dtype=torch.bfloat16), twins("BatchNorm2d", dtype=torch.bfloat16)[0].eval()
    wide = nn.fold_batch_norm(copy.deepcopy(conv).float(), copy.deepcopy(bn).float())
    for got, want in zip(nn.fold_batch_norm(conv, bn), wide):
        assert torch.equal(got, want.bfloat16())


def test_fold_takes_parametrized_convolutions():
    conv, bn = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, C, 3)), twins("BatchNorm2d")[0].eval()
    x = torch.randn(3, 4, 9, 8)
    weight, bias = nn.fold_batch_norm(conv, bn)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, weight, bias), bn(conv(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "conv", "bn"),
    [
        (TypeError, "Linear, got ConvTranspose2d", nn.ConvTranspose2d(C, C, 3), nn.BatchNorm2d(C)),
        (TypeError, "Linear, got ConvReLUPool2d", nn.ConvReLUPool2d(4, C, 3, pool=None), nn.BatchNorm2d(C)),
        (TypeError, "want a BatchNorm, got LayerNorm", nn.Conv2d(4, C, 3), nn.LayerNorm(C)),
        (ValueError, "running statistics", nn.Conv2d(4, C, 3), nn.BatchNorm2d(C, track_running_stats=False)),
        (ValueError, "without activation, got 'relu'", nn.Conv2d(4, C, 3), nn.BatchNorm2d(C, activation="relu")),
        (ValueError, "want a BatchNorm of 6 features, got 4", nn.Conv2d(4, C, 3), nn.BatchNorm2d(4)),
    ],
    ids=str,
)
def test_fold_refuses_what_is_not_linear_or_does_not_fit(error, message, conv, bn):
    with pytest.raises(error, match=f"^fold_batch_norm: .*{message}"):
        nn.fold_batch_norm(conv, bn)
