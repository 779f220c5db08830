"""batch_norm on Triton: statistics of x [N, C, ...] and their use, in two reads, and the adjoint in two more."""

from math import gcd, prod
from typing import NamedTuple

import torch
from fastarch.kernels.batch_norm_bwd import (
    batch_norm_bwd_kernel,
    batch_norm_bwd_merge_kernel,
    batch_norm_bwd_sums_kernel,
)
from fastarch.kernels.batch_norm_fwd import batch_norm_fwd_kernel, batch_norm_merge_kernel, batch_norm_stats_kernel
from fastarch.kernels.tiles import launcher, tuned
from torch import Tensor
from triton import cdiv, next_power_of_2


class Tile(NamedTuple):
    row: int  # side by side in memory, where a row is not shorter
    elements: int
    warps: int
    stages: int
    registers: int  # per thread, at most: as many blocks as PROGRAMS has for an SM fit on it


# By what a row of memory is, "channels" (channels_last) or "values" (contiguous), and by whether 4 divides its length:
# if not, there are no vectors to load, and every element needs registers for an address of its own. None spills on
# sm_80, sm_90 or sm_100, which tests/test_triton_ahead_of_time.py checks. Speed: not measured; no GPU was at hand when
# they were chosen (2026-11-21).
TILES = {
    ("channels", "vectors"): Tile(64, 2048, 4, 3, 128),
    ("channels", "odd"): Tile(64, 1024, 4, 2, 128),
    ("values", "vectors"): Tile(512, 2048, 4, 3, 128),
    ("values", "odd"): Tile(512, 1024, 4, 2, 128),
}
# What `fastarch tune` compares them with, for keys that its workloads take. None spills there.
CANDIDATES = {
    ("channels", "vectors"): (Tile(128, 2048, 4, 3, 128), Tile(64, 2048, 4, 4, 128), Tile(64, 1024, 4, 4, 128)),
    ("values", "vectors"): (Tile(1024, 2048, 4, 3, 128), Tile(512, 2048, 4, 4, 128), Tile(512, 1024, 4, 4, 128)),
    ("values", "odd"): (Tile(512, 1024, 4, 3, 128), Tile(512, 512, 4, 3, 128), Tile(512, 1024, 8, 2, 64)),
}
PROGRAMS = 4 * 132  # a few for each SM of an H100, but constant: the same tiles, the same bits
MERGE = dict(BLOCK_C=2, BLOCK_SPLITS=next_power_of_2(PROGRAMS), num_warps=4, enable_fp_fusion=True)


class Layout(NamedTuple):
    """As the kernels see a tensor: [s, c] (axis 0, n is 1) or [n, c, s] (axis 1), by the axis of s in their tiles."""

    axis: int
    n: int
    c: int
    s: int

    @property
    def row(self) -> int:
        """How many elements lie in a row of memory, and a row of the mask stands for."""
        return self.c if self.axis == 0 else self.s

    @property
    def mask_shape(self) -> tuple[int, int]:
        return self.s if self.axis == 0 else self.n * self.c, cdiv(self.row, 8)


class Plan(NamedTuple):
    """Of a launch: its grid, how many programs share a channel, the integers and the constants of the kernel."""

    grid: tuple[int]
    splits: int
    sizes: tuple[int, int, int, int]
    options: dict


def layout_of(input: Tensor) -> Layout:
    """Rows of channels or planes, as the operation's `is_rows` decides: the shape of a mask depends on it."""
    n, c, *image = input.shape
    s = prod(image)
    one_pixel = n > 0 and s == 1
    if c > 1 and (one_pixel or (not input.is_contiguous() and input.movedim(1, -1).is_contiguous())):
        return Layout(0, 1, c, n * s)
    return Layout(1, n, c, s)


def plan(layout: Layout, x: Tensor) -> Plan:
    """The tile follows from C and S of [N, C, S] or from C alone, the splits from the number of tiles."""
    axis, n, c, s = layout
    key = "channels" if axis == 0 else "values", "odd" if layout.row % 4 else "vectors"
    tile = tuned("batch_norm", key, x) or TILES[key]
    if axis == 0:
        block_c = min(max(next_power_of_2(c), 8), tile.row)  # at least a byte of the mask
        block_s = tile.elements // block_c
    else:
        block_c = min(next_power_of_2(c), tile.elements // tile.row)
        block_s = min(max(next_power_of_2(s), 8), tile.elements // block_c)
        block_c = min(next_power_of_2(c), tile.elements // block_s)
    blocks, steps = cdiv(c, block_c), n * cdiv(s, block_s)
    splits = min(max(PROGRAMS // blocks, 1), steps)
    options = dict(
        AXIS=axis, VECTOR=gcd(layout.row, 16), BLOCK_C=block_c, BLOCK_S=block_s, STAGES=tile.stages,
        num_warps=tile.warps, maxnreg=tile.registers, enable_fp_fusion=True,
    )  # fmt: skip
    return Plan((blocks * splits,), splits, (n, c, s, steps), options)


@launcher("batch_norm")
def batch_norm_stats(input: Tensor) -> tuple[Tensor, Tensor]:
    """Launch, after the caller's checks: mean and biased var of each channel; of no values they are 0."""
    layout = layout_of(input)
    with torch.cuda.device_of(input):
        return statistics_of(in_memory(input, layout), layout)


@launcher("batch_norm")
def batch_norm_fwd(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch, after the caller's checks; a mask that is not wanted is empty, as are statistics that were given."""
    layout = layout_of(input)
    output = empty_output(input, layout)
    mask = input.new_empty(layout.mask_shape if save_mask else 0, dtype=torch.uint8)
    x, r = in_memory(input, layout), in_memory(residual, layout)
    with torch.cuda.device_of(input):
        if mean is None:
            mean, var = batch = statistics_of(x, layout)
        else:
            batch = mean.new_empty(0), var.new_empty(0)
        if input.numel():
            grid, _, sizes, options = plan(layout, x)
            batch_norm_fwd_kernel[grid](
                x, r, *map(in_memory, (weight, bias, mean, var)), output, mask if save_mask else None,
                *sizes, eps,
                RELU=relu, **options,
            )  # fmt: skip
    return output, *batch, mask


@launcher("batch_norm")
def batch_norm_bwd(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
    eps: float,
    relu: bool,
    training: bool,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch, after the caller's checks; a gradient that is not wanted is empty."""
    want_input, want_residual, want_weight, want_bias = wanted
    layout = layout_of(input)
    grad_input = empty_output(input, layout) if want_input else input.new_empty(0)
    grad_residual = empty_output(input, layout) if want_residual else input.new_empty(0)
    dy, x = in_memory(grad_output, layout), in_memory(input, layout)
    saved = dy, x, mask if relu else None, *map(in_memory, (weight, bias, mean, var))
    uses_means = want_input and training
    sums = None, None
    with torch.cuda.device_of(input):
        if want_weight or want_bias or (uses_means and mean_dz is None):
            sums = sums_of(saved, eps, relu, layout)
        if (want_input or want_residual) and input.numel():
            if not uses_means:
                means, share = (None, None), 0.0
            elif mean_dz is None:
                means, share = sums, layout.c / input.numel()
            else:
                means, share = (in_memory(mean_dz), in_memory(mean_dz_xhat)), 1.0
            grid, _, sizes, options = plan(layout, x)
            batch_norm_bwd_kernel[grid](
                *saved, *means, grad_input if want_input else None, grad_residual if want_residual else None,
                *sizes, eps, share,
                RELU=relu, **options,
            )  # fmt: skip
    sum_dz, sum_dz_xhat = sums
    grad_weight = sum_dz_xhat if want_weight else mean.new_empty(0)
    return grad_input, grad_residual, grad_weight, sum_dz if want_bias else mean.new_empty(0)


def statistics_of(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """mean and var."""
    make = torch.empty if x.numel() else torch.zeros
    mean, var = (make(layout.c, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        grid, splits, sizes, options = plan(layout, x)
        partial = mean.new_empty(4, layout.c, splits)
        batch_norm_stats_kernel[grid](x, partial, *sizes, **options)
        batch_norm_merge_kernel[merge_grid(layout)](partial, mean, var, layout.c, splits, **MERGE)
    return mean, var


def sums_of(saved: tuple, eps: float, relu: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    """sum dz and sum dz xhat."""
    x = saved[1]
    make = torch.empty if x.numel() else torch.zeros
    sum_dz, sum_dz_xhat = (make(layout.c, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        grid, splits, sizes, options = plan(layout, x)
        partial = sum_dz.new_empty(2, layout.c, splits)
        batch_norm_bwd_sums_kernel[grid](*saved, partial, *sizes, eps, RELU=relu, **options)
        batch_norm_bwd_merge_kernel[merge_grid(layout)](partial, sum_dz, sum_dz_xhat, layout.c, splits, **MERGE)
    return sum_dz, sum_dz_xhat


def merge_grid(layout: Layout) -> tuple[int]:
    return (cdiv(layout.c, MERGE["BLOCK_C"]),)


def in_memory(t: Tensor | None, layout: Layout | None = None) -> Tensor | None:
    """With its elements in the kernels' order, one after the other; copied only if they are not."""
    if t is None:
        return None
    return (t.movedim(1, -1) if layout is not None and layout.axis == 0 else t).contiguous()


def empty_output(input: Tensor, layout: Layout) -> Tensor:
    """With the strides that the operation's fakes have."""
    as_it_is = layout.axis == 0 and input.movedim(1, -1).is_contiguous()
    return torch.empty_like(input, memory_format=torch.preserve_format if as_it_is else torch.contiguous_format)
