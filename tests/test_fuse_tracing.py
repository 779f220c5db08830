"""A forward whose graph might not be all it does is left alone, and is not run to find out."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastarch
from fastarch.fusion.programs import programs
from fastarch.fusion.tracing import Refused, trace

FACTOR = 2
LOOSE = torch.ones(3)


class Model(nn.Module):
    """A chain, and whatever a forward below does with its result."""

    def __init__(self, forward):
        super().__init__()
        self.norm, self.flag, self.calls, self.factors = nn.BatchNorm1d(3), True, 0, [2.0]
        self.shared = self.norm
        self.loose = torch.ones(3)
        self.body = forward

    def chain(self, x):
        return F.relu(self.norm(x))

    def forward(self, x):
        return x


def made(forward) -> nn.Module:
    return type("Made", (Model,), {"forward": forward})(forward)


def branches_on_values(self, x):
    return self.chain(x) if x.sum() > 0 else x


def branches_on_the_class(self, x):
    return self.chain(x) if isinstance(x, torch.Tensor) else x[0]


def branches_on_the_rest(self, x):
    return self.chain(x) if torch.is_grad_enabled() else x


def draws(self, x):
    return self.chain(x) + torch.rand(3)


def draws_in_python(self, x):
    return self.chain(x) * random.random()


def counts(self, x):
    self.calls += 1
    return self.chain(x)


def prints(self, x):
    print("ran")
    return self.chain(x)


def reads_a_global(self, x):
    return self.chain(x) * FACTOR


def reads_a_list(self, x):
    return self.chain(x) * self.factors[0]


def reads_a_layer(self, x):
    return self.chain(x) * self.norm.eps


def reads_a_mode(self, x):
    return self.chain(x) if self.norm.training else x


def uses_a_loose_tensor(self, x):
    return self.chain(x) * self.loose


def uses_a_global_tensor(self, x):
    return self.chain(x) * LOOSE


def switches_gradients_off(self, x):
    with torch.no_grad():
        return self.chain(x)


@torch.no_grad()
def is_decorated(self, x):
    return self.chain(x)


def checkpoints(self, x):
    return torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def differentiates_on_its_own(self, x):
    return Doubled.apply(self.chain(x))


def writes_into_a_value(self, x):
    x = self.chain(x)
    x[0] = 0
    return x


REFUSED = {
    branches_on_values: "control flow",
    branches_on_the_class: "asks for the class of a value",
    branches_on_the_rest: "asks is_grad_enabled",
    draws: "calls rand on no argument",
    draws_in_python: "reads the global random",
    counts: "sets an attribute",
    prints: "calls print",
    reads_a_global: "reads the global FACTOR",
    reads_a_list: "reads factors, a list",
    reads_a_layer: "reads norm.eps",
    reads_a_mode: "reads norm.training",
    uses_a_loose_tensor: "it uses a tensor that is no parameter",
    uses_a_global_tensor: "reads the global LOOSE",
    switches_gradients_off: "has a with statement",
    is_decorated: "is no plain function",
    checkpoints: "it runs torch._compile",
    differentiates_on_its_own: "it runs torch.autograd.function",
    writes_into_a_value: "writes into what it indexes",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_refused(forward, capsys):
    model = made(forward)
    with pytest.raises(Refused, match=REFUSED[forward]):
        programs(model)
    assert not capsys.readouterr().out
    assert model.calls == 0
    fused = fastarch.fuse(model)
    (left,) = (f for f in fastarch.fusions(fused) if f.left)
    assert (left.layer, left.what) == ("(model)", "forward of Made")
    assert type(fused.norm) is fastarch.nn.BatchNorm1d
    x = torch.randn(4, 3)
    torch.manual_seed(0), random.seed(0)
    want = model(x)
    torch.manual_seed(0), random.seed(0)
    torch.testing.assert_close(fused(x), want)


def asks_for_the_mode(self, x):
    return self.chain(x) if self.training else F.relu(self.norm(x * 2) + x)


def reads_constants(self, x):
    return self.chain(x) if self.flag else x


def goes_through_parameters(self, x):
    return self.chain(x) * self.norm.weight


def has_a_loop(self, x):
    values = [x]
    for layer in (self.norm, self.norm):
        values.append(F.relu(layer(values[-1])))
    return sum(values)


SERVED = [asks_for_the_mode, reads_constants, has_a_loop]


@pytest.mark.parametrize("forward", SERVED, ids=lambda f: f.__name__)
def test_served(forward):
    model = made(forward)
    fused = fastarch.fuse(model)
    assert any(f.became == "one call" for f in fastarch.fusions(fused))
    x = torch.randn(4, 3)
    for training in (True, False):
        for flag in (True, False):
            for m in (model, fused):
                m.train(training).flag = flag
            # running statistics are shared: those of the second call would not be those of the first
            state = {name: t.clone() for name, t in model.state_dict().items()}
            got = fused(x)
            model.load_state_dict(state)
            torch.testing.assert_close(got, model(x))


def test_a_replaced_forward_is_refused():
    model = made(reads_constants)
    model.forward = lambda x: x + 1
    fused = fastarch.fuse(model)
    assert ("(model)", "its forward was replaced") in {(f.layer, f.left) for f in fastarch.fusions(fused)}
    assert torch.equal(fused(torch.ones(3)), torch.ones(3) + 1)


def test_a_parameter_of_two_names_is_refused():
    with pytest.raises(Refused, match=r"which has other names"):
        trace(made(goes_through_parameters))


def test_a_layer_of_two_names_may_become_two():
    model = made(has_a_loop)
    fused = fastarch.fuse(model)
    fused.norm = nn.Identity()
    model.norm = nn.Identity()
    x = torch.randn(4, 3)
    torch.testing.assert_close(fused(x), model(x))


def test_tracing_leaves_no_trace():
    model = made(reads_constants)
    before = dict(model.__dict__)
    trace(model)
    assert model.__dict__ == before
    assert "__getattribute__" not in vars(nn.Module)
    assert model.training
