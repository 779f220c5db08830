"""fastarch.nn.functional: the fused operations are ours, every other name is torch.nn.functional's."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as torch_functional

import fastarch.nn as nn
import fastarch.nn.functional as F
from fastarch import ops, routing

REPLACED = ["batch_norm", "scaled_dot_product_attention"]


@pytest.mark.parametrize("name", ops.__all__)
def test_the_operations_are_ours(name):
    assert getattr(F, name) is getattr(ops, name)
    assert name in dir(F)


def test_every_other_name_is_torchs():
    names = {name for name in dir(torch_functional) if not name.startswith("__")} - {*ops.__all__}
    assert {"relu", "cross_entropy", "conv2d", "pad"} <= names <= {*dir(F)}
    assert all(getattr(F, name) is getattr(torch_functional, name) for name in names)


def test_the_replaced_names_are_those_that_torch_has():
    assert [name for name in ops.__all__ if hasattr(torch_functional, name)] == REPLACED


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(F, "conv_relu_pool9d")
    with pytest.raises(ImportError, match="conv_relu_pool9d"):
        from fastarch.nn.functional import conv_relu_pool9d  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        "import fastarch.nn.functional as F",
        "import fastarch.nn as nn; F = nn.functional",
        "from fastarch.nn import functional as F",
        "from fastarch.nn import *; F = functional",
        "import fastarch; F = fastarch.nn.functional",
    ],
)
def test_every_import_finds_ours(code):
    """Each in a process of its own, for imports leave attributes behind."""
    check = f"{code}\nassert F.__name__ == 'fastarch.nn.functional' and F.relu"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_torchs_own_module_is_left_alone():
    assert torch.nn.functional is torch_functional
    assert torch_functional.batch_norm.__module__ == "torch.nn.functional"


def test_batch_norm_takes_torchs_arguments_by_position():
    x, weight, bias = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(3).double(), torch.rand(3).double()
    results = []
    for function in (F.batch_norm, torch_functional.batch_norm):
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        results.append((function(x, *running, weight, bias, True, 0.2, 1e-3), *running))
    torch.testing.assert_close(*results)
    ours, theirs = (list(inspect.signature(f).parameters) for f in (F.batch_norm, torch_functional.batch_norm))
    assert ours[: len(theirs)] == theirs


def test_attention_takes_torchs_arguments_by_position():
    q = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    arguments = (q, q.flip(2), q.cos(), None, 0.0, True)
    got = F.scaled_dot_product_attention(*arguments)
    torch.testing.assert_close(got, torch_functional.scaled_dot_product_attention(*arguments))


def test_compiles_to_one_graph():
    """Names of ours and of torch's, in one function."""
    torch._dynamo.reset()

    def function(x):
        x = nn.functional.relu(F.conv_relu_pool(x, weight))
        return F.scaled_dot_product_attention(x, x, x).sum()

    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with routing.recording() as calls:
        want = function(x)
    assert [call.operation for call in calls] == ["conv_relu_pool", "scaled_dot_product_attention"]
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), want)
