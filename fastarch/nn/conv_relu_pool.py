"""Layers of conv_relu_pool: a convolution, ReLU and a pool in one."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastarch import ops
from fastarch.nn.leaf import Leaf


class Pooled(Leaf):
    """What the layers add to a convolution of torch.nn: the pool's arguments."""

    def __init__(
        self,
        *args,
        pool: str | None = "max",
        pool_size: int | tuple[int, ...] = 2,
        pool_stride: int | tuple[int, ...] | None = None,
        pool_padding: int | tuple[int, ...] = 0,
        ceil_mode: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.pool = pool
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding
        self.ceil_mode = ceil_mode

    def padded(self, input: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
        """The input, and the zeros that are still to be put around it."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,) * len(self.stride)

    def extra_repr(self) -> str:
        if self.pool is None:
            return f"{super().extra_repr()}, pool=None"
        return (
            f"{super().extra_repr()}, pool={self.pool!r}, pool_size={self.pool_size}, pool_stride={self.pool_stride}, "
            f"pool_padding={self.pool_padding}, ceil_mode={self.ceil_mode}"
        )


class Conv2d(Leaf, nn.Conv2d):
    """y = conv2d(x) + b.   x [N, C, H, W] or [C, H, W] -> y [N, K, OH, OW] or [K, OH, OW]

    `torch.nn.Conv2d`, its arguments, state_dict and errors. On CPUs filters of 3x3 at stride 1 over 8 channels or more
    take `fastarch.ops.conv_relu_pool` without ReLU and pool, whose Winograd algorithm has fewer products than a
    library's convolution, forward and backward; all others are torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        served = has_fewer_products(self) and self.padding_mode == "zeros" and input.is_cpu
        if not served or input.shape[-3:-2] != (self.in_channels,):
            return super().forward(input)
        try:
            return ops.conv_relu_pool(input, self.weight, self.bias, padding=self.padding, pool=None, activation=None)
        except (TypeError, ValueError):  # torch shall say itself what is wrong
            return super().forward(input)


def has_fewer_products(conv: nn.Conv2d) -> bool:
    """Whether a convolution alone, with nothing to fuse, may be faster here than torch's."""
    alike = (*conv.kernel_size, *conv.stride, *conv.dilation, conv.groups) == (3, 3, 1, 1, 1, 1, 1)
    return alike and conv.in_channels >= 8


class ConvReLUPool2d(Pooled, Conv2d):
    """y = pool(relu(conv2d(x) + b)).   x [N, C, H, W] or [C, H, W] -> y [N, K, PH, PW] or [K, PH, PW]

    Stands for `Sequential(Conv2d(...), ReLU(), MaxPool2d(pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode))`:
    the arguments, initialisation and state_dict of `torch.nn.Conv2d` (`weight` [K, C/groups, R, S], `bias` [K]), and by
    keyword `pool` ("max", "avg" or None), `pool_size`, `pool_stride`, `pool_padding`, `ceil_mode`.
    `fastarch.ops.conv_relu_pool` states precision and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self.padded(input)
        return ops.conv_relu_pool(
            input,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            pool=self.pool,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            ceil_mode=self.ceil_mode,
        )


class ConvReLUPool1d(Pooled, nn.Conv1d):
    """y = pool(relu(conv1d(x) + b)).   x [N, C, W] or [C, W] -> y [N, K, PW] or [K, PW]

    The same in one dimension, on the kernels of two: `Sequential(Conv1d(...), ReLU(), MaxPool1d(...))` with the
    arguments, initialisation and state_dict of `torch.nn.Conv1d` (`weight` [K, C/groups, S], `bias` [K]).
    """

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self.padded(input)
        output = ops.conv_relu_pool(
            input.unsqueeze(-2),
            self.weight.unsqueeze(-2),
            self.bias,
            stride=(1, *self.stride),
            padding=padding if isinstance(padding, str) else (0, *padding),
            dilation=(1, *self.dilation),
            groups=self.groups,
            pool=self.pool,
            pool_size=row(1, self.pool_size),
            pool_stride=None if self.pool_stride is None else row(1, self.pool_stride),
            pool_padding=row(0, self.pool_padding),
            ceil_mode=self.ceil_mode,
        )
        return output.squeeze(-2)


def row(height: int, width: int | tuple[int, ...]) -> tuple[int, ...]:
    """A size along one dimension as a size of a row."""
    return (height, width) if isinstance(width, int) else (height, *width)
