"""batch_norm: y = act(batch_norm(x) + residual).

Shapes: x, residual, y [N, C, ...]; weight, bias, mean, var [C], of float32 where x is bfloat16 or float16.

The kernels see x in one of two layouts, `is_rows`: rows of C channels (channels_last, and [N, C]) or planes of S
elements (contiguous; anything else is copied to that). Four operations:

stats   mean and var (biased) of a batch.
fwd     y, and unless mean and var are given (evaluation, statistics of several ranks) those of the batch. With
        save_mask also which elements passed ReLU: one bit each, in rows of whole bytes [rows, ceil(inner / 8)], where a
        row is `inner` = C or S consecutive elements; element i is bit i % 8 of byte i / 8.
bwd     With z = batch_norm(x) + residual, dz = dy where ReLU passed: by the mask, or without one where
        (x - mean) * (weight * rstd) + bias, computed as fwd did, is not <= 0.
          dresidual = dz, dbias = sum dz, dweight = sum dz xhat
          dx = weight * rstd * (dz - mean(dz) - xhat * mean(dz xhat))
        The two means are over the batch, or given (over several ranks), or 0 where the statistics were constants.
update  running += momentum (of_the_batch - running), in place, of mean and of var * unbias: on CPUs, where it
        takes 3 to 6 us and torch's operations one after the other 10.
"""

import math
import numbers

import torch
from torch import Tensor
from torch import distributed as dist

from fastarch import extension, routing
from fastarch.ref.batch_norm import batch_norm as reference
from fastarch.routing import REFERENCE, Route

CUDA_ALGORITHM = "persistent"  # what csrc/cuda implements, as batch_norm_persistent_fwd and _bwd
STATS = "(Tensor mean, Tensor var)"
FWD = (
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
    "float eps, bool relu, bool save_mask, str algorithm) -> (Tensor output, Tensor mean, Tensor var, Tensor mask)"
)
BWD = (
    "(Tensor grad_output, Tensor input, Tensor? mask, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor? mean_dz, Tensor? mean_dz_xhat, float eps, bool relu, bool training, str algorithm, bool[4] output_mask) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)
torch.library.define("fastarch::batch_norm_stats", f"(Tensor input) -> {STATS}")
torch.library.define("fastarch::batch_norm_fwd", FWD)
torch.library.define("fastarch::batch_norm_bwd", BWD)
torch.library.define(
    "fastarch::batch_norm_update",
    "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, float unbias) -> ()",
)
stats = torch.ops.fastarch.batch_norm_stats.default
fwd = torch.ops.fastarch.batch_norm_fwd.default
bwd = torch.ops.fastarch.batch_norm_bwd.default
update = torch.ops.fastarch.batch_norm_update.default

# csrc/cuda implements these two for rows: a persistent kernel that reads x once, with the batch's own statistics
torch.library.define(
    "fastarch::batch_norm_persistent_fwd",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool relu, bool save_mask) "
    "-> (Tensor output, Tensor mean, Tensor var, Tensor mask)",
)
torch.library.define(
    "fastarch::batch_norm_persistent_bwd",
    "(Tensor grad_output, Tensor input, Tensor? mask, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "float eps, bool relu, bool[4] output_mask) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.impl("fastarch::batch_norm_stats", "CUDA")
def _(input):
    from fastarch.kernels.batch_norm import batch_norm_stats  # here: a machine without Triton must import

    return batch_norm_stats(input)


@torch.library.impl("fastarch::batch_norm_fwd", "CUDA")
def _(input, residual, weight, bias, mean, var, eps, relu, save_mask, algorithm):
    if algorithm == "persistent":
        return torch.ops.fastarch.batch_norm_persistent_fwd(input, residual, weight, bias, eps, relu, save_mask)
    from fastarch.kernels.batch_norm import batch_norm_fwd

    return batch_norm_fwd(input, residual, weight, bias, mean, var, eps, relu, save_mask)


@torch.library.impl("fastarch::batch_norm_bwd", "CUDA")
def _(grad_output, input, mask, weight, bias, mean, var, mean_dz, mean_dz_xhat, eps, relu, training, algorithm, wanted):
    saved = (grad_output, input, mask, weight, bias, mean, var)
    if algorithm == "persistent":
        return torch.ops.fastarch.batch_norm_persistent_bwd(*saved, eps, relu, wanted)
    from fastarch.kernels.batch_norm import batch_norm_bwd

    return batch_norm_bwd(*saved, mean_dz, mean_dz_xhat, eps, relu, training, wanted)


def is_rows(input: Tensor) -> bool:
    """Whether kernels see the input as rows of C channels, not as planes."""
    if input.shape[1] == 1:
        return False
    if math.prod(input.shape[2:]) == 1:  # [N, C], or images of one pixel
        return True
    return not input.is_contiguous() and input.movedim(1, -1).is_contiguous()


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(input: Tensor) -> Tensor:
    """With the input's strides where kernels read it as it is, contiguous where they copy it."""
    as_it_is = is_rows(input) and input.movedim(1, -1).is_contiguous()
    return torch.empty_like(input, memory_format=torch.preserve_format if as_it_is else torch.contiguous_format)


def mask_shape(input: Tensor) -> tuple[int, int]:
    N, C, *size = input.shape
    S = math.prod(size)
    return (N * S, (C + 7) // 8) if is_rows(input) else (N * C, (S + 7) // 8)


@torch.library.register_fake("fastarch::batch_norm_stats")
def _(input):
    mean = input.new_empty(input.shape[1], dtype=statistics_dtype(input.dtype))
    return mean, torch.empty_like(mean)


def fake_fwd(input, save_mask, save_statistics):
    mean = input.new_empty(input.shape[1] if save_statistics else 0, dtype=statistics_dtype(input.dtype))
    mask = input.new_empty(mask_shape(input) if save_mask else 0, dtype=torch.uint8)
    return empty_output(input), mean, torch.empty_like(mean), mask


def fake_bwd(input, mean, wanted):
    grad_input, grad_residual = (empty_output(input) if want else input.new_empty(0) for want in wanted[:2])
    return grad_input, grad_residual, *(mean.new_empty(mean.shape if want else 0) for want in wanted[2:])


@torch.library.register_fake("fastarch::batch_norm_fwd")
def _(input, residual, weight, bias, mean, var, eps, relu, save_mask, algorithm):
    return fake_fwd(input, save_mask, mean is None)


@torch.library.register_fake("fastarch::batch_norm_bwd")
def _(grad_output, input, mask, weight, bias, mean, *args):
    return fake_bwd(input, mean, args[-1])


@torch.library.register_fake("fastarch::batch_norm_update")
def _(running_mean, running_var, mean, var, momentum, unbias):
    return None


@torch.library.register_fake("fastarch::batch_norm_persistent_fwd")
def _(input, residual, weight, bias, eps, relu, save_mask):
    return fake_fwd(input, save_mask, True)


@torch.library.register_fake("fastarch::batch_norm_persistent_bwd")
def _(grad_output, input, mask, weight, bias, mean, *args):
    return fake_bwd(input, mean, args[-1])


class BatchNormFunction(torch.autograd.Function):
    """(x, residual, weight, bias, mean and var or None) to y and, in training, the batch's mean and var [C]."""

    @staticmethod
    def forward(ctx, input, residual, weight, bias, mean, var, eps, relu, algorithm, process_group):
        ctx.training = mean is None
        count = None
        if process_group is not None:
            mean, var, count = statistics_of_group(input, process_group)
        save_mask = relu and residual is not None  # without a residual the backward computes it again, from x
        output, *batch, mask = fwd(input, residual, weight, bias, mean, var, eps, relu, save_mask, algorithm)
        if mean is None:
            mean, var = batch
        ctx.save_for_backward(input, weight, bias, mean, var, mask if save_mask else None, count)
        ctx.eps, ctx.relu, ctx.algorithm, ctx.process_group = eps, relu, algorithm, process_group
        if not ctx.training:
            return output
        statistics = (mean, var) if count is None else (mean, var, count)
        ctx.mark_non_differentiable(*statistics)
        return output, *statistics

    @staticmethod
    def backward(ctx, grad_output, *_):
        if torch.is_grad_enabled():  # create_graph: bwd is opaque to autograd and would lose the second derivative
            return *differentiable_gradients(ctx, grad_output), *(None,) * 6
        input, weight, bias, mean, var, mask, count = ctx.saved_tensors
        saved = (grad_output, input, mask, weight, bias, mean, var)
        options = (ctx.eps, ctx.relu, ctx.training, ctx.algorithm)
        need_input, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        need_dz = need_residual and ctx.relu  # without ReLU it is grad_output
        if count is None:
            wanted = [need_input, need_dz, need_weight, need_bias]
            grad_input, grad_residual, grad_weight, grad_bias = bwd(*saved, None, None, *options, wanted)
        else:
            *_, grad_weight, grad_bias = bwd(*saved, None, None, *options, [False, False, True, True])
            sums = torch.cat([grad_bias, grad_weight])
            dist.all_reduce(sums, group=ctx.process_group)
            means = (sums / count).to(mean.dtype).chunk(2)
            grad_input, grad_residual, *_ = bwd(*saved, *means, *options, [need_input, need_dz, False, False])
        return (
            grad_input if need_input else None,
            (grad_residual if ctx.relu else grad_output) if need_residual else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 6,
        )


def differentiable_gradients(ctx, grad_output):
    """What backward returns, by the reference: the mask of ReLU is a constant to any further derivative."""
    input, weight, bias, mean, var, mask, _ = ctx.saved_tensors
    if mask is not None:
        grad_output = grad_output.masked_fill(~unpacked(mask, input), 0)  # not times 0: that keeps infinities
    needed = ctx.needs_input_grad[:4]
    activation = "relu" if ctx.relu and mask is None else None
    statistics = (None, None) if ctx.training else (mean, var)
    output = reference(
        input, *statistics, weight, bias, ctx.training, 0.0, ctx.eps, None, activation, ctx.process_group
    )
    leaves = (input, None, weight, bias)
    wanted = [t for t, need in zip(leaves, needed) if need and t is not None]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True) if wanted else ())
    return [(grad_output if t is None else next(grads)) if need else None for t, need in zip(leaves, needed)]


def unpacked(mask: Tensor, input: Tensor) -> Tensor:
    """The bits of a mask as booleans, shaped as the input."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    N, C, *size = input.shape
    if is_rows(input):
        return bits.flatten(1)[:, :C].reshape(N, *size, C).movedim(-1, 1).bool()
    return bits.flatten(1)[:, : math.prod(size)].reshape(input.shape).bool()


def statistics_of_group(input: Tensor, process_group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and var of the batches of all ranks, merged as Chan et al. 1983 do, and the number of values."""
    C = input.shape[1]
    mean, var = (t.double() for t in stats(input))  # float32 cannot count beyond 2**24
    ours = torch.cat([mean, var, mean.new_full((1,), input.numel() // C)])
    every = [torch.empty_like(ours) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(every, ours, group=process_group)
    means, variances, counts = torch.stack(every).split([C, C, 1], 1)
    means, variances = (t.where(counts > 0, 0.0) for t in (means, variances))  # a rank without values has none
    count = counts.sum()
    merged = (means * counts).sum(0) / count
    variance = ((variances + (means - merged).square()) * counts).sum(0) / count
    dtype = statistics_dtype(input.dtype)
    return merged.to(dtype), variance.to(dtype), count


def check(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation) -> None:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        came = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"batch_norm: want input as a floating tensor, got {came}")
    if input.dim() < 2:
        raise error("input [N, C, ...]", [*input.shape])
    of_channels = (statistics_dtype(input.dtype), input.dtype), input.shape[1:2]
    given = ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)
    for what, t in given:
        if t is not None:
            check_beside(what, t, input, *of_channels)
    if residual is not None:
        check_beside("residual", residual, input, (input.dtype,), input.shape)
    if not isinstance(momentum, (numbers.Real, Tensor)):
        raise TypeError(f"batch_norm: want momentum as a number or a tensor, got {type(momentum).__name__}")
    if eps < 0 or (training and eps == 0):
        raise error("eps > 0 when training, >= 0 otherwise", eps)
    if activation not in (None, "relu"):
        raise error("activation None or 'relu'", repr(activation))
    if (running_mean is None) != (running_var is None):
        raise error("both running_mean and running_var, or neither", "one of them")
    if not training and running_mean is None:
        raise error("running_mean and running_var when not training", "neither")


def check_beside(what: str, t, input: Tensor, dtypes: tuple[torch.dtype, ...], shape: torch.Size) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"batch_norm: want {what} as a tensor or None, got {type(t).__name__}")
    if t.dtype not in dtypes or t.device != input.device:
        raise TypeError(f"batch_norm: input is {input.dtype} on {input.device}, {what} is {t.dtype} on {t.device}")
    if t.shape != shape:
        raise error(f"{what} {[*shape]} for input {[*input.shape]}", [*t.shape])


def error(wanted: str, came) -> ValueError:
    return ValueError(f"batch_norm: want {wanted}, got {came}")


def route(input: Tensor, training: bool, process_group) -> Route:
    """The algorithm that serves an input, or the reference."""
    device, dtype = input.device.type, input.dtype
    if input.numel() == 0 and process_group is None:
        return Route(REFERENCE, "nothing to normalise")
    if device == "cpu":
        if extension.cpu is None:
            return Route(REFERENCE, extension.no_cpu)
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return Route(REFERENCE, f"no CPU kernel for {dtype}")
        return Route("two_pass", "statistics, then the rest, from the cache where a channel fits into it")
    if device == "cuda":
        return route_cuda(input, training, process_group)
    return Route(REFERENCE, f"no kernel for {device}")


def route_cuda(input: Tensor, training: bool, process_group) -> Route:
    """Computed from bytes (two reads against one), not measured: no GPU was at hand (2026-11-21)."""
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Route(REFERENCE, f"no CUDA kernel for {input.dtype}")
    if extension.cuda is not None and training and process_group is None and is_rows(input):
        return Route("persistent", "rows of channels, kept on chip between the statistics and the rest: read once")
    return Route("two_pass", "statistics, then the rest, from the end, which L2 still holds")


def backend(device: str, algorithm: str) -> str:
    """What people read in `fastarch.explain`."""
    if algorithm == REFERENCE:
        return REFERENCE
    if device == "cpu":
        return f"cpu-{extension.isa} {algorithm}"
    return f"cuda {algorithm}" if algorithm == "persistent" else f"triton {algorithm}"


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and var by channel.

    In training mean and var (biased) are those of the batch, over every dimension but the second, and the running ones
    become (1 - momentum) running + momentum of_the_batch (the unbiased var); otherwise they are the running ones.

    Args:
        input: x [N, C, ...], contiguous, channels_last or with any other strides.
        running_mean, running_var: [C], or None for neither, which `training` then has to be. Updated in place.
        weight, bias: [C], or None for 1 and 0. Of x's dtype or, where that has 16 bits, of float32.
        training: whether to normalise by the batch's statistics.
        momentum: the share of the new batch in the running statistics; a tensor is never copied to the host.
        eps: added to var.
        residual: of x's shape and dtype, added before the activation; None for 0.
        activation: "relu" or None.
        process_group: the ranks whose batches, of any sizes, are normalised as one; None for this rank's alone.

    Returns:
        y, shaped as x; channels_last if x is.

    Raises:
        ValueError: shapes that do not fit together, one value per channel in training, no running statistics to
            evaluate with, an `eps` below 0 (or 0 in training), an unknown `activation`.
        TypeError: arguments that are not tensors, or differ in dtype or device; a `momentum` that is no number.

    Precision: float32 and float64 compute in their own precision, bfloat16 and float16 in float32, rounded once, at the
    output. Sums of squares are taken around a value of the channel and merged in double, so that a large mean does not
    cancel the variance. Results are the same bits from run to run and for any number of threads.

    Saved for the backward: x, mean, var, weight and bias; with residual and ReLU one bit per element.

    Kernels serve float32, float64, bfloat16 and float16 on CPUs (C++), all but float64 on CUDA (Triton, CUDA C++). An
    empty batch, torch.func transforms and derivatives of second order run on the differentiable reference;
    `fastarch.explain` shows it.

    Sources: Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1; He et al. 2015, arXiv 1512.03385, figure 2, for the
    residual; Chan, Golub and LeVeque 1983 for merging variances.
    """
    check(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation)
    algorithm, reason = route(input, training, process_group)
    if why := routing.reference_reason():
        algorithm, reason = REFERENCE, why
    values = input.shape[0] * math.prod(input.shape[2:])
    if training and process_group is None and values == 1:
        raise error("more than 1 value per channel when training", [*input.shape])
    routing.record("batch_norm", backend, input.device.type, algorithm, reason, input=input)
    if algorithm == REFERENCE:
        running = (running_mean, running_var)
        return reference(input, *running, weight, bias, training, momentum, eps, residual, activation, process_group)

    dtype, relu = statistics_dtype(input.dtype), activation == "relu"
    weight, bias = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (weight, bias))
    tensors = (input, residual, weight, bias)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not training:
        given = [t if t.dtype == dtype else t.to(dtype) for t in (running_mean, running_var)]
        if differentiable:
            return BatchNormFunction.apply(*tensors, *given, eps, relu, algorithm, None)
        return fwd(*tensors, *given, eps, relu, False, algorithm)[0]
    if differentiable or process_group is not None:
        output, mean, var, *count = BatchNormFunction.apply(*tensors, None, None, eps, relu, algorithm, process_group)
    else:
        (output, mean, var, _), count = fwd(*tensors, None, None, eps, relu, False, algorithm), None
    if running_mean is not None:
        count = count[0] if count else values
        update_running(running_mean, running_var, mean, var, momentum, count / (count - 1))
    return output


def update_running(running_mean, running_var, mean, var, momentum: float | Tensor, unbias: float | Tensor) -> None:
    numbers_only = not isinstance(momentum, Tensor) and not isinstance(unbias, Tensor)
    plain = mean.device.type == "cpu" and running_mean.dtype == running_var.dtype == mean.dtype
    if numbers_only and plain and not torch.compiler.is_compiling():  # a compiler makes one loop of what follows
        return update(running_mean, running_var, mean, var, momentum, unbias)
    for running, of_the_batch in ((running_mean, mean), (running_var, var * unbias)):
        weight = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
        running.lerp_(of_the_batch.to(running.dtype), weight)
