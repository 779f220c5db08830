"""conv_relu_pool: y = pool(relu(a conv2d(x, w) + b + r)), or without ReLU and pool.

x [N, C, H, W], w [K, C/groups, R, S], a, b [K]; convolution, r [N, K, OH, OW]
"""

from torch import Tensor
from torch.nn import functional as F


def conv_relu_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    pool: str,
    pool_size: tuple[int, int],
    pool_stride: tuple[int, int],
    pool_padding: tuple[int, int],
    ceil_mode: bool,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    y = F.conv2d(input, scaled(weight, scale), bias, stride, padding, dilation, groups)  # [N, K, OH, OW]
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    if pool == "max":
        return F.max_pool2d(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    if pool == "avg":
        return F.avg_pool2d(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    return y  # "none"


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """a_k w_k, rounded once where a weight has 16 bits and a scale 32."""
    return weight if scale is None else (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
