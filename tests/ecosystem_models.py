"""One small model that has all our layers, as users come by it: written on fastarch.nn, or fused from torch.nn."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastarch

FEATURES, CLASSES = 8, 3


class Model(nn.Module):
    """Digits of 12x12, read as a sequence of what a convolution sees; `layers` is torch.nn or fastarch.nn."""

    def __init__(self, layers):
        super().__init__()
        fused = layers is not nn
        stem = [layers.ConvReLUPool2d(1, 4, 3)] if fused else [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)]
        self.stem = layers.Sequential(*stem)
        self.norm = layers.BatchNorm2d(4)
        self.relu = layers.ReLU()
        self.embed = layers.Linear(4, FEATURES)
        self.gru = layers.GRU(FEATURES, FEATURES, batch_first=True)
        self.attention = layers.TransformerEncoderLayer(FEATURES, 2, 16, dropout=0.0, batch_first=True)
        self.head = layers.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x, _ = self.gru(self.embed(x.flatten(2).transpose(1, 2)))
        return self.head(self.attention(x).mean(1))


def twin() -> nn.Module:
    """On torch.nn alone."""
    torch.manual_seed(0)
    return Model(nn)


def written() -> nn.Module:
    model = Model(fastarch.nn)
    model.load_state_dict(twin().state_dict())
    return model


def fused() -> nn.Module:
    return fastarch.fuse(twin(), inplace=True)


KINDS = {"written": written, "fused": fused}


class Computed(Dataset):
    """Items that need our kernels."""

    def __init__(self, model: nn.Module):
        self.model = model.eval()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.model(torch.full((1, 1, 12, 12), float(i)))


def batches(steps: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 12, 12, generator=generator), torch.randint(CLASSES, (size,), generator=generator))
        for _ in range(steps)
    ]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 3) -> list[float]:
    """The losses of some steps."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for x, label in batches(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def train_shared(model: nn.Module) -> None:
    """What another process does with a model whose parameters are in shared memory."""
    torch.set_num_threads(1)
    trained(model)
