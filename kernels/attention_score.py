"""attention: what forward and backward have in common: which keys a block of queries meets, their scores, dropout.

i and j, the numbers of a tile's queries and keys, are [M, 1] and [1, N] or, where it is transposed, [1, M] and [N, 1].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def far(index, stride):
    """Their product in 64 bits."""
    return tl.full([], index, tl.int64) * stride


@triton.jit
def place_of(work, blocks, heads, ends_q, ends_k, lengths_k, Lq, Lk, LOWER_RIGHT: tl.constexpr):
    """Of the work of a program its block, head and sequence, the latter in memory; first query and queries, first key,
    keys in memory and keys that count; and how far the diagonal is shifted."""
    b = work // blocks // heads
    q_first, queries = sequence_of(b, ends_q, Lq)
    k_first, tokens = sequence_of(b, ends_k, Lk)
    keys = keys_of(b, lengths_k, tokens)
    memory_b = b if ends_q is None else b * 0
    shift = keys - queries if LOWER_RIGHT else 0
    return work % blocks, work // blocks % heads, b, memory_b, q_first, queries, k_first, tokens, keys, shift


@triton.jit
def sequence_of(b, ends, length):
    """First token and tokens of sequence b: of all `length`, or by the ends of packed ones, which are not trusted."""
    if ends is None:
        return 0, length
    else:
        first = tl.minimum(tl.maximum(tl.load(ends + b), 0), length)
        return first, tl.minimum(tl.maximum(tl.load(ends + b + 1), first), length) - first


@triton.jit
def keys_of(b, lengths_k, keys):
    """How many of the keys there are."""
    if lengths_k is None:
        return keys
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_k + b), 0), keys)


@triton.jit
def slope_of(b, h, slopes, stride_b):
    """ALiBi's."""
    if slopes is None:
        return 0.0
    else:
        return tl.load(slopes + b * stride_b + h)


@triton.jit
def blocks_met(first, last, total, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """Which blocks of `total` others tokens at positions first to last meet, each one those from `before` ahead of its
    position to `after` behind it: begin, where those begin and end of which every pair meets, and end."""
    begin, end = 0, total
    whole_begin, whole_end = 0, total
    if BEFORE:
        begin = tl.minimum(tl.maximum(first - before, 0), total)
        whole_begin = tl.minimum(tl.maximum(last - before, 0), total)
    if AFTER:
        end = tl.minimum(tl.maximum(last + after + 1, 0), total)
        whole_end = tl.minimum(tl.maximum(first + after + 1, 0), total)
    begin //= BLOCK
    end = tl.maximum(tl.cdiv(end, BLOCK), begin)
    whole_begin = tl.minimum(tl.cdiv(whole_begin, BLOCK), end)
    whole_end = tl.minimum(tl.maximum(whole_end // BLOCK, whole_begin), end)
    return begin, whole_begin, whole_end, end


@triton.jit
def number_of_blocks(met, EDGE: tl.constexpr):
    """Of those of which every pair meets or, with EDGE, of the others."""
    begin, whole_begin, whole_end, end = met
    if EDGE:
        return whole_begin - begin + end - whole_end
    else:
        return whole_end - whole_begin


@triton.jit
def block_number(met, t, EDGE: tl.constexpr):
    """The t-th of them."""
    begin, whole_begin, whole_end, _ = met
    if EDGE:
        ahead = whole_begin - begin
        return tl.where(t < ahead, begin + t, whole_end + t - ahead)
    else:
        return whole_begin + t


@triton.jit
def load_rows(
    x, b, h, first, start, length, stride_b, stride_h, stride_i,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows start.. of a sequence of `length` rows that begins at row `first` of x [B, H, L, WIDTH]; 0 beyond it."""
    if DESCRIPTOR:
        return x.load([b, h, start, 0]).reshape([ROWS, COLUMNS])
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        at = x + far(b, stride_b) + far(h, stride_h) + far(first + start, stride_i)
        at += row[:, None] * stride_i + column[None, :]  # within a tile 32 bits suffice: the launcher sees to it
        if EDGE:
            return tl.load(at, mask=(row < length - start)[:, None] & (column < WIDTH)[None, :], other=0)
        else:
            return tl.load(at, mask=(column < WIDTH)[None, :], other=0)


@triton.jit
def store_rows(
    x, value, b, h, first, exists, stride_b, stride_h, stride_i,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows first.. of x [B, H, L, WIDTH], those that exist."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = x + far(b, stride_b) + far(h, stride_h) + far(first, stride_i)
    at += row[:, None] * stride_i + column[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=exists[:, None] & (column < WIDTH)[None, :])


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)


@triton.jit
def score(
    x, start_m, i, start_n, j, shift, queries, keys, scale, softcap, slope, mask, stride_i, stride_j, left, right,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Of products x the scores, and the derivative of the cap. i and j count from start_m and start_n; mask points to
    its element (b, h, 0, 0)."""
    derivative = 1.0
    if SOFTCAP:
        t = tanh(x * (scale / softcap))
        derivative = 1 - t * t
        s = t * softcap
    else:
        s = x * scale
    distance = j + (start_n - start_m - shift) - i
    if ALIBI:
        s -= slope * tl.abs(distance).to(tl.float32)
    if mask is not None:
        at = mask + far(start_m, stride_i) + far(start_n, stride_j) + (i * stride_i + j * stride_j)
        there = tl.load(at, mask=(i < queries - start_m) & (j < keys - start_n), other=0)
        if mask.dtype.scalar.element_ty == tl.int1:
            s = tl.where(there, s, float("-inf"))
        else:
            s += there.to(tl.float32)
    if EDGE:
        live = j < keys - start_n
        if LEFT:
            live = live & (distance >= -left)
        if RIGHT:
            live = live & (distance <= right)
        s = tl.where(live, s, float("-inf"))
    return s, derivative


@triton.jit
def kept(seed, threshold, number, start_m, start_n, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """What dropout keeps of a tile [QUERIES, KEYS] of sequence and head `number`: fastarch/ref/attention.py.

    One call of Philox makes four words, which are those of keys 16 apart. KEYS divides start_n: 32, or multiples of 64.
    """
    LANES: tl.constexpr = KEYS // 4 if KEYS > 64 else 16
    counter = tl.zeros([QUERIES, 1], tl.int32) + (start_n // 64 * 16 + tl.arange(0, LANES))[None, :]
    query = tl.zeros_like(counter) + (start_m + tl.arange(0, QUERIES))[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter, query, tl.zeros_like(counter) + number, tl.zeros_like(counter))
    if KEYS == 32:
        second = start_n % 64 == 32
        word = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1)).permute(0, 2, 1)
    else:
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [QUERIES, KEYS / 4, 2, 2]
        word = word.reshape([QUERIES, KEYS // 64, 16, 4]).permute(0, 1, 3, 2)
    return word.reshape([QUERIES, KEYS]) >= threshold.to(tl.uint32)
