"""transformer: what teacher forcing, greedy and beam decoding compute, and that it learns."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from closeness import assert_all_close
from model_twins import TorchTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import fastarch
from fastarch import extension, models, routing

N, T, L, SOURCES, TARGETS = 3, 6, 4, 7, 5
LAYERS, HEADS = 2, 3
BEGIN, END = 1, 2
SIZES = {"d_model": 12, "num_heads": HEADS, "num_layers": LAYERS, "d_ff": 20, "max_len": 16}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Networks are too small for two."""
    threads(1)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Source [N, T], target [N, L] that begins with BEGIN, lengths [N]."""
    source, target = torch.randint(SOURCES, (N, T)), torch.randint(TARGETS, (N, L))
    target[:, 0] = BEGIN
    return source, target, torch.tensor([T, 2, 5])


def build(**options) -> nn.Module:
    sizes = {"source_size": SOURCES, "target_size": TARGETS, "begin": BEGIN, "end": END}
    network = models.transformer(**SIZES | sizes | options).double().eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))  # none is 0 or 1
        network.fc.weight.mul_(4)  # so that tokens differ in probability
        network.target.weight.mul_(4)  # and positions, which are much alike at first, by theirs
        network.fc.bias.sub_(network(*draw()).mean((0, 1)))  # and none is the likeliest everywhere
    return network


def twin(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    other = TorchTransformer(SOURCES, TARGETS, 12, HEADS, LAYERS, 20, 16).double()
    other.load_state_dict(network.state_dict())
    return other.to(dtype).eval()


def gradients(network: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradients of their squares."""
    logits = network(*inputs)
    parameters = {key.removeprefix("_orig_mod."): p for key, p in network.named_parameters()}  # of torch.compile
    grads = torch.autograd.grad(logits.square().sum(), list(parameters.values()))
    return {"logits": logits.detach()} | dict(zip(parameters, grads))


def log_probability(network: nn.Module, source: Tensor, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """Of tokens [N, L], up to and with the first END, by teacher forcing."""
    target = torch.cat([torch.full_like(tokens[:, :1], BEGIN), tokens[:, :-1]], 1)
    each = network(source, target, lengths).log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    ended = (tokens == END).cumsum(1) - (tokens == END).long() > 0
    return each.masked_fill(ended, 0).sum(1)


@pytest.mark.parametrize("tied", [False, True], ids=["two vocabularies", "one"])
def test_parameter_count_of_the_base_model(tied):
    sizes, d, d_ff = (1000, 1000 if tied else 1100), 512, 2048
    attention, feed_forward, norm = 4 * (d * d + d), 2 * d * d_ff + d_ff + d, 2 * d
    layers = 6 * (attention + feed_forward + 2 * norm) + 6 * (2 * attention + feed_forward + 3 * norm)
    words = sizes[0] * d if tied else (sizes[0] + 2 * sizes[1]) * d
    with torch.device("meta"):
        network = models.transformer(*sizes, tied=tied)
    assert sum(p.numel() for p in network.parameters()) == layers + words + sizes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_as_exact_as_torchs(dtype):
    network, inputs = build(dropout=0.0).to(dtype), draw()
    got, eager, truth = (gradients(n, *inputs) for n in (network, twin(network, dtype), twin(network, torch.float64)))
    assert_all_close(got, eager, truth)


def test_layers_start_different_and_embeddings_as_large_as_positions():
    network = models.transformer(500, 600, num_layers=2)
    first, second = (layer.linear1.weight for layer in network.encoder.layers)
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx((2 / (512 + 2048)) ** 0.5, rel=0.01)
    for embedding in (network.source, network.target):
        assert embedding.weight.std().item() == pytest.approx(512**-0.5, rel=0.01)


def test_later_tokens_play_no_part_in_earlier_logits():
    network, (source, target, lengths) = build(), draw()
    before = network(source, target, lengths)
    changed = target.clone()
    changed[:, 2] = (changed[:, 2] + 1) % TARGETS
    after = network(source, changed, lengths)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert (before[:, 2:] - after[:, 2:]).abs().amax((0, 2)).min() > 1e-3


def test_sources_are_as_if_alone():
    """Whatever token pads them."""
    network, (source, target, lengths) = build(), draw()
    padded = source.clone()
    for i, length in enumerate(lengths):
        padded[i, length:] = SOURCES - 1
    logits = network(padded, target, lengths)
    beams = network.beam(padded, 6, 3, lengths)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(logits[i : i + 1], network(source[i : i + 1, :length], target[i : i + 1]))
        torch.testing.assert_close(beams.scores[i : i + 1], network.beam(source[i : i + 1, :length], 6, 3).scores)


@pytest.mark.parametrize("beams", [1, 2])
def test_steps_with_a_cache_equal_teacher_forcing(beams):
    network, (source, target, lengths) = build(), draw()
    encoded = network.encode(source, lengths)
    targets = torch.stack([target, (target + 1) % TARGETS], 1)[:, :beams].flatten(0, 1)
    cache, logits = network.cache(encoded, beams, L), []
    with torch.no_grad():
        for tokens in targets.split(1, 1):
            step, cache = network.step(tokens, cache)
            logits.append(step)
    assert cache.length == L
    want = network(source.repeat_interleave(beams, 0), targets, lengths.repeat_interleave(beams))
    torch.testing.assert_close(torch.cat(logits, 1), want.detach())


def test_greedy_takes_the_likeliest_token():
    """As one finds it without a cache, by computing everything again for each token."""
    network, source, lengths = build(), torch.randint(SOURCES, (20, T)), torch.randint(1, T + 1, (20,))
    with torch.no_grad():
        network.fc.bias[END] -= 1  # not at once
    tokens = network.greedy(source, 8, lengths).tokens
    target = torch.full((20, 1), BEGIN)
    ended = torch.zeros(20, dtype=torch.bool)
    while not ended.all() and target.shape[1] <= 8:
        token = network(source, target, lengths)[:, -1].argmax(-1).masked_fill(ended, END)
        ended = ended | (token == END)
        target = torch.cat([target, token.unsqueeze(1)], 1)
    assert torch.equal(tokens, target[:, 1:])
    assert len({tuple(row) for row in tokens.tolist()}) > 4, "nothing to tell apart"


def test_greedy_stops_when_all_have_ended():
    network, (source, _, _) = build(), draw()
    with torch.no_grad():
        network.fc.bias[END] = 1e3
    assert network.greedy(source, 8).tokens.tolist() == [[END]] * N
    assert network.beam(source, 8, beams=1).tokens.tolist() == [[[END]]] * N


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_score_what_teacher_forcing_scores(beams):
    network, (source, _, lengths) = build(), draw()
    tokens, scores = network.beam(source, 6, beams, lengths)
    assert tokens.shape[:2] == scores.shape == (N, beams)
    assert (scores.diff(dim=1) <= 0).all()
    for beam in range(beams):
        torch.testing.assert_close(log_probability(network, source, tokens[:, beam], lengths), scores[:, beam])
    greedy = network.greedy(source, 6, lengths).tokens
    if beams == 1:
        assert torch.equal(tokens[:, 0], greedy)
    assert (scores[:, 0] >= log_probability(network, source, greedy, lengths) - 1e-9).all()


def test_enough_beams_find_the_likeliest_of_all():
    network, (source, _, lengths) = build(), draw()
    tokens, scores = network.beam(source, 3, TARGETS**2, lengths)
    every = torch.tensor([*itertools.product(range(TARGETS), repeat=3)])
    for i in range(N):
        many = source[i : i + 1].expand(len(every), T), every, lengths[i : i + 1].expand(len(every))
        best, which = log_probability(network, *many).max(0)
        torch.testing.assert_close(scores[i, 0], best)
        first = every[which].tolist()
        until = first.index(END) + 1 if END in first else 3
        assert tokens[i, 0, :until].tolist() == first[:until]


def test_weights_are_those_of_the_decoders_attention():
    network, (source, _, lengths) = build(), draw()
    tokens, weights = network.greedy(source, 8, lengths, need_weights=True)
    assert weights.shape == (N, LAYERS, HEADS, tokens.shape[1], T)
    other, seen = twin(network, torch.float64), []
    for layer in other.decoder.layers:
        layer.multihead_attn.register_forward_pre_hook(lambda module, inputs: seen.append((module, *inputs[:2])))
    other(source, F.pad(tokens[:, :-1], (1, 0), value=BEGIN), lengths)
    for i, (module, queries, memory) in enumerate(seen):
        w, b = (t.unflatten(0, (3, HEADS, 4)) for t in (module.in_proj_weight, module.in_proj_bias))
        q, k = (torch.einsum("nld,hed->nhle", t, w[j]) + b[j].unsqueeze(1) for j, t in enumerate((queries, memory)))
        scores = (q @ k.mT / 2).masked_fill((torch.arange(T) >= lengths.unsqueeze(1))[:, None, None], -math.inf)
        torch.testing.assert_close(weights[:, i], scores.softmax(-1).detach())


def test_an_empty_batch():
    network = build()
    source = torch.zeros(0, T, dtype=torch.int64)
    assert network(source, source[:, :L]).shape == (0, L, TARGETS)
    assert network.greedy(source, 3).tokens.shape[0] == 0
    assert network.beam(source, 3, 2).tokens.shape[:2] == (0, 2)


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
def test_kernels_serve_teacher_forcing():
    calls = fastarch.explain(build(), *draw(), timed=False)
    layers = [f"encoder.layers.{i}.self_attn" for i in range(LAYERS)]
    layers += [f"decoder.layers.{i}.{name}" for i in range(LAYERS) for name in ("self_attn", "multihead_attn")]
    assert [call.layer for call in calls] == layers
    assert all(call.kernel == f"cpu-{extension.isa} flash" for call in calls), calls


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
def test_kernels_serve_decoding():
    """The newest token looks at what is kept of all before it, the beams of a source at one memory."""
    network, (source, _, lengths) = build(), draw()
    cache = network.cache(network.encode(source, lengths), 2, 8)
    with torch.no_grad(), routing.recording() as calls:
        for _ in range(3):
            _, cache = network.step(torch.full((2 * N, 1), BEGIN), cache)
    assert {call.backend for call in calls} == {f"cpu-{extension.isa} split", f"cpu-{extension.isa} flash"}
    assert [call.operation for call in calls] == ["attention_decode", "scaled_dot_product_attention"] * LAYERS * 3
    assert [call.shapes["key"][2] for call in calls[:: 2 * LAYERS]] == [1, 2, 3]
    assert {(call.shapes["query"], call.shapes["key"]) for call in calls[1::2]} == {
        ((N, HEADS, 2, 4), (N, HEADS, T, 4))
    }


@pytest.mark.parametrize("tied", [False, True], ids=["two vocabularies", "one"])
def test_state_dict_round_trip(tied):
    network, (source, target, lengths) = build(target_size=SOURCES, tied=tied), draw()
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = build(target_size=SOURCES, tied=tied)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(source, target, lengths), network(source, target, lengths))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("tied", [False, True], ids=["two vocabularies", "one"])
def test_copies_are_equal_and_independent(tied, copied):
    network, inputs = build(target_size=SOURCES, tied=tied), draw()
    other, before = copied(network), network(*inputs)
    assert torch.equal(other(*inputs), before)
    assert (other.fc.weight is other.source.weight) == tied
    with torch.no_grad():
        other.source.weight.zero_()
    assert torch.equal(network(*inputs), before)
    assert other.fc.weight.any() != tied


def test_runs_in_bfloat16_and_under_autocast():
    network, (source, target, lengths) = build(), draw()
    want = network(source, target, lengths)
    network.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = [network(source, target, lengths)]
        scores = network.beam(source, 6, 2, lengths).scores
    network.bfloat16()
    got.append(network(source, target, lengths))
    assert network.greedy(source, 6, lengths, need_weights=True).weights.dtype == torch.bfloat16
    for logits in got:
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.double(), want, rtol=0.1, atol=0.2)
    assert scores.isfinite().all()


def test_is_one_graph():
    """As torch.compile traces and differentiates it."""
    torch._dynamo.reset()
    network, inputs = build(num_layers=1, dropout=0.0).train(), draw()
    graph = torch.compile(network, fullgraph=True, backend="aot_eager")
    got, want = gradients(graph, *inputs), gradients(network, *inputs)
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=lambda m: f"{key}: {m}")  # noqa: B023


def test_is_one_graph_for_all_sizes():
    torch._dynamo.reset()
    network = build(num_layers=1)
    graph = torch.compile(network, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, tokens in ((T, L), (T + 3, L + 1)):
            inputs = (
                torch.randint(SOURCES, (N, steps)),
                torch.randint(TARGETS, (N, tokens)),
                torch.tensor([steps, 2, 5]),
            )
            torch.testing.assert_close(graph(*inputs), network(*inputs))


def test_exports():
    network, inputs = build(), draw()
    exported = torch.export.export(network, inputs).module()
    torch.testing.assert_close(exported(*inputs), network(*inputs))


def test_dropout_is_for_training():
    network, inputs = build(dropout=0.5), draw()
    assert torch.equal(network(*inputs), network(*inputs))
    network.train()
    assert not torch.equal(network(*inputs), network(*inputs))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"^transformer: want num_heads that divide d_model 12, got 5"):
        build(num_heads=5)
    with pytest.raises(ValueError, match=r"^transformer: want one size of a tied vocabulary, got 7 and 5"):
        build(tied=True)
    network, (source, target, _) = build(), draw()
    with pytest.raises(ValueError, match=r"positions up to 16, got \[3, 18, 12\]"):
        network(source.repeat(1, 3), target)
    for decode in (network.greedy, network.beam):
        with pytest.raises(ValueError, match=r"^transformer: want a max_length of at most max_len 16, got 17"):
            decode(source, 17)


def test_learns_to_reverse():
    """And to decode what it learned."""
    sizes = {"source_size": 6, "target_size": 6, "d_model": 32, "num_heads": 4, "num_layers": 1, "d_ff": 64}
    network = models.transformer(**sizes, dropout=0.0, max_len=8, begin=0, end=1, tied=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    source = torch.tensor([*itertools.product(range(2, 6), repeat=3)])  # all 64 sources of three tokens
    target = F.pad(F.pad(source.flip(1), (1, 0), value=0), (0, 1), value=1)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(network(source, target[:, :-1]).mT, target[:, 1:]).backward()
        optimizer.step()
    network.eval()
    assert torch.equal(network.greedy(source, 4).tokens, target[:, 1:])
    assert torch.equal(network.beam(source, 4, 2).tokens[:, 0], target[:, 1:])
