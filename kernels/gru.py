"""gru on Triton, step by step, over x [T, N, C] and a state [N, H]; fastarch/ops/gru.py has the equations.

Two algorithms. "cell": a step is one launch, which multiplies by W_hh itself. "pointwise": a library multiplies, and
one launch does the rest. Without reset_after the product with W_hn waits for r: twice as many launches.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from fastarch.kernels.gru_bwd import gru_bwd_kernel, gru_bwd_reset_kernel
from fastarch.kernels.gru_fwd import gru_fwd_candidate_kernel, gru_fwd_kernel, gru_fwd_reset_kernel
from fastarch.kernels.tiles import launcher, tuned
from torch import Tensor
from triton import cdiv


class Tile(NamedTuple):
    h: int  # units
    n: int  # sequences
    k: int  # terms of a product in one step of its sum
    warps: int
    stages: int
    registers: int  # per thread, at most; unbounded, ptxas spills some to fit one more block on an SM


# By pass, precision of the products (half: bfloat16 and float16) and supply: "vectors" where 16 divides the lengths of
# rows, "odd" where every element needs registers for an address of its own; "gates" is without a product. 64 units are
# the fewest that wgmma takes, and few sequences give many programs. None spills on sm_80, sm_90 or sm_100, which
# tests/test_triton_ahead_of_time.py checks. Speed: not measured; no GPU was at hand when they were chosen (2026-11-25).
TILES = {
    ("fwd", "half", "vectors"): Tile(64, 32, 64, 4, 3, 255),
    ("fwd", "half", "odd"): Tile(64, 32, 32, 8, 3, 255),
    ("fwd", "tf32", "vectors"): Tile(64, 32, 32, 4, 3, 255),
    ("fwd", "tf32", "odd"): Tile(64, 32, 16, 8, 3, 255),
    ("fwd", "ieee", "vectors"): Tile(32, 32, 16, 4, 2, 255),
    ("fwd", "ieee", "odd"): Tile(32, 32, 16, 8, 2, 255),
    ("bwd", "half", "vectors"): Tile(64, 32, 64, 4, 4, 255),
    ("bwd", "half", "odd"): Tile(64, 32, 32, 8, 3, 255),
    ("bwd", "tf32", "vectors"): Tile(64, 32, 32, 4, 4, 255),
    ("bwd", "tf32", "odd"): Tile(64, 32, 16, 8, 3, 255),
    ("bwd", "ieee", "vectors"): Tile(32, 32, 16, 4, 2, 255),
    ("bwd", "ieee", "odd"): Tile(32, 32, 16, 8, 2, 255),
    ("gates", "any", "any"): Tile(128, 4, 0, 4, 1, 255),
}
# What `fastarch tune` compares them with, for keys that its workloads take. None spills there.
CANDIDATES = {
    ("fwd", "half", "vectors"): (
        Tile(64, 16, 64, 4, 3, 255),
        Tile(64, 32, 64, 4, 4, 255),
        Tile(64, 32, 128, 4, 2, 255),
        Tile(64, 64, 64, 8, 3, 255),
    ),
    ("fwd", "tf32", "vectors"): (
        Tile(64, 16, 32, 4, 3, 255),
        Tile(64, 32, 32, 4, 4, 255),
        Tile(64, 64, 32, 8, 3, 255),
    ),
    ("fwd", "ieee", "vectors"): (
        Tile(32, 16, 16, 4, 2, 255),
        Tile(16, 32, 16, 4, 2, 255),
        Tile(32, 32, 16, 4, 3, 255),
    ),
    ("bwd", "half", "vectors"): (
        Tile(64, 16, 64, 4, 4, 255),
        Tile(64, 32, 64, 4, 3, 255),
        Tile(64, 32, 128, 4, 3, 255),
        Tile(64, 64, 64, 8, 3, 255),
    ),
    ("bwd", "tf32", "vectors"): (
        Tile(64, 16, 32, 4, 4, 255),
        Tile(64, 32, 32, 4, 3, 255),
        Tile(64, 64, 32, 8, 3, 255),
    ),
    ("bwd", "ieee", "vectors"): (
        Tile(32, 16, 16, 4, 2, 255),
        Tile(16, 32, 16, 4, 2, 255),
        Tile(32, 32, 16, 4, 3, 255),
    ),
    ("gates", "any", "any"): (Tile(128, 8, 0, 4, 1, 255), Tile(128, 2, 0, 4, 1, 255), Tile(256, 2, 0, 4, 1, 255)),
}


@launcher("gru")
def gru_fwd(
    input: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    reset_after: bool,
    save_gates: bool,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch, after the caller's checks; gates that are not wanted are empty."""
    (T, N, C), H = input.shape, h0.shape[1]
    multiplies = is_cell(algorithm)
    output, h_n = input.new_empty(T, N, H), input.new_empty(N, H)
    gates = input.new_empty((T, N, 4 if reset_after else 3, H) if save_gates else 0)
    h, w_hh = h0.contiguous(), w_hh.contiguous()
    b_ih, b_hh, lengths = (t if t is None else t.contiguous() for t in (b_ih, b_hh, lengths))
    state = None if T == 1 or input.dtype == torch.float32 else h.float()
    next_states = h_n, h_n if T == 1 else torch.empty_like(h_n)  # in turns, h_n for the last step
    with torch.cuda.device_of(input), library_precision():
        if multiplies and T == 1:
            rows = H, C, input.stride(1) if input.stride(2) == 1 else 1
            inputs, strides = (input, w_ih.contiguous(), b_ih, None), (*input.stride()[1:], 0)
        else:
            # the inputs of all steps in one product: plain and large, so that a library does it as well as can be
            projected = gates.view(T * N, -1)[:, : 3 * H] if save_gates else input.new_empty(T * N, 3 * H)
            torch.mm(input.reshape(T * N, C), w_ih.t(), out=projected)
            rows = (H,)
            inputs, strides = (None, None, b_ih, projected), (0, 0, projected.stride(0))
        products = None if multiplies else input.new_empty(N, (3 if reset_after else 2) * H)
        if not reset_after:
            reset, update = torch.empty_like(h_n), torch.empty_like(h_n, dtype=torch.float32)
            candidates = None if multiplies else torch.empty_like(h_n)
        grid, constants = launch_of("fwd", multiplies, input, rows, N, H)
        saved = gates if save_gates else None
        for step in range(T):
            t, h_next = T - 1 - step if reverse else step, next_states[(T - 1 - step) % 2]
            sizes = t, N, C, H, *strides
            if not multiplies:
                torch.mm(h, w_hh[: products.shape[1]].t(), out=products)
            from_state = h, state, w_hh, b_hh, products
            if reset_after:
                gru_fwd_kernel[grid](*inputs, *from_state, lengths, h_next, output, saved, *sizes, **constants)
            else:
                gru_fwd_reset_kernel[grid](*inputs, *from_state, reset, update, saved, *sizes, **constants)
                if not multiplies:
                    torch.mm(reset, w_hh[2 * H :].t(), out=candidates)
                gru_fwd_candidate_kernel[grid](
                    *inputs, *from_state[:-1], candidates, reset, update, lengths, h_next, output, saved,
                    *sizes, **constants,
                )  # fmt: skip
            h = h_next
    return output, h_n, gates


@launcher("gru")
def gru_bwd(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    output: Tensor,
    gates: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    reset_after: bool,
    algorithm: str,
    output_mask: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch, after the caller's checks; a gradient that is not wanted is empty."""
    want_input, want_h0, want_w_ih, want_w_hh, want_b_ih, want_b_hh = output_mask
    (T, N, C), H = input.shape, h0.shape[1]
    grads = torch.empty_like(gates)  # dn, dr, dz and dn * r
    carry = torch.zeros(N, H, dtype=torch.float32, device=input.device)
    if grad_h_n is not None:
        carry.copy_(grad_h_n)
    before = torch.empty_like(output) if want_w_hh else None
    reset = torch.empty_like(output) if want_w_hh and not reset_after else None
    lengths = lengths if lengths is None else lengths.contiguous()
    with torch.cuda.device_of(input), library_precision():
        saved = h0.contiguous(), output, gates, lengths
        walk_back(grad_output, carry, grads, w_hh, *saved, before, reset, reverse, reset_after, algorithm)

        # what is left are sums over all steps: large products, which a library does as well as can be
        flat = grads.view(T * N, -1)
        of_n, of_rz, at_state = flat[:, :H], flat[:, H : 3 * H], flat[:, H:]
        grad_input, grad_h0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh = (input.new_empty(0) for _ in range(6))
        if want_input:
            # dn, the largest, last: as the first terms of float32 sums it gave 1.6 times the error (MKL, 3H 189)
            grad_input = torch.mm(of_rz, w_ih[: 2 * H]).addmm_(of_n, w_ih[2 * H :]).view(T, N, C)
        if want_h0:
            first = T - 1 if reverse else 0
            at_h0 = grads[first].view(N, -1)[:, H:]
            grad_h0 = (carry + torch.mm(at_h0, w_hh[: at_h0.shape[1]])).to(h0.dtype)
        if want_w_ih:
            x = without_padding(input, lengths).reshape(T * N, C)
            grad_w_ih = grad_of_weight(of_rz, x, of_n, x)
        if want_w_hh:
            h = before.view(T * N, H)
            if reset_after:
                grad_w_hh = torch.mm(at_state.t(), h)
            else:
                grad_w_hh = grad_of_weight(of_rz, h, of_n, reset.view(T * N, H))
        if want_b_ih or want_b_hh:
            sums = flat.sum(0, dtype=torch.float32).to(input.dtype)
            at_input = sums[H : 3 * H], sums[:H]
            grad_b_ih = torch.cat(at_input) if want_b_ih else grad_b_ih
            grad_b_hh = (sums[H:].clone() if reset_after else torch.cat(at_input)) if want_b_hh else grad_b_hh
    return grad_input, grad_h0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh


def walk_back(
    grad_output, carry, grads, w_hh, h0, output, gates, lengths, before, reset, reverse, reset_after, algorithm
):
    """Fills grads, before and reset, step by step, and leaves in carry what of dh0 needs no product."""
    T, N, G, H = grads.shape
    multiplies = is_cell(algorithm)
    w = w_hh.t()
    if output.dtype == torch.float32:
        w = w.contiguous()  # the sum's terms side by side: the only order in which wgmma reads 32-bit operands
    grid, constants = launch_of("bwd", multiplies, output, (H,), N, H)
    first_grid, first_constants = launch_of("bwd", False, output, (), N, H)
    library = None if multiplies else torch.empty_like(h0)
    strides = (0, 0, 0) if grad_output is None else grad_output.stride()
    for step in range(T):
        t = step if reverse else T - 1 - step
        products = library if step else None
        if products is not None:
            walked = grads[t - 1 if reverse else t + 1].view(N, G * H)[:, H:]
            torch.mm(walked, w_hh[: walked.shape[1]], out=products)
        gru_bwd_kernel[grid if step else first_grid](
            grad_output, carry, grads, w, products, h0, output, gates, lengths, before,
            t, T, N, H, *strides, *w.stride(),
            REVERSE=reverse, RESET_AFTER=reset_after, **(constants if step else first_constants),
        )  # fmt: skip
        if not reset_after:
            if not multiplies:
                torch.mm(grads[t, :, 0], w_hh[2 * H :], out=library)
            gru_bwd_reset_kernel[grid](
                carry, grads, w[:, 2 * H :], library, h0, output, gates, lengths, reset,
                t, T, N, H, *w.stride(),
                REVERSE=reverse, **constants,
            )  # fmt: skip


def is_cell(algorithm: str) -> bool:
    """Whether kernels multiply by W_hh, not a library."""
    if algorithm not in ("cell", "pointwise"):
        raise ValueError(f"gru: want algorithm 'cell' or 'pointwise' from Triton, got {algorithm!r}")
    return algorithm == "cell"


def launch_of(kernel: str, multiplies: bool, input: Tensor, rows: tuple[int, ...], N: int, H: int):
    """Grid and constants, where `rows` are the lengths of the rows that a product reads."""
    key = "gates", "any", "any"
    if multiplies:
        kind = precision() if input.dtype == torch.float32 else "half"
        key = kernel, kind, "odd" if any(row % 16 for row in rows) else "vectors"
    tile = tuned("gru", key, input) or TILES[key]
    return (cdiv(H, tile.h) * cdiv(N, tile.n),), dict(
        PRODUCT=multiplies, PRECISION=precision(), BLOCK_H=tile.h, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, enable_fp_fusion=True,
    )  # fmt: skip


def precision() -> str:
    """Of float32 products, as torch allows it for recurrent layers; those of 16-bit operands are exact either way."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"


@contextmanager
def library_precision():
    """The library's float32 products in the same precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision()
    try:
        yield
    finally:
        matmul.fp32_precision = before


def without_padding(input: Tensor, lengths: Tensor | None) -> Tensor:
    """What stands in padding, NaN included, must not meet its gradients of 0."""
    if lengths is None:
        return input
    t = torch.arange(input.shape[0], device=input.device)
    return input.masked_fill((t[:, None] >= lengths)[:, :, None], 0)


def grad_of_weight(grads_rz: Tensor, x_rz: Tensor, grads_n: Tensor, x_n: Tensor) -> Tensor:
    """sum_row [dr, dz, dn] x', with an x of its own for dn."""
    H = grads_n.shape[1]
    grad = x_n.new_empty(3 * H, x_n.shape[1])
    torch.mm(grads_rz.t(), x_rz, out=grad[: 2 * H])
    torch.mm(grads_n.t(), x_n, out=grad[2 * H :])
    return grad
