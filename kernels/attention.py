"""attention on Triton; fastarch/ops/attention.py has the equations and says what the arguments mean.

Two algorithms. "flash": programs walk over blocks of queries or keys. "split": few queries, for which parts of the keys
go side by side.
"""

from typing import NamedTuple

import torch
import triton
from fastarch.kernels.attention_bwd import attention_bwd_delta_kernel, attention_bwd_kv_kernel, attention_bwd_q_kernel
from fastarch.kernels.attention_fwd import attention_fwd_kernel
from fastarch.kernels.attention_split import attention_merge_kernel, attention_split_kernel
from fastarch.kernels.tiles import launcher, tuned
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int


# By kernel, dtype (half: bfloat16 and float16) and the larger of both heads' sizes, at most: the first where everything
# is read by descriptors, or on sm_80 by vectors, and there are no options; the second with a mask, dropout, a soft cap,
# ALiBi or ends of sequences. Every warp has 16 rows of its own, the fewest that tensor cores take. On sm_90 half spills
# nothing. Float32 in TF32 spills 64 bytes there and half 24 on sm_100, each in heads of 256 with every option at once;
# float32 by three products spills everywhere; on sm_80 options in the backward and heads of 256 do: tests/
# test_triton_ahead_of_time.py. Speed: not measured; no GPU was at hand when they were chosen (2026-11-26).
TILES = {
    (*key, supply): tile
    for key, pair in {
        ("fwd", "half", 64): (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3)),
        ("fwd", "half", 128): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        ("fwd", "half", 256): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        ("bwd_q", "half", 64): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        ("bwd_q", "half", 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        ("bwd_q", "half", 256): (Tile(128, 64, 8, 1), Tile(128, 32, 8, 2)),
        ("bwd_kv", "half", 64): (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)),
        ("bwd_kv", "half", 128): (Tile(32, 128, 8, 2), Tile(16, 128, 8, 2)),
        ("bwd_kv", "half", 256): (Tile(32, 128, 8, 2), Tile(16, 128, 8, 2)),
        ("split", "half", 64): (Tile(16, 128, 4, 3), Tile(16, 128, 4, 3)),
        ("split", "half", 128): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
        ("split", "half", 256): (Tile(16, 64, 8, 2), Tile(16, 64, 8, 2)),
        ("fwd", "half, sm_80", 64): (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3)),
        ("fwd", "half, sm_80", 128): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        ("fwd", "half, sm_80", 256): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        ("bwd_q", "half, sm_80", 64): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        ("bwd_q", "half, sm_80", 128): (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        ("bwd_q", "half, sm_80", 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        ("bwd_kv", "half, sm_80", 64): (Tile(64, 128, 8, 2), Tile(32, 64, 4, 2)),
        ("bwd_kv", "half, sm_80", 128): (Tile(16, 128, 8, 2), Tile(16, 64, 4, 2)),
        ("bwd_kv", "half, sm_80", 256): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
        ("split", "half, sm_80", 64): (Tile(16, 128, 4, 3), Tile(16, 128, 4, 3)),
        ("split", "half, sm_80", 128): (Tile(16, 128, 4, 2), Tile(16, 128, 4, 2)),
        ("split", "half, sm_80", 256): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
        ("fwd", "float32", 64): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        ("fwd", "float32", 128): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        ("fwd", "float32", 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        ("bwd_q", "float32", 64): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        ("bwd_q", "float32", 128): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        ("bwd_q", "float32", 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        ("bwd_kv", "float32", 64): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
        ("bwd_kv", "float32", 128): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
        ("bwd_kv", "float32", 256): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
        ("split", "float32", 64): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
        ("split", "float32", 128): (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
        ("split", "float32", 256): (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    }.items()
    for supply, tile in zip(("plain", "options"), pair)
}
# What `fastarch tune` compares them with, for keys that its workloads take. None spills there. Options have only one
# workload, with dropout, which does not speak for the others; float32 takes the compiler half a minute a tile.
CANDIDATES = {
    ("fwd", "half", 64, "plain"): (Tile(128, 64, 8, 3), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),
    ("fwd", "half", 128, "plain"): (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
    ("bwd_q", "half", 64, "plain"): (Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3)),
    ("bwd_q", "half", 128, "plain"): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2)),
    ("bwd_kv", "half", 64, "plain"): (Tile(64, 128, 8, 3), Tile(32, 128, 8, 3), Tile(64, 64, 4, 2)),
    ("bwd_kv", "half", 128, "plain"): (Tile(64, 128, 8, 2), Tile(32, 128, 8, 3), Tile(32, 64, 4, 2)),
    ("split", "half", 128, "plain"): (Tile(16, 64, 4, 4), Tile(16, 128, 8, 2)),
    ("fwd", "half, sm_80", 64, "plain"): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    ("fwd", "half, sm_80", 128, "plain"): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2)),
    ("bwd_q", "half, sm_80", 64, "plain"): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    ("bwd_q", "half, sm_80", 128, "plain"): (Tile(128, 32, 8, 3), Tile(64, 32, 4, 2)),
    ("bwd_kv", "half, sm_80", 64, "plain"): (Tile(32, 128, 8, 2), Tile(32, 64, 4, 2)),
    ("bwd_kv", "half, sm_80", 128, "plain"): (Tile(16, 128, 8, 3), Tile(16, 64, 4, 2)),
    ("split", "half, sm_80", 128, "plain"): (Tile(16, 64, 4, 3), Tile(16, 128, 8, 2)),
}
DELTA, MERGE = Tile(16, 0, 4, 1), Tile(4, 0, 1, 1)
LARGEST_HEAD = 256
NO_BOUND = 2**30  # tokens: a window as wide as that has no bound
FAR = 2**23  # elements from one row to the next: 128 of them are within 32 bits


class Problem(NamedTuple):
    """What the operation is given, without its algorithm; D and DV are the widths of heads as they are stored."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    alibi_slopes: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqlens_k: Tensor | None
    seed: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    window_left: int
    window_right: int
    lower_right: bool
    softcap: float
    dropout_p: float
    D: int
    DV: int

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As kernels take them behind q, k and v."""
        return self[3:9]

    @property
    def strides_of_options(self) -> tuple[int, ...]:
        """Of a mask spread over [B, H, Lq, Lk], and of slopes."""
        spread = (*self.q.shape[:3], self.k.shape[2])
        mask = (0, 0, 0, 0) if self.mask is None else self.mask.expand(spread).stride()
        slopes = self.alibi_slopes
        return *mask, slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0

    @property
    def numbers(self) -> tuple[float, ...]:
        """As kernels take them behind the counts of what they walk over."""
        window = (min(w, NO_BOUND) for w in (self.window_left, self.window_right))
        return self.q.shape[2], self.k.shape[2], self.scale, self.softcap, *window

    @property
    def dropout(self) -> tuple[int, float]:
        """Random words below the first number drop; what is kept is multiplied by the other."""
        return min(round(self.dropout_p * 2**32), 2**32 - 1), 1 / (1 - self.dropout_p)


@launcher("attention")
def attention_fwd(*args) -> None:
    """Launch: a Problem and an algorithm are given, output and lse are filled."""
    *given, algorithm, output, lse = args
    p = prepare(Problem(*given, given[0].shape[3], given[2].shape[3]))
    if algorithm not in ("flash", "split"):
        raise ValueError(f"attention: want algorithm 'flash' or 'split' from Triton, got {algorithm!r}")
    with torch.cuda.device_of(p.q):
        (split_fwd if algorithm == "split" else flash_fwd)(p, output, lse)


def flash_fwd(p: Problem, output: Tensor, lse: Tensor) -> None:
    tile, constants = launch_of("fwd", p, p.q, p.k, p.v)
    H, blocks = p.q.shape[1], cdiv(p.max_seqlen_q, tile.m)
    attention_fwd_kernel[grid_of(p, tile, p.sequences * H * blocks)](
        *described(constants, (p.q, tile.m), (p.k, tile.n), (p.v, tile.n)), *p.tensors, output, lse,
        *strides_of(p.q, p.k, p.v, output), *p.strides_of_options,
        p.sequences, H, p.group, blocks, *p.numbers, *p.dropout, DV_STORED=p.DV, **constants,
    )  # fmt: skip


def split_fwd(p: Problem, output: Tensor, lse: Tensor) -> None:
    if p.seed is not None or p.cu_seqlens_q is not None:
        raise ValueError("attention: split keys want no dropout and no packed sequences")
    (B, H, Lq, _), Lk = p.q.shape, p.k.shape[2]
    tile, constants = launch_of("split", p)
    walks = B * p.k.shape[1] * cdiv(p.group * Lq, tile.m)
    parts = max(1, min(processors(p.q) * programs_of(tile) // walks, cdiv(Lk, tile.n)))
    partial = p.q.new_empty(parts, B, H, Lq, p.DV, dtype=torch.float32)
    partial_lse = p.q.new_empty(parts, B, H, Lq, dtype=torch.float32)
    mask, slopes, _, _, lengths_k, _ = p.tensors
    attention_split_kernel[(walks * parts,)](
        p.q, p.k, p.v, mask, slopes, lengths_k, partial, partial_lse,
        *strides_of(p.q, p.k, p.v), *p.strides_of_options, parts, B, H, p.group, *p.numbers, DV_STORED=p.DV,
        **constants,
    )  # fmt: skip
    rows, tile = B * H * Lq, MERGE
    attention_merge_kernel[(cdiv(rows, tile.m),)](
        partial, partial_lse, output, lse, *strides_of(output), rows, H, Lq, parts,
        DV=p.DV, BLOCK_M=tile.m, BLOCK_V=constants["BLOCK_V"], num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip


@launcher("attention")
def attention_bwd(grad_output: Tensor, grad_lse: Tensor | None, *args) -> None:
    """Launch: a Problem's tensors, output, lse and its options are given; gradients that are not None are filled."""
    *given, grad_q, grad_k, grad_v, grad_mask = args
    tensors, (output, lse), options = given[:9], given[9:11], given[11:]
    given = Problem(*tensors, *options, tensors[0].shape[3], tensors[2].shape[3])
    p = prepare(given, (grad_output, output), (lse, grad_lse))
    do, lse = readable(grad_output), lse.contiguous()
    with torch.cuda.device_of(p.q):
        delta = sum_rows(do, grad_lse, readable(output), lse)
        if grad_q is not None or grad_mask is not None:
            walk_keys(p, do, lse, delta, grad_q, grad_mask)
        if grad_k is not None or grad_v is not None:
            walk_queries(p, do, lse, delta, grad_k, grad_v)
    if grad_q is not None and given.scale < 0:
        grad_q.neg_()  # `prepare` turned q round


def sum_rows(do: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> Tensor:
    """delta [B, H, Lq]."""
    (B, H, Lq, DV), tile, delta = do.shape, DELTA, torch.empty_like(lse)
    of_lse = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    attention_bwd_delta_kernel[(B * H * cdiv(Lq, tile.m),)](
        do, grad_lse, output, delta, *strides_of(do), *of_lse, *strides_of(output), H, Lq,
        DV=DV, BLOCK_M=tile.m, BLOCK_V=block_of(DV), num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return delta


def walk_keys(p: Problem, do: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor | None, grad_mask: Tensor | None):
    """grad_q and grad_mask."""
    tile, constants = launch_of("bwd_q", p, p.q, p.k, p.v, do)
    if grad_q is not None and grad_mask is not None and widest(constants):  # more than the registers hold at once
        walk_keys(p, do, lse, delta, grad_q, None)
        return walk_keys(p, do, lse, delta, None, grad_mask)
    H, blocks = p.q.shape[1], cdiv(p.max_seqlen_q, tile.m)
    spread = (*p.q.shape[:3], p.k.shape[2])
    of_pairs = grad_mask
    if grad_mask is not None:
        if grad_mask.shape != spread:
            of_pairs = grad_mask.new_empty(spread, dtype=torch.float32)
        of_pairs.zero_()  # what is not walked over stays
    attention_bwd_q_kernel[grid_of(p, tile, p.sequences * H * blocks)](
        *described(constants, (p.q, tile.m), (p.k, tile.n), (p.v, tile.n), (do, tile.m)), *p.tensors,
        lse, delta, grad_q, of_pairs,
        *strides_of(p.q, p.k, p.v, do, p.q if grad_q is None else grad_q), *p.strides_of_options,
        p.sequences, H, p.group, blocks, *p.numbers, *p.dropout, D_STORED=p.D, **constants,
    )  # fmt: skip
    if of_pairs is not grad_mask:
        grad_mask.copy_(of_pairs.sum_to_size(grad_mask.shape))


def walk_queries(p: Problem, do: Tensor, lse: Tensor, delta: Tensor, grad_k: Tensor | None, grad_v: Tensor | None):
    """grad_k and grad_v."""
    tile, constants = launch_of("bwd_kv", p, p.q, p.k, p.v, do)
    if grad_k is not None and grad_v is not None and widest(constants):
        walk_queries(p, do, lse, delta, grad_k, None)
        return walk_queries(p, do, lse, delta, None, grad_v)
    H, blocks = p.q.shape[1], cdiv(p.max_seqlen_k, tile.n)
    attention_bwd_kv_kernel[grid_of(p, tile, p.sequences * p.k.shape[1] * blocks)](
        *described(constants, (p.q, tile.m), (p.k, tile.n), (p.v, tile.n), (do, tile.m)), *p.tensors,
        lse, delta, grad_k, grad_v,
        *strides_of(p.q, p.k, p.v, do, p.k if grad_k is None else grad_k, p.v if grad_v is None else grad_v),
        *p.strides_of_options,
        p.sequences, H, p.group, blocks, *p.numbers, *p.dropout, D_STORED=p.D, DV_STORED=p.DV, **constants,
    )  # fmt: skip


def prepare(p: Problem, like_output: tuple = (), like_lse: tuple = ()) -> Problem:
    """Checked, so that a direct call of the operation stays in bounds, and readable."""
    B, H, Lq, D = p.q.shape
    Hkv, Lk, Dv = p.v.shape[1:]
    packed, slopes = p.cu_seqlens_q is not None, p.alibi_slopes
    of_head = (H,) if slopes is None or slopes.dim() == 1 else (p.sequences, H)
    ends = p.cu_seqlens_q.shape if packed else None
    wanted = [
        ("k", p.k, (B, Hkv, Lk, D), p.q.dtype),
        ("v", p.v, (B, Hkv, Lk, Dv), p.q.dtype),
        ("alibi_slopes", slopes, of_head, torch.float32),
        ("cu_seqlens_k", p.cu_seqlens_k, ends, torch.int32),
        ("seqlens_k", p.seqlens_k, None if packed else (B,), torch.int32),
        ("seed", p.seed, (1,), torch.int64),
        *(("output and its gradient", t, (B, H, Lq, Dv), p.q.dtype) for t in like_output),
        *(("lse and its gradient", t, (B, H, Lq), torch.float32) for t in like_lse),
    ]
    for name, t, shape, dtype in wanted:
        if t is not None and (t.shape != shape or t.dtype != dtype):
            came = f"{[*t.shape]} of {t.dtype}"
            raise ValueError(f"attention: want {name} {shape} of {dtype} for q {[*p.q.shape]}, got {came}")
    if (p.seed is None) != (p.dropout_p == 0) or not 0 <= p.dropout_p < 1:
        raise ValueError(f"attention: want dropout_p in [0, 1), and a seed for it, got {p.dropout_p} and {p.seed}")
    if H % Hkv or max(D, Dv) > LARGEST_HEAD or (packed and (B != 1 or p.mask is not None or p.cu_seqlens_k is None)):
        raise ValueError(
            f"attention: want heads of q a multiple of those of k, of up to {LARGEST_HEAD} elements, and packed "
            f"sequences in a batch of 1, without a mask, got {H} and {Hkv} heads of {D} and {Dv} elements, batch {B}"
        )
    q, k, v = (readable(t) for t in (p.q, p.k, p.v))
    scale = p.scale
    if scale < 0:  # the forward's running maximum wants it positive
        q, scale = -q, -scale
    mask = p.mask if p.mask is None or max(p.mask.stride()[2:]) < FAR else p.mask.contiguous()
    vectors = {
        name: t if t is None else t.contiguous()
        for name, t in zip(p._fields[4:8], p[4:8])  # slopes, ends and lengths, which kernels read element by element
    }
    return p._replace(q=q, k=k, v=v, mask=mask, scale=scale, **vectors)


def readable(t: Tensor) -> Tensor:
    """As it is, if elements stand side by side in a row, rows begin at whole 16 bytes and those of a tile are within 32
    bits of each other; else a copy, with zeros behind a row's end that scores and sums do not notice."""
    size = t.element_size()
    aligned = t.data_ptr() % 16 == 0 and not any(step * size % 16 for step in (*t.stride()[:3], t.shape[3]))
    if aligned and t.stride(3) == 1 and t.stride(2) < FAR:
        return t
    return torch.nn.functional.pad(t, (0, -t.shape[3] % (16 // size))).contiguous()


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last, in which they are 1."""
    return tuple(stride for t in tensors for stride in t.stride()[:-1])


def block_of(size: int) -> int:
    return max(16, next_power_of_2(size))


def launch_of(kernel: str, p: Problem, *read: Tensor) -> tuple[Tile, dict]:
    """The tile and the constants of a kernel that walks; `read` are tensors that could be described."""
    D, DV = p.q.shape[3], p.v.shape[3]
    gpu = generation()
    described = gpu >= 90 and can_be_described(p, *read)
    plain = (described or gpu < 90) and p.softcap == 0 and all(t is None for t in (p.mask, p.alibi_slopes, p.seed))
    kind = "float32" if p.q.dtype == torch.float32 else "half" if gpu >= 90 else "half, sm_80"
    key = kernel, kind, max(64, block_of(max(D, DV))), "plain" if plain else "options"
    tile = tuned("attention", key, p.q) or TILES[key]
    constants = dict(DESCRIPTOR=described) if read else {}
    return tile, constants | dict(
        D=D, DV=DV, LOWER_RIGHT=p.lower_right, SOFTCAP=p.softcap > 0, PRECISION=precision(), HOIST=plain and gpu < 90,
        LEFT=0 <= p.window_left < NO_BOUND, RIGHT=0 <= p.window_right < NO_BOUND,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=block_of(D), BLOCK_V=block_of(DV),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def widest(constants: dict) -> bool:
    return max(constants["BLOCK_D"], constants["BLOCK_V"]) == LARGEST_HEAD


def precision() -> str:
    """Of float32 products, as torch allows it; three products of TF32 parts are as exact as float32's own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def generation() -> int:
    """Of the GPU: 80, 90, 100; from 90 on there is TMA."""
    return triton.runtime.driver.active.get_current_target().arch


def processors(t: Tensor) -> int:
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 1


def programs_of(tile: Tile) -> int:
    """That an SM holds: eight warps of as many registers as there are."""
    return 8 // tile.warps


def grid_of(p: Problem, tile: Tile, work: int) -> tuple[int]:
    return (min(work, processors(p.q) * programs_of(tile)),)


def can_be_described(p: Problem, *tensors: Tensor) -> bool:
    """Whether tensor descriptors, which TMA reads by, can stand for all of them: only ends of tensors can be told them,
    so no sequence may end elsewhere, and no two of its elements may be the same."""
    return p.cu_seqlens_q is None and p.seqlens_k is None and all(all(t.stride()) for t in tensors)


def described(constants: dict, *blocks: tuple[Tensor, int]) -> list:
    """A descriptor of each tensor by blocks of so many rows, or the tensors."""
    if not constants["DESCRIPTOR"]:
        return [t for t, _ in blocks]
    return [TensorDescriptor.from_tensor(t, [1, 1, rows, block_of(t.shape[3])]) for t, rows in blocks]
