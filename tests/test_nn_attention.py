"""nn.MultiheadAttention stands for torch.nn's: values, gradients, weights, masks, state_dicts, errors."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from closeness import assert_close
from dispatched import Operations
from torch import Tensor

from fastarch import extension, nn, ops, routing

N, L, S, E, H = 4, 19, 29, 32, 4
KERNEL = "reference" if extension.cpu is None else f"cpu-{extension.isa} flash"


class Case(NamedTuple):
    """inputs: how many of query, key and value are tensors of their own; masks: kinds and, of attn_mask, dimensions."""

    layer: dict = {}  # noqa: RUF012
    inputs: int = 1
    mask: str = ""
    padding: str = ""
    batched: bool = True
    L: int = L

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.layer.items())
        named = {"mask": self.mask, "padding": self.padding, "L": self.L if self.L != L else ""}
        masks = " ".join(f"{name}={value}" for name, value in named.items() if value)
        return f"{options} {self.inputs} inputs {masks} {'' if self.batched else 'unbatched'}".strip()


WIDE, ADDED = {"kdim": 7, "vdim": 5}, {"add_bias_kv": True, "add_zero_attn": True}
CASES = [
    Case(),
    Case(L=197, mask="causal", padding="bool"),
    Case({"bias": False}),
    Case({"batch_first": True}),
    Case({"num_heads": 1}, mask="float 2"),
    Case(inputs=2),
    Case({"bias": False, "batch_first": True}, inputs=2, padding="float"),
    Case(inputs=3),
    Case({"bias": False}, inputs=3, mask="bool 3"),
    Case(WIDE, inputs=3, padding="bool"),
    Case(WIDE | {"bias": False, "batch_first": True}, inputs=3, mask="float 3"),
    Case({"kdim": 7, "vdim": 7}, inputs=2),
    Case({"add_bias_kv": True}, inputs=2, mask="bool 2"),
    Case({"add_zero_attn": True}, inputs=2, padding="bool"),
    Case(ADDED | {"batch_first": True}, mask="float 3", padding="float"),
    Case(ADDED | WIDE, inputs=3, mask="bool 3", padding="bool"),
    Case(ADDED, inputs=2, mask="bool 2", batched=False),
    Case(mask="bool 2"),
    Case(mask="float 2", inputs=2),
    Case(mask="bool 3", padding="bool", inputs=2),
    Case(mask="float 3", padding="bool", inputs=2),
    Case(mask="bool 2", padding="float", inputs=2),
    Case(mask="float 3", padding="float"),
    Case(padding="bool"),
    Case({"batch_first": True}, mask="bool 2", padding="bool"),
    Case(mask="causal"),
    Case({"batch_first": True}, mask="causal"),
    Case(mask="causal", padding="bool"),
    Case(mask="causal", padding="float", batched=False),
    Case(batched=False),
    Case({"batch_first": True}, batched=False, inputs=2, padding="bool"),
    Case(batched=False, inputs=3, mask="float 3", padding="bool"),
]


def twins(dtype: torch.dtype = torch.float32, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our layer and torch's, with the same parameters, none of them 0."""
    options = {"embed_dim": E, "num_heads": H, "dtype": dtype} | options
    layer, twin = nn.MultiheadAttention(**options), torch.nn.MultiheadAttention(**options)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape) * E**-0.5)
    layer.load_state_dict(twin.state_dict())
    return layer, twin


def draw(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and masks by the names of forward's arguments; every query may look at the first key."""
    batch = N if case.batched else 1
    features = {"query": E, "key": case.layer.get("kdim", E), "value": case.layer.get("vdim", E)}
    length = {"query": case.L, "key": case.L if case.inputs == 1 else S}
    length["value"] = length["key"]
    inputs, masks = {}, {}
    for name in [*features][: case.inputs]:
        t = torch.randn(batch, length[name], features[name]).to(dtype)
        t = t if case.layer.get("batch_first") else t.transpose(0, 1).contiguous()
        inputs[name] = t if case.batched else t.view(length[name], features[name])

    def mask(kind: str, *sizes: int) -> Tensor:
        t = torch.rand(sizes) < 0.3 if kind == "bool" else torch.randn(sizes).to(dtype)
        return t.index_fill(-1, torch.tensor([0]), 0)

    if case.mask == "causal":
        masks["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(case.L, dtype=dtype)
    elif case.mask:
        kind, dims = case.mask.split()
        heads = case.layer.get("num_heads", H)
        masks["attn_mask"] = mask(kind, *[batch * heads] * (dims == "3"), case.L, length["key"])
    if case.padding:
        masks["key_padding_mask"] = mask(case.padding, *[batch] * case.batched, length["key"])
    return inputs, masks


def run(case: Case, layer: torch.nn.Module, inputs: dict, masks: dict, **options) -> dict[str, Tensor]:
    """Results and, in training, every gradient of a sum that weights each of their elements differently."""
    inputs = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    added = {
        name: t.detach().clone().requires_grad_()
        for name, t in masks.items()
        if t.is_floating_point() and case.mask != "causal"
    }
    three = [*inputs.values()]
    with torch.set_grad_enabled(layer.training):
        y, weights = layer(*three, *three[-1:] * (3 - len(three)), **masks | added, **options)
    found = {"y": y} | ({} if weights is None else {"weights": weights})
    if layer.training:
        generator = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in found.values())
        leaves = {f"d{name}": t for name, t in (inputs | added | dict(layer.named_parameters())).items()}
        found |= dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    return found


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


WEIGHTS = {"no_weights": {"need_weights": False}, "weights_of_heads": {"average_attn_weights": False}}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_weights_and_gradients_as_near_as_those_of_torch(case, weights, dtype):
    layer, twin = twins(dtype, **case.layer)
    exact = copy.deepcopy(twin).double()
    inputs, masks = draw(case, dtype)
    options = WEIGHTS[weights] | {"is_causal": case.mask == "causal"}
    for training in (True, False):
        got, want = (run(case, module.train(training), inputs, masks, **options) for module in (layer, twin))
        truth = run(case, exact.train(training), double(inputs), double(masks), **options)
        assert got.keys() == want.keys() == truth.keys()
        for name in truth:
            assert_close(name, got[name], want[name], truth[name])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_our_kernel_serves_it_and_no_fused_operation_of_torch(training):
    layer = twins(batch_first=True)[0].train(training)
    x = torch.randn(N, L, E)
    with torch.set_grad_enabled(training), routing.recording() as calls, Operations() as names:
        layer(x, x, x, need_weights=False)
    assert [(call.operation, call.backend) for call in calls] == [("scaled_dot_product_attention", KERNEL)]
    assert not [name for name in names if "multi_head" in name or "dot_product" in name]
    assert ("fastarch.attention_fwd.default" in names) == (extension.cpu is not None)
    with torch.set_grad_enabled(training), Operations() as names:
        layer(x, x, x)
    assert not [name for name in names if "multi_head" in name or "dot_product" in name]


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_inputs_that_are_one_tensor_are_projected_by_one_product(inputs):
    layer, x = twins(batch_first=True)[0], [torch.randn(N, L, E) for _ in range(inputs)]
    with Operations() as names, torch.no_grad():
        layer(*x, *x[-1:] * (3 - inputs), need_weights=False)
    assert sum(name.startswith(("aten.addmm", "aten.mm")) for name in names) == inputs + 1


@pytest.fixture
def received(monkeypatch) -> list:
    """What the operation is called with."""
    calls, operation = [], ops.scaled_dot_product_attention
    monkeypatch.setattr(ops, "scaled_dot_product_attention", lambda *args: calls.append(args) or operation(*args))
    return calls


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_operation_reads_the_projection_itself(received, batch_first):
    layer = twins(batch_first=batch_first)[0]
    x, memory = torch.randn(2, 5, 5, E)
    layer(x, x, x, need_weights=False)
    layer(x, memory, memory, need_weights=False)
    (q, k, v, *_), (_, k2, v2, *_) = received
    assert [t.shape for t in (q, k, v)] == [(5, H, 5, E // H)] * 3
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1
    assert k2.untyped_storage().data_ptr() == v2.untyped_storage().data_ptr()


def test_masks_stay_small_and_a_promise_replaces_the_causal_one(received):
    layer, x = twins()[0], torch.randn(L, N, E)
    forbidden, padding = torch.ones(L, L).triu(1).bool(), torch.zeros(N, L).bool()
    options = [
        {"key_padding_mask": padding},
        {"attn_mask": forbidden},
        {"attn_mask": forbidden, "key_padding_mask": padding},
        {"attn_mask": forbidden.expand(N * H, L, L), "key_padding_mask": padding},
        {"attn_mask": forbidden, "is_causal": True},
        {"attn_mask": forbidden, "is_causal": True, "key_padding_mask": padding},
    ]
    for given in options:
        layer(x, x, x, need_weights=False, **given)
    masks, causal = zip(*((call[3], call[5]) for call in received))
    assert [None if m is None else (*m.shape,) for m in masks] == [
        (N, 1, 1, L),
        (L, L),
        (N, 1, L, L),
        (N, H, L, L),
        None,
        (N, 1, 1, L),
    ]
    assert {mask.dtype for mask in masks if mask is not None} == {torch.bool}
    assert causal == (False, False, False, False, True, True)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_keys_that_the_layer_adds_are_seen_by_all_under_a_promise_too(options):
    """torch.nn, without weights, lets the kernel's causal mask hide them, and with weights does not."""
    layer, twin = twins(torch.float64, **options)
    x, mask = torch.randn(L, N, E).double(), nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    want = twin(x, x, x, attn_mask=mask, is_causal=True)[0]
    for need_weights in (True, False):
        torch.testing.assert_close(layer(x, x, x, None, need_weights, mask, is_causal=True)[0], want)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_may_look_nowhere_gets_the_bias_and_no_gradient(kind):
    layer = twins()[0]
    forbidden = torch.zeros(L, L, dtype=torch.bool)
    forbidden[4] = True
    mask = forbidden if kind == "bool" else torch.zeros(L, L).masked_fill(forbidden, -torch.inf)
    for need_weights in (True, False):
        x = torch.randn(L, N, E, requires_grad=True)
        memory = torch.randn(L, N, E)
        y, weights = layer(x, memory, memory, attn_mask=mask, need_weights=need_weights)
        torch.testing.assert_close(y[4], layer.out_proj.bias.expand(N, E))
        assert weights is None or not weights[:, 4].any()
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert not grad[4].any()
        assert grad[[3, 5]].all()


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_weights_are_the_mean_over_heads_unless_told_otherwise(batched):
    layer, twin = twins(torch.float64)
    x = torch.randn(L, *[N] * batched, E).double()
    for got, want in zip(layer(x, x, x), twin(x, x, x)):
        torch.testing.assert_close(got, want)


def test_results_with_and_without_weights_are_the_same():
    layer, x = twins(torch.float64)[0], torch.randn(L, N, E).double()
    y, weights = layer(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], y)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, H, L).double())


def test_weights_of_half_precision_are_computed_in_float32_and_rounded_once():
    layer, x = twins(torch.bfloat16)[0], torch.randn(L, N, E).bfloat16()
    q, k, _ = (layer.heads(t).float() for t in layer.project(x, x, x))
    want = (q @ k.mT * (E // H) ** -0.5).softmax(-1).bfloat16()
    assert torch.equal(layer(x, x, x, average_attn_weights=False)[1], want)


@pytest.mark.parametrize("batch_first", [True, False])
def test_results_are_contiguous(batch_first):
    layer, x = twins(batch_first=batch_first)[0], torch.randn(L, N, E)
    assert all(layer(x, x, x, need_weights=need)[0].is_contiguous() for need in (True, False))


def counting(p: float, length: int) -> torch.nn.Module:
    """Whose y, times length * (1 - p), counts the keys that dropout kept: all weights are equal and all values 1."""
    layer = nn.MultiheadAttention(E, H, dropout=p)
    with torch.no_grad():
        layer.in_proj_weight.zero_()
        layer.in_proj_bias[2 * E :] = 1
        layer.out_proj.weight.copy_(torch.eye(E))
    return layer


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_drops_its_share_in_training_and_by_torchs_seed(need_weights):
    p, length = 0.3, 200
    layer, x = counting(p, length), torch.randn(length, 8, E)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(x, x, x, need_weights=need_weights, average_attn_weights=False))
    (y, weights), (again, _), (other, _) = results
    kept = y.detach() * length * (1 - p)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-2)
    assert abs(kept.mean().item() / length - (1 - p)) < 0.005  # of 1.28 million: the standard deviation is 0.0004
    assert kept.std() > 1
    assert torch.equal(y, again)
    assert not torch.equal(y, other)
    if need_weights:
        torch.testing.assert_close((weights != 0).sum(-1).float(), kept[..., :: E // H].permute(1, 2, 0))
    torch.testing.assert_close(layer.eval()(x, x, x, need_weights=need_weights)[0], torch.ones_like(y))


SETTINGS = [{}, {"bias": False, "add_bias_kv": True}, WIDE | {"batch_first": True}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_seed_gives_torchs_initial_values_and_state_dicts_load_both_ways(options):
    layers = []
    for library in (nn, torch.nn):
        torch.manual_seed(3)
        layers.append(library.MultiheadAttention(E, H, **options))
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
    arguments = (E, H, 0.5, False, True, True, 5, 6, True, "meta", torch.float16)
    layer, twin = (library.MultiheadAttention(*arguments) for library in (nn, torch.nn))
    assert repr(layer) == repr(twin)
    assert {name: (p.shape, p.dtype, p.device.type) for name, p in layer.named_parameters()} == {
        name: (p.shape, p.dtype, p.device.type) for name, p in twin.named_parameters()
    }
    names = ("dropout", "add_zero_attn", "kdim", "vdim", "batch_first", "head_dim")
    assert all(getattr(layer, name) == getattr(twin, name) for name in names)


def test_is_one_of_torch():
    assert isinstance(nn.MultiheadAttention(E, H), torch.nn.MultiheadAttention)


def test_runs_on_meta():
    layer, x = nn.MultiheadAttention(E, H, device="meta"), torch.empty(L, N, E, device="meta")
    assert layer(x, x, x, need_weights=False)[0].shape == (L, N, E)
    assert [t.shape for t in layer(x, x, x)] == [(L, N, E), (N, L, L)]


@pytest.mark.parametrize("shapes", [((L, 0), (S, 0)), ((0, N), (S, N)), ((L, N), (0, N))], ids=str)
def test_empty_inputs_are_as_in_torch(shapes):
    query, key = (torch.zeros(*shape, E) for shape in shapes)
    masks = {"attn_mask": torch.zeros(len(query), len(key)).bool()}
    for need_weights in (True, False):
        got, want = (module(query, key, key, None, need_weights, **masks) for module in twins())
        torch.testing.assert_close(got[0], want[0])
        assert (got[1] is None) if want[1] is None else (got[1].shape == want[1].shape)


X, Y = torch.zeros(L, N, E), torch.zeros(S, N, E)
REFUSED = {
    "one dimension": (X[0, 0], X[0, 0], X[0, 0]),
    "four dimensions": (X[None], X[None], X[None]),
    "key unbatched": (X, Y[:, 0], Y[:, 0]),
    "query unbatched": (X[:, 0], Y, Y),
    "other features of query": (X[..., 1:], Y, Y),
    "other features of key": (X, Y[..., 1:], Y[..., 1:]),
    "other features of value": (X, Y, Y[..., 1:]),
    "another length of value": (X, Y, X),
    "another batch of key": (X, Y[:, 1:], Y[:, 1:]),
    "a batch of one": (X, Y[:, :1], Y[:, :1]),
    "float64": (X.double(), X.double(), X.double()),
    "integers": (X.long(), X.long(), X.long()),
    "meta": (X.to("meta"), X, X),
    "nested": (torch.nested.as_nested_tensor([X[0], X[1]]),) * 3,
    "padding of one dimension": (X, Y, Y, torch.zeros(S).bool()),
    "padding of another length": (X, Y, Y, torch.zeros(N, L).bool()),
    "padding of another batch": (X, Y, Y, torch.zeros(1, S).bool()),
    "padding of integers": (X, Y, Y, torch.zeros(N, S).long()),
    "padding unbatched": (X[:, 0], Y[:, 0], Y[:, 0], torch.zeros(1, S).bool()),
    "mask of one dimension": (X, Y, Y, None, True, torch.zeros(S)),
    "mask of four dimensions": (X, Y, Y, None, True, torch.zeros(N, H, L, S)),
    "mask of another length": (X, Y, Y, None, True, torch.zeros(L, L)),
    "mask of another batch": (X, Y, Y, None, True, torch.zeros(N, L, S)),
    "mask of integers": (X, Y, Y, None, True, torch.zeros(L, S).long()),
    "mask in float64": (X, Y, Y, None, True, torch.zeros(L, S).double()),
    "mask in bfloat16": (X, Y, Y, None, False, torch.zeros(L, S).bfloat16()),
    "mask unbatched": (X[:, 0], Y[:, 0], Y[:, 0], None, True, torch.zeros(L, L)),
    "mask of more heads unbatched": (X[:, 0], Y[:, 0], Y[:, 0], None, True, torch.zeros(H + 1, L, S)),
    "causal without a mask": (X, X, X, None, False, None, True, True),
    "causal of another length": (X, X, X, torch.zeros(N, L).bool(), False, torch.zeros(S, S), True, True),
    "no tensor": ([1.0], X, X),
    "mask no tensor": (X, X, X, None, True, [0.0]),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_gets_an_error_of_the_same_class(arguments):
    layer, twin = twins()
    with pytest.raises((AssertionError, RuntimeError, AttributeError, TypeError)) as want:
        twin(*arguments)
    with pytest.raises(want.type) as got:
        layer(*arguments)
    assert got.type is want.type


NAMED = [
    (f"want query of {E} features, got [{L}, {N}, {E - 1}]", (X[..., 1:], Y, Y)),
    (f"want query and key of one batch, got [{L}, {N}, {E}], [{S}, {N - 1}, {E}]", (X, Y[:, 1:], Y[:, 1:])),
    (f"want key_padding_mask [{N}, {S}], got [1, {S}]", (X, Y, Y, torch.zeros(1, S).bool())),
    (f"want attn_mask [{L}, {S}] or [{N * H}, {L}, {S}], got [{L}, {L}]", REFUSED["mask of another length"]),
    ("want padded tensors, got nested ones", REFUSED["nested"]),
    ("query is on cpu, attn_mask on meta", (X, X, X, None, False, torch.zeros(L, L, device="meta"))),
]


@pytest.mark.parametrize(("message", "arguments"), NAMED, ids=[message for message, _ in NAMED])
def test_errors_say_what_was_wanted_and_what_came(message, arguments):
    with pytest.raises((AssertionError, RuntimeError)) as got:
        twins()[0](*arguments)
    assert str(got.value) == f"MultiheadAttention: {message}"


@pytest.mark.parametrize("options", [{"num_heads": 5}, {"embed_dim": 0}, {"num_heads": -1}, {"nonsense": 1}], ids=str)
def test_options_that_torch_refuses_get_an_error_of_the_same_class(options):
    options = {"embed_dim": E, "num_heads": H} | options
    with pytest.raises((AssertionError, ValueError, TypeError)) as want:
        torch.nn.MultiheadAttention(**options)
    with pytest.raises(want.type):
        nn.MultiheadAttention(**options)


class SelfAttention(torch.nn.Module):
    """A layer as a part of a network."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, padding, need_weights=True, **options):
        y, weights = self.layer(x, x, x, padding, need_weights, **options)
        return y.square(), weights


@pytest.mark.parametrize(
    ("options", "weights"),
    [({}, "no_weights"), (ADDED | {"batch_first": True}, "weights_of_heads")],
    ids=str,
)
def test_compiles_to_one_graph_for_all_sizes(options, weights):
    torch._dynamo.reset()
    layer = SelfAttention(twins(torch.float64, **options)[0])
    graph = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((2, 9), (3, 6), (5, 13)):
            sizes = (batch, length) if layer.layer.batch_first else (length, batch)
            x, padding = torch.randn(*sizes, E).double(), torch.zeros(batch, length).bool()
            padding[1, 4:] = True
            mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
            outcomes = []
            for module in (graph, layer):
                y, w = module(x, padding, attn_mask=mask, is_causal=True, **WEIGHTS[weights])
                outcomes.append([y, *([] if w is None else [w]), *torch.autograd.grad(y.sum(), layer.parameters())])
            for got, want in zip(*outcomes, strict=True):
                torch.testing.assert_close(got, want)


def test_exports_with_dynamic_sizes():
    layer = SelfAttention(twins(batch_first=True)[0].eval())
    sizes = {0: torch.export.Dim("n", min=2, max=100), 1: torch.export.Dim("l", min=2, max=100)}
    arguments, options = (torch.randn(N, L, E), torch.zeros(N, L).bool()), {"need_weights": False}
    shapes = {"x": sizes, "padding": sizes, "need_weights": None}
    program = torch.export.export(layer, arguments, options, dynamic_shapes=shapes, strict=False)
    assert extension.cpu is None or any("fastarch.attention_fwd" in str(node.target) for node in program.graph.nodes)
    x, padding = torch.randn(N + 3, 7, E), torch.zeros(N + 3, 7).bool()
    padding[1, 4:] = True
    torch.testing.assert_close(program.module()(x, padding, **options)[0], layer(x, padding, **options)[0])


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights, input_dtype):
    """Against torch's, which computes in bfloat16 too; gradients have the leaves' own dtype."""
    case = Case(ADDED, mask="float 2", padding="bool")
    layer, twin = twins(**case.layer)
    inputs, masks = draw(case, input_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (run(case, module, inputs, masks, need_weights=need_weights) for module in (layer, twin))
    truth = run(case, copy.deepcopy(twin).double(), double(inputs), double(masks), need_weights=need_weights)
    assert got["y"].dtype == torch.bfloat16
    assert got["dquery"].dtype == input_dtype
    for name in truth:
        assert_close(name, got[name], want[name], truth[name])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copied):
    layer, x = twins(**ADDED)[0], torch.randn(L, N, E)
    other, before = copied(layer), layer(x, x, x)[0]
    assert type(other) is nn.MultiheadAttention
    assert torch.equal(other(x, x, x)[0], before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x, x, x)[0], before)
    assert not other(x, x, x)[0].any()


@pytest.mark.parametrize("need_weights", [True, False])
def test_second_derivatives(need_weights):
    layer = nn.MultiheadAttention(2, 1, dtype=torch.float64, add_bias_kv=True)
    names, parameters = zip(*layer.named_parameters())
    mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False, False, True, False]])

    def function(query, key, mask, *parameters):
        arguments = (query, key, key, padding, need_weights, mask)
        results = torch.func.functional_call(layer, dict(zip(names, parameters)), arguments)
        return results if need_weights else results[0]

    query, key = (torch.randn(length, 1, 2, dtype=torch.float64, requires_grad=True) for length in (3, 4))
    assert torch.autograd.gradgradcheck(function, (query, key, mask, *parameters), fast_mode=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_transforms(need_weights):
    layer, x = twins(torch.float64)[0], torch.randn(4, L, N, E, dtype=torch.float64)

    def function(x):
        return layer(x, x, x, need_weights=need_weights)[0]

    torch.testing.assert_close(torch.func.vmap(function)(x), torch.stack([function(t) for t in x]))
    leaf = x[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda t: function(t).square().sum())(x[0]), want)
