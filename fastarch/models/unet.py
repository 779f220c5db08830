"""U-Net: Ronneberger, Fischer and Brox 2015, "U-Net: convolutional networks for biomedical image segmentation".

arXiv 1505.04597, figure 1, with today's choices: convolutions pad by 1, so that the output has the input's size and
nothing is cropped, and batch norm follows each of them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastarch import nn

LEVELS = 5


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU.   x [N, channels, H, W] -> y [N, width, H, W]"""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, activation="relu")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = nn.conv_bn_relu_pool(x, self.conv1, self.bn1)
        return nn.conv_bn_relu_pool(x, self.conv2, self.bn2)


class UNet(nn.Module):
    """Images x [N, channels, H, W], H and W >= 16, to logits [N, classes, H, W].

    31,036,546 parameters with one channel and two classes. `width` is that of the first level; each level below halves
    the image and doubles the width.
    """

    def __init__(self, classes: int = 2, channels: int = 1, width: int = 64):
        super().__init__()
        widths = [width << level for level in range(LEVELS)]
        self.encoder = nn.ModuleList(DoubleConv(*sizes) for sizes in zip([channels, *widths], widths))
        ups = [(widths[level + 1], widths[level]) for level in reversed(range(LEVELS - 1))]
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(*sizes, 2, stride=2) for sizes in ups)
        self.decoder = nn.ModuleList(DoubleConv(*sizes) for sizes in ups)
        self.head = nn.Conv2d(width, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # the paper's section 3.1

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, level in enumerate(self.encoder):
            x = level(x if i == 0 else F.max_pool2d(x, 2))  # not one with the convolution: the skip wants it unpooled
            skips.append(x)
        for upsample, level, skip in zip(self.upsample, self.decoder, reversed(skips[:-1])):
            x = level(torch.cat([skip, upsample(x, skip.shape[2:])], 1))  # the size, where halving had rounded down
        return self.head(x)


def unet(classes: int = 2, channels: int = 1, width: int = 64) -> UNet:
    return UNet(classes, channels, width)
