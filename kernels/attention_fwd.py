"""attention, forward: blocks of queries walk along the keys that they meet, with a running softmax.

A program takes every so many-th block. `blocks` is their number in each of H heads of `sequences` sequences; where keys
are bounded on the right, the longest walks of a head come first. q, k and v are pointers or, where rows are whole and
nobody else's lie between them, tensor descriptors.
"""

import triton
import triton.language as tl
from fastarch.kernels.attention_score import (
    LOG2E,
    block_number,
    blocks_met,
    far,
    kept,
    load_rows,
    number_of_blocks,
    place_of,
    score,
    slope_of,
    store_rows,
)
from fastarch.kernels.product import multiply_add


@triton.jit
def attend(
    acc, total, most, x, v, start_m, i, start_n, j, keep, shift, queries, keys, scale, softcap, slope,
    mask, mask_i, mask_j, left, right,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of the running softmax: products x [M, N] of queries and keys, values v [N, Dv].

    acc [M, Dv] and total [M] are sums of exp(s - most); most [M] is the largest score so far.
    """
    if mask is None and v.dtype != tl.float32 and not (SOFTCAP or ALIBI or EDGE):
        # one multiply-add an element; its rounding, of s instead of the difference, is lost in that of the operands
        largest = tl.maximum(most, tl.max(x, 1) * scale)  # scale >= 0
        base = largest
        p = tl.exp2(x * (scale * LOG2E) - (base * LOG2E)[:, None])
    else:
        s, _ = score(
            x, start_m, i[:, None], start_n, j[None, :], shift, queries, keys, scale, softcap, slope,
            mask, mask_i, mask_j, left, right, SOFTCAP, ALIBI, LEFT, RIGHT, EDGE,
        )  # fmt: skip
        largest = tl.maximum(most, tl.max(s, 1))
        base = tl.where(largest == float("-inf"), 0, largest)  # of rows without keys so far
        p = tl.exp2((s - base[:, None]) * LOG2E)
    shrink = tl.exp2((most - base) * LOG2E)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep, p, 0)
    acc = multiply_add(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
    return acc, total, largest


@triton.jit(do_not_specialize=["sequences", "blocks", "Lq", "Lk", "left", "right", "threshold"])
def attention_fwd_kernel(
    q, k, v, mask, slopes, ends_q, ends_k, lengths_k, seed, output, lse,
    q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j, o_b, o_h, o_i, mask_b, mask_h, mask_i, mask_j, slopes_b,
    sequences, H, group, blocks, Lq, Lk, scale, softcap, left, right, threshold, rescale,
    D: tl.constexpr, DV: tl.constexpr, DV_STORED: tl.constexpr, LOWER_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    ALIBI: tl.constexpr = slopes is not None
    DROPOUT: tl.constexpr = seed is not None
    for work in tl.range(tl.program_id(0), sequences * H * blocks, tl.num_programs(0), disable_licm=not HOIST):
        block, h, b, memory_b, q_first, queries, k_first, _, keys, shift = place_of(
            work, blocks, H, ends_q, ends_k, lengths_k, Lq, Lk, LOWER_RIGHT
        )
        if RIGHT:
            block = blocks - 1 - block
        start_m = block * BLOCK_M
        if start_m < queries:
            i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
            slope = slope_of(b, h, slopes, slopes_b)
            of_head = mask
            if mask is not None:
                of_head = mask + far(b, mask_b) + far(h, mask_h)
            q_tile = load_rows(
                q, memory_b, h, q_first, start_m, queries, q_b, q_h, q_i, D, BLOCK_M, BLOCK_D, DESCRIPTOR, True
            )
            acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            most = tl.full([BLOCK_M], float("-inf"), tl.float32)
            last_m = tl.minimum(start_m + BLOCK_M, queries) - 1
            met = blocks_met(start_m + shift, last_m + shift, keys, left, right, LEFT, RIGHT, BLOCK_N)
            for EDGE in tl.static_range(2):
                for t in tl.range(0, number_of_blocks(met, EDGE), disable_licm=not HOIST):
                    start_n = block_number(met, t, EDGE) * BLOCK_N
                    k_tile = load_rows(
                        k, memory_b, h // group, k_first, start_n, keys, k_b, k_h, k_j,
                        D, BLOCK_N, BLOCK_D, DESCRIPTOR, EDGE,
                    )  # fmt: skip
                    x = multiply_add(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
                    v_tile = load_rows(
                        v, memory_b, h // group, k_first, start_n, keys, v_b, v_h, v_j,
                        DV, BLOCK_N, BLOCK_V, DESCRIPTOR, EDGE,
                    )  # fmt: skip
                    keep = None
                    if DROPOUT:
                        keep = kept(seed, threshold, b * H + h, start_m, start_n, BLOCK_M, BLOCK_N)
                    acc, total, most = attend(
                        acc, total, most, x, v_tile, start_m, i, start_n, j, keep, shift, queries, keys, scale, softcap,
                        slope, of_head, mask_i, mask_j, left, right, SOFTCAP, ALIBI, LEFT, RIGHT, EDGE, DROPOUT,
                        PRECISION,
                    )  # fmt: skip
            some = tl.where(total == 0, 1, total)  # 0: of a row without keys
            o = acc * (rescale / some)[:, None]
            exists = i < queries - start_m
            store_rows(output, o, memory_b, h, q_first + start_m, exists, o_b, o_h, o_i, DV_STORED, BLOCK_M, BLOCK_V)
            log = tl.where(total == 0, float("-inf"), most + tl.log(some))
            tl.store(lse + far(memory_b * H + h, Lq) + (q_first + start_m + i), log, mask=exists)
