"""fastarch.nn: the fused layers stand for layers of torch.nn, and every other name is torch.nn's."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch

from fastarch import nn, ops, routing

N, SIZES = 3, {1: (29,), 2: (17, 14)}


class Options(NamedTuple):
    """Of a convolution with 6 channels in and 8 out, and of its pool."""

    convolution: dict
    pool: dict

    def __str__(self) -> str:
        return "-".join(f"{key}_{value}" for key, value in (self.convolution | self.pool).items())


OPTIONS = [
    Options({}, {}),
    Options({"bias": False, "stride": 2, "padding": 1}, {}),
    Options({"dilation": 2, "padding": 3}, {"pool": "avg"}),
    Options({"groups": 2, "kernel_size": 5}, {"pool": None}),
    Options({"padding": "valid"}, {"pool_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True}),
    Options({"padding": "same", "kernel_size": 4, "dilation": 2}, {"pool": None}),
    Options({"padding": "same"}, {"pool": "avg", "pool_size": 3, "pool_stride": 1, "pool_padding": 1}),
    Options({"padding": 2, "padding_mode": "zeros"}, {"pool": "avg", "ceil_mode": True}),
    Options({"padding": 2, "padding_mode": "reflect"}, {}),
    Options({"padding": 2, "padding_mode": "replicate", "stride": 2}, {"pool": None}),
    Options({"padding": 1, "padding_mode": "circular"}, {"pool": "avg"}),
    Options({"padding": "same", "padding_mode": "circular", "kernel_size": 4}, {"pool_stride": 1}),
    Options({"padding": "valid", "padding_mode": "reflect"}, {"pool": "max"}),
]


def fused(dimensions: int, *args, **options) -> nn.Module:
    return getattr(nn, f"ConvReLUPool{dimensions}d")(*args, **options)


def sequential(dimensions: int, convolution: dict, pool: dict) -> nn.Sequential:
    """The layers of torch.nn that a fused layer stands for."""
    torch_nn = {name: getattr(torch.nn, f"{name}{dimensions}d") for name in ("Conv", "MaxPool", "AvgPool")}
    layers = [torch_nn["Conv"](6, 8, **{"kernel_size": 3, "dtype": torch.float64} | convolution), nn.ReLU()]
    kind = pool.get("pool", "max")
    if kind is not None:
        sizes = [pool.get("pool_size", 2), pool.get("pool_stride"), pool.get("pool_padding", 0)]
        layers.append(torch_nn[f"{kind.capitalize()}Pool"](*sizes, ceil_mode=pool.get("ceil_mode", False)))
    return nn.Sequential(*layers)


def gradients(layer: nn.Module, input: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of its square."""
    input = input.detach().requires_grad_()
    output = layer(input)
    wanted = {"input": input} | {name.split(".")[-1]: p for name, p in layer.named_parameters()}
    return {"output": output} | dict(zip(wanted, torch.autograd.grad(output.square().sum(), list(wanted.values()))))


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_values_and_gradients_equal_those_of_the_sequence(dimensions, options, batched):
    twin = sequential(dimensions, *options)
    layer = fused(dimensions, 6, 8, **{"kernel_size": 3, "dtype": torch.float64} | options.convolution, **options.pool)
    layer.load_state_dict(twin[0].state_dict())
    input = torch.randn(*([N] if batched else []), 6, *SIZES[dimensions], dtype=torch.float64)
    got, want = gradients(layer, input), gradients(twin, input)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("dimensions", [1, 2])
def test_sizes_may_be_tuples(dimensions):
    input = torch.randn(N, 6, *SIZES[dimensions])
    sizes = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}
    pool = {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}
    layer = fused(dimensions, 6, 8, **sizes, **pool)
    twin = fused(dimensions, 6, 8, **{key: (value,) * dimensions for key, value in (sizes | pool).items()})
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(input), layer(input))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_seed_gives_the_convolutions_initial_values(dimensions, bias):
    states = []
    for build in (fused, lambda d, *args, **options: getattr(torch.nn, f"Conv{d}d")(*args, **options)):
        torch.manual_seed(3)
        states.append(build(dimensions, 6, 8, 3, groups=2, bias=bias).state_dict())
    assert states[0].keys() == states[1].keys() == ({"weight", "bias"} if bias else {"weight"})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.parametrize("dimensions", [1, 2])
def test_device_and_dtype_are_arguments(dimensions):
    layer = fused(dimensions, 6, 8, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("dimensions", [1, 2])
def test_runs_on_meta(dimensions):
    layer = fused(dimensions, 6, 8, 3, padding=1, device="meta")
    output = layer(torch.empty(N, 6, *SIZES[dimensions], device="meta"))
    assert output.shape == (N, 8, *(size // 2 for size in SIZES[dimensions]))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_channels_last_stays_channels_last(dimensions):
    layer = fused(dimensions, 6, 8, 3)
    input = torch.randn(N, 6, *SIZES[dimensions])
    output = layer(input.movedim(1, -1).contiguous().movedim(-1, 1))
    assert output.movedim(1, -1).is_contiguous()
    torch.testing.assert_close(output, layer(input))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_is_a_convolution_of_torch(dimensions):
    """So that whatever initialises, prunes or counts convolutions finds it."""
    assert isinstance(fused(dimensions, 6, 8, 3), getattr(torch.nn, f"Conv{dimensions}d"))


def test_repr_shows_the_pool():
    convolution = "3, 8, kernel_size=(3, 3), stride=(1, 1), padding=same"
    pool = "pool='avg', pool_size=2, pool_stride=None, pool_padding=0, ceil_mode=False"
    layers = [nn.ConvReLUPool2d(3, 8, 3, padding="same", pool=pool) for pool in ("avg", None)]
    assert repr(layers[0]) == f"ConvReLUPool2d({convolution}, {pool})"
    assert repr(layers[1]) == f"ConvReLUPool2d({convolution}, pool=None)"
    assert repr(nn.ConvReLUPool1d(3, 8, 3, pool=None)) == (
        "ConvReLUPool1d(3, 8, kernel_size=(3,), stride=(1,), pool=None)"
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_copies_are_equal_and_independent(dimensions, copied):
    layer = fused(dimensions, 6, 8, 3, padding=1, padding_mode="reflect", pool="avg", pool_size=3, pool_stride=2)
    input = torch.randn(N, 6, *SIZES[dimensions])
    other, before = copied(layer), layer(input)
    assert repr(other) == repr(layer)
    assert torch.equal(other(input), before)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(input), before)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_one_call_of_the_operation_serves_a_layer(dimensions):
    with routing.recording() as calls:
        fused(dimensions, 6, 8, 3)(torch.randn(N, 6, *SIZES[dimensions]))
    assert [call.operation for call in calls] == ["conv_relu_pool"]


BAD = [
    (ValueError, "want pool 'max', 'avg' or None, got 'min'", {"pool": "min"}),
    (ValueError, "want pool_size as one or two integers >= 1, got", {"pool_size": 0}),
    (ValueError, "want pool_stride as one or two integers >= 1, got", {"pool_stride": 0}),
    (ValueError, r"want pool_padding of at most half of pool_size \(\d, 2\), got", {"pool_padding": 2}),
    (ValueError, "want something to compute, got a convolution of", {"pool_size": 99}),
    (ValueError, r"for input \[3, 6, .*\], got \[8, 5, ", {"in_channels": 5}),
    (TypeError, "input is torch.float32 on cpu, weight is torch.float64 on cpu", {"dtype": torch.float64}),
    (TypeError, "input is torch.float32 on cpu, weight is torch.float32 on meta", {"device": "meta"}),
]


@pytest.mark.parametrize(("error", "message", "options"), BAD, ids=[message for _, message, _ in BAD])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_errors_name_the_operation(dimensions, error, message, options):
    layer = fused(dimensions, **{"in_channels": 6, "out_channels": 8, "kernel_size": 3} | options)
    with pytest.raises(error, match=f"^conv_relu_pool: .*{message}"):
        layer(torch.randn(N, 6, *SIZES[dimensions]))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_an_input_of_another_rank_is_an_error(dimensions):
    for rank in {1, 2, 3, 4, 5} - {dimensions + 1, dimensions + 2}:
        with pytest.raises(ValueError, match=r"^conv_relu_pool: want input \[N, C, H, W\] or \[C, H, W\]"):
            fused(dimensions, 6, 8, 3)(torch.randn((6,) * rank))


@pytest.mark.parametrize(
    "options",
    [{"padding": "full"}, {"padding": "same", "stride": 2}, {"groups": 4}, {"padding_mode": "mirror"}],
    ids=str,
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_arguments_that_torch_refuses_get_its_error(dimensions, options):
    with pytest.raises(ValueError) as want:
        getattr(torch.nn, f"Conv{dimensions}d")(6, 8, 3, **options)
    with pytest.raises(ValueError) as got:
        fused(dimensions, 6, 8, 3, **options)
    assert str(got.value) == str(want.value)


def test_every_other_name_is_torchs():
    names = {name for name in dir(torch.nn) if not name.startswith("_")} - {*nn.__all__}
    assert {"Linear", "Module", "init", "utils"} <= names <= {*dir(nn)}
    assert all(getattr(nn, name) is getattr(torch.nn, name) for name in names)


def test_every_other_function_is_torchs():
    names = {name for name in dir(torch.nn.functional) if not name.startswith("_")} - {*nn.functional.__all__}
    assert {"linear", "relu", "softmax"} <= names <= {*dir(nn.functional)}
    assert all(getattr(nn.functional, name) is getattr(torch.nn.functional, name) for name in names)
    assert all(getattr(nn.functional, name) is getattr(ops, name) for name in nn.functional.__all__)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(nn, "ConvReLUPool9d")
    with pytest.raises(ImportError, match="ConvReLUPool9d"):
        from fastarch.nn import ConvReLUPool9d  # noqa: F401
