"""Shapes and options that batch_norm is tested on, and the results to hold it against."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from fastarch.ref.batch_norm import batch_norm as reference

op = importlib.import_module("fastarch.ops.batch_norm")  # the module, not the function of its name

EPS = 1e-3


class Case(NamedTuple):
    """x [N, C, ...], whether there are a residual, ReLU, weight and bias, and whether the batch's statistics count."""

    x: tuple[int, ...]
    residual: bool = False
    relu: bool = False
    weight: bool = True
    bias: bool = True
    training: bool = True

    def __str__(self) -> str:
        options = [name for name in ("residual", "relu") if getattr(self, name)]
        options += [f"no_{name}" for name in ("weight", "bias") if not getattr(self, name)]
        return "_".join(["x".join(map(str, self.x)), *options, "training" if self.training else "evaluation"])

    @property
    def options(self) -> dict:
        return {"training": self.training, "eps": EPS, "activation": "relu" if self.relu else None}


CASES = [
    Case((3, 5)),
    Case((37, 70), relu=True),
    Case((9, 33, 1, 1), residual=True, relu=True),
    Case((4, 3, 17)),
    Case((2, 8, 7, 7), relu=True),
    Case((3, 16, 7, 7), residual=True, relu=True),
    Case((2, 1, 9, 10), residual=True, relu=True),  # one channel
    Case((1, 4, 2, 1)),
    Case((5, 65, 3, 5), residual=True),
    Case((2, 7, 13, 11), residual=True, relu=True),
    Case((2, 130, 4, 8), relu=True, weight=False),
    Case((3, 24, 5, 5), residual=True, relu=True, bias=False),
    Case((2, 6, 33, 31), relu=True, weight=False, bias=False),
    Case((2, 3, 4, 5, 6), residual=True, relu=True),
    Case((70, 4, 16, 16), residual=True, relu=True),  # several blocks of any kernel
    Case((1, 2, 120, 130), relu=True),
    Case((3, 5, 6, 7), training=False),
    Case((3, 40, 7, 7), residual=True, relu=True, training=False),
    Case((2, 9, 8, 8), relu=True, weight=False, bias=False, training=False),
    Case((6, 12), relu=True, training=False),
]

PLAIN = Case((3, 5, 6, 7))
FULL = Case((3, 10, 7, 5), residual=True, relu=True)
ROWS = Case((9, 13), residual=True, relu=True)
EVALUATION = FULL._replace(training=False)


def draw(case: Case, dtype: torch.dtype, channels_last: bool = False, device: str = "cpu") -> dict[str, Tensor | None]:
    """The arguments by name, from the seed; channels have means and scales of their own."""
    C = case.x[1]
    along = (C, *(1 for _ in case.x[2:]))
    x = torch.randn(case.x) * (torch.rand(along) + 0.5) + 2 * torch.randn(along)
    residual = torch.randn(case.x) if case.residual else None
    drawn = {"input": x, "residual": residual}
    drawn["weight"] = torch.randn(C) if case.weight else None
    drawn["bias"] = torch.randn(C) if case.bias else None
    drawn["running_mean"], drawn["running_var"] = torch.randn(C), torch.rand(C) + 0.5
    drawn = {name: t if t is None else t.to(device, dtype) for name, t in drawn.items()}
    if channels_last:
        drawn |= {name: as_rows(drawn[name]) for name in ("input", "residual") if drawn[name] is not None}
    return drawn


def as_rows(t: Tensor) -> Tensor:
    """The same values with channels innermost: channels_last, of any rank."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def run(function, drawn: dict[str, Tensor | None], grad_output: Tensor | None = None, **options) -> dict[str, Tensor]:
    """The output, the running statistics after it and, with a grad_output, every gradient by name."""
    leaves = {k: t.detach().requires_grad_() for k, t in drawn.items() if t is not None and "running" not in k}
    running = {k: t.clone() for k, t in drawn.items() if t is not None and "running" in k}
    absent = {k: None for k, t in drawn.items() if t is None}
    y = function(**leaves, **running, **absent, **options)
    results = {"y": y.detach()} | running
    if grad_output is not None:
        names = {"input": "dx", "residual": "dresidual", "weight": "dweight", "bias": "dbias"}
        grads = torch.autograd.grad(y, list(leaves.values()), grad_output)
        results |= {names[k]: g for k, g in zip(leaves, grads)}
    return results


def in_torch(**arguments) -> Tensor:
    return reference(**{"momentum": 0.1} | arguments)


def double(drawn: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: t if t is None else t.double() for name, t in drawn.items()}


def arguments_of_fwd(case: Case, dtype: torch.dtype, channels_last: bool = False) -> dict:
    """fwd's, per-channel tensors in the dtype that it wants them in."""
    drawn = draw(case, dtype, channels_last)
    per_channel = [None if t is None else t.to(op.statistics_dtype(dtype)) for t in list(drawn.values())[2:]]
    weight, bias, mean, var = per_channel
    given = {"mean": None, "var": None} if case.training else {"mean": mean, "var": var}
    tensors = {"input": drawn["input"], "residual": drawn["residual"], "weight": weight, "bias": bias} | given
    save_mask = case.relu and case.residual
    return tensors | {"eps": EPS, "relu": case.relu, "save_mask": save_mask, "algorithm": "two_pass"}


def arguments_of_bwd(case: Case, dtype: torch.dtype, channels_last: bool = False) -> dict:
    given = arguments_of_fwd(case, dtype, channels_last)
    y, *batch, mask = op.fwd(**given)
    saved = {"grad_output": torch.randn_like(y), "input": given["input"], "mask": mask if mask.numel() else None}
    mean, var = batch if case.training else (given["mean"], given["var"])
    saved |= {"weight": given["weight"], "bias": given["bias"], "mean": mean, "var": var}
    saved |= {"mean_dz": None, "mean_dz_xhat": None, "eps": EPS, "relu": case.relu, "training": case.training}
    return saved | {"algorithm": "two_pass", "output_mask": [True] * 4}
