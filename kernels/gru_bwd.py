"""gru, backward: a step of the reverse walk, mirroring gru_fwd, in tiles [units, sequences] again.

A launch first completes the gradient of the state it stands at: d = carry + W_hh' (gate gradients of the step walked
before), `carry` [N, H] being what needs no product, in float32. From d come this step's gate gradients and its carry.
So every product reads what another launch wrote, and no gate gradient is computed twice.

grads [T, N, G, H], G 4 with reset_after and else 3, in the order dn, dr, dz and dn * r: the first three are the
gradients at W_ih x, the last three (two) those at W_hh h, side by side for the products. In padding all are 0, and d
passes on as it is.
"""

import triton
import triton.language as tl
from fastarch.kernels.gru_fwd import live_at, take, tile_of
from fastarch.kernels.product import multiply_add


@triton.jit
def multiply_back(
    grads, row, stride_row, w, stride_unit, stride_k, unit, n, N, H, K, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """sum_k w[unit, k] grads[row, k], of a tile."""
    acc = tl.zeros([unit.shape[0], n.shape[0]], tl.float32)
    w_row = w + unit[:, None] * stride_unit
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live_w = (unit < H)[:, None] & (k < K)[None, :]
        live_g = (k < K)[:, None] & (n < N)[None, :]
        w_tile = tl.load(w_row + k.to(tl.int64)[None, :] * stride_k, mask=live_w, other=0)
        g_tile = tl.load(grads + row * stride_row + k[:, None], mask=live_g, other=0)  # [BLOCK_K, BLOCK_N]
        acc = multiply_add(w_tile, g_tile, acc, PRECISION)
    return acc


@triton.jit
def state_before(output, h0, lengths, t, row, T, N, H, unit, n, live, REVERSE: tl.constexpr):
    """h_{t-1} of a tile: the output of the step before in the forward's walk, or h0. 0 in padding."""
    if REVERSE:
        walked = live_at(t + 1, n, N, lengths, live & (row + N < T.to(tl.int64) * N))
        before = row + N
    else:
        walked = live & (row >= N)
        before = row - N
    h = take(output, before * H + unit[:, None], walked)
    return tl.where(walked, h, take(h0, n[None, :] * H + unit[:, None], live & (walked == 0)))


@triton.jit(do_not_specialize=["t", "T", "N"])
def gru_bwd_kernel(
    dy, carry, grads, w, products, h0, output, gates, lengths, before,
    t, T, N, H, stride_t, stride_n, stride_h, stride_unit, stride_k,
    REVERSE: tl.constexpr, RESET_AFTER: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All gate gradients of a step but, without reset_after, dr; and h_{t-1}, to `before`, for dW_hh.

    w [H, 3H] is W_hh transposed. Neither PRODUCT nor `products`: no step was walked before.
    """
    G: tl.constexpr = 4 if RESET_AFTER else 3
    unit, n, exists = tile_of(N, H, BLOCK_H, BLOCK_N)
    row = t.to(tl.int64) * N + n[None, :]
    at = n[None, :] * H + unit[:, None]
    live = live_at(t, n, N, lengths, exists)

    d = tl.load(carry + at, mask=exists, other=0)
    if PRODUCT:
        walked = row - N if REVERSE else row + N
        d += multiply_back(
            grads + H, walked, G * H, w, stride_unit, stride_k, unit, n, N, H, (G - 1) * H, PRECISION, BLOCK_K
        )
    elif products is not None:
        d += take(products, at, exists)
    d_live = d
    if dy is not None:
        at_y = t.to(tl.int64) * stride_t + n[None, :] * stride_n + unit[:, None] * stride_h
        d_live += take(dy, at_y, live)

    g = row * (G * H) + unit[:, None]
    h = state_before(output, h0, lengths, t, row, T, N, H, unit, n, live, REVERSE)
    z = take(gates, g + H, live)
    c = take(gates, g + 2 * H, live)
    dz = tl.where(live, d_live * (h - c) * (z * (1 - z)), 0)
    dn = tl.where(live, d_live * (1 - z) * ((1 - c) * (1 + c)), 0)  # 1 - c * c cancels near 1
    dtype: tl.constexpr = grads.dtype.element_ty
    tl.store(grads + g, dn.to(dtype), mask=exists)
    tl.store(grads + g + 2 * H, dz.to(dtype), mask=exists)
    if RESET_AFTER:
        r = take(gates, g, live)
        dr = dn * take(gates, g + 3 * H, live) * (r * (1 - r))
        tl.store(grads + g + H, dr.to(dtype), mask=exists)
        tl.store(grads + g + 3 * H, (dn * r).to(dtype), mask=exists)
    tl.store(carry + at, tl.where(live, d_live * z, d), mask=exists)
    if before is not None:
        tl.store(before + row * H + unit[:, None], h.to(before.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["t", "T", "N"])
def gru_bwd_reset_kernel(
    carry, grads, w, products, h0, output, gates, lengths, reset,
    t, T, N, H, stride_unit, stride_k,
    REVERSE: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Without reset_after, from q = W_hn' dn: dr, q * r to the carry, and r * h_{t-1}, to `reset`, for dW_hn."""
    unit, n, exists = tile_of(N, H, BLOCK_H, BLOCK_N)
    row = t.to(tl.int64) * N + n[None, :]
    at = n[None, :] * H + unit[:, None]
    live = live_at(t, n, N, lengths, exists)

    if PRODUCT:
        q = multiply_back(grads, row, 3 * H, w, stride_unit, stride_k, unit, n, N, H, H, PRECISION, BLOCK_K)
    else:
        q = take(products, at, exists)
    g = row * (3 * H) + unit[:, None]
    r = take(gates, g, live)
    h = state_before(output, h0, lengths, t, row, T, N, H, unit, n, live, REVERSE)
    dr = tl.where(live, q * h * (r * (1 - r)), 0)
    tl.store(grads + g + H, dr.to(grads.dtype.element_ty), mask=exists)
    d = tl.load(carry + at, mask=live, other=0)
    tl.store(carry + at, d + q * r, mask=live)
    if reset is not None:
        tl.store(reset + row * H + unit[:, None], (r * h).to(reset.dtype.element_ty), mask=exists)
