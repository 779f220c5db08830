"""ResNet: He, Zhang, Ren and Sun 2015, "Deep residual learning for image recognition", arXiv 1512.03385, table 1.

With torchvision's state_dict, whose pretrained weights load, and its choices: the projection B where shapes change, and
the stride in a bottleneck's 3x3 convolution ("v1.5"; the paper has it in the first 1x1).
"""

from torch import Tensor

from fastarch import nn


class BasicBlock(nn.Module):
    """y = relu(x' + T(x)), T two 3x3 convolutions.   x [N, C, H, W] -> y [N, width, H / stride, W / stride]

    x' is x, or where shapes differ x through a strided 1x1 convolution.
    """

    expansion = 1  # output channels by width

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, activation="relu")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, activation="relu")
        self.downsample = projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = nn.conv_bn_relu_pool(x, self.conv1, self.bn1)
        return nn.conv_bn_relu_pool(x, self.conv2, self.bn2, residual)


class Bottleneck(nn.Module):
    """y = relu(x' + T(x)), T a 1x1, a 3x3 and a 1x1 convolution.   x [N, C, H, W] -> y [N, 4 width, H / stride, ...]

    x' is x, or where shapes differ x through a strided 1x1 convolution.
    """

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, activation="relu")
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, activation="relu")
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width, activation="relu")
        self.downsample = projection(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = nn.conv_bn_relu_pool(x, self.conv1, self.bn1)
        x = nn.conv_bn_relu_pool(x, self.conv2, self.bn2)
        return nn.conv_bn_relu_pool(x, self.conv3, self.bn3, residual)


class Projection(nn.Sequential):
    """A convolution and a batch norm in one, which shape a skip connection to the branch beside it."""

    def __init__(self, channels: int, outputs: int, kernel: int, stride: int):
        conv = nn.Conv2d(channels, outputs, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.conv_bn_relu_pool(x, *self)


def projection(channels: int, outputs: int, stride: int) -> Projection | None:
    """None where both have one shape."""
    return None if stride == 1 and channels == outputs else Projection(channels, outputs, 1, stride)


class ResNet(nn.Module):
    """Images x [N, 3, H, W] to logits [N, classes].

    zero_init_residual: every block starts as the identity: the weight of its last batch norm is 0 (Goyal et al. 2017,
    arXiv 1706.02677, section 5.1).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        classes: int = 1000,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64, activation="relu")
        channels = 64
        for i, depth in enumerate(depths):
            width, stride = 64 << i, 1 if i == 0 else 2
            blocks = [block(channels, width, stride)]
            channels = width * block.expansion
            blocks += [block(channels, width) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, block):
                nn.init.zeros_((module.bn2 if block is BasicBlock else module.bn3).weight)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.conv_bn_relu_pool(x, self.conv1, self.bn1, pool="max", pool_size=3, pool_stride=2, pool_padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(classes: int = 1000, zero_init_residual: bool = False) -> ResNet:
    """11,689,512 parameters with a thousand classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, zero_init_residual)


def resnet34(classes: int = 1000, zero_init_residual: bool = False) -> ResNet:
    """21,797,672 parameters with a thousand classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), classes, zero_init_residual)


def resnet50(classes: int = 1000, zero_init_residual: bool = False) -> ResNet:
    """25,557,032 parameters with a thousand classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, zero_init_residual)


def resnet101(classes: int = 1000, zero_init_residual: bool = False) -> ResNet:
    """44,549,160 parameters with a thousand classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), classes, zero_init_residual)


def resnet152(classes: int = 1000, zero_init_residual: bool = False) -> ResNet:
    """60,192,808 parameters with a thousand classes."""
    return ResNet(Bottleneck, (3, 8, 36, 3), classes, zero_init_residual)
