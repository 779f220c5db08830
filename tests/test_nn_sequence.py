"""What stands beside the recurrent layers: attention that returns its weights, and truncated backpropagation."""

import doctest
import importlib

import pytest
import torch
from torch import Tensor

import fastarch
from fastarch import nn

N, L, T, S, H, WIDTH = 4, 3, 6, 5, 7, 8
LAYERS = {"additive": lambda: nn.BahdanauAttention(S, H, WIDTH).double(), "dot": lambda: nn.DotAttention()}


def drawn(kind: str) -> tuple[Tensor, Tensor]:
    states, memory = torch.randn(N, L, S if kind == "additive" else H), torch.randn(N, T, H)
    return states.double(), memory.double()


def score(layer: torch.nn.Module, s: Tensor, h: Tensor) -> Tensor:
    """e of one state and one step, as the papers write it."""
    if isinstance(layer, nn.DotAttention):
        return s.dot(h)
    return layer.score.weight[0].dot((layer.state.weight @ s + layer.memory.weight @ h + layer.memory.bias).tanh())


@pytest.mark.parametrize("kind", LAYERS)
def test_attention_by_the_papers_equations(kind):
    layer, (states, memory) = LAYERS[kind](), drawn(kind)
    lengths = torch.tensor([T, 1, 4, 2])
    context, weights = layer(states, memory, lengths)
    assert (context.shape, weights.shape) == ((N, L, H), (N, L, T))
    for i in range(N):
        steps = memory[i, : lengths[i]]
        for step in range(L):
            alpha = torch.stack([score(layer, states[i, step], h) for h in steps]).softmax(0)
            torch.testing.assert_close(weights[i, step, : lengths[i]], alpha)
            torch.testing.assert_close(context[i, step], alpha @ steps)
        assert not weights[i, :, lengths[i] :].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_attention_without_lengths_looks_everywhere(kind):
    layer, (states, memory) = LAYERS[kind](), drawn(kind)
    for got, want in zip(layer(states, memory), layer(states, memory, torch.full((N,), T))):
        torch.testing.assert_close(got, want)
    assert (layer(states, memory)[1] > 0).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_padding_counts_for_nothing(kind):
    """NaN in it reaches no result and no gradient, and nothing to look at gives 0."""
    layer, (states, memory) = LAYERS[kind](), drawn(kind)
    lengths = torch.tensor([T, 0, 4, 2])
    results = []
    for padding in (0.0, torch.nan):
        padded = memory.clone()
        for i in range(N):
            padded[i, lengths[i] :] = padding
        leaves = [states.clone().requires_grad_(), padded.requires_grad_(), *layer.parameters()]
        context, weights = layer(*leaves[:2], lengths)
        results.append([context, weights, *torch.autograd.grad(context.pow(2).sum(), leaves)])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    assert not results[0][0][1].any()
    assert not results[0][1][1].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_attention_compiles_and_differentiates_twice(kind):
    torch._dynamo.reset()
    layer, (states, memory) = LAYERS[kind](), drawn(kind)
    lengths = torch.tensor([T, 1, 4, 2])
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(graph(states, memory, lengths), layer(states, memory, lengths)):
        torch.testing.assert_close(got, want)
    leaves = [t.requires_grad_() for t in (states, memory)]
    assert torch.autograd.gradgradcheck(lambda s, h: layer(s, h, lengths), leaves, fast_mode=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_attention_names_what_it_wants(kind):
    layer, (states, memory) = LAYERS[kind](), drawn(kind)
    for arguments in ((states[0], memory), (states, memory[0]), (states[:2], memory)):
        with pytest.raises(ValueError, match=r"Attention: want states \[N, L, S\] and memory \[N, T, H\], got"):
            layer(*arguments)
    with pytest.raises(ValueError, match=r"Attention: want lengths \[4\], got \[3\]"):
        layer(states, memory, torch.ones(3, dtype=torch.int64))
    if kind == "dot":
        with pytest.raises(ValueError, match=r"DotAttention: want states of 7 features, got \[4, 3, 5\]"):
            layer(states[..., :S], memory)


@pytest.mark.parametrize("dim", [0, 1])
def test_chunks_are_views_of_all_steps(dim):
    x, y = torch.randn(11, 11, 2), torch.randn(11, 11)
    chunks = [*nn.bptt_chunks(x, y, length=4, dim=dim)]
    assert [chunk.shape[dim] for chunk, _ in chunks] == [4, 4, 3]
    for i, whole in enumerate((x, y)):
        parts = [chunk[i] for chunk in chunks]
        assert torch.equal(torch.cat(parts, dim), whole)
        assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
    assert [len(chunk) for chunk in nn.bptt_chunks(x, length=20)] == [1]


def test_chunks_name_what_they_want():
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"^bptt_chunks: want sequences of one length, got \[5, 2\]"):
        nn.bptt_chunks(x, x.T, length=2)
    with pytest.raises(ValueError, match=r"^bptt_chunks: want sequences of one length, got \[\]"):
        nn.bptt_chunks(length=2)
    with pytest.raises(ValueError, match=r"^bptt_chunks: want a length of at least 1, got 0"):
        nn.bptt_chunks(x, length=0)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_the_state_goes_on_and_the_gradient_stops(kind):
    layer = getattr(nn, kind)(2, 3, dtype=torch.float64)
    x = torch.randn(9, 4, 2, dtype=torch.float64, requires_grad=True)
    state, outputs = None, []
    for (chunk,) in nn.bptt_chunks(x, length=4):
        output, state = layer(chunk, nn.detach_state(state))
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), layer(x)[0])
    (grad,) = torch.autograd.grad(outputs[-1].sum(), x)
    assert not grad[:8].any()
    assert grad[8].all()


def test_states_of_all_kinds_are_detached():
    t = torch.randn(2, requires_grad=True) * 2
    assert nn.detach_state(None) is None
    detached = nn.detach_state((t, [t, None]))
    assert not detached[0].requires_grad
    assert not detached[1][0].requires_grad
    assert detached[1][0].data_ptr() == t.data_ptr()
    assert detached[1][1] is None


@pytest.mark.parametrize("module", ["gru_weights", "truncated_bptt"])
def test_examples_of_the_docstrings_run(module):
    names = {"fastarch": fastarch, "torch": torch}
    failed, tried = doctest.testmod(importlib.import_module(f"fastarch.nn.{module}"), extraglobs=names)
    assert tried
    assert not failed
