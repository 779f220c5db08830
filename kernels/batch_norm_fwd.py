"""batch_norm, forward: y = act((x - mean) (w rstd) + b + r), rstd = 1 / sqrt(var + eps), by channel.

Memory is rows, of C channels each (x [S, C]; N is 1) or of S values each (x [N, C, S]). Tiles have the rows along axis
0, so that what stands side by side in memory does so in a tile; AXIS is the one along which the values of a channel
lie, 0 or 1. A step is a tile of S for one image; S turns slower than N, so that only the last steps have tiles that are
not full. Programs, each of some channels, take the steps in turns: at any time they read one region of memory.

The statistics read x from its beginning and the rest from its end, which L2 still holds. A launch for each slice of the
channels that L2 holds would save the second read of everything, 6 us per 25 MB on an H200, for launches that cost as
much.
"""

import triton
import triton.language as tl


@triton.jit
def split_of(C, BLOCK_C: tl.constexpr):
    """Of a program: its block of channels, its split of the steps, and the number of splits."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    return program % blocks, program // blocks, tl.num_programs(0) // blocks


@triton.jit
def values_in(step, N, S, BLOCK_S: tl.constexpr):
    """How many values of each channel a step's tile has."""
    return tl.minimum(S - (step // N).to(tl.int64) * BLOCK_S, BLOCK_S)


@triton.jit
def rows_of(step, block, N, C, S, AXIS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Which rows of memory a tile has, whether these exist, and at which column of them it begins."""
    c = (block * BLOCK_C).to(tl.int64)
    s = (step // N).to(tl.int64) * BLOCK_S
    if AXIS == 0:
        row = s + tl.arange(0, BLOCK_S)
        return row, row < S, c
    else:
        channel = c + tl.arange(0, BLOCK_C)
        return (step % N).to(tl.int64) * C + channel, channel < C, s


@triton.jit
def width_of(C, S, AXIS: tl.constexpr, VECTOR: tl.constexpr):
    """The length of a row of memory, in a form that shows Triton which power of two divides it: it loads vectors."""
    return (C if AXIS == 0 else S) // VECTOR * VECTOR


@triton.jit
def elements_at(row, live, column, WIDTH, BLOCK: tl.constexpr):
    """Offsets of BLOCK columns of these rows, and whether there is such an element."""
    columns = column + tl.arange(0, BLOCK)
    return row[:, None] * WIDTH + columns[None, :], live[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def per_channel(pointer, c, live, AXIS: tl.constexpr):
    """A channel's value, beside each of its elements in a tile."""
    return tl.expand_dims(tl.load(pointer + c, mask=live, other=0), AXIS)


@triton.jit
def constants_of(c, live, mean, var, w, b, eps, AXIS: tl.constexpr):
    """mean, rstd, w rstd and b of channels, rounded alike in forward and backward."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(per_channel(var, c, live, AXIS) + eps))
    scale = rstd
    if w is not None:
        scale = per_channel(w, c, live, AXIS) * rstd
    shift = tl.zeros_like(rstd)
    if b is not None:
        shift = per_channel(b, c, live, AXIS)
    return per_channel(mean, c, live, AXIS), rstd, scale, shift


@triton.jit
def affine(d, scale, shift):
    """d scale + shift, d = x - mean, rounded once: backward must find the very sign that forward found."""
    return tl.fma(d, scale, shift)


@triton.jit
def batch_norm_stats_kernel(
    x, partial,
    N, C, S, STEPS,
    AXIS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial [4, C, splits], of a split's values: count, `around`, mean - around, sum of squares about the mean.

    Squares are summed up about `around`, the mean of the first tile. However far an outlier there shifts it, that sum
    is at most as many times too large as the split has tiles, and some: the outlier itself is in the sum that remains.
    """
    WIDTH = width_of(C, S, AXIS, VECTOR)
    BLOCK_ROW: tl.constexpr = BLOCK_C if AXIS == 0 else BLOCK_S
    block, split, splits = split_of(C, BLOCK_C)
    row, live, column = rows_of(split, block, N, C, S, AXIS, BLOCK_C, BLOCK_S)
    at, live = elements_at(row, live, column, WIDTH, BLOCK_ROW)

    first = tl.load(x + at, mask=live, other=0).to(tl.float32)
    count = values_in(split, N, S, BLOCK_S)
    around = tl.sum(first, AXIS, keep_dims=True) / count.to(tl.float32)
    d = tl.where(live, first - around, 0)
    total = d
    squares = d * d
    for step in tl.range(split + splits, STEPS, splits, num_stages=STAGES):
        row, live, column = rows_of(step, block, N, C, S, AXIS, BLOCK_C, BLOCK_S)
        at, live = elements_at(row, live, column, WIDTH, BLOCK_ROW)
        d = tl.where(live, tl.load(x + at, mask=live, other=0).to(tl.float32) - around, 0)
        total += d
        squares += d * d
        count += values_in(step, N, S, BLOCK_S)

    count = count.to(tl.float32)
    shift = tl.sum(total, AXIS) / count  # [BLOCK_C]
    squares_c = tl.sum(squares, AXIS) - shift * shift * count
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    at = c * splits + split
    tl.store(partial + at, tl.zeros_like(shift) + count, mask=c < C)
    tl.store(partial + C * splits + at, tl.reshape(around, [BLOCK_C]), mask=c < C)
    tl.store(partial + 2 * C * splits + at, shift, mask=c < C)
    tl.store(partial + 3 * C * splits + at, tl.where(squares_c < 0, 0, squares_c), mask=c < C)


@triton.jit
def batch_norm_merge_kernel(partial, mean, var, C, SPLITS, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """mean and var of all splits: count var = sum_i squares_i + count_i (mean_i - mean)^2 (Chan et al. 1983)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, BLOCK_SPLITS)
    live = (c < C)[:, None] & (split < SPLITS)[None, :]
    at = c[:, None] * SPLITS + split[None, :]  # [BLOCK_C, BLOCK_SPLITS]
    count = tl.load(partial + at, mask=live, other=0)
    around = tl.load(partial + C * SPLITS + at, mask=live, other=0)
    shift = tl.load(partial + 2 * C * SPLITS + at, mask=live, other=0)
    squares = tl.load(partial + 3 * C * SPLITS + at, mask=live, other=0)

    total = tl.maximum(tl.sum(count, 1, keep_dims=True), 1)
    near = tl.sum(count * around, 1, keep_dims=True) / total
    d = (around - near) + shift  # mean_i - near, without the rounding that a mean far from 0 has
    mean_d = tl.sum(count * d, 1, keep_dims=True) / total
    d -= mean_d
    variance = tl.sum(squares + count * d * d, 1, keep_dims=True) / total

    tl.store(mean + c, tl.reshape(near + mean_d, [BLOCK_C]), mask=c < C)
    tl.store(var + c, tl.reshape(variance, [BLOCK_C]), mask=c < C)


@triton.jit
def batch_norm_fwd_kernel(
    x, r, w, b, mean, var, y, mask,
    N, C, S, STEPS, eps,
    AXIS: tl.constexpr, RELU: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) (w rstd) + b + r) and, in mask, a bit of each element: whether it passed ReLU."""
    WIDTH = width_of(C, S, AXIS, VECTOR)
    BLOCK_ROW: tl.constexpr = BLOCK_C if AXIS == 0 else BLOCK_S
    BLOCK_ROWS: tl.constexpr = BLOCK_S if AXIS == 0 else BLOCK_C
    block, split, splits = split_of(C, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, _, scale, shift = constants_of(c, c < C, mean, var, w, b, eps, AXIS)

    for turn in tl.range(split, STEPS, splits, num_stages=STAGES):
        step = STEPS - 1 - turn  # backwards: what the statistics read last
        row, live_row, column = rows_of(step, block, N, C, S, AXIS, BLOCK_C, BLOCK_S)
        at, live = elements_at(row, live_row, column, WIDTH, BLOCK_ROW)
        z = affine(tl.load(x + at, mask=live, other=0).to(tl.float32) - mean, scale, shift)
        if r is not None:
            z += tl.load(r + at, mask=live, other=0).to(tl.float32)

        if mask is not None:
            bits = tl.where((z <= 0) | (live == 0), 0, 1)  # not z > 0: NaN passes
            bits = tl.reshape(bits, [BLOCK_ROWS, BLOCK_ROW // 8, 8]) << tl.arange(0, 8)[None, None, :]
            byte, live_byte = elements_at(row, live_row, column // 8, tl.cdiv(WIDTH, 8), BLOCK_ROW // 8)
            tl.store(mask + byte, tl.sum(bits, 2).to(tl.uint8), mask=live_byte)
        if RELU:
            z = tl.where(z <= 0, 0, z)
        tl.store(y + at, z.to(y.dtype.element_ty), mask=live)
