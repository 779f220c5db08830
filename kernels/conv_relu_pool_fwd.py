"""conv_relu_pool, forward: y[n, k, ph, pw] = pool_{i, j} relu(b[k] + sum_{c, r, s} x[n, c, h, w] w[k, c, r, s]).

Shapes: x [N, C, H, W], w [K, C, R, S], b [K], C and K per group; y and index [N, K, PH, PW]. Element (i, j) of a window
is the convolution's row oh = ph pool_stride - pool_padding + i, which reads x at h = oh stride - padding + r dilation.

An implicit GEMM whose pixels are whole pool windows, element beside element: only pooled values leave the registers.

Tiles are [channels, pixels] in every kernel of this operation. In channels_last Triton sees channels side by side and
loads vectors of them; in NCHW it sees nothing, and its default order runs along the pixels, which is the right one.
"""

import triton
import triton.language as tl
from fastarch.kernels.product import multiply_add


@triton.jit
def pixels_at(tile, BLOCK: tl.constexpr, offsets, HEIGHT, WIDTH):
    """Image, row and column of the pixels tile * BLOCK + offsets, counted through all images; one's fit in 31 bits.

    All of them may not: the image's number and the rest come by doubling, as in division by hand, from 32 bits.
    """
    area = HEIGHT * WIDTH
    image = tile // area
    rest = (tile % area).to(tl.uint32)
    for bit in tl.static_range(16):
        if 1 << bit < BLOCK:
            carry = rest * 2 >= area
            image = image * 2 + carry.to(tl.int32)
            rest = rest * 2 - tl.where(carry, area, 0)
    pixel = rest.to(tl.int32) + offsets
    return image + pixel // area, pixel % area // WIDTH, pixel % area % WIDTH


@triton.jit
def terms_at(step, CHANNELS, TAPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tap and channel of a step's BLOCK_K terms in a sum over taps and channels, and whether the sum has them."""
    lanes = tl.arange(0, BLOCK_K)
    if ALIGNED:  # BLOCK_K divides CHANNELS; taps turn fastest, so that L1 still holds the pixels they share
        every = tl.full([BLOCK_K], True, tl.int1)
        return tl.full([BLOCK_K], step % TAPS, tl.int32), step // TAPS * BLOCK_K + lanes, every
    else:  # few or odd channels: packed tap after tap, without a gap
        term = step * BLOCK_K + lanes
        return term // CHANNELS, term % CHANNELS, term < TAPS * CHANNELS


@triton.jit
def within(row, column, HEIGHT, WIDTH):
    """0 <= row < HEIGHT and 0 <= column < WIDTH, in one comparison each: as unsigned, a negative number is large."""
    return (row.to(tl.uint32) < HEIGHT) & (column.to(tl.uint32) < WIDTH)


@triton.jit
def window_area(ph, pw, OH, OW, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr):
    """What an average divides by: its window, clipped to the padded convolution."""
    top = ph * POOL_STRIDE[0]
    left = pw * POOL_STRIDE[1]
    height = tl.minimum(POOL_SIZE[0], OH + 2 * POOL_PADDING[0] - top)
    width = tl.minimum(POOL_SIZE[1], OW + 2 * POOL_PADDING[1] - left)
    return (height * width).to(tl.float32)


@triton.jit
def take(v, element, y, index, POOL: tl.constexpr, LANES: tl.constexpr):
    """Pool relu(v) into y, and element into index; v [M, LANES P] has LANES elements of each window, y is [M, P].

    Starting from y = 0 is the ReLU, `v > y` keeps the first maximum, `v != v` lets NaN pass: all as in torch.
    """
    if LANES > 1:
        halves = tl.permute(tl.reshape(v, [v.shape[0], 2, v.shape[1] // 2]), [0, 2, 1])
        former, latter = tl.split(halves)  # each [M, LANES / 2 P]
        y, index = take(former, element, y, index, POOL, LANES // 2)
        return take(latter, element + LANES // 2, y, index, POOL, LANES // 2)
    elif POOL == "avg":
        passed = (v > 0) | (v != v)
        return y + tl.where(passed, v, 0), index | tl.where(passed, 1 << element, 0)
    else:
        taken = (v > y) | (v != v)
        return tl.where(taken, v, y), tl.where(taken, element, index)


@triton.jit
def store_pooled(
    best, place, y, index,
    tile, k, live_k, N, OH, OW, PH, PW, stride_y,
    POOL: tl.constexpr, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
):  # fmt: skip
    """y and index, in y's dtype and in bytes, of the channels k in a tile of pooled pixels."""
    n, ph, pw = pixels_at(tile, best.shape[1], tl.arange(0, best.shape[1]), PH, PW)
    if POOL == "avg":
        best = tl.div_rn(best, window_area(ph, pw, OH, OW, POOL_SIZE, POOL_STRIDE, POOL_PADDING)[None, :])
    at = n.to(tl.int64) * stride_y[0] + ph.to(tl.int64) * stride_y[2] + pw.to(tl.int64) * stride_y[3]
    at = (k * stride_y[1])[:, None] + at[None, :]  # [M, P]
    live = live_k[:, None] & (n < N)[None, :]
    tl.store(y + at, best.to(y.dtype.element_ty), mask=live)
    if index is not None:
        tl.store(index + at, place.to(tl.uint8), mask=live)


@triton.jit
def conv_relu_pool_fwd_kernel(
    x, w, b, y, index,
    N, C, H, W, K, OH, OW, PH, PW, GROUPS,
    stride_x, stride_w, stride_b, stride_y,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POOL: tl.constexpr, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[n, k, ph, pw] = pool_{i, j} relu(b[k] + sum_{c, r, s} x[n, c, h, w] w[k, c, r, s])."""
    P: tl.constexpr = BLOCK_N // LANES  # pooled pixels of a tile
    ELEMENTS: tl.constexpr = POOL_SIZE[0] * POOL_SIZE[1]
    program = tl.program_id(0)
    tiles_m = tl.cdiv(K, BLOCK_M)
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    group = program // tiles_m % GROUPS
    tile = program // tiles_m // GROUPS

    live_k = m < K
    k = (group * K + m).to(tl.int64)
    w_row = w + k * stride_w[0]
    x_group = x + (group * C).to(tl.int64) * stride_x[1]
    lane = tl.arange(0, BLOCK_N)
    n, ph, pw = pixels_at(tile, P, lane % P, PH, PW)

    best = tl.zeros([BLOCK_M, P], tl.float32)
    place = tl.full([BLOCK_M, P], 0 if POOL == "avg" else 255, tl.int32)
    for first in range(0, ELEMENTS, LANES):
        element = first + lane // P
        oh = ph * POOL_STRIDE[0] - POOL_PADDING[0] + element // POOL_SIZE[1]
        ow = pw * POOL_STRIDE[1] - POOL_PADDING[1] + element % POOL_SIZE[1]
        live = within(oh, ow, OH, OW) & (element < ELEMENTS) & (n < N)
        top = tl.where(live, oh * STRIDE[0] - PADDING[0], H)  # from row H on there is nothing to read: no mask needed
        left = ow * STRIDE[1] - PADDING[1]
        x_pixel = (
            x_group + n.to(tl.int64) * stride_x[0] + top.to(tl.int64) * stride_x[2] + left.to(tl.int64) * stride_x[3]
        )

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(tl.cdiv(R * S * C, BLOCK_K)):
            tap, c, live_c = terms_at(step, C, R * S, ALIGNED, BLOCK_K)
            r = tap // S
            s = tap % S
            down = r * DILATION[0]
            across = s * DILATION[1]
            x_term = c.to(tl.int64) * stride_x[1] + down.to(tl.int64) * stride_x[2] + across.to(tl.int64) * stride_x[3]
            w_term = c.to(tl.int64) * stride_w[1] + r * stride_w[2] + s * stride_w[3]
            inside = within(top[None, :] + down[:, None], left[None, :] + across[:, None], H, W) & live_c[:, None]

            # every tap reads its pixels anew: ".ca" lets L1 keep them (Triton 3.9 heeds it, 3.6 does not; not measured)
            x_tile = tl.load(x_pixel[None, :] + x_term[:, None], mask=inside, other=0, cache_modifier=".ca")
            w_tile = tl.load(w_row[:, None] + w_term[None, :], mask=live_k[:, None] & live_c[None, :], other=0)
            acc = multiply_add(w_tile, x_tile, acc, PRECISION)  # [BLOCK_M, BLOCK_N]

        if b is not None:
            acc += tl.load(b + k * stride_b, mask=live_k, other=0).to(tl.float32)[:, None]
        acc = tl.where(live[None, :], acc, float("-inf"))  # which ReLU cuts off
        best, place = take(acc, first, best, place, POOL, LANES)

    store_pooled(
        best, place, y, index,
        tile, k, live_k, N, OH, OW, PH, PW, stride_y,
        POOL, POOL_SIZE, POOL_STRIDE, POOL_PADDING,
    )  # fmt: skip


@triton.jit
def relu_pool_fwd_kernel(
    v, b, y, index,
    N, K, OH, OW, PH, PW,
    stride_v, stride_b, stride_y,
    POOL: tl.constexpr, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[n, k, ph, pw] = pool_{i, j} relu(b[k] + v[n, k, oh, ow]): what a library's convolution v leaves to do."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(K, BLOCK_M)
    k = (program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    tile = program // tiles_m
    live_k = k < K
    n, ph, pw = pixels_at(tile, BLOCK_N, tl.arange(0, BLOCK_N), PH, PW)
    v_tile = v + (k * stride_v[1])[:, None] + (n.to(tl.int64) * stride_v[0])[None, :]
    bias = 0.0
    if b is not None:
        bias = tl.load(b + k * stride_b, mask=live_k, other=0).to(tl.float32)[:, None]

    best = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    place = tl.full([BLOCK_M, BLOCK_N], 0 if POOL == "avg" else 255, tl.int32)
    for element in range(POOL_SIZE[0] * POOL_SIZE[1]):
        oh = ph * POOL_STRIDE[0] - POOL_PADDING[0] + element // POOL_SIZE[1]
        ow = pw * POOL_STRIDE[1] - POOL_PADDING[1] + element % POOL_SIZE[1]
        live = live_k[:, None] & (within(oh, ow, OH, OW) & (n < N))[None, :]
        at = oh.to(tl.int64) * stride_v[2] + ow.to(tl.int64) * stride_v[3]
        value = tl.load(v_tile + at[None, :], mask=live, other=0).to(tl.float32) + bias  # [BLOCK_M, BLOCK_N]
        best, place = take(tl.where(live, value, float("-inf")), element, best, place, POOL, 1)

    store_pooled(
        best, place, y, index,
        tile, k, live_k, N, OH, OW, PH, PW, stride_y,
        POOL, POOL_SIZE, POOL_STRIDE, POOL_PADDING,
    )  # fmt: skip
