"""LeNet-5: LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition", fig. 2.

With today's choices: ReLU for tanh, max pools for trained subsampling, all maps connected.
"""

from torch import Tensor

from fastarch import nn


class LeNet5(nn.Module):
    """Digits x [N, channels, 32, 32] to logits [N, classes]; 61,706 parameters with one channel and ten classes."""

    def __init__(self, classes: int = 10, channels: int = 1):
        super().__init__()
        self.c1 = nn.ConvReLUPool2d(channels, 6, 5)  # [N, 6, 14, 14]
        self.c3 = nn.ConvReLUPool2d(6, 16, 5)  # [N, 16, 5, 5]
        self.c5 = nn.Linear(16 * 5 * 5, 120)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c3(self.c1(x)).flatten(1)
        return self.output(self.f6(self.c5(x).relu()).relu())


def lenet5(classes: int = 10, channels: int = 1) -> LeNet5:
    return LeNet5(classes, channels)
