"""GoogLeNet: Szegedy et al. 2014, "Going deeper with convolutions", arXiv 1409.4842, table 1.

The variant of torchvision, with its initialisation and state_dict, whose pretrained weights load (they want
transform_input=True): batch norm after every convolution, and 3x3 convolutions where the paper has 5x5.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastarch import nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation by channel, of images in [0, 1]


class GoogLeNetOutputs(NamedTuple):
    """Logits [N, classes] of the network, and in training those of its auxiliary classifiers."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class BasicConv2d(nn.Module):
    """y = pool(relu(bn(conv(x)))), the pool by keyword, if any."""

    def __init__(self, channels: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001, activation="relu")

    def forward(self, x: Tensor, **pool) -> Tensor:
        return nn.conv_bn_relu_pool(x, self.conv, self.bn, **pool)


class Inception(nn.Module):
    """Four branches side by side.   x [N, C, H, W] -> y [N, width1 + width2 + width3 + width4, H, W]

    reduce2 and reduce3 are the channels between the two convolutions of the second and third branch.
    """

    def __init__(self, channels: int, width1: int, reduce2: int, width2: int, reduce3: int, width3: int, width4: int):
        super().__init__()
        self.branch1 = BasicConv2d(channels, width1, 1)
        self.branch2 = nn.Sequential(BasicConv2d(channels, reduce2, 1), BasicConv2d(reduce2, width2, 3, padding=1))
        self.branch3 = nn.Sequential(BasicConv2d(channels, reduce3, 1), BasicConv2d(reduce3, width3, 3, padding=1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), BasicConv2d(channels, width4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class AuxiliaryClassifier(nn.Module):
    """Features x [N, C, H, W] from the middle of the network to logits [N, classes]: a short way for the gradient."""

    def __init__(self, channels: int, classes: int, dropout: float):
        super().__init__()
        self.conv = BasicConv2d(channels, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(self.fc1(x).relu()))


class GoogLeNet(nn.Module):
    """Images x [N, 3, H, W], H and W >= 15, to logits [N, classes], in training with aux_logits to GoogLeNetOutputs.

    transform_input: x is normalised as for torchvision's other networks by ImageNet's mean and
    deviation; take that back and bring it to [-1, 1], as the pretrained weights want it.
    """

    def __init__(
        self,
        classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ):
        super().__init__()
        self.transform_input = transform_input
        self.conv1 = BasicConv2d(3, 64, 7, stride=2, padding=3)
        self.conv2 = BasicConv2d(64, 64, 1)
        self.conv3 = BasicConv2d(64, 192, 3, padding=1)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = AuxiliaryClassifier(512, classes, dropout_aux) if aux_logits else None
        self.aux2 = AuxiliaryClassifier(528, classes, dropout_aux) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.01)  # torchvision's is truncated at 200 deviations: the same

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        if self.transform_input:
            x = torch.stack([2 * (c * deviation + mean) - 1 for c, mean, deviation in zip(x.unbind(1), *IMAGENET)], 1)
        pool = {"pool": "max", "pool_size": 3, "pool_stride": 2, "ceil_mode": True}
        x = self.conv3(self.conv2(self.conv1(x, **pool)), **pool)
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = after_4a = self.inception4a(x)
        x = after_4d = self.inception4d(self.inception4c(self.inception4b(x)))
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        logits = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        if self.training and self.aux1 is not None:
            return GoogLeNetOutputs(logits, self.aux2(after_4d), self.aux1(after_4a))
        return logits


def googlenet(
    classes: int = 1000,
    aux_logits: bool = True,
    transform_input: bool = False,
    dropout: float = 0.2,
    dropout_aux: float = 0.7,
) -> GoogLeNet:
    """13,004,888 parameters with a thousand classes, 6,624,904 without auxiliary classifiers."""
    return GoogLeNet(classes, aux_logits, transform_input, dropout, dropout_aux)
