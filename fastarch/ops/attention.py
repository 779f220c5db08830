"""attention: softmax(scale q k^T + ...) v without the matrix of scores; equations: fastarch/ref/attention.py.

q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv], Hkv divides Hq, any strides. Two operations:

fwd     output [B, Hq, Lq, Dv] and lse [B, Hq, Lq], of float32 or, for float64, float64. Both are laid out as
        `empty_like_heads` says: tokens outside heads where q has them so, contiguous otherwise.
bwd     With dp_ij = z_ij do_i.v_j, delta_i = do_i.o_i - dlse_i:
          ds_ij = p_ij (dp_ij - delta_i), dmask = ds, dx_ij = ds_ij (1 - tanh^2(scale q_i.k_j / softcap))
          dq_i = scale sum_j dx_ij k_j, dk_j = scale sum_i dx_ij q_i, dv_j = sum_i p_ij z_ij do_i
        dmask is summed over the dimensions in which mask has size 1.

mask            bool (True = attend) or, added, of q's dtype or float32: 4-D, each size that of [B, Hq, Lq, Lk] or 1.
alibi_slopes    float32 [Hq] or [B, Hq].
cu_seqlens_*    int32 [sequences + 1], packed sequences' ends, from 0: then B = 1 and Lq, Lk are totals, and mask and
                seqlens_k are None. max_seqlen_* are bounds on their lengths; Lq and Lk otherwise.
seqlens_k       int32 [B], how many keys there are, of Lk; lower_right then aligns with the last of them.
seed            int64 [1], for dropout: fastarch/ref/attention.py says which element gets which random word.
window_*        how far keys may lie to the left and to the right of the diagonal; -1 for any. Causal is right = 0.
algorithm       "flash", or "split" for few queries: parts of the keys side by side, merged exactly.
"""

import itertools
import math
import numbers

import torch
from torch import Tensor

from fastarch import autocast, extension, routing
from fastarch.ref.attention import attention as reference
from fastarch.routing import REFERENCE, Route

TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqlens_k, Tensor? seed"
)
OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int window_left, int window_right, bool lower_right, "
    "float softcap, float dropout_p, str algorithm"
)
torch.library.define("fastarch::attention_fwd", f"({TENSORS}, {OPTIONS}) -> (Tensor output, Tensor lse)")
torch.library.define(
    "fastarch::attention_bwd",
    f"(Tensor grad_output, Tensor? grad_lse, {TENSORS}, Tensor output, Tensor lse, {OPTIONS}, bool[4] output_mask) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_mask)",
)
fwd = torch.ops.fastarch.attention_fwd.default
bwd = torch.ops.fastarch.attention_bwd.default

LARGEST_HEAD = 256
SPLIT_QUERIES = 16  # so many queries, at most, are few


def empty_like_heads(t: Tensor, width: int) -> Tensor:
    """[B, H, L, width], uninitialised: in memory [B, L, H, width] where t has heads inside tokens, else contiguous."""
    B, H, L, _ = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty(B, L, H, width).transpose(1, 2)
    return t.new_empty(B, H, L, width)


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_results(q, k, v, *args):
    return empty_like_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=softmax_dtype(q.dtype))


def empty_gradients(grad_output, grad_lse, q, k, v, mask, *args):
    *wanted, want_mask = args[-1]
    grads = (empty_like_heads(t, t.shape[3]) if want else t.new_empty(0) for t, want in zip((q, k, v), wanted))
    return *grads, mask.new_empty(mask.shape) if want_mask else q.new_empty(0)


torch.library.register_fake("fastarch::attention_fwd", empty_results)
torch.library.register_fake("fastarch::attention_bwd", empty_gradients)


def triton_fwd(*args):
    from fastarch.kernels.attention import attention_fwd  # here: a machine without Triton must import

    output, lse = empty_results(*args)
    attention_fwd(*args, output, lse)
    return output, lse


def triton_bwd(*args):
    from fastarch.kernels.attention import attention_bwd

    grads = empty_gradients(*args)
    *given, _, output_mask = args
    attention_bwd(*given, *(grad if want else None for grad, want in zip(grads, output_mask)))
    return grads


torch.library.impl("fastarch::attention_fwd", "CUDA", triton_fwd)
torch.library.impl("fastarch::attention_bwd", "CUDA", triton_bwd)


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, mask and what else fwd takes) to the output and lse."""

    @staticmethod
    def forward(ctx, q, k, v, mask, *rest):
        *tensors, lengths, options, algorithm = rest
        output, lse = fwd(q, k, v, mask, *tensors, *lengths, *options, algorithm)
        ctx.save_for_backward(q, k, v, mask, *tensors, output, lse)
        ctx.lengths, ctx.options, ctx.algorithm = lengths, options, algorithm
        ctx.set_materialize_grads(False)  # mostly nobody asks for lse
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        needed = ctx.needs_input_grad[:4]
        if grad_output is None and grad_lse is None:
            return (None,) * 12
        if torch.is_grad_enabled():  # create_graph: bwd is opaque to autograd and would lose the second derivative
            return *differentiable_gradients(ctx, grad_output, grad_lse), *(None,) * 8
        *inputs, output, lse = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        options = (*ctx.lengths, *ctx.options, "flash", [*needed])
        grads = bwd(grad_output, grad_lse, *inputs, output, lse, *options)
        return *(grad if need else None for grad, need in zip(grads, needed)), *(None,) * 8


def differentiable_gradients(ctx, grad_output, grad_lse):
    """What backward returns, by the reference."""
    *inputs, _, _ = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    wanted = [t for t, need in zip(inputs, needed) if need]
    results, gradients = [], []
    for result, gradient in zip(reference(*inputs, *ctx.options), (grad_output, grad_lse)):
        if gradient is not None:
            results.append(result)
            gradients.append(gradient)
    # allow_unused: lse does not depend on v
    grads = iter(torch.autograd.grad(results, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needed]


def error(operation: str, wanted: str, came) -> ValueError:
    return ValueError(f"{operation}: want {wanted}, got {came}")


def check_tensor(operation: str, what: str, t, beside: Tensor | None = None) -> None:
    """A floating tensor and, beside another, of its dtype and on its device."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        came = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{operation}: want {what} as a floating tensor, got {came}")
    if beside is not None and (t.dtype != beside.dtype or t.device != beside.device):
        raise TypeError(f"{operation}: query is {beside.dtype} on {beside.device}, {what} is {t.dtype} on {t.device}")


def check_indices(operation: str, what: str, t, size: int | None, device: torch.device) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.int32 or t.device != device:
        came = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{operation}: want {what} as int32 on {device}, got {came}")
    if t.dim() != 1 or t.shape[0] < 1 or (size is not None and t.shape[0] != size):
        raise error(operation, f"{what} [{'sequences + 1' if size is None else size}]", [*t.shape])


def check_options(operation: str, scale, window, softcap, alibi_slopes, q: Tensor) -> None:
    """q [B, Hq, Lq, D]."""
    if scale is not None and not isinstance(scale, numbers.Real):
        raise TypeError(f"{operation}: want scale as a number or None, got {type(scale).__name__}")
    if not isinstance(softcap, numbers.Real):
        raise TypeError(f"{operation}: want softcap as a number, got {type(softcap).__name__}")
    if not (0 <= softcap < math.inf):
        raise error(operation, "softcap >= 0, where 0 is none", softcap)
    if window is not None and not isinstance(window, tuple | list):
        raise TypeError(f"{operation}: want window as (left, right) or None, got {type(window).__name__}")
    if window is not None and (len(window) != 2 or not all(isinstance(w, int) and w >= -1 for w in window)):
        raise error(operation, "window (left, right), integers >= -1, where -1 is no bound, or None", window)
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor) or alibi_slopes.device != q.device:
            raise TypeError(f"{operation}: want alibi_slopes as a tensor on {q.device}, got {alibi_slopes!r:.40}")
        if not alibi_slopes.is_floating_point():
            raise TypeError(f"{operation}: want alibi_slopes of a floating dtype, got {alibi_slopes.dtype}")


def check_dropout(operation: str, dropout_p) -> None:
    if not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"{operation}: want dropout_p as a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise error(operation, "dropout_p in [0, 1]", dropout_p)


def check_slopes(operation: str, alibi_slopes: Tensor | None, B: int, H: int) -> None:
    if alibi_slopes is not None and alibi_slopes.shape not in ((H,), (B, H)):
        raise error(operation, f"alibi_slopes [{H}] or [{B}, {H}]", [*alibi_slopes.shape])


def check_heads(operation: str, q: Tensor, k: Tensor, grouped: bool) -> None:
    if grouped and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise error(operation, "heads of query that are a multiple of those of key", f"{q.shape[1]} and {k.shape[1]}")


def check_mask(q: Tensor, k: Tensor, mask) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{SDPA}: want attn_mask as a tensor or None, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype) or mask.device != q.device:
        raise TypeError(
            f"{SDPA}: want attn_mask of bool, float32 or {q.dtype} on {q.device}, got {mask.dtype} on {mask.device}"
        )
    if mask.dtype == torch.float32 and q.dtype == torch.float64:
        raise TypeError(f"{SDPA}: want attn_mask of bool or {q.dtype}, got {mask.dtype}")
    want = (*q.shape[:3], k.shape[2])
    if mask.dim() > 4 or any(have != 1 and have != size for have, size in zip(mask.shape[::-1], want[::-1])):
        raise error(SDPA, f"attn_mask that broadcasts to {[*want]}", [*mask.shape])


def route(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, dropout_p: float) -> Route:
    """The algorithm that serves tensors [B, H, L, D], or the reference."""
    device, dtype = q.device.type, q.dtype
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return Route(REFERENCE, "nothing to attend to")
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return Route(REFERENCE, f"kernels serve heads of up to {LARGEST_HEAD} elements")
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return Route(REFERENCE, "kernels have no gradient of alibi_slopes")
    if dropout_p == 1:
        return Route(REFERENCE, "dropout_p = 1 drops everything")
    if device == "cpu":
        if extension.cpu is None:
            return Route(REFERENCE, extension.no_cpu)
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return Route(REFERENCE, f"no CPU kernel for {dtype}")
        return Route("flash", "tiles of queries by tiles of keys, from the cache")
    if device == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16):
        return Route("flash", "tiles of queries by tiles of keys, on chip")
    return Route(REFERENCE, f"no kernel for {dtype} on {device}")


def backend(device: str, algorithm: str) -> str:
    """What people read in `fastarch.explain`."""
    if algorithm == REFERENCE:
        return REFERENCE
    return f"triton {algorithm}" if device == "cuda" else f"{device}-{extension.isa} {algorithm}"


def attend(operation, q, k, v, mask, alibi_slopes, cu_seqlens, seqlens_k, lengths, options, split=False):
    """Output and lse, by whatever serves the call. options: from scale to dropout_p, as fwd takes them."""
    algorithm, reason = route(q, k, v, alibi_slopes, options[-1])
    if why := routing.reference_reason():
        algorithm, reason = REFERENCE, why
    if split and algorithm == "flash" and q.shape[2] <= SPLIT_QUERIES:
        algorithm, reason = "split", "few queries: parts of the keys side by side, merged"
    routing.record(operation, backend, q.device.type, algorithm, reason, query=q, key=k, value=v)
    # from torch's generator, so that torch.manual_seed and activation checkpointing reproduce it
    seed = torch.randint(2**63 - 1, (1,), device=q.device) if options[-1] else None
    if algorithm == REFERENCE:
        with autocast.done(q.device.type):
            return reference(q, k, v, mask, alibi_slopes, *cu_seqlens, seqlens_k, seed, *options)
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.detach().float()
    tensors = (q, k, v, mask, alibi_slopes, *cu_seqlens, seqlens_k, seed)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, mask)):
        return AttentionFunction.apply(*tensors, lengths, options, algorithm)
    return fwd(*tensors, *lengths, *options, algorithm)


def scale_of(scale: float | None, D: int) -> float:
    if scale is None:
        return D**-0.5 if D else 1.0
    return float(scale)


def window_of(window: tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    left, right = window or (-1, -1)
    return left, 0 if is_causal else right


SDPA = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = sum_j softmax_j(s_ij) v_j, s_ij = cap(scale q_i.k_j) - slope |d_i - j| + mask_ij, cap(x) = c tanh(x / c).

    As torch.nn.functional.scaled_dot_product_attention, with a window, a soft cap, ALiBi and lse; all options combine,
    in the backward too. The matrix of scores is not written, but for the gradient of a mask that is added. d_i is i, or
    i + Lk - Lq with "lower_right".

    Args:
        query: [B, Hq, Lq, D] or [Hq, Lq, D], with any strides: tokens outside heads, slices of one projection.
        key, value: [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv], of query's dtype. B and Hkv may be 1 where query's are not.
        attn_mask: broadcastable to [B, Hq, Lq, Lk]. bool: True attends. Otherwise it is added to the scores, in query's
            dtype or float32, and has a gradient.
        dropout_p: the probability, in [0, 1], that a weight becomes 0; the others are divided by 1 - dropout_p.
        is_causal: j <= d_i only.
        scale: of q_i.k_j; None for 1 / sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
        window: (left, right), d_i - left <= j <= d_i + right only; -1 is no bound.
        softcap: c in the unit of the scores; 0 for none.
        alibi_slopes: [Hq] or [B, Hq], >= 0 as a rule.
        causal_alignment: "upper_left" or "lower_right": which corner of the scores the diagonal meets.
        return_lse: also return lse.

    Returns:
        o, shaped as query but with value's last size, of query's dtype. With return_lse also lse_i = log sum_j
        exp(s_ij), float32 (float64 for float64), differentiable. A row that may attend to nothing gives 0, lse -inf
        and no gradient.

    Raises:
        ValueError: shapes that do not fit; `dropout_p`, `softcap`, `window` or `causal_alignment` out of range.
        TypeError: arguments that are not tensors, or differ in dtype or device.

    Precision: float32 and float64 compute in their own precision, bfloat16 and float16 in float32; on CUDA products of
    float32 are of TF32 or, exact, sums of three such, as torch.backends.cuda.matmul is set. Results are the same bits
    from run to run and, on CPUs, for any number of threads.

    Dropout: the weight of (b, h, i, j) is kept or dropped by word (j // 16) % 4 of Philox4x32-10 at the counter
    (j // 64 * 16 + j % 16, i, b * Hq + h, 0) under a key drawn from torch's generator: the same on every device.

    Saved for the backward: query, key, value, attn_mask, o and lse.

    Kernels serve heads of up to 256 elements, in float32, bfloat16 and float16 on CPUs (C++) and CUDA (Triton), in
    float64 on CPUs. Other devices, longer heads, empty tensors, dropout_p = 1, gradients of alibi_slopes, torch.func
    transforms and derivatives of second order run on the differentiable reference; `fastarch.explain` shows it.

    Sources: Vaswani et al. 2017, arXiv 1706.03762, equation 1; Dao 2023, arXiv 2307.08691, algorithms 1 and 2; Press et
    al. 2021, arXiv 2108.12409, for ALiBi; Gemma 2, arXiv 2408.00118, section 2, for the soft cap.
    """
    check_tensor(SDPA, "query", query)
    check_tensor(SDPA, "key", key, query if not autocast.is_on(query.device.type) else None)
    check_tensor(SDPA, "value", value, query if not autocast.is_on(query.device.type) else None)
    if not all(2 <= t.dim() <= 4 for t in (query, key, value)):
        shapes = ", ".join(str([*t.shape]) for t in (query, key, value))
        raise error(SDPA, "query, key and value [B, H, L, D] or [H, L, D]", shapes)
    query, key, value = autocast.cast(query.device.type, query, key, value)
    q, k, v = (t[(None,) * (4 - t.dim())] for t in (query, key, value))
    rank = max(query.dim(), key.dim(), value.dim())
    if q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise error(
            SDPA, "key [..., Lk, D] and value [..., Lk, Dv] for query [..., Lq, D]", shapes_of(query, key, value)
        )
    if enable_gqa:
        check_heads(SDPA, q, k, True)
        k, v = broadcast((q, k, v), (0,))[1:]
        if k.shape[1] != v.shape[1]:
            raise error(SDPA, "as many heads of key as of value", shapes_of(query, key, value))
    elif not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        q, k, v = broadcast((q, k, v), (0, 1))
    if attn_mask is not None:
        check_mask(q, k, attn_mask)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    check_dropout(SDPA, dropout_p)
    check_options(SDPA, scale, window, softcap, alibi_slopes, q)
    check_slopes(SDPA, alibi_slopes, q.shape[0], q.shape[1])
    if causal_alignment not in ("upper_left", "lower_right"):
        raise error(SDPA, "causal_alignment 'upper_left' or 'lower_right'", repr(causal_alignment))
    lower_right = causal_alignment == "lower_right"
    scale = scale_of(scale, q.shape[3])
    options = (scale, *window_of(window, is_causal), lower_right, float(softcap), float(dropout_p))
    lengths = (q.shape[2], k.shape[2])
    output, lse = attend(SDPA, q, k, v, attn_mask, alibi_slopes, (None, None), None, lengths, options)
    for _ in range(4 - rank):
        output, lse = output[0], lse[0]
    return (output, lse) if return_lse else output


def cast(q, k, v) -> tuple:
    """As autocast wants them; what is no tensor is told of later."""
    tensors = all(isinstance(t, Tensor) for t in (q, k, v))
    return autocast.cast(q.device.type, q, k, v) if tensors else (q, k, v)


def shapes_of(*tensors: Tensor) -> str:
    return ", ".join(str([*t.shape]) for t in tensors)


def broadcast(tensors: tuple[Tensor, ...], dims: tuple[int, ...]) -> list[Tensor]:
    """Expanded, without a copy, in the given dimensions."""
    sizes = {}
    for dim in dims:
        size = next((t.shape[dim] for t in tensors if t.shape[dim] != 1), 1)  # no set: a size may be symbolic
        if any(t.shape[dim] not in (1, size) for t in tensors):
            what = "heads (or enable_gqa=True)" if dim == 1 else "batch sizes"
            raise error(SDPA, f"{what} that are the same or 1", shapes_of(*tensors))
        sizes[dim] = size
    return [t.expand([sizes.get(dim, size) for dim, size in enumerate(t.shape)]) for t in tensors]


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """scaled_dot_product_attention of sequences that stand one after the other, each by itself.

    Args:
        q: [total_q, Hq, D], with any strides.
        k, v: [total_k, Hkv, D] and [total_k, Hkv, Dv]; Hq is a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], on q's device: 0, then where each sequence ends, the last at
            total_q and total_k.
        max_seqlen_q, max_seqlen_k: lengths that no sequence exceeds.
        is_causal, window: aligned lower right: the last query of a sequence meets its last key.
        scale, softcap, dropout_p: as in scaled_dot_product_attention; dropout counts sequences as the batch.
        alibi_slopes: [Hq] or [sequences, Hq].
        return_lse: also return lse.

    Returns:
        o [total_q, Hq, Dv]; with return_lse also lse [total_q, Hq], differentiable.

    Raises:
        ValueError: shapes that do not fit together, options out of range; on CPUs also cu_seqlens that decrease, leave
            their tensor or exceed their bound, which on CUDA would cost a synchronisation.
        TypeError: arguments that are not tensors, or differ in dtype or device.

    Precision, sources and routes as scaled_dot_product_attention.
    """
    name = "attention_varlen"
    q, k, v = cast(q, k, v)
    check_tensor(name, "query", q)
    check_tensor(name, "key", k, q)
    check_tensor(name, "value", v, q)
    fit = q.dim() == k.dim() == v.dim() == 3 and q.shape[2] == k.shape[2] and k.shape[:2] == v.shape[:2]
    if not fit:
        raise error(name, "q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv]", shapes_of(q, k, v))
    check_heads(name, q.transpose(0, 1)[None], k.transpose(0, 1)[None], True)
    check_indices(name, "cu_seqlens_q", cu_seqlens_q, None, q.device)
    check_indices(name, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0], q.device)
    check_options(name, scale, window, softcap, alibi_slopes, q)
    check_slopes(name, alibi_slopes, cu_seqlens_q.shape[0] - 1, q.shape[1])
    check_dropout(name, dropout_p)
    if not torch.compiler.is_compiling() and q.device.type == "cpu":
        check_ends(name, "cu_seqlens_q", cu_seqlens_q, max_seqlen_q, q.shape[0])
        check_ends(name, "cu_seqlens_k", cu_seqlens_k, max_seqlen_k, k.shape[0])
    scale = scale_of(scale, q.shape[2])
    options = (scale, *window_of(window, is_causal), True, float(softcap), float(dropout_p))
    packed = [t.transpose(0, 1)[None] for t in (q, k, v)]
    cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    output, lse = attend(name, *packed, None, alibi_slopes, cu_seqlens, None, (max_seqlen_q, max_seqlen_k), options)
    output, lse = output[0].transpose(0, 1), lse[0].transpose(0, 1)
    return (output, lse) if return_lse else output


def check_ends(operation: str, what: str, ends: Tensor, longest: int, total: int) -> None:
    at = ends.tolist()
    lengths = [b - a for a, b in itertools.pairwise(at)]
    if at[0] != 0 or at[-1] != total or any(not 0 <= length <= longest for length in lengths):
        raise error(operation, f"{what} from 0 to {total} by steps in [0, {longest}]", at)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest queries to a cache of keys and values, which already holds theirs.

    Causal, aligned lower right: the last query meets the last key of its sequence, the one before it the key before.

    Args:
        q: [B, Hq, Lq, D], Lq one or a few.
        k_cache, v_cache: [B, Hkv, capacity, D] and [B, Hkv, capacity, Dv], with any strides; Hq is a multiple of Hkv.
        cache_seqlens: int32 [B], on q's device: how many entries of the cache are filled; None for all.
        scale, softcap, alibi_slopes: as in scaled_dot_product_attention.
        window: (left, right); right is 0 whatever it says.
        return_lse: also return lse.

    Returns:
        o [B, Hq, Lq, Dv]; with return_lse also lse [B, Hq, Lq]. Differentiable.

    Raises:
        ValueError: shapes that do not fit together, options out of range; on CPUs also cache_seqlens beyond capacity.
        TypeError: arguments that are not tensors, or differ in dtype or device.

    For up to 16 queries parts of the keys are attended to side by side and merged exactly, by their lse. Precision and
    sources as scaled_dot_product_attention; Dao et al. 2023, "Flash-Decoding", for the parts.
    """
    name = "attention_decode"
    q, k_cache, v_cache = cast(q, k_cache, v_cache)
    check_tensor(name, "query", q)
    check_tensor(name, "k_cache", k_cache, q)
    check_tensor(name, "v_cache", v_cache, q)
    fit = q.dim() == k_cache.dim() == v_cache.dim() == 4 and q.shape[3] == k_cache.shape[3]
    if not fit or k_cache.shape[:3] != v_cache.shape[:3] or q.shape[0] != k_cache.shape[0]:
        wanted = "q [B, Hq, Lq, D], k_cache [B, Hkv, capacity, D], v_cache [B, Hkv, capacity, Dv]"
        raise error(name, wanted, shapes_of(q, k_cache, v_cache))
    check_heads(name, q, k_cache, True)
    check_options(name, scale, window, softcap, alibi_slopes, q)
    check_slopes(name, alibi_slopes, q.shape[0], q.shape[1])
    if cache_seqlens is not None:
        check_indices(name, "cache_seqlens", cache_seqlens, q.shape[0], q.device)
        if not torch.compiler.is_compiling() and q.device.type == "cpu":
            filled, capacity = cache_seqlens.tolist(), k_cache.shape[2]
            if any(not 0 <= length <= capacity for length in filled):
                raise error(name, f"cache_seqlens in [0, {capacity}]", filled)
        cache_seqlens = cache_seqlens.contiguous()
    scale = scale_of(scale, q.shape[3])
    options = (scale, *window_of(window, True), True, float(softcap), 0.0)
    lengths = (q.shape[2], k_cache.shape[2])
    tensors = (q, k_cache, v_cache, None, alibi_slopes, (None, None), cache_seqlens)
    output, lse = attend(name, *tensors, lengths, options, split=True)
    return (output, lse) if return_lse else output
