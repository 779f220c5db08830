"""conv_bn_relu_pool: the block of convolutional networks since 2015, over a convolution and a BatchNorm of the caller.

Not a layer, because a layer would own the two and so rename their parameters: a network calls it on its own `conv1` and
`bn1`, which keep the names that published weights have.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fastarch import ops
from fastarch.nn.batch_norm import scale_and_bias
from fastarch.nn.conv_relu_pool import Conv2d
from fastarch.ops.conv_relu_pool import adds_residual

POOLS = {"max": F.max_pool2d, "avg": F.avg_pool2d}


def conv_bn_relu_pool(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.Module,
    residual: Tensor | None = None,
    *,
    pool: str | None = None,
    pool_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """y = pool(relu(bn(conv(x)) + residual)), without ReLU if bn has none.   x [N, C, H, W] -> y [N, K, PH, PW]

    In evaluation everything is one `fastarch.ops.conv_relu_pool`, which calls neither module: their hooks do not run.
    In training, where bn cannot join (no running statistics, padding other than zeros, a layer that does more), and
    where no kernel adds a residual or does without ReLU (if gradients may be wanted, in 16 bits, with a pool, on CUDA),
    it is the convolution, batch norm with residual and ReLU in one pass, and the pool.

    Args:
        conv: C to K channels; `padding`, `stride`, `dilation` and `groups` are its own.
        bn: BatchNorm2d or SyncBatchNorm of `fastarch.nn` of K features, with activation="relu" or, where nothing is
            pooled, None.
        residual: of the convolution's shape and x's dtype.
        pool: "max", "avg" or None; with the sizes that follow as in `fastarch.ops.conv_relu_pool`.
    """
    if not hasattr(bn, "activation"):  # torch.nn's own BatchNorm
        raise ValueError(f"conv_bn_relu_pool: want a BatchNorm of fastarch.nn, got {bn}")
    if bn.activation is None and pool is not None:
        raise ValueError(f"conv_bn_relu_pool: want a BatchNorm with activation 'relu' or no pool, got pool {pool!r}")
    if pool is not None and pool not in POOLS:
        raise ValueError(f"conv_bn_relu_pool: want pool 'max', 'avg' or None, got {pool!r}")
    plain = type(conv).forward in (nn.Conv2d.forward, Conv2d.forward) and conv.padding_mode == "zeros"
    joins = (residual is None and bn.activation == "relu") or (pool is None and adds_residual(x))
    if plain and joins and not bn.training and bn.running_mean is not None:
        scale, bias = scale_and_bias(conv, bn)
        return ops.conv_relu_pool(
            x,
            conv.weight,
            bias,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            pool=pool,
            pool_size=pool_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            ceil_mode=ceil_mode,
            activation=bn.activation,
            scale=scale,
            residual=residual,
        )
    y = bn(conv(x)) if residual is None else bn(conv(x), residual)
    return y if pool is None else POOLS[pool](y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
