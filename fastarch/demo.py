"""The main job on real input: LeNet-5 learns handwritten digits, on our kernels and on PyTorch's layers at once."""

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fastarch.measure import now, saved_bytes
from fastarch.models import lenet5

BATCH = 64
SIDE = 32  # LeNet-5 looks at 32x32


class Digits(NamedTuple):
    """Images [N, 1, 32, 32] with mean 0 and standard deviation 1, labels [N]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    source: str


class Learner:
    """A network in training, and what it cost."""

    def __init__(self, name: str, network: nn.Module):
        self.name = name
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = now(images.device)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(now(images.device) - start)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return (self.predict(images) == labels).float().mean().item()

    def predict(self, images: Tensor) -> Tensor:
        self.network.eval()
        with torch.no_grad():
            return torch.cat([self.network(part).argmax(1) for part in images.split(512)])


def torch_lenet5(like: nn.Module) -> nn.Module:
    """LeNet-5 of PyTorch's layers with the same weights."""
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(400, 120), nn.ReLU()),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )
    network.load_state_dict(dict(zip(network.state_dict(), like.state_dict().values())))
    return network


def load_digits(folder: Path | None) -> Digits:
    """scikit-learn's 1,797 digits (UCI optical recognition, 8x8), or MNIST's IDX files in a folder."""
    if folder is not None:
        parts = [
            (idx(folder, f"{part}-images-idx3-ubyte"), idx(folder, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        ]
        source = f"MNIST in {folder}"
    else:
        from sklearn import datasets  # an extra

        digits = datasets.load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images, labels = torch.from_numpy(digits.images)[order], torch.from_numpy(digits.target)[order]
        parts = [(images[:1437], labels[:1437]), (images[1437:], labels[1437:])]
        source = "scikit-learn's handwritten digits"
    mean, deviation = parts[0][0].float().mean(), parts[0][0].float().std()
    train, test = (
        (F.interpolate((i.float().unsqueeze(1) - mean) / deviation, SIDE, mode="bilinear"), labels.long())
        for i, labels in parts
    )
    return Digits(train, test, source)


def idx(folder: Path, name: str) -> Tensor:
    """A file in MNIST's IDX format, gzipped or not: two zero bytes, the type (8: bytes), the rank, sizes, values."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise FileNotFoundError(f"demo: want {name} or {name}.gz in {folder}")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    values = bytearray(content[4 + 4 * rank :])
    if not rank or not values or len(values) != math.prod(sizes):
        raise ValueError(f"demo: {path} is not an IDX file of bytes")
    return torch.frombuffer(values, dtype=torch.uint8).reshape(sizes)


def run(digits: Digits, epochs: int, picture: Path, device: torch.device, console: Console) -> None:
    torch.manual_seed(0)
    train, test = (tuple(t.to(device) for t in part) for part in (digits.train, digits.test))
    console.print(f"LeNet-5 on {digits.source}: {len(train[1])} to learn from, {len(test[1])} to test, on {device}")

    network = lenet5()
    ours, torchs = (
        Learner(name, n.to(device)) for name, n in (("fastarch", network), ("PyTorch", torch_lenet5(network)))
    )
    steps = max(1, len(train[1]) // BATCH)  # per epoch; what is left over waits for the next
    with Progress(console=console) as progress:
        task = progress.add_task("both learn from the same batches", total=epochs * steps)
        for _ in range(epochs):
            order = torch.randperm(len(train[1]), device=device)
            for batch in order.split(BATCH)[:steps]:
                images, labels = train[0][batch], train[1][batch]
                for learner in (ours, torchs):
                    learner.step(images, labels)
                progress.update(task, advance=1, description=f"loss {ours.losses[-1]:.4f} and {torchs.losses[-1]:.4f}")

    report(ours, torchs, train, test, steps, console)
    draw(ours, torchs, test, digits.source, picture)
    console.print(f"Loss curves and predictions: {picture}")


def report(ours: Learner, torchs: Learner, train, test, steps: int, console: Console) -> None:
    table = Table("", "fastarch", "PyTorch", "")
    accuracies = [learner.accuracy(*test) for learner in (ours, torchs)]
    table.add_row("test accuracy", *(f"{a:.1%}" for a in accuracies), "")
    medians = [torch.tensor(learner.seconds).median().item() for learner in (ours, torchs)]
    speed = f"[bold green]{medians[1] / medians[0]:.2f} times as fast"
    table.add_row("training step, median", *(f"{m * 1e3:.2f} ms" for m in medians), speed)
    totals = [sum(learner.seconds) for learner in (ours, torchs)]
    table.add_row("training, total", *(f"{t:.1f} s" for t in totals), f"{totals[1] / totals[0]:.2f} times as fast")
    saved = [saved_bytes(learner.network, train[0][:BATCH].clone()) for learner in (ours, torchs)]
    table.add_row("kept for the backward", *(f"{s / 1e6:.2f} MB" for s in saved), f"{1 - saved[0] / saved[1]:.0%} less")
    for name, part in (("loss, first epoch", slice(0, steps)), ("loss, last epoch", slice(-steps, None))):
        curves = [learner.losses[part] for learner in (ours, torchs)]
        apart = max(abs(a - b) for a, b in zip(*curves))
        table.add_row(name, *(f"{sum(c) / len(c):.5f}" for c in curves), f"at most {apart:.2g} apart")
    console.print(table)


def draw(ours: Learner, torchs: Learner, test, source: str, picture: Path) -> None:
    import matplotlib  # an extra

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(11, 4.5), constrained_layout=True)
    curves, grid = figure.subfigures(1, 2, width_ratios=[3, 2])
    axis = curves.subplots()
    axis.plot(torchs.losses, label="PyTorch", linewidth=3, color="tab:orange", alpha=0.6)
    axis.plot(ours.losses, label="fastarch", linewidth=1, color="tab:blue")
    axis.set(
        yscale="log", xlabel="step", ylabel="cross-entropy", title="LeNet-5 from the same weights, on the same batches"
    )
    axis.legend()
    images, labels = test[0][:24].cpu(), test[1][:24].cpu()
    grid.suptitle(f"predictions on {source}", fontsize="medium")
    for cell, image, want, got in zip(grid.subplots(4, 6).flat, images, labels, ours.predict(test[0][:24]).cpu()):
        cell.imshow(image[0].numpy(), cmap="gray_r")
        cell.set_title(f"{got}", fontsize="small", color="black" if got == want else "red")
        cell.axis("off")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
