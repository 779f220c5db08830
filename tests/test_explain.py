"""fastarch.explain: what calls cost, what is left to PyTorch, and that a model does not notice."""

import random
import time

import pytest
import torch
from rich.console import Console
from torch import nn as torch_nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import fastarch
from fastarch import costs, counterparts, extension, measure, nn, ops
from fastarch.explain import number

built = pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")


class Everything(nn.Module):
    """Layers with states, modes and random numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=None, activation="relu")
        self.conv = nn.ConvReLUPool2d(3, 4, 3)
        self.gru = nn.GRU(4, 8, num_layers=2, dropout=0.5)
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, dropout=0.5)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean((1, 2, 3))
        y = self.conv(self.norm(x))
        return self.layer(self.gru(y.flatten(2).permute(2, 0, 1))[0])


def draw(*shape):
    return torch.randn(*shape)


@built
def test_every_call_has_both_times_and_both_numbers_of_bytes():
    calls = fastarch.explain(Everything(), draw(2, 3, 8, 8))
    assert [call.operation for call in calls] == [
        *("batch_norm", "conv_relu_pool", "gru", "gru", "scaled_dot_product_attention")
    ]
    for call in calls:
        for cost in (call.ours, call.pytorchs):
            assert 0 < cost.seconds < 1
            assert cost.saved_bytes > 0


@built
def test_the_bytes_are_those_that_autograd_keeps():
    x, layer = draw(4, 1, 12, 12), nn.ConvReLUPool2d(1, 6, 5)
    plain = torch_nn.Sequential(torch_nn.Conv2d(1, 6, 5), torch_nn.ReLU(), torch_nn.MaxPool2d(2))
    (call,) = fastarch.explain(layer, x)
    # x [4, 1, 12, 12], weight and bias of float32, a byte for each pooled output [4, 6, 4, 4]
    assert call.ours.saved_bytes == 4 * (4 * 144 + 6 * 25 + 6) + 4 * 6 * 16
    assert call.pytorchs.saved_bytes == measure.saved_bytes(plain, x.requires_grad_())


@built
def test_the_times_are_of_the_two_functions(monkeypatch):
    """Which take turns."""
    turns = []

    def both(*arguments):
        x = arguments[0]
        return counterparts.Counterparts((x,), lambda x: turns.append("ours"), lambda x: slow(turns))

    def slow(turns):
        turns.append("PyTorch's")
        time.sleep(0.005)

    monkeypatch.setitem(counterparts.OF, "conv_relu_pool", both)
    (call,) = fastarch.explain(nn.ConvReLUPool2d(1, 2, 3), draw(1, 1, 8, 8))
    assert call.ours.seconds < 0.005 <= call.pytorchs.seconds
    assert len(turns) >= 6
    assert turns == ["ours", "PyTorch's"] * (len(turns) // 2)


def test_medians_leave_the_first_round_out(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 10.0)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    durations = [0.5, 0.001]
    (seconds,) = measure.medians([lambda: time.sleep(durations.pop(0))], torch.device("cpu"))
    assert durations == []
    assert 0.001 <= seconds < 0.2


def test_one_round_is_enough_where_it_takes_long(monkeypatch):
    runs = []
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    (seconds,) = measure.medians([lambda: runs.append(time.sleep(0.01))], torch.device("cpu"))
    assert len(runs) == 1
    assert seconds >= 0.01


@built
def test_untimed_the_model_runs_and_nothing_else(monkeypatch):
    monkeypatch.setattr(costs, "compare", None)
    calls = fastarch.explain(Everything(), draw(2, 3, 8, 8), timed=False)
    assert len(calls) == 5
    assert all(call.ours is None and call.pytorchs is None for call in calls)
    assert "MB" not in str(calls)


@built
def test_calls_that_are_alike_are_measured_once(monkeypatch):
    measured, compare = [], costs.compare
    monkeypatch.setattr(costs, "compare", lambda *args: measured.append(args[0]) or compare(*args))
    alike = [nn.ConvReLUPool2d(2, 2, 3, padding=1, pool=None) for _ in range(3)]
    calls = fastarch.explain(nn.Sequential(*alike, nn.ConvReLUPool2d(2, 2, 1)), draw(1, 2, 8, 8))
    assert len(measured) == 2
    assert calls[0].ours == calls[1].ours == calls[2].ours != calls[3].ours


@built
def test_measuring_ends_when_its_time_is_spent(monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    calls = fastarch.explain(nn.ConvReLUPool2d(1, 2, 3), draw(1, 1, 8, 8))
    assert [call.ours for call in calls] == [None]


@built
def test_activations_are_not_kept(monkeypatch):
    """Only how they lie in memory: a large model's activations need not fit all at once."""
    kept, measured = [], costs.Costs.measured
    monkeypatch.setattr(costs.Costs, "measured", lambda self: kept.extend(self.arguments.values()) or measured(self))
    model = Everything().eval()
    fastarch.explain(model, draw(2, 3, 8, 8))
    parameters = {id(p) for p in model.parameters()}
    tensors = [t for arguments in kept for t in arguments if isinstance(t, torch.Tensor)]
    assert all(t.dim() < 2 or id(t) in parameters for t in tensors)
    assert any(t is model.norm.running_var for t in tensors)  # random numbers would be no variances


def test_tensors_are_drawn_as_they_lay():
    for like in (draw(2, 3, 4, 5).to(memory_format=torch.channels_last), draw(2, 1, 4).expand(2, 3, 4), draw(0, 3)):
        drawn = costs.described(like).draw()
        assert (drawn.shape, drawn.stride(), drawn.dtype) == (like.shape, like.stride(), like.dtype)


@built
@pytest.mark.parametrize("which", [0, 1], ids=["ours", "PyTorch's"])
def test_what_cannot_run_here_has_no_cost(monkeypatch, which):
    def both(*arguments):
        def fails(*_):
            raise NotImplementedError("no kernel")

        functions = [lambda x: x, lambda x: x]
        functions[which] = fails
        return counterparts.Counterparts((arguments[0],), *functions)

    monkeypatch.setitem(counterparts.OF, "conv_relu_pool", both)
    calls = fastarch.explain(nn.ConvReLUPool2d(1, 2, 3), draw(1, 1, 8, 8))
    (call,) = calls
    assert (call.ours, call.pytorchs)[which] is None
    assert (call.ours, call.pytorchs)[1 - which].seconds > 0
    assert "conv_relu_pool" in str(calls)


@built
def test_what_has_no_gradient_has_a_time(monkeypatch):
    def both(*arguments):
        def forward_only(x):
            if torch.is_grad_enabled():
                raise RuntimeError("no backward")
            return x

        return counterparts.Counterparts((arguments[0],), forward_only, None)

    monkeypatch.setitem(counterparts.OF, "conv_relu_pool", both)
    (call,) = fastarch.explain(nn.ConvReLUPool2d(1, 2, 3), draw(1, 1, 8, 8))
    assert call.ours.seconds > 0
    assert call.ours.saved_bytes is None
    assert call.pytorchs is None


def test_the_reference_has_no_costs():
    with fastarch.reference():
        calls = fastarch.explain(nn.ConvReLUPool2d(1, 2, 3), draw(1, 1, 8, 8))
    assert [(call.kernel, call.ours, call.pytorchs) for call in calls] == [("reference", None, None)]


@built
def test_a_call_after_one_on_the_reference_has_its_own_costs():
    large = nn.ConvReLUPool2d(1, 2, 3, pool_size=16)
    calls = fastarch.explain(nn.Sequential(large, nn.BatchNorm2d(2)), draw(2, 1, 70, 70))
    assert [(call.operation, call.ours is None) for call in calls] == [("conv_relu_pool", True), ("batch_norm", False)]


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_model_does_not_notice(timed, training):
    model = Everything().train(training)
    model.gru.eval()
    modes = [module.training for module in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    attributes = {name: vars(module).keys() for name, module in model.named_modules()}
    x = draw(2, 3, 8, 8).requires_grad_()
    numbers, pythons = torch.get_rng_state(), random.getstate()
    fastarch.explain(model, x, timed=timed)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert random.getstate() == pythons
    assert [module.training for module in model.modules()] == modes
    assert all(t is buffers[name] for name, t in model.named_buffers())
    assert {name: vars(module).keys() for name, module in model.named_modules()} == attributes
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0, msg=name)
    assert all(p.grad is None for p in model.parameters())


def test_buffers_are_put_back_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls += 1
            torch.rand(1)
            raise RuntimeError("no")

    model, x = Fails(), draw(1)
    numbers = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        fastarch.explain(model, x)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), numbers)


def test_buffers_that_share_elements_and_lazy_ones_are_left():
    class Model(torch_nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("ones", torch.ones(1).expand(3))
            self.norm = torch_nn.LazyBatchNorm1d()

        def forward(self, x):
            return self.norm(x * self.ones)

    fastarch.explain(Model(), draw(4, 3))


@built
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_measured(dtype):
    calls = fastarch.explain(Everything().to(dtype), draw(2, 3, 8, 8).to(dtype))
    assert len(calls) == 5
    assert all(call.ours and call.pytorchs for call in calls)


@built
def test_under_autocast_the_cast_call_is_measured():
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = fastarch.explain(nn.ConvReLUPool2d(1, 6, 5), draw(4, 1, 12, 12))
    assert call.ours.saved_bytes == 2 * (4 * 144 + 6 * 25 + 6) + 4 * 6 * 16


@built
def test_an_uncast_call_under_autocast_is_measured_uncast():
    class Exact(nn.ConvReLUPool2d):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    layer, x = Exact(1, 6, 5), draw(4, 1, 12, 12)
    (alone,) = fastarch.explain(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = fastarch.explain(layer, x)
    for got, want in ((call.ours, alone.ours), (call.pytorchs, alone.pytorchs)):
        assert got.saved_bytes == want.saved_bytes


@built
def test_in_inference_mode_bytes_are_known_too():
    with torch.inference_mode():
        model = nn.Sequential(nn.ConvReLUPool2d(1, 6, 5), nn.BatchNorm2d(6))
        calls = fastarch.explain(model, draw(4, 1, 12, 12))
    assert model[1].num_batches_tracked == 0
    assert len(calls) == 2
    assert all(call.ours.saved_bytes > 0 and call.pytorchs.saved_bytes > 0 for call in calls)


def test_fake_tensors_have_no_costs():
    with FakeTensorMode():
        calls = fastarch.explain(nn.ConvReLUPool2d(1, 6, 5), torch.empty(4, 1, 12, 12))
    assert [(call.operation, call.ours) for call in calls] == [("conv_relu_pool", None)]


@built
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
def test_a_compiled_model_is_explained_each_time(timed):
    model = torch.compile(nn.Sequential(nn.ConvReLUPool2d(1, 2, 3)), backend="eager", fullgraph=True)
    x = draw(1, 1, 8, 8)
    model(x)
    for _ in range(2):
        (call,) = fastarch.explain(model, x, timed=timed)
        assert (call.layer, call.ours is not None) == ("_orig_mod.0", timed)


@built
def test_a_model_with_operators_of_higher_order_is_explained():
    class Branches(torch_nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.norm(x),))

    (call,) = fastarch.explain(Branches(), draw(4, 3))
    assert call.ours.seconds > 0


class Plain(torch_nn.Module):
    """What fastarch has, on PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = torch_nn.Conv2d(1, 4, 3), torch_nn.ReLU()
        self.gru = torch_nn.GRU(4, 4)
        self.lstm = torch_nn.LSTM(4, 4)

    def forward(self, x):
        y = self.relu(self.conv(x)).flatten(2).permute(2, 0, 1)
        return self.lstm(self.gru(y)[0])[0]


def test_what_fuse_would_take_is_named():
    model = Plain()
    found = fastarch.explain(model, draw(1, 1, 6, 6))
    assert found == []
    assert found.unfused == [
        ("(model)", "conv -> relu", "not fused: fastarch.fuse makes it one call"),
        ("gru", "GRU", "not fused: fastarch.fuse makes it fastarch.nn.GRU"),
    ]
    assert type(model) is Plain
    assert type(model.gru) is torch_nn.GRU
    printed = str(found)
    assert "conv -> relu" in printed
    assert "kernel" not in printed  # no table of no calls


def test_what_is_fused_is_not_named_anywhere():
    fused = fastarch.fuse(Plain())
    found = fastarch.explain(fused, draw(1, 1, 6, 6))
    assert [call.layer for call in found] == ["(model)", "gru"]
    assert found.unfused == []
    inside = fastarch.explain(torch_nn.Sequential(fused, torch_nn.BatchNorm1d(1)), draw(1, 1, 6, 6), timed=False)
    assert [row.layer for row in inside.unfused] == ["1"]
    ours = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.TransformerEncoderLayer(3, 1))
    assert [row.what for row in fastarch.explain(ours, draw(4, 3)).unfused] == ["0 -> 1"]


def test_attention_of_transformers_is_named_until_it_is_fused():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": 8}
    model, tokens = transformers.GPT2Model(transformers.GPT2Config(**sizes)), torch.randint(8, (2, 5))
    assert fastarch.explain(model, tokens).unfused == [
        ("(model)", "attention of transformers", "not fused: fastarch.fuse makes it ours")
    ]
    assert model.config._attn_implementation == "sdpa"
    (call,) = found = fastarch.explain(fastarch.fuse(model), tokens)
    assert call.operation == "scaled_dot_product_attention"
    assert found.unfused == []


def test_what_fuse_leaves_is_named_with_its_reason():
    class Branch(torch_nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    class Special(torch_nn.GRU):
        pass

    model = torch_nn.Sequential(
        Branch(torch_nn.Conv2d(1, 1, 1), torch_nn.ReLU()), torch_nn.Flatten(1, 2), Special(4, 4)
    )
    model[0][1].register_forward_hook(lambda *_: None)
    for network in (model, fastarch.fuse(model)):
        rows = fastarch.explain(network, draw(2, 1, 3, 4)).unfused
        assert [(row.layer, row.what) for row in rows] == [
            ("0", "forward of Branch"),
            ("0.1", "ReLU"),
            ("2", "Special"),
        ]
        assert "hook" in rows[1].reason
        assert rows[2].reason == "Special is another class than GRU"


def test_a_model_that_cannot_be_copied_is_explained():
    class Single(nn.Sequential):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of me [/red]")

    found = fastarch.explain(Single(nn.BatchNorm1d(3)), draw(4, 3))
    (call,), (row,) = found, found.unfused
    assert call.layer == "0"
    assert row == ("(model)", "Single", "fastarch.fuse cannot take it: there is one of me [/red]")
    assert "there is one of me [/red]" in str(found)


def test_explain_wants_a_module():
    with pytest.raises(TypeError, match=r"explain: want a torch\.nn\.Module, got function"):
        fastarch.explain(F.relu, draw(1))


@built
def test_tables_fit_into_160_columns():
    """No text is cut off, and numbers stand on one line."""
    model = nn.TransformerDecoderLayer(8, 2, dim_feedforward=8)
    found = fastarch.explain(nn.Sequential(Named(model), torch_nn.GRU(8, 8)), draw(5, 2, 8))
    lines = str(found).splitlines()
    assert all(len(line) <= 160 for line in lines)
    assert "…" not in str(found)
    row = next(line for line in lines if "scaled_dot" in line)
    numbers = [cell.strip() for cell in row.strip("│").split("│")][-4:]
    assert all(float(number) > 0 for number in numbers)


@built
def test_numbers_stay_whole_in_a_narrow_window():
    (call,) = found = fastarch.explain(nn.ConvReLUPool2d(1, 2, 3), draw(1, 1, 300, 300))
    console = Console(width=60)
    with console.capture() as captured:
        console.print(found)
    assert f" {number(call.pytorchs.saved_bytes, 1e-6)} " in captured.get()


class Named(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.a_layer_with_quite_a_long_name = layer

    def forward(self, x):
        return self.a_layer_with_quite_a_long_name(x, x)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, 1e3, ""), (0.0, 1e3, "0"), (1.23456e-5, 1e3, "0.0123"), (0.0123456, 1e3, "12.3"), (1.23456, 1e3, "1235")],
)
def test_numbers_have_three_digits(value, unit, text):
    assert number(value, unit) == text


@built
def test_a_call_of_several_ranks_is_not_measured_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "compare", None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        model = nn.Module()
        model.forward = lambda x: ops.batch_norm(x, None, None, training=True, process_group=group)
        (call,) = fastarch.explain(model, draw(4, 3))
    finally:
        torch.distributed.destroy_process_group()
    assert (call.operation, call.ours, call.pytorchs) == ("batch_norm", None, None)
