"""gpt2 and bert: what Hugging Face's originals compute, from the same weights, and how they generate."""

import copy
import pickle

import pytest
import torch
from closeness import TIMES_EAGER, assert_close
from torch import Tensor, nn

import fastarch
from fastarch import extension, models, routing
from fastarch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="the originals are Hugging Face's")

N, L, VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 3, 7, 41, 32, 24, 2, 3
SIZES = {"vocabulary": VOCABULARY, "context": CONTEXT, "width": WIDTH, "layers": LAYERS, "heads": HEADS}
PARAMETERS = {"gpt2": 124_439_808, "bert": 109_482_240}
EAGER = {"attn_implementation": "eager"}
BLOCK = {"gpt2": "transformer.h.1.attn", "bert": "encoder.layer.1.attention.self"}


def gpt2_original(**options) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    tokens = {"bos_token_id": 1, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | tokens | EAGER | options))


def bert_original(**options) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "hidden_size": WIDTH}
    layers = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    return transformers.BertModel(transformers.BertConfig(**sizes | layers | EAGER | options))


ORIGINALS = {"gpt2": gpt2_original, "bert": bert_original}
FULL = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "bert": lambda: transformers.BertModel(transformers.BertConfig()),
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # too little for two


@pytest.fixture(params=PARAMETERS)
def name(request) -> str:
    return request.param


@torch.no_grad()
def build(name: str, **options) -> nn.Module:
    """Ours, small, with weights as after training: none of them is 0 or 1, and outputs depend on all of them."""
    network = getattr(models, name)(**SIZES | options).eval()
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network


def original_of(name: str, network: nn.Module) -> nn.Module:
    original = ORIGINALS[name]().eval()
    original.load_state_dict(network.state_dict(), strict=True)
    return original


def tokens_of(length: int = L) -> Tensor:
    return torch.randint(VOCABULARY, (N, length))


def padding() -> Tensor:
    mask = torch.ones(N, L, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[2, 1:] = 0
    return mask


def results(network: nn.Module, *inputs, **options) -> dict[str, Tensor]:
    """Outputs, and every parameter's gradient of a sum of theirs that weighs each element by its own number."""
    returned = network(*inputs, **options)
    if isinstance(returned, Tensor):
        outputs = {"logits": returned}
    elif hasattr(returned, "logits"):
        outputs = {"logits": returned.logits}
    else:
        outputs = {key: getattr(returned, key) for key in ("last_hidden_state", "pooler_output")}
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in outputs.values())
    parameters = dict(network.named_parameters())
    return outputs | dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


def assert_as_exact(name: str, network: nn.Module, *inputs, **options) -> None:
    eager = original_of(name, network)
    truth = results(copy.deepcopy(eager).double(), *inputs, **options)
    got, eager = (results(n, *inputs, **options) for n in (network, eager))
    assert got.keys() == eager.keys() == truth.keys()
    for key in truth:
        if key.endswith(".key.bias"):  # 0, as softmax does not see what all scores of a row share: units at its terms'
            terms = truth[key.replace("bias", "weight")].abs().max().item()
            error, own = ((t - truth[key]).abs().max().item() for t in (got[key], eager[key]))
            assert error <= TIMES_EAGER * own + torch.finfo(got[key].dtype).eps * terms, key
            continue
        assert_close(key, got[key], eager[key], truth[key])


def test_parameter_count(name):
    with torch.device("meta"):
        network = getattr(models, name)()
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


def test_state_dict_has_the_originals_keys_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = getattr(models, name)().state_dict(), FULL[name]().state_dict()
    assert [(key, t.shape) for key, t in ours.items()] == [(key, t.shape) for key, t in theirs.items()]


def test_state_dict_loads_both_ways(name):
    network, tokens = build(name), tokens_of()
    original = original_of(name, network)
    other = getattr(models, name)(**SIZES).eval()
    other.load_state_dict(original.state_dict(), strict=True)
    with torch.no_grad():
        for got, want in zip(other(tokens), network(tokens)):
            assert torch.equal(got, want)


def test_outputs_and_gradients_are_as_exact_as_the_originals(name):
    assert_as_exact(name, build(name), tokens_of())


def test_bert_with_padding_and_two_sentences():
    types = (torch.arange(L) >= 3).long().expand(N, L)
    assert_as_exact("bert", build("bert"), tokens_of(), attention_mask=padding(), token_type_ids=types)


def test_bert_sees_no_padding():
    network, tokens, mask = build("bert").double(), tokens_of(), padding()
    padded = tokens.masked_fill(mask == 0, 5)
    for i, length in enumerate(mask.sum(1)):
        alone = network(tokens[i : i + 1, :length])
        torch.testing.assert_close(network(padded, mask).last_hidden_state[i : i + 1, :length], alone.last_hidden_state)


def test_training_drops(name):
    """In training and not in evaluation, and with no probability nothing."""
    network, tokens = build(name).train(), tokens_of()
    assert not torch.equal(network(tokens)[0], network(tokens)[0])
    without = build(name, dropout=0.0).train()
    without.load_state_dict(network.state_dict())
    torch.testing.assert_close(without(tokens)[0], network.eval()(tokens)[0])


def test_weights_start_as_the_originals(name):
    sizes = {"vocabulary": 500, "context": 300, "width": 192, "layers": 2, "heads": 3}
    original = {
        "gpt2": {"vocab_size": 500, "n_positions": 300, "n_embd": 192},
        "bert": {"vocab_size": 500, "max_position_embeddings": 300, "hidden_size": 192, "intermediate_size": 768},
    }
    theirs = ORIGINALS[name](**original[name]).state_dict()
    for key, parameter in getattr(models, name)(**sizes).state_dict().items():
        assert parameter.shape == theirs[key].shape
        assert parameter.mean().item() == pytest.approx(theirs[key].mean().item(), abs=3e-3), key
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(theirs[key].std().item(), rel=0.2), key
        else:
            assert torch.equal(parameter, theirs[key]), key
    if name == "bert":
        assert not getattr(models, name)(**sizes).embeddings.word_embeddings.weight[0].any()


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
def test_a_kernel_serves_attention(name):
    calls = fastarch.explain(build(name), tokens_of(), timed=False)
    assert [call.operation for call in calls] == ["scaled_dot_product_attention"] * LAYERS
    assert all(call.kernel == f"cpu-{extension.isa} flash" for call in calls)
    assert calls[1].layer == BLOCK[name]


def test_queries_keys_and_values_are_views_of_one_projection(monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention

    def spy(*tensors, **options):
        seen.append({t.untyped_storage().data_ptr() for t in tensors})
        return attention(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    build("gpt2")(tokens_of())
    assert [len(storages) for storages in seen] == [1] * LAYERS


def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    network, tokens = build(name), tokens_of()
    graph = torch.compile(network, fullgraph=True, backend="aot_eager")
    got, want = results(graph, tokens), results(network, tokens)
    for key, t in want.items():
        torch.testing.assert_close(got[key if key in got else f"_orig_mod.{key}"], t)


def test_exports_with_any_length(name):
    network, tokens = build(name), tokens_of()
    length = torch.export.Dim("length", min=2, max=CONTEXT)
    program = torch.export.export(network, (tokens,), dynamic_shapes=({1: length},) if name == "gpt2" else None)
    torch.testing.assert_close(program.module()(tokens), network(tokens))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_share_no_weight(name, copied):
    network, tokens = build(name), tokens_of()
    other = copied(network)
    assert torch.equal(other(tokens)[0], network(tokens)[0])
    if name == "gpt2":
        assert other.lm_head.weight is other.transformer.wte.weight
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert network(tokens)[0].any()


def test_runs_in_half_precision(name):
    network, tokens = build(name), tokens_of()
    want = network(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = network(tokens)[0]
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1 * want.abs().max().item())
    got = network.bfloat16()(tokens)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1 * want.abs().max().item())


def test_an_empty_batch(name):
    network, tokens = build(name), tokens_of()
    assert tuple(t.shape for t in as_tuple(network(tokens[:0]))) == tuple(
        (0, *t.shape[1:]) for t in as_tuple(network(tokens))
    )


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@pytest.mark.parametrize(
    ("name", "message", "call"),
    [
        ("gpt2", "want at most 32 tokens, got 33", lambda n: n(tokens_of(33))),
        ("bert", "want at most 32 tokens, got 33", lambda n: n(tokens_of(33))),
        ("bert", r"want attention_mask \[3, 7\], got \[3, 1, 7\]", lambda n: n(tokens_of(), padding()[:, None])),
        ("gpt2", "want from 1 to 33 tokens in all, got 7 and 27 more", lambda n: n.generate(tokens_of(), 27)),
        ("gpt2", "want from 1 to 33 tokens in all, got 0 and 2 more", lambda n: n.generate(tokens_of(0), 2)),
        ("gpt2", "want temperature >= 0, got -1", lambda n: n.generate(tokens_of(), 1, temperature=-1)),
        ("gpt2", "want top_k >= 1 or None, got 0", lambda n: n.generate(tokens_of(), 1, 1.0, 0)),
    ],
)
def test_errors_name_the_network(name, message, call):
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        call(build(name))


def test_heads_divide_the_width(name):
    with pytest.raises(ValueError, match=f"^{name}: want a width that is a multiple of heads, got 24 and 5"):
        build(name, heads=5)


def test_tokens_read_in_parts_give_the_logits_of_all():
    """With a cache: a prompt, a few tokens, then one by one."""
    network, tokens = build("gpt2").double(), tokens_of(12)
    with torch.no_grad():
        cache = network.cache(N, 12)
        got = [network(part, cache) for part in tokens.split([5, 3, 1, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(got, 1), network(tokens))
    assert cache.lengths.tolist() == [12] * N


@torch.no_grad()
def test_sequences_of_a_cache_may_differ_in_length():
    network, tokens = build("gpt2").double(), tokens_of(9)
    cache, lengths = network.cache(N, 9), torch.tensor([5, 2, 4], dtype=torch.int32)
    network(tokens[:, :5], cache)
    cache.lengths.copy_(lengths)  # what stands behind is padding, and will be written over
    nexts = tokens[:, 5:].gather(1, torch.zeros(N, 1, dtype=torch.int64))
    got = network(nexts, cache)
    for i, length in enumerate(lengths):
        alone = torch.cat([tokens[i, :length], nexts[i]]).unsqueeze(0)
        torch.testing.assert_close(got[i, -1], network(alone)[0, -1])


def test_generation_equals_that_without_a_cache_and_the_originals():
    network, tokens = build("gpt2").double(), tokens_of()
    got = network.generate(tokens, 12)
    want = tokens
    for _ in range(12):
        want = torch.cat([want, network(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)
    original = original_of("gpt2", network).double()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(got, original.generate(tokens, attention_mask=torch.ones_like(tokens), **options))


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
def test_steps_attend_to_the_cache():
    with routing.recording() as calls:
        build("gpt2").generate(tokens_of(), 3)
    assert [call.operation for call in calls] == ["attention_decode"] * 3 * LAYERS
    assert all(call.backend == f"cpu-{extension.isa} split" for call in calls)
    assert [call.shapes["query"][2] for call in calls[::LAYERS]] == [L, 1, 1]
    assert {call.shapes["key"] for call in calls} == {(N, HEADS, L + 2, WIDTH // HEADS)}


def test_generation_may_fill_the_context():
    network = build("gpt2")
    assert network.generate(tokens_of(), CONTEXT + 1 - L).shape == (N, CONTEXT + 1)


def test_a_sequence_that_ended_has_nothing_but_the_end():
    network, tokens = build("gpt2").double(), tokens_of()
    free = network.generate(tokens, 12)[:, L:]
    end = free[0, 3].item()
    got = network.generate(tokens, 12, end=end)[:, L:]
    for sequence, unbound in zip(got.tolist(), free.tolist()):
        until = unbound.index(end) + 1 if end in unbound else len(sequence)
        assert sequence[:until] == unbound[:until]
        assert set(sequence[until:]) <= {end}
    assert network.generate(tokens[:1], 12, end=end).shape[1] == L + free[0].tolist().index(end) + 1


def test_samples_are_distributed_as_the_softmax_says():
    network = build("gpt2").double()
    tokens, draws = tokens_of(3)[:1], 4000
    logits = network(tokens)[0, -1].detach() / 1.7
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        drawn = network.generate(tokens.expand(draws, -1), 1, 1.7, generator=generator, **options)[:, -1]
        return drawn.bincount(minlength=VOCABULARY) / draws

    error = 5 * (0.25 / draws) ** 0.5
    assert (frequencies() - logits.softmax(0)).abs().max() < error
    best = logits.topk(4).indices
    few = frequencies(top_k=4)
    assert few[best].sum().item() == pytest.approx(1)
    assert (few[best] - logits[best].softmax(0)).abs().max() < error


def test_sampling_repeats_with_its_generator():
    network, tokens = build("gpt2"), tokens_of()
    first, second, other = (
        network.generate(tokens, 8, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(network.generate(tokens, 8, 1.0, top_k=1), network.generate(tokens, 8))


def test_generation_under_autocast():
    network, tokens = build("gpt2"), tokens_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert network.generate(tokens, 3).shape == (N, L + 3)
        assert network.cache(N, 4).keys.dtype == torch.bfloat16


@torch.no_grad()
def test_one_graph_serves_all_steps():
    torch._dynamo.reset()
    network, tokens = build("gpt2"), tokens_of(6)
    step = torch.compile(network, fullgraph=True, backend="aot_eager")
    cache, want = network.cache(N, 6), network(tokens)
    network(tokens[:, :2], cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(2, 6):
            torch.testing.assert_close(step(tokens[:, i : i + 1], cache)[:, 0], want[:, i])
