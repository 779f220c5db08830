"""Deep plain networks lose their gradient, skip connections keep it.

The gradient at layer l of a plain network x_{l+1} = T(x_l) is a product of dT/dx over all layers above. Where these are
smaller than 1 it vanishes with the depth, with sigmoid, whose slope is at most 1/4, faster than with ReLU. With a skip
connection, x_{l+1} = x_l + T(x_l), the factors are I + dT/dx, and the gradient arrives. Here T is a 3x3 convolution and
an activation, as torch.nn initialises them, without batch norm, on scikit-learn's handwritten digits. The left plot is
the norm of every layer's gradient before the first step, the right one what that means for learning.

    python examples/vanishing_gradient.py    # writes out/vanishing_gradient.png
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn import datasets
from torch import Tensor
from torch.nn import functional as F

from fastarch import nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTH = 16  # channels
BATCH = 64


class DeepNetwork(nn.Module):
    """Images x [N, 1, 8, 8] to logits [N, 10] through `depth` layers of one shape [N, WIDTH, 8, 8]."""

    def __init__(self, depth: int, activation: str, skip: bool):
        super().__init__()
        self.first = nn.Conv2d(1, WIDTH, 3, padding=1)
        convolutions = {
            "ReLU": lambda: nn.ConvReLUPool2d(WIDTH, WIDTH, 3, padding=1, pool=None),
            "sigmoid": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Sigmoid()),
        }
        self.layers = nn.ModuleList(convolutions[activation]() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 10)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x) if self.skip else layer(x)
        return self.head(x.mean((2, 3)))

    def gradient_norms(self) -> list[float]:
        """Of the loss by each layer's weight, from the first layer to the last."""
        weights = [next(layer.parameters()) for layer in self.layers]
        return [weight.grad.double().norm().item() for weight in weights]


class Result(NamedTuple):
    """`norms` by layer before the first step, `losses` by step."""

    norms: list[float]
    losses: list[float]


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits: images [N, 1, 8, 8] with mean 0 and deviation 1, labels [N]."""
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.from_numpy(digits.target).long()


def train(network: DeepNetwork, images: Tensor, labels: Tensor, steps: int) -> Iterator[float]:
    """The loss of each step, whose gradients the network still has."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,))
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        yield loss.item()


def draw(results: dict[str, Result], picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for name, result in results.items():
        style = {"label": name, "color": "tab:blue" if "ReLU" in name else "tab:orange"}
        style["linestyle"] = "-" if "skip" in name else "--"
        left.plot(range(1, len(result.norms) + 1), result.norms, **style)
        right.plot(result.losses, **style)
    left.set(yscale="log", xlabel="layer", ylabel="norm of the gradient", title="before the first step")
    right.set(yscale="log", xlabel="step", ylabel="cross-entropy", title="learning")
    left.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(
    depth: Annotated[int, typer.Option(min=2, help="layers of each network")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="of training, each on 64 digits")] = 300,
    output: Annotated[Path, typer.Option(help="where the plot goes")] = Path("out/vanishing_gradient.png"),
    quick: Annotated[bool, typer.Option("--quick", help="15 layers and 3 steps, to see that it runs")] = False,
) -> None:
    """Show the gradient of plain and residual networks, with sigmoid and with ReLU, layer by layer."""
    if quick:
        depth, steps = 15, 3
    console = Console()
    images, labels = load_digits()
    results = {}
    with Progress(console=console) as progress:
        for activation in ("sigmoid", "ReLU"):
            for skip in (False, True):
                torch.manual_seed(0)
                name = f"{activation}, {'skip' if skip else 'plain'}"
                network = DeepNetwork(depth, activation, skip)
                norms, losses = [], []
                for loss in progress.track(train(network, images, labels, steps), steps, description=name):
                    losses.append(loss)
                    norms = norms or network.gradient_norms()
                results[name] = Result(norms, losses)

    table = Table(f"{depth} layers", "gradient, first layer", "last layer", "first / last", f"loss after {steps} steps")
    for name, (norms, losses) in results.items():
        recent = losses[-20:]
        numbers = (f"{norms[0]:.1e}", f"{norms[-1]:.1e}", f"{norms[0] / norms[-1]:.1e}")
        table.add_row(name, *numbers, f"{sum(recent) / len(recent):.3f}")
    console.print(table)
    draw(results, output)
    console.print(f"Plot: {output}")


if __name__ == "__main__":
    typer.run(main)
