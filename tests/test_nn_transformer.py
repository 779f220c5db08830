"""The Transformer's layers stand for torch.nn's: values, gradients, masks, state_dicts, and run on our attention."""

import copy
import itertools
import pickle

import pytest
import torch
from closeness import assert_close
from dispatched import Operations
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastarch
from fastarch import extension, nn, ops

N, S, T, E, H, WIDE = 3, 17, 13, 24, 4, 40
KERNEL = "reference" if extension.cpu is None else f"cpu-{extension.isa} flash"
LAYERS = {"TransformerEncoderLayer": 1, "TransformerDecoderLayer": 2}
STACKS = {"TransformerEncoder": 1, "TransformerDecoder": 2, "Transformer": 2}
KINDS = LAYERS | STACKS  # how many sequences forward takes
OPTIONS = [
    {},
    {"norm_first": True, "batch_first": True},
    {"activation": "gelu", "bias": False, "layer_norm_eps": 0.1},
    {"activation": torch.tanh, "batch_first": True, "bias": False, "norm_first": True},
]


MASKS = ["none", "padding", "bool", "heads", "float", "causal"]
causal_mask = nn.Transformer.generate_square_subsequent_mask
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def named(value) -> str:
    """The id of a case: no address in it, for processes that share the tests compare them."""
    return str(value).replace(str(torch.tanh), "tanh")


def build(library, kind: str, norm: bool = True, **options) -> torch.nn.Module:
    options = {"d_model": E, "nhead": H, "dim_feedforward": WIDE, "dropout": 0.0} | options
    if kind in LAYERS:
        return getattr(library, kind)(**options)
    if kind == "Transformer":
        return library.Transformer(num_encoder_layers=2, num_decoder_layers=2, **options)
    layer = getattr(library, f"{kind}Layer")(**options)
    normed = torch.nn.LayerNorm(E, dtype=options.get("dtype")) if norm else None
    # torch's nested tensors, in evaluation, make its outputs at padding 0
    nested = {"enable_nested_tensor": False} if kind == "TransformerEncoder" and library is torch.nn else {}
    return getattr(library, kind)(layer, 2, normed, **nested)


def twins(kind: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and torch's, with the same parameters, of layers that are not alike."""
    module, twin = build(nn, kind, **options), build(torch.nn, kind, **options)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (E**-0.5) + (parameter == 1))
    module.load_state_dict(twin.state_dict())
    return module, twin


def draw(kind: str, dtype: torch.dtype = torch.float32, batch_first: bool = False) -> list[Tensor]:
    """In the order of forward: (src), (tgt, memory), or of Transformer (src, tgt)."""
    lengths = (S, T) if kind == "Transformer" else (T, S)[-KINDS[kind] :]
    drawn = [torch.randn(N, size, E).to(dtype) for size in lengths]
    return drawn if batch_first else [t.transpose(0, 1).contiguous() for t in drawn]


def length(kind: str) -> int:
    """Of what attends to itself, and may do so causally."""
    return S if KINDS[kind] == 1 else T


def forbid(*sizes: int) -> Tensor:
    """Of bool, but never the first key."""
    return (torch.rand(sizes) < 0.3).index_fill(-1, torch.tensor([0]), False)


def masks(kind: str, which: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | bool]:
    """By the names of forward's arguments."""
    own, hint = {
        "TransformerEncoderLayer": ("src_mask", "is_causal"),
        "TransformerEncoder": ("mask", "is_causal"),
    }.get(kind, ("tgt_mask", "tgt_is_causal"))
    if which == "causal":
        return {own: causal_mask(length(kind), dtype=dtype), hint: True}
    full, padding = {own: (length(kind), length(kind))}, {"src_key_padding_mask": S}
    if KINDS[kind] == 2:
        full, padding = full | {"memory_mask": (T, S)}, {"tgt_key_padding_mask": T, "memory_key_padding_mask": S}
    if kind == "Transformer":
        full, padding = full | {"src_mask": (S, S)}, padding | {"src_key_padding_mask": S}
    padding = {name: forbid(N, size) for name, size in padding.items()}
    return {
        "none": {},
        "padding": padding,
        "bool": padding | {name: forbid(*sizes) for name, sizes in full.items()},
        "heads": {name: forbid(N * H, *sizes) for name, sizes in full.items()},
        "float": {name: torch.randn(sizes).to(dtype) for name, sizes in full.items()},
    }[which]


def run(module: torch.nn.Module, inputs: list[Tensor], given: dict) -> dict[str, Tensor]:
    """The output and, in training, every gradient of a sum that weights each of its elements differently."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    with torch.set_grad_enabled(module.training):
        y = module(*inputs, **given)
    if not module.training:
        return {"y": y}
    leaves = {f"dinput{i}": t for i, t in enumerate(inputs)} | {f"d{name}": p for name, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum()
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def double(tensors: dict) -> dict:
    return {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("which", "options"), [*zip(MASKS, itertools.cycle(OPTIONS))], ids=named)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_as_near_as_those_of_torch(kind, which, options, dtype):
    assert_as_near(kind, which, dtype, options)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("kind", STACKS)
def test_stacks_equal_those_of_torch(kind, options):
    assert_as_near(kind, "bool", torch.float64, options)


def assert_as_near(kind: str, which: str, dtype: torch.dtype, options: dict) -> None:
    module, twin = twins(kind, dtype=dtype, **options)
    exact = copy.deepcopy(twin).double()
    inputs, given = draw(kind, dtype, options.get("batch_first", False)), masks(kind, which, dtype)
    for training in (True, False):
        got, want = (run(m.train(training), inputs, given) for m in (module, twin))
        truth = run(exact.train(training), [t.double() for t in inputs], double(given))
        assert got.keys() == want.keys() == truth.keys()
        for name in truth:
            assert_close(name, got[name], want[name], truth[name])


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(kind):
    module, twin = twins(kind, dtype=torch.float64, batch_first=True)
    inputs = [t[0] for t in draw(kind, torch.float64, batch_first=True)]
    got, want = (run(m, inputs, {}) for m in (module, twin))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_fused_operation_of_torch_runs(kind, training):
    module = build(nn, kind, batch_first=True).train(training)
    for given in ({}, masks(kind, "padding")):
        with torch.set_grad_enabled(training), Operations() as names:
            module(*draw(kind, batch_first=True), **given)
        assert not [name for name in names if "transformer" in name or "multi_head" in name or "dot_product" in name]
        assert not [name for name in names if "nested" in name]
        calls = {"TransformerEncoderLayer": 1, "TransformerEncoder": 2, "TransformerDecoder": 4, "Transformer": 6}
        attention = names.count("fastarch.attention_fwd.default")
        assert attention == (0 if extension.cpu is None else calls.get(kind, 2))


def test_explain_names_the_kernel_of_every_layer():
    model = nn.Transformer(E, H, 2, 1, WIDE, batch_first=True).eval()
    found = fastarch.explain(model, *draw("Transformer", batch_first=True))
    layers = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    layers += ["decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert [call.layer for call in found] == layers
    assert {(call.operation, call.kernel) for call in found} == {("scaled_dot_product_attention", KERNEL)}


@pytest.fixture
def promised(monkeypatch) -> list[tuple[bool, bool]]:
    """Of every call of the operation: whether it came with a mask, whether it was told to be causal."""
    calls, operation = [], ops.scaled_dot_product_attention
    spy = lambda *args: calls.append((args[3] is not None, args[5])) or operation(*args)  # noqa: E731
    monkeypatch.setattr(ops, "scaled_dot_product_attention", spy)
    return calls


MASKED, CAUSAL = (True, False), (False, True)
LOOKED_AT = {
    "float": (causal_mask(S), CAUSAL),
    "bool": (causal_mask(S).bool(), CAUSAL),
    "not itself": (causal_mask(S).bool() | (torch.eye(S) * torch.arange(S)).bool(), MASKED),
    "one more": (causal_mask(S).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(0.0)), MASKED),
    "added to what is seen": (causal_mask(S) + torch.eye(S), MASKED),
    "lowest instead of -inf": (causal_mask(S).nan_to_num(neginf=-1e9), MASKED),
    "of heads": (causal_mask(S).expand(N * H, S, S), MASKED),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("mask", "seen"), LOOKED_AT.values(), ids=LOOKED_AT)
def test_a_causal_mask_is_found_out(promised, mask, seen, batch_first):
    encoder, decoder = (build(nn, kind, batch_first=batch_first) for kind in [*STACKS][:2])
    (x,) = draw("TransformerEncoder", batch_first=batch_first)
    encoder(x, mask)
    encoder(x, mask, is_causal=False)
    decoder(x, x, mask)
    decoder(x, x, mask, tgt_is_causal=False)
    memory = (False, False)
    assert promised == [*[seen] * 2, *[MASKED] * 2, *[seen, memory] * 2, *[MASKED, memory] * 2]


def test_padding_beside_a_causal_mask(promised):
    encoder, twin = twins("TransformerEncoder", dtype=torch.float64)
    (x,), padding = draw("TransformerEncoder", torch.float64), forbid(N, S)
    mask = causal_mask(S).bool()
    torch.testing.assert_close(encoder(x, mask, padding), twin(x, mask, padding))
    assert promised == [(True, True)] * 2


def test_torchs_encoder_runs_our_layer():
    """In evaluation too, where it makes nested tensors for its own."""
    layer, twin = twins("TransformerEncoderLayer", batch_first=True)
    with pytest.warns(UserWarning, match="enable_nested_tensor is True"):
        encoder = torch.nn.TransformerEncoder(layer, 2)
    want = torch.nn.TransformerEncoder(twin, 2, enable_nested_tensor=False)
    (x,), padding = draw("TransformerEncoder", batch_first=True), torch.arange(S) >= torch.tensor([[S], [3], [8]])
    with torch.no_grad(), Operations() as names:
        y = encoder.eval()(x, src_key_padding_mask=padding)
    assert not [name for name in names if "nested" in name or "transformer" in name]
    torch.testing.assert_close(y, want(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_torchs_initial_values_and_state_dicts_load_both_ways(kind, options):
    modules = []
    for library in (nn, torch.nn):
        torch.manual_seed(3)
        modules.append(build(library, kind, **options))
    ours, twins = (module.state_dict() for module in modules)
    assert [*ours] == [*twins]
    assert ours._metadata == twins._metadata
    assert all(torch.equal(ours[name], twins[name]) for name in twins)
    for one, other in (modules, modules[::-1]):
        changed = {name: torch.randn_like(t) for name, t in one.state_dict().items()}
        one.load_state_dict(changed)
        other.load_state_dict(one.state_dict())
        assert all(torch.equal(t, changed[name]) for name, t in other.state_dict().items())


def test_arguments_by_position_are_those_of_torch():
    of_layer = (E, H, WIDE, 0.3, "gelu", 0.2, True, True, False, "meta", torch.float16)
    whole = (E, H, 2, 1, WIDE, 0.3, "gelu", None, None, 0.2, True, True, False, "meta", torch.float16)
    for kind, arguments in {**dict.fromkeys(LAYERS, of_layer), "Transformer": whole}.items():
        module, twin = (getattr(library, kind)(*arguments) for library in (nn, torch.nn))
        assert repr(module) == repr(twin)
        assert module.batch_first if kind == "Transformer" else module.self_attn.batch_first
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    defaults = [library.Transformer(device="meta") for library in (nn, torch.nn)]
    assert repr(defaults[0]) == repr(defaults[1])
    encoder, twin = (build(library, "TransformerEncoder") for library in (nn, torch.nn))
    assert encoder.enable_nested_tensor
    assert encoder.mask_check == twin.mask_check


@pytest.mark.parametrize("kind", KINDS)
def test_is_one_of_torch_of_our_layers(kind):
    module = build(nn, kind)
    assert isinstance(module, getattr(torch.nn, kind))
    for part in module.modules():
        if "ransformer" in type(part).__name__ or "Attention" in type(part).__name__:
            assert type(part) is getattr(nn, type(part).__name__)


def test_custom_encoder_and_decoder():
    class Encoder(torch.nn.Linear):
        def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
            return super().forward(src)

    modules = []
    for library in (nn, torch.nn):
        torch.manual_seed(3)
        modules.append(library.Transformer(E, H, 1, 1, WIDE, 0.0, custom_encoder=Encoder(E, E)))
    ours, twins = (module.state_dict() for module in modules)
    assert [*ours] == [*twins]
    assert all(torch.equal(ours[name], twins[name]) for name in twins)
    inputs = draw("Transformer")
    torch.testing.assert_close(*(module(*inputs) for module in modules))
    decoder = build(nn, "TransformerDecoder")
    assert nn.Transformer(E, H, 1, 1, custom_decoder=decoder).decoder is decoder


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_in_training_and_by_torchs_seed(kind):
    module, inputs = build(nn, kind, dropout=0.5), draw(kind)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(module(*inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    sure = build(nn, kind)
    sure.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(*inputs), sure(*inputs))
    assert {part.dropout for part in module.modules() if isinstance(part, nn.MultiheadAttention)} == {0.5}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind, copied):
    module, inputs = twins(kind)[0], draw(kind)
    other, before = copied(module), module(*inputs)
    assert [type(part) for part in other.modules()] == [type(part) for part in module.modules()]
    assert torch.equal(other(*inputs), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(module(*inputs), before)
    assert not other(*inputs).any()


def test_layers_of_a_stack_share_nothing():
    encoder = build(nn, "TransformerEncoder")
    places = [p.data_ptr() for layer in encoder.layers for p in layer.parameters()]
    assert len(places) == len({*places})


@pytest.mark.parametrize("kind", [*STACKS][:2])
def test_compiles_to_one_graph_with_a_causal_mask(kind):
    """Which cannot be looked at while tracing."""
    torch._dynamo.reset()
    module = getattr(nn, kind)(twins(f"{kind}Layer", dtype=torch.float64)[0], 1)
    inputs, (mask, _) = draw(kind, torch.float64), masks(kind, "causal", torch.float64).values()
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*inputs, mask).square().sum(), module.parameters()) for f in (graph, module))
    for name, *two in zip(dict(module.named_parameters()), got, want):
        torch.testing.assert_close(*two, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_exports():
    module, inputs = twins("Transformer")[0].eval(), draw("Transformer")
    given = masks("Transformer", "padding") | {"tgt_mask": causal_mask(T), "tgt_is_causal": True}
    program = torch.export.export(module, tuple(inputs), given, strict=False)
    attention = [node for node in program.graph.nodes if "fastarch.attention_fwd" in str(node.target)]
    assert len(attention) == (0 if extension.cpu is None else 6)
    torch.testing.assert_close(program.module()(*inputs, **given), module(*inputs, **given))


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind):
    """Against torch's, which computes in bfloat16 too."""
    module, twin = twins(kind)
    exact, inputs = copy.deepcopy(twin).double(), draw(kind)
    given = masks(kind, "bool")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (run(m, inputs, given) for m in (module, twin))
    truth = run(exact, [t.double() for t in inputs], given)
    assert got["dinput0"].dtype == torch.float32
    for name in truth:
        assert_close(name, got[name], want[name], truth[name])


def test_activation_checkpointing():
    layer, (x,) = build(nn, "TransformerEncoderLayer", dropout=0.5), draw("TransformerEncoderLayer")
    grads = []
    for how in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(how(x).square().sum(), layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives(kind):
    layer = getattr(nn, kind)(2, 1, 3, 0.0, torch.tanh, dtype=torch.float64)
    inputs = [torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(KINDS[kind])]
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


SRC, TGT = torch.zeros(S, N, E), torch.zeros(T, N, E)
REFUSED = [
    ("TransformerEncoderLayer", (SRC, torch.zeros(S, S).long())),
    ("TransformerEncoderLayer", (SRC, torch.zeros(S, T))),
    ("TransformerEncoderLayer", (SRC, None, torch.zeros(S, N).bool())),
    ("TransformerEncoderLayer", (SRC, None, None, True)),
    ("TransformerEncoderLayer", (SRC[..., 1:],)),
    ("TransformerEncoder", (SRC[None],)),
    ("TransformerEncoder", (SRC, torch.zeros(S, S).long())),
    ("TransformerEncoder", (SRC, torch.zeros(T, T))),
    ("TransformerEncoder", (SRC, None, torch.zeros(N, S).long())),
    ("TransformerEncoder", (SRC, None, None, True)),
    ("TransformerDecoderLayer", (TGT, SRC[:, 1:])),
    ("TransformerDecoderLayer", (TGT, SRC[..., 1:])),
    ("TransformerDecoder", (TGT, SRC, torch.zeros(T, S))),
    ("TransformerDecoder", (TGT, SRC, None, torch.zeros(S, T))),
    ("Transformer", (SRC, TGT[:, 1:])),
    ("Transformer", (SRC, TGT[..., 1:])),
    ("Transformer", (SRC, TGT, torch.zeros(T, T))),
]


@pytest.mark.parametrize(("kind", "arguments"), REFUSED)
def test_what_torch_refuses_gets_an_error_of_the_same_class(kind, arguments):
    module, twin = (build(library, kind) for library in (nn, torch.nn))
    with pytest.raises((AssertionError, RuntimeError)) as want:
        twin(*arguments)
    with pytest.raises(want.type) as got:
        module(*arguments)
    assert got.type is want.type


@pytest.mark.parametrize("options", [{"activation": "elu"}, {"nhead": 5}, {"d_model": 0}, {"nonsense": 1}], ids=str)
@pytest.mark.parametrize("kind", [*LAYERS, "Transformer"])
def test_options_that_torch_refuses_get_an_error_of_the_same_class(kind, options):
    options = {"d_model": E, "nhead": H} | options
    with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)) as want:
        getattr(torch.nn, kind)(**options)
    with pytest.raises(want.type):
        getattr(nn, kind)(**options)
