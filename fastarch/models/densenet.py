"""DenseNet: Huang, Liu, van der Maaten and Weinberger 2016, "Densely connected convolutional networks".

arXiv 1608.06993, DenseNet-BC of table 1 (growth rate 32), with torchvision's initialisation and state_dict, whose
pretrained weights load.
"""

import re
from collections import OrderedDict

import torch
from torch import Tensor

from fastarch import nn

GROWTH = 32  # channels that a layer adds


class DenseLayer(nn.Module):
    """y = [x, conv2(relu(norm2(conv1(relu(norm1(x))))))].   x [N, C, H, W] -> y [N, C + GROWTH, H, W]"""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, activation="relu")
        self.conv1 = nn.Conv2d(channels, 4 * GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * GROWTH, activation="relu")
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.conv_bn_relu_pool(self.norm1(x), self.conv1, self.norm2)
        return torch.cat([x, self.dropout(self.conv2(y))], 1)


class Features(nn.Sequential):
    """Images x [N, 3, H, W] to features [N, C, H / 32, W / 32]; a max pool follows the first convolution's norm."""

    def forward(self, x: Tensor) -> Tensor:
        conv0, norm0, *rest = self
        x = nn.conv_bn_relu_pool(x, conv0, norm0, pool="max", pool_size=3, pool_stride=2, pool_padding=1)
        for layer in rest:
            x = layer(x)
        return x


class DenseNet(nn.Module):
    """Images x [N, 3, H, W], H and W >= 29, to logits [N, classes]."""

    def __init__(self, depths: tuple[int, ...], classes: int = 1000, dropout: float = 0.0):
        super().__init__()
        channels = 64
        layers = {
            "conv0": nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
            "norm0": nn.BatchNorm2d(channels, activation="relu"),
        }
        for i, depth in enumerate(depths, 1):
            block = {f"denselayer{j + 1}": DenseLayer(channels + j * GROWTH, dropout) for j in range(depth)}
            layers[f"denseblock{i}"] = nn.Sequential(OrderedDict(block))
            channels += depth * GROWTH
            if i < len(depths):
                layers[f"transition{i}"] = transition(channels, channels // 2)
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels, activation="relu")
        self.features = Features(OrderedDict(layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(rename_published_keys)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def transition(channels: int, outputs: int) -> nn.Module:
    """[N, channels, H, W] to [N, outputs, H / 2, W / 2]"""
    layers = {
        "norm": nn.BatchNorm2d(channels, activation="relu"),
        "conv": nn.Conv2d(channels, outputs, 1, bias=False),
        "pool": nn.AvgPool2d(2),
    }
    return nn.Sequential(OrderedDict(layers))


def rename_published_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """The files that torchvision links to were written when a module could be called `norm.1`."""
    for key in [*state]:
        state[re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)] = state.pop(key)


def densenet121(classes: int = 1000, dropout: float = 0.0) -> DenseNet:
    """7,978,856 parameters with a thousand classes."""
    return DenseNet((6, 12, 24, 16), classes, dropout)


def densenet169(classes: int = 1000, dropout: float = 0.0) -> DenseNet:
    """14,149,480 parameters with a thousand classes."""
    return DenseNet((6, 12, 32, 32), classes, dropout)


def densenet201(classes: int = 1000, dropout: float = 0.0) -> DenseNet:
    """20,013,928 parameters with a thousand classes."""
    return DenseNet((6, 12, 48, 32), classes, dropout)
