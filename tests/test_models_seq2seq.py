"""seq2seq: what teacher forcing, greedy and beam decoding compute, and that it learns."""

import itertools

import pytest
import torch
from model_twins import TorchSeq2Seq
from torch import Tensor
from torch.nn import functional as F

from fastarch import extension, models
from fastarch.nn import BahdanauAttention, DotAttention

N, T, L, SOURCES, TARGETS = 3, 6, 4, 7, 5
BEGIN, END = 1, 2
ATTENTIONS = [None, "additive", "dot"]
PARAMETERS = {None: 12_222_224, "dot": 12_747_024, "additive": 13_272_336}
pytestmark = pytest.mark.parametrize("attention", ATTENTIONS)


def build(attention: str | None, **options) -> torch.nn.Module:
    sizes = {"source_size": SOURCES, "target_size": TARGETS, "embedding": 4, "width": 6, "begin": BEGIN, "end": END}
    network = models.seq2seq(attention, **sizes | options).double().eval()
    with torch.no_grad():
        network.fc.weight.mul_(8)  # so that tokens differ in probability
    return network


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Source [N, T], target [N, L] that begins with BEGIN, lengths [N]."""
    source, target = torch.randint(SOURCES, (N, T)), torch.randint(TARGETS, (N, L))
    target[:, 0] = BEGIN
    return source, target, torch.tensor([T, 2, 5])


def log_probability(network: torch.nn.Module, source: Tensor, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """Of tokens [N, L], up to and with the first END, by teacher forcing."""
    target = torch.cat([torch.full_like(tokens[:, :1], BEGIN), tokens[:, :-1]], 1)
    each = network(source, target, lengths).log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    ended = (tokens == END).cumsum(1) - (tokens == END).long() > 0
    return each.masked_fill(ended, 0).sum(1)


def test_parameter_count(attention):
    with torch.device("meta"):
        network = models.seq2seq(attention)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[attention]
    kind = {None: type(None), "additive": BahdanauAttention, "dot": DotAttention}[attention]
    assert type(network.attention) is kind


def test_teacher_forcing_equals_step_by_step(attention):
    """The same logits from one call for all steps as from a call for each, from the state that the last one left."""
    network, (source, target, lengths) = build(attention, layers=2), draw()
    encoded = network.encode(source, lengths)
    state, logits = encoded.state, []
    for token in target.split(1, 1):
        step, state, weights = network.decode(token, state, encoded)
        logits.append(step)
        assert (weights is None) == (attention is None)
    torch.testing.assert_close(network(source, target, lengths), torch.cat(logits, 1))


def test_later_tokens_play_no_part_in_earlier_logits(attention):
    network, (source, target, lengths) = build(attention), draw()
    before = network(source, target, lengths)
    changed = target.clone()
    changed[:, 2] = (changed[:, 2] + 1) % TARGETS
    after = network(source, changed, lengths)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert (before[:, 2:] - after[:, 2:]).abs().max() > 1e-3


def test_sources_are_as_if_alone(attention):
    """Whatever token pads them."""
    network, (source, target, lengths) = build(attention, layers=2), draw()
    padded = source.clone()
    for i, length in enumerate(lengths):
        padded[i, length:] = SOURCES - 1
    logits = network(padded, target, lengths)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(logits[i : i + 1], network(source[i : i + 1, :length], target[i : i + 1]))


def test_without_attention_the_state_is_the_bottleneck(attention):
    """What the logits depend on: the last states alone, or every state of the encoder."""
    network, (source, target, _) = build(attention), draw()
    encoded = network.encode(source)
    leaves = [encoded.memory.detach().requires_grad_(), encoded.state.detach().requires_grad_()]
    logits, *_ = network.decode(target, leaves[1], encoded._replace(memory=leaves[0]))
    memory, state = torch.autograd.grad(logits.sum(), leaves, allow_unused=True)
    assert state.any()
    assert (memory is None) == (attention is None)
    assert memory is None or memory.any(-1).all()


def test_greedy_takes_the_likeliest_token(attention):
    network, (source, _, lengths) = build(attention), draw()
    tokens, weights = network.greedy(source, 8, lengths)
    assert tokens.shape[1] <= 8
    target = torch.cat([torch.full((N, 1), BEGIN), tokens], 1)
    wanted = network(source, target, lengths)[:, :-1].argmax(-1)
    ended = (tokens == END).cumsum(1) - (tokens == END).long() > 0
    assert torch.equal(tokens[~ended], wanted[~ended])
    assert (tokens[ended] == END).all()
    if attention is None:
        assert weights is None
    else:
        assert weights.shape == (*tokens.shape, T)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert not weights[1, :, lengths[1] :].any()


def test_greedy_stops_when_all_have_ended(attention):
    network, (source, _, _) = build(attention), draw()
    with torch.no_grad():
        network.fc.bias[END] = 1e3
    assert network.greedy(source, 8).tokens.tolist() == [[END]] * N
    assert network.beam(source, 8, beams=1).tokens.tolist() == [[[END]]] * N


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_score_what_teacher_forcing_scores(attention, beams):
    network, (source, _, lengths) = build(attention, layers=2), draw()
    tokens, scores = network.beam(source, 6, beams, lengths)
    assert tokens.shape[:2] == scores.shape == (N, beams)
    assert (scores.diff(dim=1) <= 0).all()
    for beam in range(beams):
        torch.testing.assert_close(log_probability(network, source, tokens[:, beam], lengths), scores[:, beam])
    if beams == 1:
        assert torch.equal(tokens[:, 0], network.greedy(source, 6, lengths).tokens)


def test_enough_beams_find_the_likeliest_of_all(attention):
    network, (source, _, lengths) = build(attention), draw()
    tokens, scores = network.beam(source, 3, TARGETS**2, lengths)
    every = torch.tensor([*itertools.product(range(TARGETS), repeat=3)])
    for i in range(N):
        many = source[i : i + 1].expand(len(every), T), every, lengths[i : i + 1].expand(len(every))
        best, which = log_probability(network, *many).max(0)
        torch.testing.assert_close(scores[i, 0], best)
        first = every[which].tolist()
        until = first.index(END) + 1 if END in first else 3
        assert tokens[i, 0, :until].tolist() == first[:until]


def test_an_empty_batch(attention):
    network = build(attention)
    source = torch.zeros(0, T, dtype=torch.int64)
    assert network(source, source[:, :L]).shape == (0, L, TARGETS)
    assert network.greedy(source, 3).tokens.shape[0] == 0
    assert network.beam(source, 3, 2).tokens.shape[:2] == (0, 2)


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built: the reference unrolls its loop")
def test_compiles_to_one_graph_for_all_sizes(attention):
    torch._dynamo.reset()
    network = build(attention)
    graph = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, tokens in ((T, L), (T + 3, L + 1)):
            source, target = torch.randint(SOURCES, (N, steps)), torch.randint(TARGETS, (N, tokens))
            lengths = torch.randint(1, steps, (N,))
            torch.testing.assert_close(graph(source, target, lengths), network(source, target, lengths))


def test_arguments_are_checked(attention):
    with pytest.raises(ValueError, match=r"^seq2seq: want attention None, 'additive' or 'dot', got 'multiplicative'"):
        models.seq2seq("multiplicative")
    with pytest.raises(ValueError, match=r"^seq2seq: want an even width, got 7"):
        models.seq2seq(attention, width=7)


def test_learns_to_reverse(attention, threads):
    """And to decode what it learned."""
    threads(1)  # too little for two
    sizes = {"source_size": 6, "target_size": 6, "embedding": 16, "width": 32, "begin": 0, "end": 1}
    network = models.seq2seq(attention, **sizes)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    source = torch.tensor([*itertools.product(range(2, 6), repeat=3)])  # all 64 sources of three tokens
    target = F.pad(F.pad(source.flip(1), (1, 0), value=0), (0, 1), value=1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(source, target[:, :-1]).mT, target[:, 1:]).backward()
        optimizer.step()
    assert torch.equal(network.greedy(source, 4).tokens, target[:, 1:])
    assert torch.equal(network.beam(source, 4, 2).tokens[:, 0], target[:, 1:])


def test_equals_torchs_layers(attention):
    """Logits and gradients, of sequences of one length."""
    network, (source, target, _) = build(attention), draw()
    twin = TorchSeq2Seq(attention, SOURCES, TARGETS, 4, 6).double()
    twin.load_state_dict(network.state_dict())
    got, want = (results(n, source, target) for n in (network, twin))
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=lambda m, key=key: f"{key}: {m}")


def results(network: torch.nn.Module, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    logits = network(source, target)
    names, parameters = zip(*network.named_parameters())
    grads = torch.autograd.grad(logits.square().sum(), parameters)
    return {"logits": logits.detach()} | dict(zip(names, grads))
