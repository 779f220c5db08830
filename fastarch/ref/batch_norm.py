"""batch_norm: y = act(batch_norm(x) + residual), x [N, C, ...], statistics over everything but C."""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    momentum = momentum.item() if isinstance(momentum, Tensor) else momentum
    if training and process_group is not None:
        y = over_a_group(input, running_mean, running_var, weight, bias, momentum, eps, process_group)
    else:
        y = of_one_rank(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return y.relu() if activation == "relu" else y


def of_one_rank(input, running_mean, running_var, weight, bias, training, momentum, eps) -> Tensor:
    if weight is None and bias is not None:  # without a weight torch 2.13 loses the bias' second derivative
        weight = torch.ones_like(bias)
    per_channel = (running_mean, running_var, weight, bias)
    if len({t.dtype for t in per_channel if t is not None}) <= 1:
        return F.batch_norm(input, *per_channel, training, momentum, eps)
    # beside an input of 16 bits some are of float32 and some are not, which torch refuses
    running = [None if t is None else t.float() for t in (running_mean, running_var)]
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    y = F.batch_norm(input, *running, weight, bias, training, momentum, eps)
    for before, after in zip((running_mean, running_var), running):
        if training and before is not after:
            before.copy_(after)
    return y


def over_a_group(input, running_mean, running_var, weight, bias, momentum, eps, process_group) -> Tensor:
    """Batch normalization in training, with the statistics of all ranks' batches."""
    C = input.shape[1]
    along = (C, *(1 for _ in input.shape[2:]))  # a channel's value beside each of its elements
    x = input.double() if input.dtype == torch.float64 else input.float()
    values = x.transpose(0, 1).reshape(C, -1)  # [C, values]
    count = AllReduce.apply(torch.tensor(values.shape[1], device=x.device), process_group)
    mean = AllReduce.apply(values.sum(1), process_group) / count
    var = AllReduce.apply((values - mean[:, None]).square().sum(1), process_group) / count
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    y = (x - mean.view(along)) * (var + eps).rsqrt().view(along)
    y = y if weight is None else y * weight.view(along)
    return (y if bias is None else y + bias.view(along)).to(input.dtype)


class AllReduce(torch.autograd.Function):
    """The sum over all ranks, which is its own adjoint; differentiable as often as one likes."""

    @staticmethod
    def forward(ctx, t, process_group):
        ctx.process_group = process_group
        t = t.clone()
        dist.all_reduce(t, group=process_group)
        return t

    @staticmethod
    def backward(ctx, grad_output):
        return AllReduce.apply(grad_output, ctx.process_group), None
