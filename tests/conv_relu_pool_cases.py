"""Shapes and options that conv_relu_pool is tested on, and the results to hold it against."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from fastarch.ref.conv_relu_pool import conv_relu_pool as reference

op = importlib.import_module("fastarch.ops.conv_relu_pool")  # the module, not the function of its name


class Case(NamedTuple):
    """x [N, C, H, W], w [K, C/groups, R, S] and the keywords of conv_relu_pool."""

    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    options: dict
    bias: bool = True

    def __str__(self) -> str:
        options = "-".join(f"{k}{v}" for k, v in self.options.items())
        return f"{'x'.join(map(str, self.x))}_{'x'.join(map(str, self.w))}_{options}{'' if self.bias else '_nobias'}"


CASES = [
    Case((3, 2, 5, 4), (3, 2, 1, 1), {}),
    Case((1, 1, 3, 3), (1, 1, 3, 3), {"pool": None}),
    Case((2, 1, 28, 28), (6, 1, 5, 5), {}),  # LeNet's first
    Case((3, 6, 14, 14), (16, 6, 5, 5), {}),  # and second
    Case((2, 5, 13, 11), (7, 5, 3, 3), {"padding": 1}),
    Case((2, 17, 15, 12), (33, 17, 3, 3), {"padding": 1}),
    Case((3, 32, 14, 14), (64, 32, 3, 3), {"padding": 1}, bias=False),
    Case((2, 19, 9, 10), (18, 19, 3, 3), {"padding": (0, 2), "pool": None}),
    Case((1, 40, 7, 7), (70, 40, 3, 3), {"padding": 1, "pool": "avg"}),
    Case((2, 9, 13, 15), (10, 9, 3, 3), {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}),
    Case(
        (2, 3, 61, 53), (33, 3, 11, 11), {"stride": 4, "padding": 2, "pool_size": 3, "pool_stride": 2}
    ),  # AlexNet's first
    Case(
        (2, 3, 40, 37), (20, 3, 7, 7), {"stride": 2, "padding": 3, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}
    ),
    Case((1, 4, 23, 19), (9, 4, 5, 5), {"stride": 2, "padding": 2, "pool": "avg"}),
    Case((2, 8, 17, 19), (12, 2, 3, 3), {"groups": 4, "dilation": 2, "padding": 2, "ceil_mode": True, "pool_size": 3}),
    Case((2, 8, 17, 19), (32, 4, 3, 3), {"groups": 2, "padding": 1}),
    Case((2, 6, 11, 12), (6, 1, 3, 3), {"groups": 6, "padding": 1}),  # depthwise
    Case((1, 130, 8, 9), (20, 130, 3, 3), {"dilation": 2, "padding": 2}),
    Case(
        (2, 8, 17, 19),
        (12, 8, 3, 2),
        {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 3), "pool": None},
        bias=False,
    ),
    Case((2, 8, 12, 14), (11, 8, 3, 2), {"pool": "avg", "pool_size": (2, 3), "pool_stride": (1, 2), "pool_padding": 1}),
    Case(
        (2, 8, 13, 14), (11, 8, 2, 3), {"pool": "avg", "ceil_mode": True, "pool_size": (2, 3), "pool_padding": (1, 1)}
    ),
    Case(
        (1, 3, 9, 20),
        (5, 3, 3, 3),
        {"pool_size": (2, 5), "pool_stride": (3, 1), "pool_padding": (1, 2), "ceil_mode": True},
    ),
    Case((2, 3, 20, 21), (4, 3, 2, 2), {"pool_size": (15, 17), "pool_stride": 2}),  # the largest windows: 255 elements
    Case((2, 40, 12, 13), (20, 40, 11, 9), {"padding": 1}),
    Case((1, 40, 10, 11), (20, 40, 1, 1), {"stride": 3, "padding": 1}),
    Case((1, 3, 30, 30), (5, 3, 2, 2), {"pool_stride": 4, "stride": 3}),  # gaps between patches
    Case((0, 3, 8, 8), (4, 3, 3, 3), {}),  # an empty batch
    Case((1, 2, 1, 40), (5, 2, 1, 3), {"padding": (0, 1), "pool_size": (1, 2)}),  # one dimension
]


def draw(case: Case, dtype: torch.dtype, channels_last: bool = False, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, w and b (or None) from the seed."""
    x = torch.randn(case.x).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    w = (torch.randn(case.w) / (case.w[1] * case.w[2] * case.w[3]) ** 0.5).to(device, dtype)
    return x, w, (torch.randn(case.w[0]) / 2).to(device, dtype) if case.bias else None


def run(function, tensors, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """The output of function(x, w, b) and, with a grad_output, every gradient by name."""
    x, w, b = (None if t is None else t.detach().requires_grad_() for t in tensors)
    y = function(x, w, b)
    results = {"y": y.detach()}
    if grad_output is not None:
        wanted = {name: t for name, t in (("dx", x), ("dw", w), ("db", b)) if t is not None}
        results |= dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_output)))
    return results


def double(tensors) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def reference_of(geometry, relu: bool = True):
    return lambda x, w, b: reference(x, w, b, *geometry, relu=relu)


def plan_of(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> op.Plan:
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "pool": "max", "pool_size": 2}
    options |= {"pool_stride": None, "pool_padding": 0, "ceil_mode": False} | case.options
    return op.make_plan(device, dtype, case.x, case.w, **options)


def geometry_of(case: Case) -> op.Geometry:
    return plan_of(case).geometry
