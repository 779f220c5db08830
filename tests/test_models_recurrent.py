"""elman, gru_classifier and lstm_classifier: lengths, layers, directions, and that they learn."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastarch import extension, models, nn

T, N, C = 9, 6, 4
NAMES = ["elman", "gru_classifier", "lstm_classifier"]


def build(name: str, **options) -> torch.nn.Module:
    return getattr(models, name)(**{"classes": 3, "channels": C, "width": 5} | options).double()


def draw(steps: int = T) -> Tensor:
    return torch.randn(N, steps, C, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_is_what_the_name_says(name):
    kind = {"elman": torch.nn.RNN, "gru_classifier": nn.GRU, "lstm_classifier": torch.nn.LSTM}[name]
    network = build(name, layers=2, bidirectional=True, dropout=0.25)
    assert type(network.rnn) is kind
    assert (network.rnn.num_layers, network.rnn.bidirectional, network.rnn.dropout) == (2, True, 0.25)
    assert network.dropout.p == 0.25
    assert network.fc.in_features == 10
    assert build(name, dropout=0.25).rnn.dropout == 0  # of which torch would warn: there is nothing between


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_lengths_cut_each_sequence(name, layers, bidirectional):
    """As if it had come alone; what lies behind it, NaN included, reaches no logit and no gradient."""
    network = build(name, layers=layers, bidirectional=bidirectional)
    x, lengths = draw(), torch.tensor([3, T, 1, 7, 7, 2])
    padded = x.clone()
    for i, length in enumerate(lengths):
        padded[i, length:] = torch.nan
    padded.requires_grad_()
    logits = network(padded, lengths)
    alone = torch.cat([network(x[i : i + 1, :length]) for i, length in enumerate(lengths)])
    torch.testing.assert_close(logits, alone)
    grads = []
    for y in (logits, alone):
        grads.append(torch.autograd.grad(y.square().sum(), list(network.parameters()), retain_graph=True))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want)
    (dx,) = torch.autograd.grad(logits.sum(), padded)
    for i, length in enumerate(lengths):
        assert dx[i, :length].all()
        assert not dx[i, length:].any()


@pytest.mark.parametrize("name", NAMES)
def test_all_lengths_are_as_none(name):
    network, x = build(name, bidirectional=True), draw()
    torch.testing.assert_close(network(x, torch.full((N,), T)), network(x))


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_read_both_ends(name):
    """The first half of the answer's input comes from the last step, the second from the first."""
    network, x = build(name, bidirectional=True), draw().requires_grad_()
    features = []
    network.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    network(x)
    for half, late in ((features[0][:, :5], True), (features[0][:, 5:], False)):
        (dx,) = torch.autograd.grad(half.sum(), x, retain_graph=True)
        norms = dx.norm(dim=(0, 2))
        assert (norms[-1] > norms[0]) == late


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built: the reference unrolls its loop")
def test_gru_classifier_compiles_with_lengths_to_one_graph_for_all_sizes():
    torch._dynamo.reset()
    network = build("gru_classifier", layers=2, bidirectional=True)
    graph = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (T, 4, 13):
            x, lengths = draw(steps), torch.randint(1, steps, (N,))
            torch.testing.assert_close(graph(x, lengths), network(x, lengths))


@pytest.mark.parametrize("name", NAMES)
def test_learns_to_tell_which_end_is_larger(name, threads):
    threads(1)  # too little for two
    network = build(name, classes=2, channels=1, width=8).float()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    x = torch.randn(64, 5, 1)
    labels = (x[:, 0] > x[:, -1]).squeeze(1).long()
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
