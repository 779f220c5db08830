"""attention, backward: blocks of queries walk along keys for dq, blocks of keys along queries for dk and dv.

Nobody adds to what another program writes, so that results are the same bits from run to run. Blocks are shared out as
in the forward; lse and delta are [B, H, Lq] of float32, Lq being all tokens where sequences are packed.
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
def attention_bwd_delta_kernel(
    grad_output, grad_lse, output, delta, do_b, do_h, do_i, dlse_b, dlse_h, dlse_i, o_b, o_h, o_i, H, Lq,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """delta_i = do_i.o_i - dlse_i."""
    blocks = tl.cdiv(Lq, BLOCK_M)
    work = tl.program_id(0)
    h = work // blocks % H
    b = work // blocks // H
    start = work % blocks * BLOCK_M
    o = load_rows(output, b, h, 0, start, Lq, o_b, o_h, o_i, DV, BLOCK_M, BLOCK_V, False, True)
    do = load_rows(grad_output, b, h, 0, start, Lq, do_b, do_h, do_i, DV, BLOCK_M, BLOCK_V, False, True)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    i = start + tl.arange(0, BLOCK_M)
    if grad_lse is not None:
        at = far(b, dlse_b) + far(h, dlse_h) + i.to(tl.int64) * dlse_i
        sums -= tl.load(grad_lse + at, mask=i < Lq, other=0)
    tl.store(delta + far(b * H + h, Lq) + i, sums, mask=i < Lq)


@triton.jit
def load_sums(lse, delta, number, Lq, first, exists, BLOCK_M: tl.constexpr):
    """lse and delta of queries first..; those that do not exist or have no keys get exp(s - lse) = 0."""
    at = far(number, Lq) + first + tl.arange(0, BLOCK_M)
    log = tl.load(lse + at, mask=exists, other=float("inf"))
    log = tl.where(log == float("-inf"), float("inf"), log)
    return log, tl.load(delta + at, mask=exists, other=0)


@triton.jit(do_not_specialize=["sequences", "blocks", "Lq", "Lk", "left", "right", "threshold"])
def attention_bwd_q_kernel(
    q, k, v, grad_output, mask, slopes, ends_q, ends_k, lengths_k, seed, lse, delta, grad_q, grad_mask,
    q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j, do_b, do_h, do_i, dq_b, dq_h, dq_i,
    mask_b, mask_h, mask_i, mask_j, slopes_b,
    sequences, H, group, blocks, Lq, Lk, scale, softcap, left, right, threshold, rescale,
    D: tl.constexpr, DV: tl.constexpr, D_STORED: tl.constexpr, LOWER_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq, and into grad_mask [B, H, Lq, Lk], which is 0 before, ds."""
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
            exists = i < queries - start_m
            slope = slope_of(b, h, slopes, slopes_b)
            of_head = mask
            if mask is not None:
                of_head = mask + far(b, mask_b) + far(h, mask_h)
            q_tile = load_rows(
                q, memory_b, h, q_first, start_m, queries, q_b, q_h, q_i, D, BLOCK_M, BLOCK_D, DESCRIPTOR, True
            )
            do_tile = load_rows(
                grad_output, memory_b, h, q_first, start_m, queries, do_b, do_h, do_i,
                DV, BLOCK_M, BLOCK_V, DESCRIPTOR, True,
            )  # fmt: skip
            log, delta_i = load_sums(lse, delta, memory_b * H + h, Lq, q_first + start_m, exists, BLOCK_M)
            dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            last_m = tl.minimum(start_m + BLOCK_M, queries) - 1
            met = blocks_met(start_m + shift, last_m + shift, keys, left, right, LEFT, RIGHT, BLOCK_N)
            for EDGE in tl.static_range(2):
                for t in tl.range(0, number_of_blocks(met, EDGE), disable_licm=not HOIST):
                    start_n = block_number(met, t, EDGE) * BLOCK_N
                    k_tile = load_rows(
                        k, memory_b, h // group, k_first, start_n, keys, k_b, k_h, k_j,
                        D, BLOCK_N, BLOCK_D, DESCRIPTOR, EDGE,
                    )  # fmt: skip
                    v_tile = load_rows(
                        v, memory_b, h // group, k_first, start_n, keys, v_b, v_h, v_j,
                        DV, BLOCK_N, BLOCK_V, DESCRIPTOR, EDGE,
                    )  # fmt: skip
                    x = multiply_add(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
                    s, derivative = score(
                        x, start_m, i[:, None], start_n, j[None, :], shift, queries, keys, scale, softcap, slope,
                        of_head, mask_i, mask_j, left, right, SOFTCAP, ALIBI, LEFT, RIGHT, EDGE,
                    )  # fmt: skip
                    p = tl.exp2((s - log[:, None]) * LOG2E)  # the difference first: with it its rounding is small
                    dp = multiply_add(do_tile, v_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
                    if DROPOUT:
                        keep = kept(seed, threshold, b * H + h, start_m, start_n, BLOCK_M, BLOCK_N)
                        dp = tl.where(keep, dp * rescale, 0)
                    ds = p * (dp - delta_i[:, None])
                    if grad_mask is not None:
                        of_tile = grad_mask + (far(b * H + h, Lq) + start_m) * Lk + start_n
                        there = exists[:, None] & (j < keys - start_n)[None, :]
                        dtype: tl.constexpr = grad_mask.dtype.element_ty
                        tl.store(of_tile + (i[:, None] * Lk + j[None, :]), ds.to(dtype), mask=there)
                    if grad_q is not None:
                        dq = multiply_add((ds * derivative).to(k_tile.dtype), k_tile, dq, PRECISION)
            if grad_q is not None:
                store_rows(
                    grad_q, dq * scale, memory_b, h, q_first + start_m, exists, dq_b, dq_h, dq_i,
                    D_STORED, BLOCK_M, BLOCK_D,
                )  # fmt: skip


@triton.jit(do_not_specialize=["sequences", "blocks", "Lq", "Lk", "left", "right", "threshold"])
def attention_bwd_kv_kernel(
    q, k, v, grad_output, mask, slopes, ends_q, ends_k, lengths_k, seed, lse, delta, grad_k, grad_v,
    q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j, do_b, do_h, do_i, dk_b, dk_h, dk_j, dv_b, dv_h, dv_j,
    mask_b, mask_h, mask_i, mask_j, slopes_b,
    sequences, H, group, blocks, Lq, Lk, scale, softcap, left, right, threshold, rescale,
    D: tl.constexpr, DV: tl.constexpr, D_STORED: tl.constexpr, DV_STORED: tl.constexpr, LOWER_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    HOIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dk and dv, either of which may be None; tiles are [keys, queries]. H counts heads of q, of which `group` meet the
    same keys."""
    ALIBI: tl.constexpr = slopes is not None
    DROPOUT: tl.constexpr = seed is not None
    heads = H // group
    for work in tl.range(tl.program_id(0), sequences * heads * blocks, tl.num_programs(0), disable_licm=not HOIST):
        # bounded on the right, the keys that the most queries meet come first as they are
        block, h_k, b, memory_b, q_first, queries, k_first, tokens, keys, shift = place_of(
            work, blocks, heads, ends_q, ends_k, lengths_k, Lq, Lk, LOWER_RIGHT
        )
        start_n = block * BLOCK_N
        if start_n < tokens:
            i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
            k_tile = load_rows(
                k, memory_b, h_k, k_first, start_n, keys, k_b, k_h, k_j, D, BLOCK_N, BLOCK_D, DESCRIPTOR, True
            )
            v_tile = load_rows(
                v, memory_b, h_k, k_first, start_n, keys, v_b, v_h, v_j, DV, BLOCK_N, BLOCK_V, DESCRIPTOR, True
            )
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            last_n = tl.minimum(start_n + BLOCK_N, keys) - 1
            others = tl.where(start_n < keys, queries, 0)
            met = blocks_met(start_n - shift, last_n - shift, others, right, left, RIGHT, LEFT, BLOCK_M)
            for EDGE in tl.static_range(2):
                number = number_of_blocks(met, EDGE)
                for t in tl.range(0, group * number, disable_licm=not HOIST):
                    h = h_k * group + t // number
                    start_m = block_number(met, t % number, EDGE) * BLOCK_M
                    slope = slope_of(b, h, slopes, slopes_b)
                    of_head = mask
                    if mask is not None:
                        of_head = mask + far(b, mask_b) + far(h, mask_h)
                    q_tile = load_rows(
                        q, memory_b, h, q_first, start_m, queries, q_b, q_h, q_i,
                        D, BLOCK_M, BLOCK_D, DESCRIPTOR, EDGE,
                    )  # fmt: skip
                    do_tile = load_rows(
                        grad_output, memory_b, h, q_first, start_m, queries, do_b, do_h, do_i,
                        DV, BLOCK_M, BLOCK_V, DESCRIPTOR, EDGE,
                    )  # fmt: skip
                    exists = i < queries - start_m
                    log, delta_i = load_sums(lse, delta, memory_b * H + h, Lq, q_first + start_m, exists, BLOCK_M)
                    x = multiply_add(k_tile, q_tile.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
                    s, derivative = score(
                        x, start_m, i[None, :], start_n, j[:, None], shift, queries, keys, scale, softcap, slope,
                        of_head, mask_i, mask_j, left, right, SOFTCAP, ALIBI, LEFT, RIGHT, EDGE,
                    )  # fmt: skip
                    p = tl.exp2((s - log[None, :]) * LOG2E)
                    if DROPOUT:
                        keep = kept(seed, threshold, b * H + h, start_m, start_n, BLOCK_M, BLOCK_N).T
                    if grad_v is not None:
                        weights = tl.where(keep, p, 0) if DROPOUT else p
                        dv = multiply_add(weights.to(do_tile.dtype), do_tile, dv, PRECISION)
                    if grad_k is not None:
                        dp = multiply_add(v_tile, do_tile.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
                        if DROPOUT:
                            dp = tl.where(keep, dp * rescale, 0)
                        ds = p * (dp - delta_i[None, :])
                        dk = multiply_add((ds * derivative).to(q_tile.dtype), q_tile, dk, PRECISION)
            exists, filled = j < tokens - start_n, (j < keys - start_n)[:, None]
            first = k_first + start_n
            if grad_k is not None:
                dk = tl.where(filled, dk * scale, 0)
                store_rows(grad_k, dk, memory_b, h_k, first, exists, dk_b, dk_h, dk_j, D_STORED, BLOCK_N, BLOCK_D)
            if grad_v is not None:
                dv = tl.where(filled, dv * rescale, 0)
                store_rows(grad_v, dv, memory_b, h_k, first, exists, dv_b, dv_h, dv_j, DV_STORED, BLOCK_N, BLOCK_V)
