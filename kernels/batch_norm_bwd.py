"""batch_norm, backward: the adjoint of batch_norm_fwd, in its tiles and steps.

With xhat = (x - mean) rstd and dz = dy where ReLU passed, by the mask or by computing (x - mean) (w rstd) + b again:

    db = sum dz     dw = sum dz xhat     dr = dz
    dx = w rstd (dz - mean(dz) - xhat mean(dz xhat))      without the means where the statistics were constants
"""

import triton
import triton.language as tl
from fastarch.kernels.batch_norm_fwd import (
    affine,
    constants_of,
    elements_at,
    per_channel,
    rows_of,
    split_of,
    width_of,
)


@triton.jit
def gradient_past_relu(
    dy, mask, d, scale, shift, at, live, row, live_row, column, WIDTH, RELU: tl.constexpr, BLOCK_ROW: tl.constexpr
):
    """dz, of a tile; d = x - mean."""
    dz = tl.load(dy + at, mask=live, other=0).to(tl.float32)
    if RELU:
        if mask is not None:
            byte, live_byte = elements_at(row, live_row, column // 8, tl.cdiv(WIDTH, 8), BLOCK_ROW // 8)
            bits = tl.load(mask + byte, mask=live_byte, other=0).to(tl.int32)
            bits = bits[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1
            dz = tl.where(tl.reshape(bits, dz.shape) != 0, dz, 0)
        else:
            dz = tl.where(affine(d, scale, shift) <= 0, 0, dz)
    return dz


@triton.jit
def batch_norm_bwd_sums_kernel(
    dy, x, mask, w, b, mean, var, partial,
    N, C, S, STEPS, eps,
    AXIS: tl.constexpr, RELU: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial [2, C, splits]: sum dz and sum dz xhat of a split's values."""
    WIDTH = width_of(C, S, AXIS, VECTOR)
    BLOCK_ROW: tl.constexpr = BLOCK_C if AXIS == 0 else BLOCK_S
    BLOCK_ROWS: tl.constexpr = BLOCK_S if AXIS == 0 else BLOCK_C
    block, split, splits = split_of(C, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, scale, shift = constants_of(c, c < C, mean, var, w, b, eps, AXIS)

    sum_dz = tl.zeros([BLOCK_ROWS, BLOCK_ROW], tl.float32)
    sum_dz_d = tl.zeros([BLOCK_ROWS, BLOCK_ROW], tl.float32)
    for step in tl.range(split, STEPS, splits, num_stages=STAGES):
        row, live_row, column = rows_of(step, block, N, C, S, AXIS, BLOCK_C, BLOCK_S)
        at, live = elements_at(row, live_row, column, WIDTH, BLOCK_ROW)
        d = tl.load(x + at, mask=live, other=0).to(tl.float32) - mean
        dz = gradient_past_relu(dy, mask, d, scale, shift, at, live, row, live_row, column, WIDTH, RELU, BLOCK_ROW)
        sum_dz += dz
        sum_dz_d += dz * d

    at = c * splits + split
    tl.store(partial + at, tl.sum(sum_dz, AXIS), mask=c < C)
    sum_dz_xhat = tl.sum(sum_dz_d, AXIS) * tl.reshape(rstd, [BLOCK_C])
    tl.store(partial + C * splits + at, sum_dz_xhat, mask=c < C)


@triton.jit
def batch_norm_bwd_merge_kernel(
    partial, sum_dz, sum_dz_xhat, C, SPLITS, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    """The sums over all splits."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, BLOCK_SPLITS)
    live = (c < C)[:, None] & (split < SPLITS)[None, :]
    at = c[:, None] * SPLITS + split[None, :]  # [BLOCK_C, BLOCK_SPLITS]
    tl.store(sum_dz + c, tl.sum(tl.load(partial + at, mask=live, other=0), 1), mask=c < C)
    tl.store(sum_dz_xhat + c, tl.sum(tl.load(partial + C * SPLITS + at, mask=live, other=0), 1), mask=c < C)


@triton.jit
def batch_norm_bwd_kernel(
    dy, x, mask, w, b, mean, var, sum_dz, sum_dz_xhat, dx, dr,
    N, C, S, STEPS, eps, share,
    AXIS: tl.constexpr, RELU: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dr = dz and dx = w rstd (dz - share sum_dz - xhat share sum_dz_xhat), from the end, as the sums read last."""
    READS_X: tl.constexpr = sum_dz is not None or (RELU and mask is None)
    WIDTH = width_of(C, S, AXIS, VECTOR)
    BLOCK_ROW: tl.constexpr = BLOCK_C if AXIS == 0 else BLOCK_S
    block, split, splits = split_of(C, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, scale, shift = constants_of(c, c < C, mean, var, w, b, eps, AXIS)
    if sum_dz is not None:
        mean_dz = per_channel(sum_dz, c, c < C, AXIS) * share
        slope = per_channel(sum_dz_xhat, c, c < C, AXIS) * share * rstd

    for turn in tl.range(split, STEPS, splits, num_stages=STAGES):
        step = STEPS - 1 - turn
        row, live_row, column = rows_of(step, block, N, C, S, AXIS, BLOCK_C, BLOCK_S)
        at, live = elements_at(row, live_row, column, WIDTH, BLOCK_ROW)
        d = mean
        if READS_X:
            d = tl.load(x + at, mask=live, other=0).to(tl.float32) - mean
        dz = gradient_past_relu(dy, mask, d, scale, shift, at, live, row, live_row, column, WIDTH, RELU, BLOCK_ROW)
        if dr is not None:
            tl.store(dr + at, dz.to(dr.dtype.element_ty), mask=live)
        if dx is not None:
            if sum_dz is not None:
                dz -= mean_dz + d * slope
            tl.store(dx + at, (scale * dz).to(dx.dtype.element_ty), mask=live)
