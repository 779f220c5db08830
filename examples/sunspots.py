"""Recurrent networks forecast: next year's sunspots from all years before, against a linear model.

The yearly number of sunspots since 1700, which statsmodels ships, swings in about 11 years, up faster than down, to
maxima of very different height. A linear autoregression, x_t = sum_i a_i x_{t-i} + b over the ORDER years before, is
the classic model of it (Yule 1927), and hard to beat. The GRU sees one year at a time, and what it wants to know of
earlier ones it has to keep. It learns by truncated backpropagation through time: in chunks, of which each begins in the
state where the last one ended, but sends no gradient there. All forecast the years from SPLIT on, one year ahead, and
know those before; of these the GRU learns from the years until STOP, and stops where the error on the others is least.

    python examples/sunspots.py    # writes out/sunspots.png
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from statsmodels.datasets import sunspots
from torch import Tensor

from fastarch import nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STOP, SPLIT = 1890, 1930
ORDER = 9  # years of the linear model
CHUNK = 30  # years of a chunk
WIDTH = 16
PATIENCE = 50  # walks without a smaller error


class Forecaster(nn.Module):
    """A series x [T, N, 1] and a state to the value after each step [T, N, 1] and the next state."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, WIDTH)
        self.fc = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, state = self.gru(x, state)
        return x + self.fc(h), state  # the change


def load() -> tuple[Tensor, Tensor]:
    """Years [T] and their sunspot numbers [T]."""
    data = sunspots.load_pandas().data
    return torch.tensor(data.YEAR.to_numpy()), torch.tensor(data.SUNACTIVITY.to_numpy()).float()


def autoregression(x: Tensor, known: int) -> Tensor:
    """Forecasts of all of x [T] but the first ORDER, by least squares on the known ones."""
    lagged = torch.cat([x.unfold(0, ORDER, 1)[:-1], torch.ones(len(x) - ORDER, 1)], 1)
    solution = torch.linalg.lstsq(lagged[: known - ORDER], x[ORDER:known].unsqueeze(1)).solution
    return (lagged @ solution).squeeze(1)


def train(network: Forecaster, x: Tensor, epochs: int) -> Iterator[float]:
    """The mean loss of each walk over x [T]."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    series = x.view(-1, 1, 1)
    for _ in range(epochs):
        state, losses = None, []
        for inputs, targets in nn.bptt_chunks(series[:-1], series[1:], length=CHUNK):
            forecast, state = network(inputs, nn.detach_state(state))
            loss = (forecast - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield sum(losses) / len(losses)


@torch.no_grad()
def forecast(network: Forecaster, x: Tensor) -> Tensor:
    """Of all of x [T] but the first."""
    return network(x.view(-1, 1, 1))[0].flatten()[:-1]


def error(forecasts: Tensor, numbers: Tensor) -> float:
    """The root of the mean squared difference, over the last years that both have."""
    count = min(len(forecasts), len(numbers))
    return (forecasts[-count:] - numbers[-count:]).square().mean().sqrt().item()


def draw(
    years: Tensor, numbers: Tensor, forecasts: dict[str, Tensor], curves: dict[str, list[float]], picture: Path
) -> None:
    figure, (series, learning) = plt.subplots(1, 2, figsize=(13, 4.5), width_ratios=[3, 1], constrained_layout=True)
    shown = years >= SPLIT
    series.plot(years[shown], numbers[shown], label="sunspots", color="black", linewidth=1)
    for name, values in forecasts.items():
        series.plot(years[shown], values[-int(shown.sum()) :], label=name, linewidth=1)
    series.set(xlabel="year", ylabel="sunspots", title="forecasts, one year ahead")
    series.legend()
    for name, curve in curves.items():
        learning.plot(curve, label=name)
    learning.set(xlabel="walk over the years", ylabel="error of the GRU, in roots", title="learning")
    learning.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(
    epochs: Annotated[int, typer.Option(min=1, help="walks over the years")] = 400,
    output: Annotated[Path, typer.Option(help="where the plot goes")] = Path("out/sunspots.png"),
    quick: Annotated[bool, typer.Option("--quick", help="5 walks, to see that it runs")] = False,
) -> None:
    """Forecast sunspots with a GRU that learns by truncated backpropagation, and with linear models."""
    if quick:
        epochs = 5
    console = Console()
    torch.manual_seed(0)
    years, numbers = load()
    stop, split = int((years < STOP).sum()), int((years < SPLIT).sum())
    roots = numbers.sqrt()  # whose swings are more alike
    mean, deviation = roots[:stop].mean(), roots[:stop].std()
    x = (roots - mean) / deviation

    network = Forecaster()
    choosing, testing = [], []
    with Progress(console=console) as progress:
        for _ in progress.track(train(network, x[:stop], epochs), epochs, description="GRU"):
            values = (forecast(network, x) * deviation + mean).clamp(min=0)
            choosing.append(error(values[: split - 1], roots[stop:split]))
            testing.append(error(values, roots[split:]))
            best = choosing.index(min(choosing))
            if best == len(choosing) - 1:
                chosen = values.square()
            elif len(choosing) > best + PATIENCE:
                break
    curves = {f"{STOP} to {SPLIT - 1}, to choose by": choosing, f"from {SPLIT} on, the test": testing}

    forecasts = {
        "as many as this year": numbers[:-1],
        f"linear in the numbers of {ORDER} years": autoregression(numbers, split).clamp(min=0),
        f"linear in the roots of {ORDER} years": autoregression(roots, split).clamp(min=0).square(),
        "GRU": chosen,
    }
    table = Table(f"forecast of {SPLIT} to {int(years[-1])}", "root of the mean squared error, in sunspots")
    for name, values in forecasts.items():
        table.add_row(name, f"{error(values, numbers[split:]):.1f}")
    console.print(table)
    draw(years, numbers, dict([*forecasts.items()][1:]), curves, output)
    console.print(f"Plot: {output}")


if __name__ == "__main__":
    typer.run(main)
