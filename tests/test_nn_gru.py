"""The layers of gru stand for torch.nn's: values, gradients, state_dicts, errors, and what torch's cannot do."""

import copy
import pickle

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from fastarch import extension, nn, routing
from fastarch.ref.gru import gru as reference

T, N, C, H = 7, 5, 3, 4
OPTIONS = [
    {},
    {"num_layers": 2, "batch_first": True},
    {"bidirectional": True, "bias": False},
    {"num_layers": 3, "bidirectional": True},
]
SMALL = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}


def named(name: str):
    return lambda message: f"{name}: {message}"


def twins(**options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our layer and torch's, with the same parameters."""
    layer, twin = nn.GRU(C, H, **options), torch.nn.GRU(C, H, **options)
    layer.load_state_dict(twin.state_dict())
    return layer, twin


def draw_state(layer: torch.nn.Module, *batch: int) -> Tensor:
    directions = 2 if layer.bidirectional else 1
    return torch.randn(layer.num_layers * directions, *batch, H, dtype=layer.weight_ih_l0.dtype)


def results(layer: torch.nn.Module, input: Tensor | PackedSequence, hx: Tensor | None, **options) -> dict[str, Tensor]:
    """Output, last state, and every gradient of a sum that weights each of their elements differently."""
    packed = isinstance(input, PackedSequence)
    data = (input.data if packed else input).detach().clone().requires_grad_()
    leaves = {"dx": data} | {f"d{name}": p for name, p in layer.named_parameters()}
    if hx is not None:
        leaves["dh0"] = hx = hx.detach().clone().requires_grad_()
    output, h_n = layer(input._replace(data=data) if packed else data, hx, **options)
    output = output.data if packed else output
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in (output, h_n))
    return {"output": output, "h_n": h_n} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance, msg=named(name))


def pack(sorted: bool, dtype: torch.dtype = torch.float64) -> PackedSequence:
    """Sequences of random lengths, one of them as long as all and one of a single step."""
    lengths = torch.cat([torch.tensor([T, 1]), torch.randint(1, T + 1, (N - 2,))])
    lengths = lengths.sort(descending=True)[0] if sorted else lengths[torch.randperm(N)]
    return pack_padded_sequence(torch.randn(T, N, C, dtype=dtype), lengths, enforce_sorted=sorted)


@pytest.mark.parametrize("given", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_equal_those_of_torch(options, batched, given):
    layer, twin = twins(dtype=torch.float64, **options)
    batch = [N] if batched else []
    sizes = [*batch, T] if options.get("batch_first") else [T, *batch]
    x, hx = torch.randn(*sizes, C, dtype=torch.float64), draw_state(layer, *batch) if given else None
    assert_same(results(layer, x, hx), results(twin, x, hx))


@pytest.mark.parametrize("given", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("ordered", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_packed_sequences_equal_those_of_torch(num_layers, bidirectional, ordered, given):
    layer, twin = twins(num_layers=num_layers, bidirectional=bidirectional, dtype=torch.float64)
    for _ in range(3):
        packed, hx = pack(ordered), draw_state(layer, N) if given else None
        assert_same(results(layer, packed, hx), results(twin, packed, hx))
        for got, want in zip(layer(packed, hx)[0][1:], twin(packed, hx)[0][1:], strict=True):
            assert got is want


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_stand_for_a_packed_sequence(batch_first):
    """And may be 0, where the state stays, and the output is 0; padding may hold anything."""
    layer = twins(**SMALL)[0]
    layer.batch_first = batch_first
    packed, hx = pack(False), draw_state(layer, N)
    x, lengths = pad_packed_sequence(packed, batch_first, padding_value=torch.nan)
    output, h_n = layer(x, hx, lengths=lengths)
    want, want_h_n = layer(packed, hx)
    want = pad_packed_sequence(want, batch_first)[0]
    assert_same({"y": output, "h_n": h_n}, {"y": want, "h_n": want_h_n})
    output, h_n = layer(x, hx, lengths=torch.zeros_like(lengths))
    assert not output.any()
    assert torch.equal(h_n, hx)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_reset_before_the_product(bias):
    layer = nn.GRU(C, H, 2, bias, bidirectional=True, dtype=torch.float64, reset_after=False)
    x, hx, lengths = torch.randn(T, N, C, dtype=torch.float64), draw_state(layer, N), torch.tensor([3, T, 1, 0, 5])
    output, states = x, []
    for i in (0, 2):
        pairs = [
            reference(output, hx[i + j], *(*layer.all_weights[i + j], None, None)[:4], j == 1, lengths, False)
            for j in (0, 1)
        ]
        output = torch.cat([pair[0] for pair in pairs], -1)
        states += [pair[1] for pair in pairs]
    assert_same(
        dict(zip(("output", "h_n"), layer(x, hx, lengths=lengths))), {"output": output, "h_n": torch.stack(states)}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision(dtype):
    layer, twin = twins(num_layers=2, bidirectional=True, dtype=dtype)
    exact = copy.deepcopy(twin).double()
    x, hx = torch.randn(T, N, C).to(dtype), draw_state(layer, N)
    for name, *three in zip(("output", "h_n"), layer(x, hx), twin(x, hx), exact(x.double(), hx.double())):
        assert_close(name, *three)


def test_dropout_is_between_layers_and_in_training():
    layer, twin = twins(num_layers=3, dropout=0.4, dtype=torch.float64)
    x = torch.randn(T, N, C, dtype=torch.float64)
    assert_same({"y": layer.eval()(x)[0]}, {"y": twin.eval()(x)[0]})
    layer.train(), twin.train()
    outputs = []
    for module in (layer, twin):
        torch.manual_seed(3)
        outputs.append({"y": module(x)[0]})
    assert_same(*outputs)
    assert (outputs[0]["y"] - layer.eval()(x)[0]).abs().max() > 1e-3


def test_one_call_of_the_operation_serves_a_layer_in_one_direction():
    with routing.recording() as calls:
        nn.GRU(C, H, 3, bidirectional=True)(torch.randn(T, N, C))
    assert [call.operation for call in calls] == ["gru"] * 6


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_gives_torchs_initial_values_and_state_dicts_load_both_ways(kind, bias):
    layers = []
    for library in (nn, torch.nn):
        torch.manual_seed(3)
        layers.append(getattr(library, kind)(C, H, bias=bias, **({} if kind == "GRUCell" else {"num_layers": 2})))
    ours, twins = (layer.state_dict() for layer in layers)
    assert [*ours] == [*twins]
    assert ours._metadata == twins._metadata
    assert all(torch.equal(ours[name], twins[name]) for name in twins)
    for one, other in (layers, layers[::-1]):
        changed = {name: torch.randn_like(t) for name, t in one.state_dict().items()}
        one.load_state_dict(changed)
        other.load_state_dict(one.state_dict())
        assert all(torch.equal(t, changed[name]) for name, t in other.state_dict().items())


def test_arguments_by_position_are_those_of_torch():
    arguments = (C, H, 2, False, True, 0.5, True)
    layers = [library.GRU(*arguments, device="meta", dtype=torch.float16) for library in (nn, torch.nn)]
    assert repr(layers[0]) == repr(layers[1])
    assert {(p.device.type, p.dtype) for p in layers[0].parameters()} == {("meta", torch.float16)}
    cells = [library.GRUCell(C, H, False, "meta", torch.float16) for library in (nn, torch.nn)]
    assert repr(cells[0]) == repr(cells[1])
    assert cells[0].weight_hh.dtype == torch.float16


def test_repr_shows_the_unit():
    assert repr(nn.GRU(C, H, 2, reset_after=False)) == "GRU(3, 4, num_layers=2, reset_after=False)"
    assert repr(nn.GRUCell(C, H, reset_after=False)) == "GRUCell(3, 4, reset_after=False)"


def test_runs_on_meta():
    layer = nn.GRU(C, H, 2, bidirectional=True, device="meta")
    output, h_n = layer(torch.empty(T, N, C, device="meta"))
    assert (output.shape, h_n.shape) == ((T, N, 2 * H), (4, N, H))


def test_an_empty_batch_is_as_in_torch():
    layer, twin = twins(num_layers=2)
    x = torch.zeros(T, 0, C)
    assert [t.shape for t in layer(x)] == [t.shape for t in twin(x)]


def zeros(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **options)


REFUSED = {
    "one dimension": (zeros(C),),
    "four dimensions": (zeros(1, T, N, C),),
    "no step": (zeros(0, N, C),),
    "no step, unbatched": (zeros(0, C),),
    "other features": (zeros(T, N, C + 1),),
    "float64": (zeros(T, N, C, dtype=torch.float64),),
    "integers": (zeros(T, N, C, dtype=torch.int64),),
    "meta": (zeros(T, N, C, device="meta"),),
    "state unbatched": (zeros(T, N, C), zeros(1, H)),
    "state batched": (zeros(T, C), zeros(1, 1, H)),
    "state of another batch": (zeros(T, N, C), zeros(1, N + 1, H)),
    "state of more layers": (zeros(T, N, C), zeros(2, N, H)),
    "state of other features": (zeros(T, N, C), zeros(1, N, H + 1)),
    "state in float64": (zeros(T, N, C), zeros(1, N, H, dtype=torch.float64)),
    "state on meta": (zeros(T, N, C), zeros(1, N, H, device="meta")),
    "packed without features": (pack_padded_sequence(zeros(3, 2), [3, 1]),),
    "packed other features": (pack_padded_sequence(zeros(3, 2, C + 1), [3, 1]),),
    "packed float64": (pack_padded_sequence(zeros(3, 2, C, dtype=torch.float64), [3, 1]),),
    "packed state of another batch": (pack_padded_sequence(zeros(3, 2, C), [3, 1]), zeros(1, 3, H)),
    "packed state unbatched": (pack_padded_sequence(zeros(3, 2, C), [3, 1]), zeros(2, H)),
    "no tensor": ([1.0],),
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_gets_an_error_of_the_same_class(arguments):
    layer, twin = twins()
    with pytest.raises((ValueError, RuntimeError, AttributeError)) as want:
        twin(*arguments)
    with pytest.raises(want.type) as got:
        layer(*arguments)
    assert got.type is want.type
    assert want.type is AttributeError or str(got.value).startswith("GRU: ")


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 0},
        {"hidden_size": 0},
        {"input_size": 1.5},
        {"bias": 1},
        {"batch_first": None},
        {"dropout": 1.5},
        {"dropout": True},
        {"proj_size": 1},
        {"nonsense": 1},
    ],
    ids=str,
)
def test_options_that_torch_refuses_get_an_error_of_the_same_class(options):
    options = {"input_size": C, "hidden_size": H} | options
    with pytest.raises((ValueError, TypeError)) as want:
        torch.nn.GRU(**options)
    with pytest.raises(want.type):
        nn.GRU(**options)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"^GRU: want no proj_size"):
        nn.GRU(C, H, 1, True, False, 0.0, False, 2)
    with pytest.raises(ValueError, match=r"^GRU: want lengths with a batch"):
        nn.GRU(C, H)(zeros(T, C), lengths=torch.tensor([T]))
    with pytest.raises(ValueError, match=r"^GRU: want lengths with a padded input"):
        nn.GRU(C, H)(pack_padded_sequence(zeros(3, 2, C), [3, 1]), lengths=torch.tensor([3, 1]))
    with pytest.raises(ValueError, match=r"^gru: want lengths from 0 to 7, got 8 to 8"):
        nn.GRU(C, H)(zeros(T, N, C), lengths=torch.full((N,), T + 1))
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        nn.GRU(C, H, dropout=0.5)


class Subclass(torch.nn.GRU):
    def forward(self, input):
        return input


def test_is_what_torch_compile_takes():
    """Nothing that is a torch.nn.GRU: once this fails, ours may be one."""
    assert isinstance(nn.GRU(C, H), torch.nn.RNNBase)
    assert isinstance(nn.GRUCell(C, H), torch.nn.GRUCell)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="GRU"):
        torch.compile(Subclass(C, H), fullgraph=True, backend="eager")(zeros(T, N, C))


def compiled(layer: torch.nn.Module, **options) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager", **options)


class Within(torch.nn.Module):
    """A layer as a part of a network."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs, **options):
        return self.layer(*inputs, **options)


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built: the reference unrolls its loop")
@pytest.mark.parametrize("batch_first", [False, True])
def test_compiles_to_one_graph_for_all_sizes(batch_first):
    layer = twins(**SMALL)[0]
    layer.batch_first = batch_first
    graph = compiled(Within(layer), dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in ((7, 5), (4, 6), (9, 3)):
            x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), C, dtype=torch.float64)
            hx, lengths = draw_state(layer, batch), torch.randint(1, steps, (batch,))
            got, want = (results(module, x, hx, lengths=lengths) for module in (graph, Within(layer)))
            assert_same({name.replace("_orig_mod.", ""): t for name, t in got.items()}, want)


@pytest.mark.parametrize("given", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("ordered", [True, False], ids=["sorted", "unsorted"])
def test_packed_sequences_compile(ordered, given):
    layer = twins(**SMALL)[0]
    packed, hx = pack(ordered), draw_state(layer, N) if given else None
    got, want = (module(packed, hx) for module in (compiled(Within(layer)), layer))
    assert isinstance(got[0], PackedSequence)
    assert_same({"y": got[0].data, "h_n": got[1]}, {"y": want[0].data, "h_n": want[1]})


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built: the reference unrolls its loop")
def test_exports_with_dynamic_sizes():
    layer = twins(**SMALL)[0].eval()
    x, hx = torch.randn(T, N, C, dtype=torch.float64), draw_state(layer, N)
    t, n = torch.export.Dim("t", min=2, max=100), torch.export.Dim("n", min=2, max=100)
    program = torch.export.export(layer, (x, hx), dynamic_shapes=({0: t, 1: n}, {1: n}), strict=False)
    for steps, batch in ((T, N), (3, 9)):
        x, hx = torch.randn(steps, batch, C, dtype=torch.float64), draw_state(layer, batch)
        assert_same(*(dict(zip(("y", "h_n"), module(x, hx))) for module in (program.module(), layer)))


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(input_dtype):
    """The weights are cast as well, whatever comes in; outputs have autocast's dtype; gradients the leaves' own."""
    layer = nn.GRU(C, H, 2, bidirectional=True)
    cell = nn.GRUCell(C, H)
    x = torch.randn(T, N, C).to(input_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = layer(x)
        h = cell(x[0])
    want = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert torch.equal(output, want[0])
    assert torch.equal(h_n, want[1])
    assert torch.equal(h, copy.deepcopy(cell).bfloat16()(x[0].bfloat16()))
    (output.sum() + h.sum()).backward()
    assert x.grad.dtype == input_dtype
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_copies_are_equal_and_independent(kind, copied):
    layer = getattr(nn, kind)(C, H, reset_after=False)
    x = torch.randn(T, N, C) if kind == "GRU" else torch.randn(N, C)
    other, before = copied(layer), layer(x)
    assert repr(other) == repr(layer)
    torch.testing.assert_close(other(x), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    assert (other(x)[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_second_derivatives(packed, reset_after):
    layer = nn.GRU(2, 2, 2, bidirectional=True, dtype=torch.float64, reset_after=reset_after)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    sequence = pack_padded_sequence(x, [1, 3], enforce_sorted=False)
    names, parameters = zip(*layer.named_parameters())

    def function(data, hx, *parameters):
        input = sequence._replace(data=data) if packed else data
        output, h_n = torch.func.functional_call(layer, dict(zip(names, parameters)), (input, hx))
        return output.data if packed else output, h_n

    data = (sequence.data if packed else x).requires_grad_()
    hx = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, (data, hx, *parameters), fast_mode=True)


def test_activation_checkpointing():
    layer = nn.GRU(C, H, 2, dropout=0.5, dtype=torch.float64)
    x, hx = torch.randn(T, N, C, dtype=torch.float64), draw_state(layer, N)

    def again(x, hx):
        return checkpoint(layer, x, hx, use_reentrant=False)

    again.named_parameters = layer.named_parameters
    outcomes = []
    for module in (again, layer):
        torch.manual_seed(3)
        outcomes.append(results(module, x, hx))
    assert_same(*outcomes)


def test_flatten_parameters_is_harmless():
    layer = twins(num_layers=2)[0]
    x = torch.randn(T, N, C)
    before, places = layer(x)[0], [p.data_ptr() for p in layer.parameters()]
    layer.flatten_parameters()
    assert [p.data_ptr() for p in layer.parameters()] == places
    assert torch.equal(layer(x)[0], before)


def test_parameters_may_be_replaced_converted_shared_and_parametrized():
    layer, twin = twins(num_layers=2)
    x = torch.randn(T, N, C)
    for module in (layer, twin):
        module.weight_hh_l1 = module.weight_hh_l0
        module.double()
    assert_same({"y": layer(x.double())[0]}, {"y": twin(x.double())[0]})
    replaced = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    outputs = (torch.func.functional_call(module, replaced, x.double())[0] for module in (layer, twin))
    assert_same(*({"y": y} for y in outputs))
    for module in (layer, twin):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
        module.parametrizations.weight_ih_l0.original0.data.fill_(2)
    assert_same({"y": layer(x.double())[0]}, {"y": twin(x.double())[0]})
    copy.deepcopy(layer)


def test_an_ensemble_by_torch_func():
    """Gradients of several layers at once, by vmap over their stacked parameters."""
    layers = [nn.GRU(C, H, 2, bidirectional=True, dtype=torch.float64) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(T, N, C, dtype=torch.float64)

    def loss(parameters):
        return torch.func.functional_call(layers[0], parameters, x)[0].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i, layer in enumerate(layers):
        want = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
        assert_same({name: t[i] for name, t in grads.items()}, dict(zip(grads, want)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("given", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("batch", [(N,), ()], ids=["batched", "unbatched"])
def test_cell_equals_that_of_torch(batch, given, bias):
    cell, twin = (library.GRUCell(C, H, bias, dtype=torch.float64) for library in (nn, torch.nn))
    cell.load_state_dict(twin.state_dict())
    x = torch.randn(*batch, C, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(*batch, H, dtype=torch.float64, requires_grad=True) if given else None
    outcomes = []
    for module in (cell, twin):
        leaves = [x, *([hx] if given else []), *module.parameters()]
        h = module(x, hx)
        grads = torch.autograd.grad(h.pow(3).sum(), leaves)
        outcomes.append({"h": h} | {str(i): grad for i, grad in enumerate(grads)})
    assert_same(*outcomes)


@pytest.mark.parametrize("reset_after", [True, False])
def test_cells_make_a_sequence(reset_after):
    layer = nn.GRU(C, H, dtype=torch.float64, reset_after=reset_after)
    cell = nn.GRUCell(C, H, dtype=torch.float64, reset_after=reset_after)
    cell.load_state_dict({name.removesuffix("_l0"): t for name, t in layer.state_dict().items()})
    x = torch.randn(T, N, C, dtype=torch.float64)
    h, outputs = None, []
    for step in x:
        h = cell(step, h)
        outputs.append(h)
    assert_same({"y": torch.stack(outputs)}, {"y": layer(x)[0]})


def test_cell_compiles():
    cell = nn.GRUCell(C, H, dtype=torch.float64)
    graph = compiled(cell)
    for x in (torch.randn(N, C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)):
        assert_same({"h": graph(x)}, {"h": cell(x)})


REFUSED_BY_CELL = {
    "three dimensions": (zeros(T, N, C),),
    "state of three dimensions": (zeros(N, C), zeros(1, N, H)),
    "state unbatched": (zeros(N, C), zeros(H)),
    "state batched": (zeros(C), zeros(N, H)),
    "other features": (zeros(N, C + 1),),
    "state of another batch": (zeros(N, C), zeros(N + 1, H)),
    "state of other features": (zeros(N, C), zeros(N, H + 1)),
    "float64": (zeros(N, C, dtype=torch.float64),),
    "integers": (zeros(N, C, dtype=torch.int64),),
    "state in float64": (zeros(N, C), zeros(N, H, dtype=torch.float64)),
    "meta": (zeros(N, C, device="meta"),),
    "nothing": (None,),
}


@pytest.mark.parametrize("arguments", REFUSED_BY_CELL.values(), ids=REFUSED_BY_CELL)
def test_what_torchs_cell_refuses_gets_an_error_of_the_same_class(arguments):
    with pytest.raises((ValueError, RuntimeError, AttributeError)) as want:
        torch.nn.GRUCell(C, H)(*arguments)
    with pytest.raises(want.type) as got:
        nn.GRUCell(C, H)(*arguments)
    assert got.type is want.type
    assert arguments == (None,) or str(got.value).startswith("GRUCell: ")
