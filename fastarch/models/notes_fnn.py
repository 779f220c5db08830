"""The small feed-forward network of the lecture notes that fastarch exists for, twin of `notes_cnn`."""

from torch import Tensor

from fastarch import nn


class NotesFNN(nn.Module):
    """Images x [N, 1, 28, 28] to logits [N, classes]; 418,666 parameters with ten classes."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 512)
        self.fc2 = nn.Linear(512, 32)
        self.fc3 = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


def notes_fnn(classes: int = 10) -> NotesFNN:
    return NotesFNN(classes)
