"""A Transformer translates: numbers in French words become numbers in English words.

"quatre-vingt-dix-sept" becomes "ninety-seven": four times twenty, ten and seven, which English counts in tens. Nobody
tells the network that. Of the numbers below a million it reads two in a hundred, word by word in both languages, and is
tested on others. The plot shows where the last layer of its decoder looks, in the mean of its heads: rows are what it
wrote, columns what it read.

    python examples/french_numbers.py    # writes out/french_numbers.png
"""

import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import torch
import typer
from num2words import num2words
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fastarch import models

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KNOWN = 20_000  # numbers to learn from, besides all below a hundred
BATCH = 64
BEGIN, END = 0, 1
LENGTH = 15  # words of the longest English number, hyphens, comma and END
SHOWN = (1_497, 80_071, 421_690)  # in the plot; held out


class Batch(NamedTuple):
    """source [N, T] padded behind its lengths [N], target [N, 1 + L] from BEGIN to END, padded with BEGIN."""

    source: Tensor
    lengths: Tensor
    target: Tensor


@functools.cache
def words(number: int, language: str) -> list[str]:
    return re.findall(r"\w+|[-,]", num2words(number, lang=language))


def text(tokens: list[str]) -> str:
    return " ".join(tokens).replace(" - ", "-").replace(" ,", ",")


# what three digits, a thousand and a comma are written with
READ, WRITTEN = (sorted({w for n in [*range(1001), 1100] for w in words(n, language)}) for language in ("fr", "en"))


def split(count: int) -> tuple[list[int], list[int]]:
    """Numbers to learn from, and `count` that are held out: of three to six digits, each as often as it can be."""
    generator = random.Random(0)
    numbers = {*SHOWN}
    while len(numbers) < KNOWN + count:
        numbers.add(int(10 ** generator.uniform(2, 6)))
    others = sorted(numbers - {*SHOWN})
    generator.shuffle(others)
    numbers = [*SHOWN, *others]
    return [*range(100), *numbers[count:]], numbers[:count]


def encode(numbers: list[int]) -> Batch:
    french = [[READ.index(w) for w in words(n, "fr")] for n in numbers]
    english = [[BEGIN, *(2 + WRITTEN.index(w) for w in words(n, "en")), END] for n in numbers]
    lengths = torch.tensor([len(tokens) for tokens in french])
    return Batch(pad(french), lengths, pad(english))


def pad(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [BEGIN] * (longest - len(row)) for row in rows])


def decode(tokens: Tensor) -> list[str]:
    written = tokens.tolist()
    written = written[: written.index(END)] if END in written else written
    return [WRITTEN[token - 2] if token != BEGIN else "?" for token in written]


def build() -> torch.nn.Module:
    sizes = {"d_model": 128, "num_heads": 4, "num_layers": 2, "d_ff": 256, "dropout": 0.0, "max_len": 32}
    return models.transformer(len(READ), 2 + len(WRITTEN), **sizes, begin=BEGIN, end=END)


def train(network: torch.nn.Module, numbers: list[int], steps: int) -> Iterator[float]:
    """The loss of each step, the mean over all words of a batch."""
    generator = random.Random(1)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for _ in range(steps):
        batch = encode(generator.choices(numbers, k=BATCH))
        optimizer.zero_grad()
        logits = network(batch.source, batch.target[:, :-1], batch.lengths)
        loss = F.cross_entropy(logits.mT, batch.target[:, 1:], ignore_index=BEGIN)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def test(network: torch.nn.Module, numbers: list[int]) -> list[tuple[str, str, str]]:
    """What it read, what it wrote, and what is right."""
    results = []
    for i in range(0, len(numbers), 512):
        part = numbers[i : i + 512]
        batch = encode(part)
        tokens = network.greedy(batch.source, LENGTH, batch.lengths).tokens
        results += [
            (num2words(n, lang="fr"), text(decode(row)), num2words(n, lang="en")) for n, row in zip(part, tokens)
        ]
    return results


def align(network: torch.nn.Module, number: int) -> tuple[Tensor, Tensor]:
    """Tokens [L] that it writes for a number, END too, and where it looks for each of them, [L, T]."""
    tokens, weights = network.greedy(encode([number]).source, LENGTH, need_weights=True)
    return tokens[0], weights[0, -1].mean(0)


def show(network: torch.nn.Module, losses: list[float], picture: Path) -> None:
    figure = plt.figure(figsize=(12, 8), constrained_layout=True)
    grid = figure.subplots(2, 2, width_ratios=[2, 3])
    for axis, number in zip((grid[0, 0], grid[0, 1], grid[1, 1]), SHOWN):
        read, (tokens, weights) = words(number, "fr"), align(network, number)
        labels = ["begin", "end", *WRITTEN]
        axis.imshow(weights.numpy(), cmap="Greys", aspect="auto", vmin=0, vmax=1)
        axis.set_xticks(range(len(read)), read, rotation=45, ha="left", rotation_mode="anchor")
        axis.set_yticks(range(len(tokens)), [labels[token] for token in tokens])
        axis.set_xlabel(f"{number:,}  →  {text(decode(tokens))}")
        axis.xaxis.tick_top()
    grid[1, 0].plot(losses, linewidth=0.8)
    grid[1, 0].set(yscale="log", xlabel="step", ylabel="cross-entropy per word", title="learning")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(min=1, help=f"of training, each on {BATCH} numbers")] = 1500,
    count: Annotated[int, typer.Option(min=len(SHOWN), help="of held-out numbers to test")] = 5000,
    output: Annotated[Path, typer.Option(help="where the plot goes")] = Path("out/french_numbers.png"),
    quick: Annotated[bool, typer.Option("--quick", help="5 steps and 64 numbers, to see that it runs")] = False,
) -> None:
    """Learn to translate numbers from French to English, and show where the decoder looks."""
    if quick:
        steps, count = 5, 64
    console = Console()
    known, held_out = split(count)
    torch.manual_seed(0)
    network = build()
    losses = [*track(train(network, known, steps), total=steps, description="learning", console=console)]

    results = test(network.eval(), held_out)
    correct, wrong = ([r for r in results if (r[1] == r[2]) is outcome] for outcome in (True, False))
    table = Table("read", "written", "right", title="some numbers, and what went wrong")
    for read, written, right in correct[:5] + wrong[:5]:
        table.add_row(read, written if written == right else f"[red]{written}", right)
    console.print(table)
    console.print(f"{len(correct) / count:.2%} of {count} held-out numbers are translated exactly")
    show(network, losses, output)
    console.print(f"Plot: {output}")


if __name__ == "__main__":
    typer.run(main)
