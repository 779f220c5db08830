"""conv_relu_pool: y = pool(relu(conv2d(x, w) + b)), x [N, C, H, W], w [K, C/groups, R, S], b [K]."""

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
) -> Tensor:
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()  # [N, K, OH, OW]
    if pool == "max":
        return F.max_pool2d(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    if pool == "avg":
        return F.avg_pool2d(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    return y  # "none"
