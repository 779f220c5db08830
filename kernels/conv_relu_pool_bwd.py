"""conv_relu_pool, backward: the adjoints of conv_relu_pool_fwd, from dy and index [N, K, PH, PW], laid out alike.

Before the pool the gradient is g[n, k, oh, ow] = sum_{ph, pw} dy[n, k, ph, pw] where index names that element of the
window (avg: has its bit, and a share of dy). The sums gather it from dy and index as they go; it is never written.

    dx[n, c, h, w] = sum_{k, r, s} g[n, k, oh, ow] w[k, c, r, s]      where oh stride = h + padding - r dilation
    dw[k, c, r, s] = sum_{n, ph, pw, i, j} g x[n, c, h, w]            window by window, as in the forward
    db[k]          = sum_{n, ph, pw, i, j} g
"""

import triton
import triton.language as tl
from fastarch.kernels.conv_relu_pool_fwd import pixels_at, terms_at, window_area, within
from fastarch.kernels.product import multiply_add


@triton.jit
def window_over(o, t, WINDOWS, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr):
    """Along one axis: the t-th last window that can hold the unsigned position o, its place there, and whether it does.

    A negative position, large as unsigned, is in no window; one in the padding or past the end is named by no index.
    """
    p = (o + POOL_PADDING) // POOL_STRIDE - t
    place = o + POOL_PADDING - p * POOL_STRIDE
    return p, place, (p < WINDOWS) & (place < POOL_SIZE)


@triton.jit
def gradient_at(dy, index, at, live, element, area, POOL: tl.constexpr):
    """What a window passes on to one of its elements."""
    d = tl.load(dy + at, mask=live, other=0)
    named = tl.load(index + at, mask=live, other=0).to(tl.int32)
    if POOL == "avg":
        return tl.where(named >> (element & 7) & 1 != 0, tl.div_rn(d.to(tl.float32), area), 0)
    else:
        return tl.where(named == element, d, 0)


@triton.jit
def conv_relu_pool_bwd_input_kernel(
    dy, w, index, dx,
    N, C, H, W, K, OH, OW, PH, PW, GROUPS,
    stride_y, stride_w, stride_x,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POOL: tl.constexpr, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[n, c, h, w] = sum_{k, r, s} g[n, k, oh, ow] w[k, c, r, s]; where windows overlap each is a term of its own."""
    OVERLAP_W: tl.constexpr = (POOL_SIZE[1] + POOL_STRIDE[1] - 1) // POOL_STRIDE[1]
    OVERLAP: tl.constexpr = (POOL_SIZE[0] + POOL_STRIDE[0] - 1) // POOL_STRIDE[0] * OVERLAP_W
    program = tl.program_id(0)
    tiles_m = tl.cdiv(C, BLOCK_M)
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    group = program // tiles_m % GROUPS
    tile = program // tiles_m // GROUPS

    live_c = m < C
    c = (group * C + m).to(tl.int64)
    first_k = (group * K).to(tl.int64)
    w_row = w + m.to(tl.int64) * stride_w[1] + first_k * stride_w[0]
    n, h, column = pixels_at(tile, BLOCK_N, tl.arange(0, BLOCK_N), H, W)
    live = n < N
    at_image = n.to(tl.int64) * stride_y[0] + first_k * stride_y[1]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(R * S * OVERLAP * K, BLOCK_K)):
        tap, k, live_k = terms_at(step, K, R * S * OVERLAP, ALIGNED, BLOCK_K)
        r = tap // OVERLAP // S
        s = tap // OVERLAP % S
        # oh stride and ow stride, if there are such oh and ow
        rows = ((h + PADDING[0])[None, :] - (r * DILATION[0])[:, None]).to(tl.uint32)
        columns = ((column + PADDING[1])[None, :] - (s * DILATION[1])[:, None]).to(tl.uint32)
        oh = rows // STRIDE[0]
        ow = columns // STRIDE[1]
        t = (tap % OVERLAP).to(tl.uint32)[:, None]
        ph, i, live_h = window_over(oh, t // OVERLAP_W, PH, POOL_SIZE[0], POOL_STRIDE[0], POOL_PADDING[0])
        pw, j, live_w = window_over(ow, t % OVERLAP_W, PW, POOL_SIZE[1], POOL_STRIDE[1], POOL_PADDING[1])
        held = live_h & live_w & (oh * STRIDE[0] == rows) & (ow * STRIDE[1] == columns)
        held &= live_k[:, None] & live[None, :]
        at = (k.to(tl.int64) * stride_y[1])[:, None] + ph.to(tl.int64) * stride_y[2] + pw.to(tl.int64) * stride_y[3]
        area = window_area(ph, pw, OH, OW, POOL_SIZE, POOL_STRIDE, POOL_PADDING)
        w_term = k.to(tl.int64) * stride_w[0] + r * stride_w[2] + s * stride_w[3]

        g = gradient_at(dy, index, at_image[None, :] + at, held, i * POOL_SIZE[1] + j, area, POOL)  # [BLOCK_K, BLOCK_N]
        w_tile = tl.load(w_row[:, None] + w_term[None, :], mask=live_c[:, None] & live_k[None, :], other=0)
        acc = multiply_add(w_tile, g.to(w_tile.dtype), acc, PRECISION)  # [BLOCK_M, BLOCK_N]

    at = n.to(tl.int64) * stride_x[0] + h.to(tl.int64) * stride_x[2] + column.to(tl.int64) * stride_x[3]
    at = (c * stride_x[1])[:, None] + at[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=live_c[:, None] & live[None, :])


@triton.jit
def conv_relu_pool_bwd_weight_kernel(
    dy, x, index, dw,
    N, C, H, W, K, OH, OW, PH, PW, GROUPS, STEPS, SPLIT,
    stride_y, stride_x,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    POOL: tl.constexpr, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, k, r, s, c] = sum_{n, ph, pw, i, j of the split} g x[n, c, h, w], over SPLIT of all STEPS blocks."""
    ELEMENTS: tl.constexpr = POOL_SIZE[0] * POOL_SIZE[1]
    program = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(K, BLOCK_M)
    tiles_n = tl.cdiv(R * S * C, BLOCK_N)
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    term = program // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    group = program // tiles_m // tiles_n

    live_k = m < K
    k = (group * K + m).to(tl.int64)
    live_term = term < R * S * C
    c = (group * C + term % C).to(tl.int64)
    down = term // C // S * DILATION[0]
    across = term // C % S * DILATION[1]
    x_term = x + c * stride_x[1] + down.to(tl.int64) * stride_x[2] + across.to(tl.int64) * stride_x[3]

    # the summed-over positions, as digits: image, pooled row, and (pooled column, element) in one
    WIDTH = PW * ELEMENTS
    n, ph, digit = pixels_at(split * SPLIT, BLOCK_K, tl.arange(0, BLOCK_K), PH, WIDTH)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(tl.minimum(SPLIT, STEPS - split * SPLIT)):
        pw = (digit.to(tl.uint32) // ELEMENTS).to(tl.int32)
        element = (digit.to(tl.uint32) % ELEMENTS).to(tl.int32)
        oh = ph * POOL_STRIDE[0] - POOL_PADDING[0] + element // POOL_SIZE[1]
        ow = pw * POOL_STRIDE[1] - POOL_PADDING[1] + element % POOL_SIZE[1]
        live = within(oh, ow, OH, OW) & (n < N)
        at = n.to(tl.int64) * stride_y[0] + ph.to(tl.int64) * stride_y[2] + pw.to(tl.int64) * stride_y[3]
        at = (k * stride_y[1])[:, None] + at[None, :]
        area = window_area(ph, pw, OH, OW, POOL_SIZE, POOL_STRIDE, POOL_PADDING)[None, :]
        top = tl.where(live, oh * STRIDE[0] - PADDING[0], H)  # from row H on there is nothing to read: no mask needed
        left = ow * STRIDE[1] - PADDING[1]
        x_pixel = n.to(tl.int64) * stride_x[0] + top.to(tl.int64) * stride_x[2] + left.to(tl.int64) * stride_x[3]
        inside = within(top[None, :] + down[:, None], left[None, :] + across[:, None], H, W) & live_term[:, None]

        live = live_k[:, None] & live[None, :]
        g = gradient_at(dy, index, at, live, element[None, :], area, POOL)  # [BLOCK_M, BLOCK_K]
        x_tile = tl.load(x_term[:, None] + x_pixel[None, :], mask=inside, other=0)  # [BLOCK_N, BLOCK_K]
        acc = multiply_add(g.to(x_tile.dtype), tl.trans(x_tile), acc, PRECISION)  # [BLOCK_M, BLOCK_N]

        # BLOCK_K positions on, by carries: a third fewer instructions in the loop than by divisions
        digit += BLOCK_K % WIDTH
        carry = (digit >= WIDTH).to(tl.int32)
        digit -= carry * WIDTH
        ph += BLOCK_K // WIDTH % PH + carry
        carry = (ph >= PH).to(tl.int32)
        ph -= carry * PH
        n += BLOCK_K // WIDTH // PH + carry

    at = ((split * GROUPS * K + k) * (R * S * C))[:, None] + term[None, :]
    tl.store(dw + at, acc, mask=live_k[:, None] & live_term[None, :])


@triton.jit
def conv_relu_pool_bwd_bias_kernel(
    dy, index, db,
    N, K, OH, OW, PH, PW, STEPS, SPLIT,
    stride_y,
    POOL: tl.constexpr, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """db[split, k] = sum_{n, ph, pw of the split} dy[n, k, ph, pw], for as many elements as passed ReLU."""
    k = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(1)
    live_k = k < K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.minimum(SPLIT, STEPS - split * SPLIT)):
        n, ph, pw = pixels_at(split * SPLIT + step, BLOCK_N, tl.arange(0, BLOCK_N), PH, PW)
        at = n.to(tl.int64) * stride_y[0] + ph.to(tl.int64) * stride_y[2] + pw.to(tl.int64) * stride_y[3]
        at = (k * stride_y[1])[:, None] + at[None, :]
        live = live_k[:, None] & (n < N)[None, :]
        d = tl.load(dy + at, mask=live, other=0).to(tl.float32)
        named = tl.load(index + at, mask=live, other=0).to(tl.int32)
        if POOL == "avg":
            passed = tl.zeros_like(named)
            for element in tl.static_range(POOL_SIZE[0] * POOL_SIZE[1]):
                passed += named >> element & 1
            area = window_area(ph, pw, OH, OW, POOL_SIZE, POOL_STRIDE, POOL_PADDING)[None, :]
            total += tl.where(passed > 0, tl.div_rn(d * passed.to(tl.float32), area), 0)  # not 0 * inf
        else:
            total += tl.where(named != 255, d, 0)
    tl.store(db + split * K + k, tl.sum(total, axis=1), mask=live_k)


@triton.jit
def relu_pool_bwd_kernel(
    dy, index, dv,
    N, K, OH, OW, PH, PW,
    stride_y, stride_v,
    POOL: tl.constexpr, POOL_SIZE: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dv[n, k, oh, ow] = g[n, k, oh, ow], which a library's convolution wants to read: the adjoint of relu_pool_fwd."""
    OVERLAP_W: tl.constexpr = (POOL_SIZE[1] + POOL_STRIDE[1] - 1) // POOL_STRIDE[1]
    OVERLAP: tl.constexpr = (POOL_SIZE[0] + POOL_STRIDE[0] - 1) // POOL_STRIDE[0] * OVERLAP_W
    program = tl.program_id(0)
    tiles_m = tl.cdiv(K, BLOCK_M)
    k = (program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    tile = program // tiles_m
    live_k = k < K
    n, oh, ow = pixels_at(tile, BLOCK_N, tl.arange(0, BLOCK_N), OH, OW)
    at_image = (k * stride_y[1])[:, None] + (n.to(tl.int64) * stride_y[0])[None, :]

    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(OVERLAP):
        ph, i, live_h = window_over(oh.to(tl.uint32), t // OVERLAP_W, PH, POOL_SIZE[0], POOL_STRIDE[0], POOL_PADDING[0])
        pw, j, live_w = window_over(ow.to(tl.uint32), t % OVERLAP_W, PW, POOL_SIZE[1], POOL_STRIDE[1], POOL_PADDING[1])
        held = live_k[:, None] & (live_h & live_w & (n < N))[None, :]
        at = (ph.to(tl.int64) * stride_y[2] + pw.to(tl.int64) * stride_y[3])[None, :]
        area = window_area(ph, pw, OH, OW, POOL_SIZE, POOL_STRIDE, POOL_PADDING)[None, :]
        g += gradient_at(dy, index, at_image + at, held, (i * POOL_SIZE[1] + j)[None, :], area, POOL)

    at = n.to(tl.int64) * stride_v[0] + oh.to(tl.int64) * stride_v[2] + ow.to(tl.int64) * stride_v[3]
    at = (k * stride_v[1])[:, None] + at[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(dv + at, g.to(dv.dtype.element_ty), mask=live_k[:, None] & (n < N)[None, :])
