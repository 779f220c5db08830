"""VGG: Simonyan and Zisserman 2014, "Very deep convolutional networks for large-scale image recognition".

arXiv 1409.1556, configurations A, B, D and E of table 1, with the initialisation and state_dict of torchvision, whose
pretrained weights load: a fused layer keeps the index of its convolution. The variants `_bn` have batch norm (Ioffe and
Szegedy 2015, arXiv 1502.03167) after every convolution.
"""

from collections import OrderedDict

from torch import Tensor

from fastarch import nn

# output channels of each stage's convolutions; every stage ends in a pool
STAGES = {
    "vgg11": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "vgg13": [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    "vgg16": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    "vgg19": [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


def features(stages: list[list[int]]) -> nn.Sequential:
    """Images [N, 3, H, W] to [N, 512, H / 32, W / 32]."""
    layers, index, channels = OrderedDict(), 0, 3
    for stage in stages:
        for i, width in enumerate(stage):
            pool = "max" if i == len(stage) - 1 else None
            layers[str(index)] = nn.ConvReLUPool2d(channels, width, 3, padding=1, pool=pool)
            index += 3 if pool else 2  # torchvision counts convolution, ReLU and pool
            channels = width
    return nn.Sequential(layers)


class NormalizedFeatures(nn.Sequential):
    """Images [N, 3, H, W] to [N, 512, H / 32, W / 32], convolutions and batch norms by turns."""

    def __init__(self, stages: list[list[int]]):
        super().__init__()
        self.pools: list[str | None] = []  # behind each convolution and its batch norm
        index, channels = 0, 3
        for stage in stages:
            for i, width in enumerate(stage):
                self.add_module(str(index), nn.Conv2d(channels, width, 3, padding=1))
                self.add_module(str(index + 1), nn.BatchNorm2d(width, activation="relu"))
                self.pools.append("max" if i == len(stage) - 1 else None)
                index += 4 if self.pools[-1] else 3  # torchvision counts convolution, batch norm, ReLU and pool
                channels = width

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self)
        for conv, bn, pool in zip(layers, layers, self.pools):
            x = nn.conv_bn_relu_pool(x, conv, bn, pool=pool)
        return x


class VGG(nn.Module):
    """Images x [N, 3, H, W], H and W >= 32, to logits [N, classes]."""

    def __init__(self, stages: list[list[int]], classes: int = 1000, dropout: float = 0.5, batch_norm: bool = False):
        super().__init__()
        self.features = NormalizedFeatures(stages) if batch_norm else features(stages)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg11(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """132,863,336 parameters with a thousand classes."""
    return VGG(STAGES["vgg11"], classes, dropout)


def vgg13(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """133,047,848 parameters with a thousand classes."""
    return VGG(STAGES["vgg13"], classes, dropout)


def vgg16(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """138,357,544 parameters with a thousand classes."""
    return VGG(STAGES["vgg16"], classes, dropout)


def vgg19(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """143,667,240 parameters with a thousand classes."""
    return VGG(STAGES["vgg19"], classes, dropout)


def vgg11_bn(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """132,868,840 parameters with a thousand classes."""
    return VGG(STAGES["vgg11"], classes, dropout, batch_norm=True)


def vgg13_bn(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """133,053,736 parameters with a thousand classes."""
    return VGG(STAGES["vgg13"], classes, dropout, batch_norm=True)


def vgg16_bn(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """138,365,992 parameters with a thousand classes."""
    return VGG(STAGES["vgg16"], classes, dropout, batch_norm=True)


def vgg19_bn(classes: int = 1000, dropout: float = 0.5) -> VGG:
    """143,678,248 parameters with a thousand classes."""
    return VGG(STAGES["vgg19"], classes, dropout, batch_norm=True)
