"""SENet: Hu, Shen and Sun 2017, "Squeeze-and-excitation networks", arXiv 1709.01507: ResNets that gate their channels.

The authors' Caffe networks as Cadene ported them, with the state_dict and initialisation of timm's legacy_seresnet50,
legacy_seresnet152 and legacy_senet154, whose pretrained weights load and which have the published numbers of
parameters. Unlike `resnet50`, an SE-ResNet strides in the first 1x1 convolution, and the stem's pool rounds up.
"""

from torch import Tensor

from fastarch import nn
from fastarch.models.resnet import Projection


class SqueezeExcitation(nn.Module):
    """y = x sigmoid(fc2(relu(fc1(mean of x over H and W)))).   x, y [N, C, H, W]"""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()  # [N, C, 1, 1]
        return x * gate


class Bottleneck(nn.Module):
    """y = relu(x' + gated(T(x))), T a 1x1, a 3x3 and a 1x1 convolution; x' is x, or x through `downsample`.

    x [N, C, H, W] -> y [N, outputs, H / stride, W / stride]. The gate stands between the last batch norm and the sum,
    so that these two cannot be one pass, as they are in a ResNet.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, int],
        outputs: int,
        strides: tuple[int, int],
        groups: int,
        downsample: nn.Module | None,
    ):
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(channels, first, 1, strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(first, activation="relu")
        self.conv2 = nn.Conv2d(first, second, 3, strides[1], padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(second, activation="relu")
        self.conv3 = nn.Conv2d(second, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.se_module = SqueezeExcitation(outputs)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = nn.conv_bn_relu_pool(x, self.conv1, self.bn1)
        x = nn.conv_bn_relu_pool(x, self.conv2, self.bn2)
        x = nn.conv_bn_relu_pool(x, self.conv3, self.bn3)
        return (self.se_module(x) + residual).relu()


class Stem(nn.Module):
    """Images [N, 3, H, W] to [N, channels, H / 4, W / 4]: one 7x7 convolution, or three of 3x3, and a max pool."""

    def __init__(self, channels: int, deep: bool):
        super().__init__()
        if deep:
            self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(64, activation="relu")
            self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(64, activation="relu")
            self.conv3 = nn.Conv2d(64, channels, 3, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels, activation="relu")
        else:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(channels, activation="relu")
        self.deep = deep

    def forward(self, x: Tensor) -> Tensor:
        last = (self.conv1, self.bn1)
        if self.deep:
            x = nn.conv_bn_relu_pool(x, self.conv1, self.bn1)
            x = nn.conv_bn_relu_pool(x, self.conv2, self.bn2)
            last = (self.conv3, self.bn3)
        return nn.conv_bn_relu_pool(x, *last, pool="max", pool_size=3, pool_stride=2, ceil_mode=True)


class SENet(nn.Module):
    """Images x [N, 3, H, W] to logits [N, classes].

    wide: as SENet-154 (the paper's appendix): a stem of three 3x3 convolutions; blocks 2 and 4 times as wide, whose
    3x3 convolution has 64 groups and the stride; 3x3 convolutions in the skip connections.
    """

    def __init__(self, depths: tuple[int, int, int, int], wide: bool, classes: int = 1000, dropout: float = 0.0):
        super().__init__()
        channels = 128 if wide else 64
        self.layer0 = Stem(channels, deep=wide)
        for i, depth in enumerate(depths):
            width, stride = 64 << i, 1 if i == 0 else 2
            widths, groups = ((2 * width, 4 * width), 64) if wide else ((width, width), 1)
            outputs, kernel = 4 * width, 3 if wide and i > 0 else 1
            downsample = Projection(channels, outputs, kernel, stride)
            strides = (1, stride) if wide else (stride, 1)
            blocks = [Bottleneck(channels, widths, outputs, strides, groups, downsample)]
            blocks += [Bottleneck(outputs, widths, outputs, (1, 1), groups, None) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            channels = outputs
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(x)))))
        return self.last_linear(self.dropout(self.avg_pool(x).flatten(1)))


def se_resnet50(classes: int = 1000, dropout: float = 0.0) -> SENet:
    """28,088,024 parameters with a thousand classes."""
    return SENet((3, 4, 6, 3), False, classes, dropout)


def se_resnet152(classes: int = 1000, dropout: float = 0.0) -> SENet:
    """66,821,848 parameters with a thousand classes."""
    return SENet((3, 8, 36, 3), False, classes, dropout)


def senet154(classes: int = 1000, dropout: float = 0.2) -> SENet:
    """115,088,984 parameters with a thousand classes; first of ILSVRC 2017."""
    return SENet((3, 8, 36, 3), True, classes, dropout)
