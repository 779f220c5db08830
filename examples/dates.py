"""Attention aligns: an encoder and a decoder learn to write dates, as people write them, in ISO 8601.

"Tuesday, the 3rd of May 1979" becomes "1979-05-03", character by character. The decoder chooses where to look in the
source by e_lj = v' tanh(W s_l + U h_j) (Bahdanau et al. 2014): nobody tells it where the year stands, or that "May" is
05. The plot shows where it looks: rows are what it wrote, columns what it read. It is tested on days that it has never
seen in any form. Beside it learns the same network without attention, whose decoder knows of the source no more than
the state that it starts from.

    python examples/dates.py    # writes out/dates.png
"""

import datetime
import random
import string
from collections.abc import Callable, Iterator
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

from fastarch import models

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MONTHS = ["January", "February", "March", "April", "May", "June"]
MONTHS += ["July", "August", "September", "October", "November", "December"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
HELD_OUT = 10  # one day in so many is for the test
BATCH = 128
BEGIN, END = 0, 1
READ = string.ascii_letters + string.digits + " ,./-"
WRITTEN = "-0123456789"  # the decoder's alphabet, after BEGIN and END
LENGTH = 11  # characters of an ISO date, and END


def ordinal(day: int) -> str:
    ending = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


# d: the date, m: its month's name, w: its weekday's
FORMATS: list[Callable[[datetime.date, str, str], str]] = [
    lambda d, m, w: f"{d.day} {m} {d.year}",
    lambda d, m, w: f"{m} {d.day}, {d.year}",
    lambda d, m, w: f"{w}, the {ordinal(d.day)} of {m} {d.year}",
    lambda d, m, w: f"{w}, {m} {ordinal(d.day)}, {d.year}",
    lambda d, m, w: f"the {ordinal(d.day)} of {m} {d.year}",
    lambda d, m, w: f"{ordinal(d.day)} {m[:3]} {d.year}",
    lambda d, m, w: f"{m[:3]} {d.day} {d.year}",
    lambda d, m, w: f"{w[:3]} {d.day:02} {m[:3].upper()} {d.year}",
    lambda d, m, w: f"{d.day}-{m[:3]}-{d.year}",
    lambda d, m, w: f"{d.day}.{d.month}.{d.year}",
    lambda d, m, w: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d, m, w: f"{d.month}/{d.day}/{d.year}",
    lambda d, m, w: f"{d.month:02}/{d.day:02}/{d.year}",
    lambda d, m, w: f"{d.year}/{d.month:02}/{d.day:02}",
    lambda d, m, w: f"{d.year} {m} {d.day}",
    lambda d, m, w: f"{d.year}{d.month:02}{d.day:02}",
    lambda d, m, w: f"{m.lower()} {d.day} {d.year}",
    lambda d, m, w: f"{w.lower()} {d.day} {m.lower()} {d.year}",
]


class Batch(NamedTuple):
    """source [N, T] padded behind its lengths [N], target [N, 1 + LENGTH] from BEGIN to END."""

    source: Tensor
    lengths: Tensor
    target: Tensor


def human(date: datetime.date, form: int) -> str:
    return FORMATS[form](date, MONTHS[date.month - 1], DAYS[date.weekday()])


def split() -> tuple[list[datetime.date], list[datetime.date]]:
    """All days from FIRST to LAST: those to learn from, and those held out."""
    days = [FIRST + datetime.timedelta(i) for i in range((LAST - FIRST).days + 1)]
    random.Random(0).shuffle(days)
    return days[len(days) // HELD_OUT :], days[: len(days) // HELD_OUT]


def encode(texts: list[str], dates: list[datetime.date]) -> Batch:
    lengths = torch.tensor([len(text) for text in texts])
    source = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    for row, text in zip(source, texts):
        row[: len(text)] = torch.tensor([READ.index(c) for c in text])
    target = [[BEGIN, *(2 + WRITTEN.index(c) for c in date.isoformat()), END] for date in dates]
    return Batch(source, lengths, torch.tensor(target))


def draw(days: list[datetime.date], count: int, generator: random.Random) -> tuple[list[str], list[datetime.date]]:
    dates = generator.choices(days, k=count)
    return [human(date, generator.randrange(len(FORMATS))) for date in dates], dates


def decode(tokens: Tensor) -> str:
    written = tokens.tolist()
    written = written[: written.index(END)] if END in written else written
    return "".join(WRITTEN[token - 2] if token != BEGIN else "?" for token in written)


def build(attention: str | None) -> torch.nn.Module:
    sizes = {"source_size": len(READ), "target_size": 2 + len(WRITTEN), "embedding": 32, "width": 128}
    return models.seq2seq(attention, **sizes, begin=BEGIN, end=END)


def train(network: torch.nn.Module, days: list[datetime.date], steps: int) -> Iterator[float]:
    """The loss of each step, the mean over all characters of a batch."""
    generator = random.Random(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        batch = encode(*draw(days, BATCH, generator))
        optimizer.zero_grad()
        logits = network(batch.source, batch.target[:, :-1], batch.lengths)
        loss = F.cross_entropy(logits.mT, batch.target[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def test(network: torch.nn.Module, days: list[datetime.date], count: int) -> list[tuple[str, str, str]]:
    """What it read, what it wrote, and what is right."""
    texts, dates = draw(days, count, random.Random(2))
    results = []
    for i in range(0, count, 512):
        batch = encode(texts[i : i + 512], dates[i : i + 512])
        tokens = network.greedy(batch.source, LENGTH, batch.lengths).tokens
        results += zip(texts[i : i + 512], map(decode, tokens), (date.isoformat() for date in dates[i : i + 512]))
    return results


def align(network: torch.nn.Module, text: str) -> tuple[str, Tensor]:
    """What it writes for a text, and where it looks for each character, [L, T]."""
    batch = encode([text], [FIRST])
    tokens, weights = network.greedy(batch.source, LENGTH)
    written = decode(tokens[0])
    return written, weights[0, : len(written)]


def show(network: torch.nn.Module, date: datetime.date, losses: dict[str, list[float]], picture: Path) -> None:
    figure = plt.figure(figsize=(12, 7.5), constrained_layout=True)
    grid = figure.subplots(2, 2, width_ratios=[3, 2])
    for axis, form in zip(grid.flat, (2, 11, 7)):
        text = human(date, form)
        written, weights = align(network, text)
        axis.imshow(weights.numpy(), cmap="Greys", aspect="auto", vmin=0, vmax=1)
        axis.set_xticks(range(len(text)), list(text), family="monospace")
        axis.set_yticks(range(len(written)), list(written), family="monospace")
        axis.set_title(f"{text}  →  {written}", fontsize="medium")
        axis.xaxis.tick_top()
    for name, curve in losses.items():
        grid[1, 1].plot(curve, label=name, linewidth=0.8)
    grid[1, 1].set(yscale="log", xlabel="step", ylabel="cross-entropy per character", title="learning")
    grid[1, 1].legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(min=1, help=f"of training, each on {BATCH} dates")] = 500,
    count: Annotated[int, typer.Option(min=1, help="of held-out dates to test")] = 5000,
    output: Annotated[Path, typer.Option(help="where the plot goes")] = Path("out/dates.png"),
    quick: Annotated[bool, typer.Option("--quick", help="5 steps and 64 dates, to see that it runs")] = False,
) -> None:
    """Learn to write dates in ISO 8601, and show where the decoder looks."""
    if quick:
        steps, count = 5, 64
    console = Console()
    known, held_out = split()
    networks, losses = {}, {}
    with Progress(console=console) as progress:
        for name, attention in (("no attention", None), ("additive attention", "additive")):
            torch.manual_seed(0)
            networks[name] = build(attention)
            learning = train(networks[name], known, steps)
            losses[name] = [*progress.track(learning, steps, description=name)]

    table = Table("", "read", "written", "right", title="some dates, and what went wrong")
    for name, network in networks.items():
        results = test(network.eval(), held_out, count)
        correct, wrong = ([r for r in results if (r[1] == r[2]) is outcome] for outcome in (True, False))
        for text, written, right in correct[:3] + wrong[:3]:
            table.add_row(name, text, written if written == right else f"[red]{written}", right)
        exact = 1 - len(wrong) / count
        console.print(f"{name}: {exact:.1%} of {count} held-out dates are right, written in {len(FORMATS)} ways")
    console.print(table)
    show(networks["additive attention"], held_out[0], losses, output)
    console.print(f"Plot: {output}")


if __name__ == "__main__":
    typer.run(main)
