"""The small convolutional network of the lecture notes that fastarch exists for, twin of `notes_fnn`."""

from torch import Tensor

from fastarch import nn


class NotesCNN(nn.Module):
    """Images x [N, 1, 28, 28] to logits [N, classes]; 421,642 parameters with ten classes."""

    def __init__(self, classes: int = 10, dropout: float = 0.3):
        super().__init__()
        self.conv1 = nn.ConvReLUPool2d(1, 32, 3, padding=1)  # [N, 32, 14, 14]
        self.conv2 = nn.ConvReLUPool2d(32, 64, 3, padding=1)  # [N, 64, 7, 7]
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x)).flatten(1)
        return self.fc2(self.dropout(self.fc1(x).relu()))


def notes_cnn(classes: int = 10, dropout: float = 0.3) -> NotesCNN:
    return NotesCNN(classes, dropout)
