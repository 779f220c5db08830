"""attention of few queries: parts of the keys side by side, for all queries that read a head of keys, and their merge.

The queries of `group` heads are rows of one tile: row r is query r // group of the head's r % group. Partial results
are [parts, B, H, Lq, DV] and [parts, B, H, Lq] of float32.
"""

import triton
import triton.language as tl
from fastarch.kernels.attention_fwd import attend
from fastarch.kernels.attention_score import block_number, blocks_met, far, keys_of, load_rows, number_of_blocks
from fastarch.kernels.product import multiply_add


@triton.jit(do_not_specialize=["B", "Lq", "Lk", "left", "parts"])
def attention_split_kernel(
    q, k, v, mask, slopes, lengths_k, partial, partial_lse,
    q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j, mask_b, mask_h, mask_i, mask_j, slopes_b,
    parts, B, H, group, Lq, Lk, scale, softcap, left, right,
    D: tl.constexpr, DV: tl.constexpr, DV_STORED: tl.constexpr, LOWER_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    ALIBI: tl.constexpr = slopes is not None
    heads = H // group
    program = tl.program_id(0)
    part = program % parts
    h_k = program // parts % heads
    b = program // parts // heads % B
    row = program // parts // heads // B * BLOCK_M + tl.arange(0, BLOCK_M)
    i = row // group
    h = h_k * group + row % group
    keys = keys_of(b, lengths_k, Lk)
    shift = keys - Lq if LOWER_RIGHT else 0
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + b * slopes_b + h, mask=h < H, other=0)[:, None]
    of_heads = mask
    if mask is not None:
        of_heads = mask + far(b, mask_b) + h.to(tl.int64)[:, None] * mask_h
    e = tl.arange(0, BLOCK_D)
    at = far(b, q_b) + h.to(tl.int64) * q_h + i.to(tl.int64) * q_i
    q_tile = tl.load(q + at[:, None] + e[None, :], mask=(i < Lq)[:, None] & (e < D)[None, :], other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    met = blocks_met(shift, shift + Lq - 1, keys, left, right, LEFT, RIGHT, BLOCK_N)
    for EDGE in tl.static_range(2):
        for t in tl.range(part, number_of_blocks(met, EDGE), parts, disable_licm=not HOIST):
            start_n = block_number(met, t, EDGE) * BLOCK_N
            k_tile = load_rows(k, b, h_k, 0, start_n, keys, k_b, k_h, k_j, D, BLOCK_N, BLOCK_D, False, EDGE)
            v_tile = load_rows(v, b, h_k, 0, start_n, keys, v_b, v_h, v_j, DV, BLOCK_N, BLOCK_V, False, EDGE)
            x = multiply_add(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
            acc, total, most = attend(
                acc, total, most, x, v_tile, 0, i, start_n, tl.arange(0, BLOCK_N), None, shift, Lq, keys, scale,
                softcap, slope, of_heads, mask_i, mask_j, left, right, SOFTCAP, ALIBI, LEFT, RIGHT, EDGE, False,
                PRECISION,
            )  # fmt: skip
    some = tl.where(total == 0, 1, total)  # 0: of a row without keys in this part
    e = tl.arange(0, BLOCK_V)
    at = ((part * B + b).to(tl.int64) * H + h) * Lq + i
    there = (i < Lq)[:, None] & (e < DV_STORED)[None, :]
    tl.store(partial + at[:, None] * DV_STORED + e[None, :], acc / some[:, None], mask=there)
    log = tl.where(total == 0, float("-inf"), most + tl.log(some))
    tl.store(partial_lse + at, log, mask=i < Lq)


@triton.jit(do_not_specialize=["rows", "Lq", "parts"])
def attention_merge_kernel(
    partial, partial_lse, output, lse, o_b, o_h, o_i, rows, H, Lq, parts,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of rows (b, h, i) lse = log sum_part exp(lse_part), output = sum_part exp(lse_part - lse) output_part."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_V)
    live = row < rows
    there = live[:, None] & (e < DV)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in tl.range(0, parts):
        at = far(part, rows) + row
        log = tl.load(partial_lse + at, mask=live, other=float("-inf"))
        o = tl.load(partial + at[:, None] * DV + e[None, :], mask=there, other=0)
        largest = tl.maximum(most, log)
        base = tl.where(largest == float("-inf"), 0, largest)
        shrink, weight = tl.exp(most - base), tl.exp(log - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + o * weight[:, None]
        most = largest
    some = tl.where(total == 0, 1, total)
    i = row % Lq
    h = row // Lq % H
    b = row // Lq // H
    at = b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + i.to(tl.int64) * o_i
    o = acc / some[:, None]
    tl.store(output + at[:, None] + e[None, :], o.to(output.dtype.element_ty), mask=there)
    log = tl.where(total == 0, float("-inf"), most + tl.log(some))
    tl.store(lse + row.to(tl.int64), log, mask=live)
