"""gru, forward: one step of fastarch/ops/gru.py's equations, for tiles [units, sequences] of the state.

Units lie along axis 0, so that weights, of which there are many, are the product's left operand: wgmma wants 64 rows of
that, and sequences may be as few as 16. With PRODUCT the kernels multiply themselves; otherwise `products` [N, 3H] or a
part of its columns holds what a library multiplied, and only the gates remain.

`h` [N, H] is the state before, in x's dtype: products read it, so that h_t goes to another place, `h_next`. `state` is
the same in float32, of which every program reads and writes its own tile alone; without it (float32, or a single step)
`h` is as good. `projected` is W_ih x of all steps, rows of stride_row; it may lie where `gates` go, for of both a
program touches its own tile alone and reads first. Without it (a single step) kernels multiply x [N, C] as well.
"""

import triton
import triton.language as tl
from fastarch.kernels.product import multiply_add


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By an exponential where that does not cancel; the odd polynomial is Cephes' tanhf, within 2 units everywhere."""
    square = x * x
    series = -5.70498872745e-3
    series = series * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    magnitude = tl.abs(x)
    far = 1 - 2 / (tl.exp(2 * magnitude) + 1)
    return tl.where(magnitude < 0.625, x + x * square * series, tl.where(x < 0, -far, far))


@triton.jit
def tile_of(N, H, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a program: its units and sequences, in 64 bits for the offsets made of them, and whether there are such."""
    blocks = tl.cdiv(H, BLOCK_H)
    program = tl.program_id(0)
    unit = (program % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    n = (program // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return unit, n, (unit < H)[:, None] & (n < N)[None, :]


@triton.jit
def live_at(t, n, N, lengths, exists):
    """Where a tile's sequences have a step t."""
    if lengths is not None:
        return exists & (t < tl.load(lengths + n, mask=n < N, other=0))[None, :]
    else:
        return exists


@triton.jit
def take(pointer, at, live):
    return tl.load(pointer + at, mask=live, other=0).to(tl.float32)


@triton.jit
def plus_bias(value, b, unit, H, gate: tl.constexpr):
    if b is not None:
        value += tl.load(b + gate * H + unit, mask=unit < H, other=0).to(tl.float32)[:, None]
    return value


@triton.jit
def multiply_gates(
    r, z, c, x, stride_n, stride_k, w, unit, n, N, H, K,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """r, z and c plus sum_k w[gate, unit, k] x[n, k], of the gates FIRST to LAST; c is the third's."""
    w_row = w + unit[:, None] * K
    x_row = x + n[None, :] * stride_n
    gate = tl.full([], K, tl.int64) * H
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = w_row + k[None, :]
        live = (unit < H)[:, None] & (k < K)[None, :]
        x_tile = tl.load(
            x_row + k.to(tl.int64)[:, None] * stride_k, mask=(k < K)[:, None] & (n < N)[None, :], other=0
        )  # [BLOCK_K, BLOCK_N]
        if FIRST == 0:
            r = multiply_add(tl.load(at, mask=live, other=0), x_tile, r, PRECISION)
            z = multiply_add(tl.load(at + gate, mask=live, other=0), x_tile, z, PRECISION)
        if LAST == 2:
            c = multiply_add(tl.load(at + 2 * gate, mask=live, other=0), x_tile, c, PRECISION)
    return r, z, c


@triton.jit
def from_state(
    h, w, b, products, unit, n, N, H, live,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W_hh h + b_hh of the gates FIRST to LAST."""
    r = tl.zeros(live.shape, tl.float32)
    z = tl.zeros(live.shape, tl.float32)
    c = tl.zeros(live.shape, tl.float32)
    if PRODUCT:
        r, z, c = multiply_gates(r, z, c, h, H, 1, w, unit, n, N, H, H, FIRST, LAST, PRECISION, BLOCK_K)
    else:
        at = n[None, :] * ((LAST - FIRST + 1) * H) + unit[:, None]
        if FIRST == 0:
            r = take(products, at, live)
            z = take(products, at + H, live)
        if LAST == 2:
            c = take(products, at + (LAST - FIRST) * H, live)
    return plus_bias(r, b, unit, H, 0), plus_bias(z, b, unit, H, 1), plus_bias(c, b, unit, H, 2)


@triton.jit
def plus_input(
    r, z, c, x, stride_n, stride_c, w, b, projected, stride_row, row, unit, n, N, C, H, live,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """r, z and c plus W_ih x + b_ih, of the gates FIRST to LAST."""
    if projected is None:
        r, z, c = multiply_gates(r, z, c, x, stride_n, stride_c, w, unit, n, N, H, C, FIRST, LAST, PRECISION, BLOCK_K)
    else:
        at = row * stride_row + unit[:, None]
        if FIRST == 0:
            r += take(projected, at, live)
            z += take(projected, at + H, live)
        if LAST == 2:
            c += take(projected, at + 2 * H, live)
    return plus_bias(r, b, unit, H, 0), plus_bias(z, b, unit, H, 1), plus_bias(c, b, unit, H, 2)


@triton.jit
def store_state(z, c, h, state, h_next, output, at, row, H, unit, exists, live):
    """h_t = (1 - z) c + z h_{t-1}, to all that want it. In padding the state stays and the output is 0."""
    before = take(h if state is None else state, at, exists)
    after = tl.where(live, (1 - z) * c + z * before, before)
    tl.store(h_next + at, after.to(h_next.dtype.element_ty), mask=exists)
    if state is not None:
        tl.store(state + at, after, mask=exists)
    after = tl.where(live, after, 0)
    tl.store(output + row * H + unit[:, None], after.to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["t", "N"])
def gru_fwd_kernel(
    x, w_ih, b_ih, projected, h, state, w_hh, b_hh, products, lengths, h_next, output, gates,
    t, N, C, H, stride_n, stride_c, stride_row,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A step with reset_after."""
    unit, n, exists = tile_of(N, H, BLOCK_H, BLOCK_N)
    row = t.to(tl.int64) * N + n[None, :]
    at = n[None, :] * H + unit[:, None]
    live = live_at(t, n, N, lengths, exists)

    r, z, a_n = from_state(h, w_hh, b_hh, products, unit, n, N, H, live, 0, 2, PRODUCT, PRECISION, BLOCK_K)
    i_n = tl.zeros_like(a_n)
    r, z, i_n = plus_input(
        r, z, i_n, x, stride_n, stride_c, w_ih, b_ih, projected, stride_row, row, unit, n, N, C, H, live,
        0, 2, PRECISION, BLOCK_K,
    )  # fmt: skip
    r = sigmoid(r)
    z = sigmoid(z)
    c = tanh(i_n + r * a_n)
    if gates is not None:
        g = gates + row * (4 * H) + unit[:, None]
        dtype: tl.constexpr = gates.dtype.element_ty
        tl.store(g, r.to(dtype), mask=live)
        tl.store(g + H, z.to(dtype), mask=live)
        tl.store(g + 2 * H, c.to(dtype), mask=live)
        tl.store(g + 3 * H, a_n.to(dtype), mask=live)
    store_state(z, c, h, state, h_next, output, at, row, H, unit, exists, live)


@triton.jit(do_not_specialize=["t", "N"])
def gru_fwd_reset_kernel(
    x, w_ih, b_ih, projected, h, state, w_hh, b_hh, products, reset, update, gates,
    t, N, C, H, stride_n, stride_c, stride_row,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a step without reset_after the first half: reset = r * h_{t-1}, which meets W_hn, and update = z, [N, H]."""
    unit, n, exists = tile_of(N, H, BLOCK_H, BLOCK_N)
    row = t.to(tl.int64) * N + n[None, :]
    at = n[None, :] * H + unit[:, None]

    r, z, _ = from_state(h, w_hh, b_hh, products, unit, n, N, H, exists, 0, 1, PRODUCT, PRECISION, BLOCK_K)
    r, z, _ = plus_input(
        r, z, z, x, stride_n, stride_c, w_ih, b_ih, projected, stride_row, row, unit, n, N, C, H, exists,
        0, 1, PRECISION, BLOCK_K,
    )  # fmt: skip
    r = sigmoid(r)
    z = sigmoid(z)
    before = take(h if state is None else state, at, exists)
    tl.store(reset + at, (r * before).to(reset.dtype.element_ty), mask=exists)
    tl.store(update + at, z, mask=exists)
    if gates is not None:
        g = gates + row * (3 * H) + unit[:, None]
        tl.store(g, r.to(gates.dtype.element_ty), mask=exists)
        tl.store(g + H, z.to(gates.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["t", "N"])
def gru_fwd_candidate_kernel(
    x, w_ih, b_ih, projected, h, state, w_hh, b_hh, products, reset, update, lengths, h_next, output, gates,
    t, N, C, H, stride_n, stride_c, stride_row,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The second half: n and the state."""
    unit, n, exists = tile_of(N, H, BLOCK_H, BLOCK_N)
    row = t.to(tl.int64) * N + n[None, :]
    at = n[None, :] * H + unit[:, None]
    live = live_at(t, n, N, lengths, exists)

    _, _, c = from_state(reset, w_hh, b_hh, products, unit, n, N, H, live, 2, 2, PRODUCT, PRECISION, BLOCK_K)
    _, _, c = plus_input(
        c, c, c, x, stride_n, stride_c, w_ih, b_ih, projected, stride_row, row, unit, n, N, C, H, live,
        2, 2, PRECISION, BLOCK_K,
    )  # fmt: skip
    c = tanh(c)
    z = take(update, at, exists)
    if gates is not None:
        tl.store(gates + row * (3 * H) + 2 * H + unit[:, None], c.to(gates.dtype.element_ty), mask=live)
    store_state(z, c, h, state, h_next, output, at, row, H, unit, exists, live)
