"""gru: h_t = (1 - z_t) * n_t + z_t * h_{t-1}, one layer in one direction, all steps in one call.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr),  z_t likewise
    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))    reset_after
    n_t = tanh(W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn)    otherwise

Shapes: x [T, N, C], h0 and h_n [N, H], output [T, N, H]; w_ih [3H, C], w_hh [3H, H], b_ih, b_hh [3H] in the order r, z,
n; lengths [N] of int64. A step t >= lengths[n] is padding: the state stays, the output is 0, x counts for nothing.
`reverse` walks from the last step to the first.

fwd     With save_gates also what the backward cannot compute again cheaply, `gates` [T, N, G, H] in x's dtype: r, z, n
        and, with reset_after, a_n = W_hn h_{t-1} + b_hn. (h_{t-1} is the output of another step, or h0.) Padding holds
        anything.
bwd     With dh the gradient of h_t, from the output and from the step after it:
          dz = dh * (h_{t-1} - n) * z (1 - z),  dn = dh * (1 - z) * (1 - n^2),  dr = dn * a_n * r (1 - r)
          dh_{t-1} = dh * z + W_hr' dr + W_hz' dz + W_hn' (dn * r)
          dx = W_ih' [dr, dz, dn],  dW_ih = sum [dr, dz, dn] x',  dW_hh = sum [dr, dz, dn * r] h_{t-1}'
        (before the gates' nonlinearities; ' transposes). Without reset_after q = W_hn' dn stands for the gradient of
        r * h_{t-1}: dr = q * h_{t-1} * r (1 - r), dh_{t-1} = dh * z + W_hr' dr + W_hz' dz + q * r, and dn meets
        r * h_{t-1} in dW_hh.
"""

import math

import torch
from torch import Tensor

from fastarch import autocast, extension, routing
from fastarch.ref.gru import gru as reference
from fastarch.ref.gru import gru_cell as cell_reference
from fastarch.routing import REFERENCE, Route

CUDA_ALGORITHM = "persistent"  # what csrc/cuda implements, as gru_persistent_fwd and _bwd
FWD = (
    "(Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? lengths, "
    "bool reverse, bool reset_after, bool save_gates{algorithm}) -> (Tensor output, Tensor h_n, Tensor gates)"
)
BWD = (
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor output, "
    "Tensor gates, Tensor? lengths, bool reverse, bool reset_after{algorithm}, bool[6] output_mask) "
    "-> (Tensor grad_input, Tensor grad_h0, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh)"
)
torch.library.define("fastarch::gru_fwd", FWD.format(algorithm=", str algorithm"))
torch.library.define("fastarch::gru_bwd", BWD.format(algorithm=", str algorithm"))
fwd = torch.ops.fastarch.gru_fwd.default
bwd = torch.ops.fastarch.gru_bwd.default

# csrc/cuda implements these two: one launch for a whole sequence, with the recurrent weights on chip
torch.library.define("fastarch::gru_persistent_fwd", FWD.format(algorithm=", bool tf32"))
torch.library.define("fastarch::gru_persistent_bwd", BWD.format(algorithm=", bool tf32"))


@torch.library.impl("fastarch::gru_fwd", "CUDA")
def _(input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, reset_after, save_gates, algorithm):
    arguments = (input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, reset_after, save_gates)
    if algorithm == "persistent":
        return torch.ops.fastarch.gru_persistent_fwd(*arguments, allows_tf32())
    from fastarch.kernels.gru import gru_fwd  # here: a machine without Triton must import

    return gru_fwd(*arguments, algorithm)


@torch.library.impl("fastarch::gru_bwd", "CUDA")
def _(
    grad_output, grad_h_n, input, h0, w_ih, w_hh, output, gates, lengths, reverse, reset_after, algorithm, output_mask
):
    saved = (grad_output, grad_h_n, input, h0, w_ih, w_hh, output, gates, lengths, reverse, reset_after)
    if algorithm == "persistent":
        return torch.ops.fastarch.gru_persistent_bwd(*saved, allows_tf32(), output_mask)
    from fastarch.kernels.gru import gru_bwd

    return gru_bwd(*saved, algorithm, output_mask)


def allows_tf32() -> bool:
    """Whether float32 products may round to TF32: torch's setting for recurrent layers."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


def fake_fwd(input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, reset_after, save_gates, algorithm):
    (T, N, _), H = input.shape, h0.shape[1]
    gates = input.new_empty((T, N, 4 if reset_after else 3, H) if save_gates else 0)
    return input.new_empty(T, N, H), h0.new_empty(N, H), gates


def fake_bwd(grad_output, grad_h_n, input, h0, w_ih, w_hh, *options):
    shapes = (input.shape, h0.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1], w_hh.shape[:1])
    return tuple(input.new_empty(shape if want else 0) for shape, want in zip(shapes, options[-1]))


torch.library.register_fake("fastarch::gru_fwd", fake_fwd)
torch.library.register_fake("fastarch::gru_bwd", fake_bwd)
torch.library.register_fake("fastarch::gru_persistent_fwd", fake_fwd)
torch.library.register_fake("fastarch::gru_persistent_bwd", fake_bwd)


class GRUFunction(torch.autograd.Function):
    """(x, h0, w_ih, w_hh, b_ih, b_hh) to the output of every step and the state after the last."""

    @staticmethod
    def forward(ctx, input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse, reset_after, algorithm):
        tensors = (input, h0, w_ih, w_hh, b_ih, b_hh)
        output, h_n, gates = fwd(*tensors, lengths, reverse, reset_after, True, algorithm)
        ctx.save_for_backward(*tensors, lengths, output, gates)
        ctx.reverse, ctx.reset_after, ctx.algorithm = reverse, reset_after, algorithm
        ctx.set_materialize_grads(False)  # the output or the last state is often not used
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        *tensors, lengths, output, gates = ctx.saved_tensors
        needed = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # create_graph: bwd is opaque to autograd and would lose the second derivative
            results = reference(*tensors, ctx.reverse, lengths, ctx.reset_after)
            pairs = [(y, dy) for y, dy in zip(results, (grad_output, grad_h_n)) if dy is not None]
            wanted = [t for t, need in zip(tensors, needed) if need]
            ys, dys = zip(*pairs)
            grads = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
            return *(next(grads) if need else None for need in needed), *(None,) * 4
        grads = bwd(
            grad_output,
            grad_h_n,
            *tensors[:4],
            output,
            gates,
            lengths,
            ctx.reverse,
            ctx.reset_after,
            ctx.algorithm,
            needed,
        )
        return *(grad if need else None for grad, need in zip(grads, needed)), *(None,) * 4


def device_of(input) -> str:
    """Of what may be no tensor: `check` says so."""
    return input.device.type if isinstance(input, Tensor) else "cpu"


def check(name: str, input, state, w_ih, w_hh, b_ih, b_hh, ranks: tuple[int, ...], hx: str) -> None:
    """Of the tensors that `gru` and `gru_cell` have in common. `hx` is what the state is called there."""
    tensors = {"input": input, hx: state, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
    for what, t in tensors.items():
        if t is None and what.startswith("b_"):
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            came = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: want {what} as a floating tensor, got {came}")
        if t.dtype != input.dtype or t.device != input.device:
            raise TypeError(f"{name}: input is {input.dtype} on {input.device}, {what} is {t.dtype} on {t.device}")
    if input.dim() not in ranks:
        shapes = " or ".join({1: "[C]", 2: "[N, C]", 3: "[T, N, C]"}[rank] for rank in ranks)
        raise ValueError(f"{name}: want input {shapes}, got {[*input.shape]}")
    if w_hh.dim() != 2 or w_hh.shape[0] != 3 * w_hh.shape[1]:
        raise ValueError(f"{name}: want w_hh [3H, H], got {[*w_hh.shape]}")
    H, C = w_hh.shape[1], input.shape[-1]
    batch = input.shape[-2:-1]
    shapes = {hx: (*batch, H), "w_ih": (3 * H, C), "b_ih": (3 * H,), "b_hh": (3 * H,)}
    for what, shape in shapes.items():
        if tensors[what] is not None and tensors[what].shape != shape:
            raise ValueError(
                f"{name}: want {what} {[*shape]} for input {[*input.shape]} and w_hh {[*w_hh.shape]}, "
                f"got {[*tensors[what].shape]}"
            )


def check_lengths(lengths, input: Tensor) -> None:
    T, N, _ = input.shape
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64 or lengths.device != input.device:
        came = f"{lengths.dtype} on {lengths.device}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"gru: want lengths as a tensor of torch.int64 on {input.device}, got {came}")
    if lengths.shape != (N,):
        raise ValueError(f"gru: want lengths [{N}] for input {[*input.shape]}, got {[*lengths.shape]}")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and N:
        least, most = (int(t) for t in lengths.aminmax())
        if least < 0 or most > T:
            raise ValueError(f"gru: want lengths from 0 to {T}, got {least} to {most}")


def route(input: Tensor, h0: Tensor, reset_after: bool) -> Route:
    """The algorithm that serves an input, or the reference."""
    device, dtype = input.device.type, input.dtype
    if input.numel() == 0 or h0.numel() == 0:
        return Route(REFERENCE, "nothing to compute")
    if device == "cpu":
        if extension.cpu is None:
            return Route(REFERENCE, extension.no_cpu)
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return Route(REFERENCE, f"no CPU kernel for {dtype}")
        return Route(
            "sequence",
            "all steps in one parallel region; weights packed once, for one step of few sequences not at all",
        )
    if device == "cuda":
        return route_cuda(input, h0, reset_after)
    return Route(REFERENCE, f"no kernel for {device}")


def route_cuda(input: Tensor, h0: Tensor, reset_after: bool) -> Route:
    """A rule by counting, not by measurement: no GPU was at hand (2026-11-25)."""
    T, H = input.shape[0], h0.shape[1]
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Route(REFERENCE, f"no CUDA kernel for {input.dtype}")
    if extension.cuda is not None and T > 1 and reset_after:
        device = torch.cuda.get_device_properties(input.device)
        if fits_on_chip(H, input.itemsize, device.multi_processor_count, device.shared_memory_per_block_optin):
            return Route("persistent", "several steps, and recurrent weights that fit on chip: one launch for all")
    if H <= 256:
        return Route("cell", "a step is one launch: its product is too small to fill the GPU by itself")
    return Route("pointwise", "wide states: cuBLAS multiplies, one launch does the rest of a step")


def fits_on_chip(H: int, itemsize: int, multiprocessors: int, shared_bytes: int) -> bool:
    """Whether the persistent kernels' weights fit into shared memory: as csrc/cuda/gru.cuh plans them."""
    tiles = math.ceil(math.ceil(H / 16) / multiprocessors)  # of 16 units, in each block
    chunks = math.ceil(H * itemsize / 64)  # of 64 bytes in a row of weights, 16 rows of which take 1 KB
    sums = 8 * 3 * 160 * 4  # of 8 warps, three gates, 8 sequences of 20 words each
    return tiles * 3 * chunks * 1024 + sums <= shared_bytes


def backend(device: str, algorithm: str) -> str:
    """What people read in `fastarch.explain`."""
    if algorithm == REFERENCE:
        return REFERENCE
    if device == "cpu":
        return f"cpu-{extension.isa} {algorithm}"
    return f"cuda {algorithm}" if algorithm == "persistent" else f"triton {algorithm}"


def run(name: str, tensors: tuple[Tensor | None, ...], lengths, reverse: bool, reset_after: bool):
    """All steps by the kernel that serves them; None where that is the reference."""
    input, h0 = tensors[:2]
    algorithm, reason = route(input, h0, reset_after)
    if why := routing.reference_reason():
        algorithm, reason = REFERENCE, why
    routing.record(name, backend, input.device.type, algorithm, reason, input=input, state=h0)
    if algorithm == REFERENCE:
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return GRUFunction.apply(*tensors, lengths, reverse, reset_after, algorithm)
    output, h_n, _ = fwd(*tensors, lengths, reverse, reset_after, False, algorithm)
    return output, h_n


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
) -> Tensor:
    """h' = (1 - z) * n + z * h, one step of `gru`, which has the equations of r, z and n.

    Args:
        input: x [N, C], or [C] for a single sequence.
        hx: h [N, H], or [H].
        w_ih: [3H, C], rows of r, z, n in this order. w_hh: [3H, H].
        b_ih, b_hh: [3H], or None for 0.
        reset_after: whether r multiplies W_hn h + b_hn (PyTorch, cuDNN), or h before the product (Cho et al. 2014).

    Returns:
        h', shaped as hx.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: arguments that are not floating tensors, or differ in dtype or device.

    Precision, kernels, derivatives and sources: as `gru`.
    """
    tensors = autocast.cast(device_of(input), input, hx, w_ih, w_hh, b_ih, b_hh)
    check("gru_cell", *tensors, (1, 2), "hx")
    batched = input.dim() == 2
    x, h, *parameters = tensors
    sequence = (x[None] if batched else x[None, None], h if batched else h[None], *parameters)
    results = run("gru_cell", sequence, None, False, reset_after)
    if results is None:
        return cell_reference(*tensors, reset_after)
    return results[1] if batched else results[1][0]


def gru(
    input: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset_after: bool = True,
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z_t) * n_t + z_t * h_{t-1}: a layer of gated recurrent units over a sequence, in one direction.

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr),  z_t likewise
        n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))    reset_after
        n_t = tanh(W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn)    otherwise

    Args:
        input: x [T, N, C], any strides.
        h0: the state before the first step, [N, H].
        w_ih: [3H, C], rows of r, z, n in this order, as in torch.nn.GRU. w_hh: [3H, H].
        b_ih, b_hh: [3H], or None for 0.
        reverse: whether the walk goes from the last step to the first. output[t] stays beside x[t].
        lengths: steps of each sequence, [N] of int64, 0 to T (on CUDA what is beyond counts as 0 or T, for looking
            would wait for the device). Later steps are padding: their x counts for nothing, NaN included, their output
            is 0, and no gradient passes; with `reverse` the walk begins at the sequence's own last step. None: all T.
        reset_after: PyTorch's and cuDNN's unit; False gives that of Cho et al. 2014. Both with PyTorch's z, which keeps
            the old state; `fastarch.nn.convert_gru_weights` maps other conventions.

    Returns:
        The output h_t of every step, [T, N, H], and the state after the last step of each sequence, [N, H].

    Raises:
        ValueError: shapes that do not fit together; on CPUs also lengths out of range.
        TypeError: arguments that are not floating tensors, or differ in dtype or device; lengths of another dtype.

    Precision: float32 and float64 compute in their own precision; bfloat16 and float16 in float32, the state included,
    and outputs are rounded as they are written. sigmoid and tanh are within 2.6 units of the last place
    (csrc/cpu/activation.h). Results are the same bits from run to run and for any number of threads.

    Saved for the backward: the tensors given, the output, and per step and unit r, z, n and, with reset_after,
    W_hn h + b_hn, in x's dtype; everything else is computed again.

    Kernels serve float32, float64, bfloat16 and float16 on CPUs (C++), all but float64 on CUDA (CUDA C++, Triton).
    Nothing to compute (T, N or C of 0), torch.func transforms and derivatives of second order run on the differentiable
    reference; `fastarch.explain` shows it.

    Sources: Cho et al. 2014, arXiv 1406.1078, equations 5 to 8 (v3: reset before; v1: after, as in cuDNN).
    """
    tensors = autocast.cast(device_of(input), input, h0, w_ih, w_hh, b_ih, b_hh)
    check("gru", *tensors, (3,), "h0")
    if lengths is not None:
        check_lengths(lengths, input)
    results = run("gru", tensors, lengths, reverse, reset_after)
    return reference(*tensors, reverse, lengths, reset_after) if results is None else results
