"""fuse on networks that nobody would write: drawn chains, functions, branches, shared modules, hooks, sums in place."""

import copy
import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fastarch

EXAMPLES = int(os.environ.get("FASTARCH_FUZZ_EXAMPLES", "200"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
N, C = 2, 3

# what a layer named so in the source is; all keep the number of channels
LAYERS = {
    "conv": lambda: nn.Conv2d(C, C, 3, padding=1),
    "grouped": lambda: nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False),
    "norm": lambda: nn.BatchNorm2d(C),
    "frozen": lambda: nn.BatchNorm2d(C, track_running_stats=False, affine=False),
    "relu": lambda: nn.ReLU(),
    "relu_": lambda: nn.ReLU(inplace=True),
    "maxpool": lambda: nn.MaxPool2d(3, 1, 1),
    "avgpool": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "dilated": lambda: nn.MaxPool2d(2, 1, 0, dilation=2),
    "uncounted": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "chain": lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.MaxPool2d(3, 1, 1)),
    "skip": lambda: nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)),
    "skip_": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(True)),
}
FUNCTIONS = [
    "F.relu({a})",
    "torch.relu({a})",
    "{a}.relu()",
    "{a}.relu_()",
    "F.relu({a}, inplace=True)",
    "F.max_pool2d({a}, 3, 1, padding=1)",
    "F.avg_pool2d({a}, kernel_size=(2, 1), ceil_mode=True)",
    "F.max_pool2d({a}, 2, 1, dilation=1, ceil_mode=True)",
    "F.dropout({a}, 0.0, self.training)",
    "{a} * 0.5",
    "F.scaled_dot_product_attention({a}, {a}, {a})",
]
SUMS = [
    "{a} + {b}",
    "torch.add({a}, {b})",
    "{a}.add_({b})",
    "{a}.add({b})",
    "{a} * {b}",
    "torch.add({a}, {b}, alpha=2)",
]
STATEMENTS = [
    "{a} += {b}",
    "{a} -= 0.1 * {b}",
    "alias = {a}; alias += {b}",
    "alias = {a}; alias *= 2",
    "if self.training: {a} = {a} * 2",
    "if self.flag: {a} = {a} + 1",
    "for layer in self.stack: {a} = layer({a})",
]
# runs of calls that are likely to be chains: each takes what the one before it gave
RUNS = [
    ("conv", "norm", "relu", "maxpool"),
    ("conv", "relu_", "avgpool"),
    ("conv", "norm", "relu_"),
    ("conv", "F.relu({a})", "F.max_pool2d({a}, 3, 1, padding=1)"),
    ("norm", "{a} + {b}", "relu"),
    ("conv", "norm", "{a}.add_({b})", "relu_"),
    ("conv", "norm", "{a} + self.skip0({b})", "F.relu({a})"),
    ("norm", "{a} + self.skip_0({b})", "{a}.relu()"),
    ("frozen", "relu"),
    ("conv", "relu", "uncounted"),
    ("conv", "relu", "F.avg_pool2d({a}, 3, 1, 1, count_include_pad=False)"),
    ("conv", "relu_", "F.max_pool2d({a}, 3, 1, 1, 2)"),
    ("conv", "relu", "dilated"),
]


class Network(NamedTuple):
    source: str
    layers: tuple[str, ...]
    hooked: tuple[str, ...]
    seed: int


@st.composite
def networks(draw) -> Network:
    """Values are v0, v1, ...; all are images of C channels, of a size that only pools change."""
    lines, values, count, names = ["v0 = x * 1.5", "v1 = x + 1"], ["v0", "v1"], 2, {"skip0", "skip_0"}

    def layer(kind: str) -> str:
        name = f"{kind}{draw(st.integers(0, 2))}"  # few of each kind, so that many are called more than once
        names.add(name)
        return name

    def add(call: str, a: str) -> str:
        nonlocal count
        b = draw(st.sampled_from(values))
        call = f"self.{layer(call)}({a})" if call in LAYERS else call.format(a=a, b=b)
        lines.append(f"v{count} = {call}")
        count += 1
        return f"v{count - 1}"

    for _ in range(draw(st.integers(2, 5))):
        a = draw(st.sampled_from(values))
        what = draw(st.sampled_from(["run", "run", "run", "layer", "function", "sum", "statement"]))
        if what == "statement":
            lines.append(draw(st.sampled_from(STATEMENTS)).format(a=a, b=draw(st.sampled_from(values))))
            continue
        choices = {"run": RUNS, "layer": list(LAYERS), "function": FUNCTIONS, "sum": SUMS}[what]
        chosen = draw(st.sampled_from(choices))
        for call in chosen if what == "run" else [chosen]:
            a = add(call, a)
            if draw(st.integers(0, 3)) == 0:  # the middle of a chain may be used elsewhere
                values.append(a)
        values.append(a)
    kept = [values[-1], *draw(st.lists(st.sampled_from(values), max_size=1))]
    lines.append(f"return torch.cat([{', '.join(f'{v}.flatten(1)' for v in kept)}], 1)")
    source = "def forward(self, x):\n" + "\n".join(f"    {line}" for line in lines)
    layers = tuple(sorted(names))
    hooked = tuple(draw(st.lists(st.sampled_from(layers), max_size=1)))
    return Network(source, layers, hooked, draw(st.integers(0, 2**32)))


class Base(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        for name in network.layers:
            setattr(self, name, LAYERS[name.rstrip("0123456789")]())
        for name in network.hooked:
            getattr(self, name).register_forward_hook(lambda module, args, output: output * 1.5)
        self.stack = nn.ModuleList([nn.Conv2d(C, C, 1), nn.ReLU()])
        self.flag = network.seed % 2 == 0


def built(network: Network) -> nn.Module:
    scope = {"torch": torch, "F": F, "__name__": __name__}
    exec(network.source, scope)
    return type("Drawn", (Base,), {"forward": scope["forward"]})(network).double()


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    leaves = {"x": x} | dict(model.named_parameters())
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads) if grad is not None}
    with torch.no_grad():  # takes ways of its own
        evaluated = {} if model.training else {"without gradients": model(x.detach())}
    return {"y": y.detach()} | evaluated | named | {name: b.clone() for name, b in model.named_buffers()}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.mark.filterwarnings("ignore:dropout2d")
def test_a_drawn_network_and_its_fused_twin_are_the_same():
    chains = []
    compare(chains)
    assert sum(chains) > EXAMPLES / 4  # networks without a chain prove little


def compare(chains: list[int]) -> None:
    @fuzz
    @given(networks())
    def check(network: Network) -> None:
        note(network.source)
        torch.manual_seed(network.seed)
        model = built(network)
        x = torch.randn(N, C, 5, 6, dtype=torch.float64)
        fused = fastarch.fuse(copy.deepcopy(model), inplace=True)
        note(str(fastarch.fusions(fused)))
        chains.append(sum(f.became == "one call" for f in fastarch.fusions(fused)))
        assert list(fused.state_dict()) == list(model.state_dict())
        for training in (True, False):
            want = original(model.train(training), x)
            assume(want is not None)
            got = results(fused.train(training), x)
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=1e-7, atol=1e-7, msg=lambda m: f"{name}: {m}")  # noqa: B023
        fastarch.unfuse(fused).load_state_dict(model.state_dict())
        assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(fused(x), model(x))

    check()


def original(model: nn.Module, x: Tensor) -> dict[str, Tensor] | None:
    """None where torch itself refuses: sums of other sizes, gradients through what was changed in place."""
    try:
        return results(model, x)
    except RuntimeError:
        return None
