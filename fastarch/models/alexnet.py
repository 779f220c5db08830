"""AlexNet: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", arXiv 1404.5997.

The variant of torchvision, whose pretrained weights load: a fused layer keeps the index of its convolution.
"""

from collections import OrderedDict

from torch import Tensor

from fastarch import nn


class AlexNet(nn.Module):
    """Images x [N, 3, H, W], H and W >= 63, to logits [N, classes]; 61,100,840 parameters with a thousand classes."""

    def __init__(self, classes: int = 1000, dropout: float = 0.5):
        super().__init__()
        pool = {"pool_size": 3, "pool_stride": 2}
        layers = {
            "0": nn.ConvReLUPool2d(3, 64, 11, stride=4, padding=2, **pool),
            "3": nn.ConvReLUPool2d(64, 192, 5, padding=2, **pool),
            "6": nn.ConvReLUPool2d(192, 384, 3, padding=1, pool=None),
            "8": nn.ConvReLUPool2d(384, 256, 3, padding=1, pool=None),
            "10": nn.ConvReLUPool2d(256, 256, 3, padding=1, **pool),
        }
        self.features = nn.Sequential(OrderedDict(layers))
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def alexnet(classes: int = 1000, dropout: float = 0.5) -> AlexNet:
    return AlexNet(classes, dropout)
