"""attention: o_i = sum_j p_ij z_ij v_j, p_ij = exp(s_ij - lse_i), lse_i = log sum_j exp(s_ij).

q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]; query head h reads key head h // (Hq / Hkv). With the diagonal
d = i (upper left) or i + Lk - Lq (lower right)
  s_ij = c tanh(scale q_i.k_j / c) - slope_h |d - j| + mask_ij      c = softcap, without one c tanh(x / c) is x
         -inf unless -left <= j - d <= right and mask_ij
  z_ij = 0 where dropout drops (b, h, i, j), 1 / (1 - p) elsewhere
A row without keys has o = 0 and lse = -inf. Packed sequences stand one after the other in B = 1.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    lower_right: bool,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The output [B, Hq, Lq, Dv] and lse [B, Hq, Lq], of float32 unless q is of float64."""
    options = (scale, window_left, window_right, lower_right, softcap, dropout_p)
    if cu_seqlens_q is None:
        return dense(q, k, v, mask, alibi_slopes, seqlens_k, seed, 0, *options)
    outputs, lses = [], []
    at_q, at_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(at_q) - 1):
        of_q, of_k = slice(at_q[b], at_q[b + 1]), slice(at_k[b], at_k[b + 1])
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        o, lse = dense(q[:, :, of_q], k[:, :, of_k], v[:, :, of_k], None, slopes, None, seed, b, *options)
        outputs.append(o)
        lses.append(lse)
    if not outputs:
        return dense(q, k[:, :, :0], v[:, :, :0], None, None, None, None, 0, scale, -1, -1, False, 0.0, 0.0)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def dense(q, k, v, mask, alibi_slopes, seqlens_k, seed, first, scale, left, right, lower_right, softcap, dropout_p):
    """`first` is the number, to dropout, of the first sequence of the batch."""
    B, H, Lq, _ = q.shape
    Lk = k.shape[2]
    dtype = q.dtype
    q, k, v = (t if t.dtype == torch.float64 else t.float() for t in (q, k, v))
    k, v = (t.repeat_interleave(H // t.shape[1], 1) if t.shape[1] != H else t for t in (k, v))
    s = q @ k.transpose(-1, -2) * scale  # [B, Hq, Lq, Lk]
    if softcap:
        s = softcap * torch.tanh(s / softcap)

    length = torch.full((1,), Lk, device=q.device) if seqlens_k is None else seqlens_k.long()  # [B or 1]
    j = torch.arange(Lk, device=q.device)
    diagonal = torch.arange(Lq, device=q.device) + ((length - Lq)[:, None] if lower_right else 0)
    distance = j - diagonal.reshape(length.shape[0] if lower_right else 1, 1, Lq, 1)  # [B or 1, 1, Lq, Lk]
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype).view(-1, H, 1, 1) * distance.abs()
    if mask is not None and mask.dtype != torch.bool:
        s = s + mask.to(s.dtype)

    live = j < length.view(-1, 1, 1, 1)
    if mask is not None and mask.dtype == torch.bool:
        live = live & mask
    if left >= 0:
        live = live & (distance >= -left)
    if right >= 0:
        live = live & (distance <= right)
    s = s.masked_fill(~live, float("-inf"))

    empty = (s == float("-inf")).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0)
    lse = s.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    p = s.softmax(-1).masked_fill(empty, 0)
    if dropout_p:
        p = p * dropout_factors(seed, dropout_p, first, B, H, Lq, Lk, p.dtype)
    return (p @ v).to(dtype), lse


def dropout_factors(
    seed: Tensor, p: float, first: int, B: int, H: int, Lq: int, Lk: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """z [B, H, Lq, Lk]: 0 where an element is dropped, 1 / (1 - p) where it is kept.

    The random word of element (b, h, i, j) is word (j // 16) % 4 of Philox4x32-10 at the counter
    (j // 64 * 16 + j % 16, i, b * H + h, 0) under the key (low half of the seed, high half): one call serves 64
    consecutive keys by vectors of 16. Dropped where the word is below p * 2**32.
    """
    if p == 1:
        return torch.zeros(B, H, Lq, Lk, dtype=dtype, device=seed.device)
    b = torch.arange(first, first + B, device=seed.device).view(B, 1, 1, 1)
    h = torch.arange(H, device=seed.device).view(H, 1, 1)
    i = torch.arange(Lq, device=seed.device).view(Lq, 1)
    j = torch.arange(Lk, device=seed.device)
    words = philox(seed, (j // 64 * 16 + j % 16, i, b * H + h, torch.zeros_like(j)))
    word = torch.stack(words).gather(0, (j // 16 % 4).expand(1, B, H, Lq, Lk))[0]
    return (word >= dropout_threshold(p)).to(dtype) / (1 - p)


def dropout_threshold(p: float) -> int:
    """Words below it are dropped."""
    return min(round(p * 2**32), MASK32)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 bits, kept in int64."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product; each half of x by itself, for int64 cannot hold it."""
    by_high, by_low = a * (x >> 16), a * (x & 0xFFFF)
    return (by_high + (by_low >> 16)) >> 16, (by_low + ((by_high & 0xFFFF) << 16)) & MASK32
