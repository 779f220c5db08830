"""Layers of batch_norm: batch normalization, and a residual and ReLU in the same pass."""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastarch import ops
from fastarch.nn.conv_relu_pool import Conv2d
from fastarch.nn.leaf import Leaf


class Fused(Leaf):
    """What the layers add to torch.nn's: an activation, a residual, and our operation."""

    def __init__(self, *args, activation: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.normalize(input, residual, self.activation)

    def normalize(self, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        """forward with another activation than the layer's own."""
        self._check_input_dim(input)
        tracking = self.training and self.track_running_stats
        momentum = self.momentum
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the average of all batches; a tensor, for float() would wait for the device
                dtype = torch.promote_types(self.running_mean.dtype, torch.float32)
                momentum = self.num_batches_tracked.to(dtype).reciprocal()
        training = self.training or (self.running_mean is None and self.running_var is None)
        running = (self.running_mean, self.running_var) if tracking or not self.training else (None, None)
        return ops.batch_norm(
            input,
            *running,
            self.weight,
            self.bias,
            training,
            0.0 if momentum is None else momentum,
            self.eps,
            residual=residual,
            activation=activation,
            process_group=self.ranks(training),
        )

    def ranks(self, training: bool) -> dist.ProcessGroup | None:
        """Whose batches are normalised together with this one's."""
        return None

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class BatchNorm1d(Fused, nn.BatchNorm1d):
    """y = act(batch_norm(x) + residual).   x, residual, y [N, C] or [N, C, L]

    `torch.nn.BatchNorm1d`'s arguments, defaults, errors and state_dict, and by keyword `activation` (None or "relu");
    called with x, or with x and a residual. `fastarch.ops.batch_norm` states precision and errors.
    """


class BatchNorm2d(Fused, nn.BatchNorm2d):
    """y = act(batch_norm(x) + residual).   x, residual, y [N, C, H, W]

    `torch.nn.BatchNorm2d`'s arguments, defaults, errors and state_dict, and by keyword `activation` (None or "relu");
    called with x, or with x and a residual. `fastarch.ops.batch_norm` states precision and errors.
    """


class BatchNorm3d(Fused, nn.BatchNorm3d):
    """y = act(batch_norm(x) + residual).   x, residual, y [N, C, D, H, W]

    `torch.nn.BatchNorm3d`'s arguments, defaults, errors and state_dict, and by keyword `activation` (None or "relu");
    called with x, or with x and a residual. `fastarch.ops.batch_norm` states precision and errors.
    """


class SyncBatchNorm(Fused, nn.modules.batchnorm._BatchNorm):
    """Batch normalization over the batches of all ranks of `process_group`, which may differ in size, or be empty.

    `torch.nn.SyncBatchNorm`'s arguments, defaults, errors and state_dict, on CPUs (gloo) as on GPUs (NCCL); without
    torch.distributed, with one rank, and in evaluation it is `BatchNorm`. It is no subclass of torch's, because
    DistributedDataParallel refuses that one on CPUs.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        *args,
        **kwargs,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, *args, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: want input [N, C, ...], got {[*input.shape]}")
        if input.shape[1] == 0:
            raise ValueError(f"SyncBatchNorm: want input of at least one channel, got {[*input.shape]}")

    def ranks(self, training: bool) -> dist.ProcessGroup | None:
        if not (training and self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """The module with every BatchNorm in it replaced by a SyncBatchNorm with the same parameters and buffers."""
        converted = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            activation = getattr(module, "activation", None)
            arguments = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            converted = cls(*arguments, process_group, activation=activation)
            for name in ("weight", "bias"):
                setattr(converted, name, getattr(module, name))
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.training = module.training
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted


FOLDABLE = {layer.forward for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv2d)}


def fold_batch_norm(conv: nn.Module, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals bn(conv(x)) in evaluation.

    weight' = weight * s and bias' = (bias - running_mean) * s + bn.bias by output channel, s = bn.weight /
    sqrt(running_var + eps); rounded once, at the end, where they have 16 bits, and differentiable by every parameter.

    Args:
        conv: a Conv1d, 2d or 3d of any groups, or a Linear.
        bn: a BatchNorm with running statistics and no activation of its own.

    Raises:
        TypeError: another kind of layer, one that computes more than a convolution included (ConvReLUPool2d).
        ValueError: no running statistics, an activation, or another number of features.
    """
    if type(conv).forward not in FOLDABLE:  # by forward: parametrized layers are classes of their own
        raise TypeError(f"fold_batch_norm: want a Conv1d, Conv2d, Conv3d or Linear, got {type(conv).__name__}")
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"fold_batch_norm: want a BatchNorm, got {type(bn).__name__}")
    if bn.running_mean is None:
        raise ValueError("fold_batch_norm: want a BatchNorm with running statistics, got track_running_stats=False")
    if getattr(bn, "activation", None) is not None:
        raise ValueError(f"fold_batch_norm: want a BatchNorm without activation, got {bn.activation!r}")
    if len(bn.running_mean) != len(conv.weight):
        raise ValueError(
            f"fold_batch_norm: want a BatchNorm of {len(conv.weight)} features, got {len(bn.running_mean)}"
        )
    scale, bias = scale_and_bias(conv, bn)
    weight = conv.weight * scale.view(-1, *(1 for _ in conv.weight.shape[1:]))
    return weight.to(conv.weight.dtype), bias


def scale_and_bias(conv: nn.Module, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """s and bias' of the same, without checks; an activation of bn is for the caller to apply."""
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    mean, var, gain, offset, bias = (
        None if t is None else t.to(dtype) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias, conv.bias)
    )
    scale = torch.rsqrt(var + bn.eps)
    scale = scale if gain is None else scale * gain
    shift = -mean if bias is None else bias - mean
    bias = shift * scale if offset is None else torch.addcmul(offset, shift, scale)
    return scale, bias.to(conv.weight.dtype)
