"""Recurrent networks forget, gates remember.

The gradient of a loss after step T with respect to the state after step t is a product of T - t Jacobians. In an Elman
network, h_t = tanh(W x_t + U h_{t-1} + b), they are diag(1 - h_t^2) U, and the product vanishes or explodes; in a GRU
and an LSTM gates can hold them near the identity. Here each network has to name, after many steps of noise, the symbol
that it saw first. The left plot is the norm of the gradient for every t before the first step of training, the middle
one after the last, the right one how they learned. The state of an LSTM is (h, c).

All start as torch.nn initialises them, but with gates open for as long as the sequences may ask: the bias of "keep" is
the logarithm of a time between 1 and T (Tallec and Ollivier 2018, arXiv 1804.11188).

    python examples/long_memory.py    # writes out/long_memory.png
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fastarch import nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SYMBOLS = 8
NOISE = 4  # channels
WIDTH = 64
BATCH = 64
KINDS = {"Elman": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}


class Memory(nn.Module):
    """Sequences x [T, N, SYMBOLS + NOISE] to logits [N, SYMBOLS] from the last state."""

    def __init__(self, kind: str, steps: int):
        super().__init__()
        self.rnn = KINDS[kind](SYMBOLS + NOISE, WIDTH)
        self.fc = nn.Linear(WIDTH, SYMBOLS)
        with torch.no_grad():
            keep = torch.empty(WIDTH).uniform_(1, steps - 1).log()
            bias = self.rnn.bias_ih_l0.split(WIDTH)
            if kind == "GRU":  # r, z, n
                bias[1].copy_(keep)
            elif kind == "LSTM":  # i, f, g, o
                bias[0].copy_(-keep)
                bias[1].copy_(keep)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][-1])

    def gradient_norms(self, x: Tensor, labels: Tensor) -> list[float]:
        """Of the loss by the state after each step, from the first to the last. In float64: float32 ends at 1e-45."""
        exact = copy.deepcopy(self).double()
        states, state = [], None
        for step in x.double():
            _, state = exact.rnn(step.unsqueeze(0), state)
            states.append(state if isinstance(state, tuple) else (state,))
        loss = F.cross_entropy(exact.fc(states[-1][0][0]), labels)
        tensors = [t for state in states for t in state]
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)  # the last c: h has passed
        grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(tensors, grads)]
        parts = len(states[0])
        return [torch.cat(grads[i : i + parts]).norm().item() for i in range(0, len(grads), parts)]


class Result(NamedTuple):
    """Norms of the gradient by step before and after training, accuracies by step of training."""

    before: list[float]
    after: list[float]
    accuracies: list[float]


def draw(steps: int) -> tuple[Tensor, Tensor]:
    """Sequences [T, N, SYMBOLS + NOISE] that show a symbol at the first step and noise at all, and the symbols [N]."""
    labels = torch.randint(SYMBOLS, (BATCH,))
    x = torch.zeros(steps, BATCH, SYMBOLS + NOISE)
    x[0, :, :SYMBOLS] = F.one_hot(labels, SYMBOLS)
    x[:, :, SYMBOLS:] = torch.randn(steps, BATCH, NOISE)
    return x, labels


def train(network: Memory, steps: int, updates: int) -> Iterator[float]:
    """The accuracy of each update's batch, before the update."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(updates):
        x, labels = draw(steps)
        optimizer.zero_grad()
        logits = network(x)
        F.cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        yield (logits.argmax(1) == labels).float().mean().item()


def plot(results: dict[str, Result], picture: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.5), constrained_layout=True)
    for name, result in results.items():
        for axis, norms in ((left, result.before), (middle, result.after)):
            axis.plot(range(1, len(norms) + 1), norms, label=name)
        smooth = torch.tensor(result.accuracies).unfold(0, min(20, len(result.accuracies)), 1).mean(1)
        right.plot(smooth, label=name)
    for axis, title in ((left, "before training"), (middle, "after training")):
        axis.set(yscale="log", ylim=(1e-20, None), xlabel="t", title=title)
    left.set_ylabel("norm of the gradient of the loss by the state")
    right.axhline(1 / SYMBOLS, color="grey", linestyle=":", label="guessing")
    right.set(ylim=(0, 1.05), xlabel="update", ylabel="accuracy", title="naming the first symbol")
    left.legend()
    right.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(min=2, help="T, of each sequence")] = 200,
    updates: Annotated[int, typer.Option(min=1, help=f"of training, each on {BATCH} sequences")] = 800,
    output: Annotated[Path, typer.Option(help="where the plot goes")] = Path("out/long_memory.png"),
    quick: Annotated[bool, typer.Option("--quick", help="20 steps and 3 updates, to see that it runs")] = False,
) -> None:
    """Show how far back the gradient reaches in an Elman network, a GRU and an LSTM, before and after training."""
    if quick:
        steps, updates = 20, 3
    console = Console()
    results = {}
    with Progress(console=console) as progress:
        for name in KINDS:
            torch.manual_seed(0)
            network, probe = Memory(name, steps), draw(steps)
            before = network.gradient_norms(*probe)
            accuracies = [*progress.track(train(network, steps, updates), updates, description=name)]
            results[name] = Result(before, network.gradient_norms(*probe), accuracies)

    table = Table(f"T = {steps}", "first / last, untrained", "first / last, trained", "accuracy")
    for name, (before, after, accuracies) in results.items():
        recent = accuracies[-20:]
        ratios = (f"{norms[0] / norms[-1]:.1e}" for norms in (before, after))
        table.add_row(name, *ratios, f"{sum(recent) / len(recent):.0%}")
    console.print(table)
    plot(results, output)
    console.print(f"Plot: {output}")


if __name__ == "__main__":
    typer.run(main)
