"""conv_relu_pool: y = pool(relu(a conv2d(x, w) + b + r)), or without ReLU and pool.

Shapes: x [N, C, H, W], w [K, C/groups, R, S], a, b [K]; convolution, r [N, K, OH, OW]; y [N, K, PH, PW].

Two operations. The forward never writes the convolution's output. For the backward it saves one byte per pooled
output (`index`, shaped and strided as y):
  max: i * pool_w + j, where the window's first maximum stands at row i, column j; 255 where ReLU cut the window off
  avg: bit i * pool_w + j is set where the element at row i, column j passed ReLU
  none: as max, in a window of 1 x 1
Without ReLU there is nothing to save, and index is empty.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastarch import autocast, extension, routing
from fastarch.ref.conv_relu_pool import conv_relu_pool as reference
from fastarch.ref.conv_relu_pool import scaled
from fastarch.routing import REFERENCE, Route

MAX_WINDOW = 255  # elements of a max window that one byte can number, 255 itself being taken
AVG_WINDOW = 8  # elements of an average window that one byte can mark
LARGEST_FOOTPRINT = 1 << 20  # elements per channel under one output; larger ones are absurdly dilated or strided
CUDA_ALGORITHM = "direct"  # what csrc/cuda implements, as conv_relu_pool_direct_fwd and _bwd

GEOMETRY = (
    "int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "str pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode"
)
FWD = "Tensor input, Tensor weight, Tensor? bias, " + GEOMETRY
BWD = "Tensor grad_output, Tensor input, Tensor weight, Tensor index, " + GEOMETRY
RESULTS = "(Tensor output, Tensor index)"
GRADS = "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"

# On CPUs alone: a scale and a residual, in inference, and a convolution without ReLU, which has no index.
torch.library.define(
    "fastarch::conv_relu_pool_fwd",
    f"({FWD}, str algorithm, bool save_index, Tensor? scale=None, Tensor? residual=None, bool relu=True) -> {RESULTS}",
)
torch.library.define("fastarch::conv_relu_pool_bwd", f"({BWD}, str algorithm, bool[3] output_mask) -> {GRADS}")
fwd = torch.ops.fastarch.conv_relu_pool_fwd.default
bwd = torch.ops.fastarch.conv_relu_pool_bwd.default

# csrc/cuda implements these two: a direct convolution for few input channels
torch.library.define("fastarch::conv_relu_pool_direct_fwd", f"({FWD}, bool save_index) -> {RESULTS}")
torch.library.define("fastarch::conv_relu_pool_direct_bwd", f"({BWD}, bool[3] output_mask) -> {GRADS}")


@torch.library.impl("fastarch::conv_relu_pool_fwd", "CUDA")
def _(input, weight, bias, *args):
    geometry, (algorithm, save_index, *for_cpus) = args[:9], args[9:]
    if for_cpus:
        raise TypeError("conv_relu_pool: on CUDA want ReLU and neither scale nor residual")
    if algorithm == "direct":
        return torch.ops.fastarch.conv_relu_pool_direct_fwd(input, weight, bias, *geometry, save_index)
    from fastarch.kernels.conv_relu_pool import conv_relu_pool_fwd  # here: a machine without Triton must import

    return conv_relu_pool_fwd(input, weight, bias, Geometry(*geometry), algorithm, save_index)


@torch.library.impl("fastarch::conv_relu_pool_bwd", "CUDA")
def _(grad_output, input, weight, index, *args):
    *geometry, algorithm, output_mask = args
    if algorithm == "direct":
        return torch.ops.fastarch.conv_relu_pool_direct_bwd(grad_output, input, weight, index, *geometry, output_mask)
    from fastarch.kernels.conv_relu_pool import conv_relu_pool_bwd

    return conv_relu_pool_bwd(grad_output, input, weight, index, Geometry(*geometry), algorithm, output_mask)


class Geometry(NamedTuple):
    """The schema's geometry arguments, in its order."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pool: str
    pool_size: tuple[int, int]
    pool_stride: tuple[int, int]
    pool_padding: tuple[int, int]
    ceil_mode: bool

    def tiles_are_windows(self) -> bool:
        """Whether the pool takes whole tiles of 2x2, or there is none."""
        pool = self.pool_size, self.pool_stride, self.pool_padding, self.ceil_mode
        return self.pool == "none" or pool == ((2, 2), (2, 2), (0, 0), False)

    def footprint(self, kernel):
        """Rows and columns of the input under one output."""
        return [(p - 1) * s + (k - 1) * d + 1 for p, s, k, d in zip(self.pool_size, self.stride, kernel, self.dilation)]

    def conv_size(self, size, kernel):
        """[OH, OW] of a convolution over [H, W] with [R, S]."""
        return [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, self.stride, self.padding, self.dilation)
        ]

    def pooled_size(self, size):
        """[PH, PW] of a pool over [OH, OW]; under ceil_mode the last window may overhang, but starts inside."""
        pooled = []
        for n, k, s, p in zip(size, self.pool_size, self.pool_stride, self.pool_padding):
            windows = (n + 2 * p - k + (s - 1 if self.ceil_mode else 0)) // s + 1
            pooled.append(windows - 1 if self.ceil_mode and (windows - 1) * s >= n + p else windows)
        return pooled


@torch.library.register_fake("fastarch::conv_relu_pool_fwd")
def _(input, weight, bias, *args):
    geometry, save_index = Geometry(*args[:9]), args[10]
    pooled = geometry.pooled_size(geometry.conv_size(input.shape[2:], weight.shape[2:]))
    output = input.new_empty((input.shape[0], weight.shape[0], *pooled)).contiguous(memory_format=memory_format(input))
    index = torch.empty_like(output, dtype=torch.uint8) if save_index else output.new_empty(0, dtype=torch.uint8)
    return output, index


@torch.library.register_fake("fastarch::conv_relu_pool_bwd")
def _(grad_output, input, weight, index, *args):
    want_input, want_weight, want_bias = args[-1]
    grad_input = torch.empty_like(input, memory_format=memory_format(input)) if want_input else input.new_empty(0)
    grad_weight = torch.empty_like(weight, memory_format=memory_format(weight)) if want_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(weight.shape[0] if want_bias else 0)
    return grad_input, grad_weight, grad_bias


def memory_format(t: Tensor) -> torch.memory_format:
    """Output and gradients keep the tensor's: channels_last where it is laid out so and is not contiguous as well."""
    if t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


class ConvReLUPoolFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, geometry, relu, algorithm):
        without = () if relu else (None, None, False)
        output, index = fwd(input, weight, bias, *geometry, algorithm, relu, *without)
        ctx.save_for_backward(input, weight, bias, index)
        ctx.geometry, ctx.relu, ctx.algorithm = geometry, relu, algorithm
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, index = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: bwd is opaque to autograd and would lose the second derivative
            wanted = [t for t, need in zip((input, weight, bias), needed) if need]
            output = reference(input, weight, bias, *ctx.geometry, relu=ctx.relu)
            grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
            return *(next(grads) if need else None for need in needed), None, None, None
        grads = bwd(grad_output, input, weight, index, *ctx.geometry, ctx.algorithm, needed)
        return *(grad if need else None for grad, need in zip(grads, needed)), None, None, None


class Plan(NamedTuple):
    """What follows from shapes and options alone."""

    geometry: Geometry
    behind: tuple[int, int]  # rows and columns of zeros that an uneven padding "same" puts behind the input
    route: Route


def make_plan(
    device: str,
    dtype: torch.dtype,
    input: tuple[int, ...],
    weight: tuple[int, ...],
    stride,
    padding,
    dilation,
    groups,
    pool,
    pool_size,
    pool_stride,
    pool_padding,
    ceil_mode,
    activation="relu",
    alone=False,
) -> Plan:
    """The arguments in the schema's form and their kernel, or an error that says what was wanted and what came.

    alone: nothing is fused with the convolution, neither ReLU nor scale nor residual.
    """
    if len(input) not in (3, 4) or len(weight) != 4:
        raise error("input [N, C, H, W] or [C, H, W] and weight [K, C/groups, R, S]", f"{[*input]} and {[*weight]}")
    if not isinstance(groups, int) or groups < 1:
        raise error("groups >= 1", groups)
    if weight[0] % groups or input[-3] != weight[1] * groups:
        wanted = f"weight [K, C/groups, R, S], K a multiple of groups = {groups}, for input {[*input]}"
        raise error(wanted, [*weight])
    if pool not in ("max", "avg", None):
        raise error("pool 'max', 'avg' or None", repr(pool))
    if activation != "relu" and (activation is not None or pool is not None):
        raise error("activation 'relu', or None without a pool", f"{activation!r} and pool {pool!r}")

    stride, dilation, behind = pair("stride", stride, 1), pair("dilation", dilation, 1), (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise error("stride 1 for padding 'same'", stride)
        total = [d * (k - 1) for d, k in zip(dilation, weight[2:])]
        padding, behind = (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
    elif padding == "valid":
        padding = (0, 0)
    padding = pair("padding", padding, 0)
    if pool is None:
        geometry = Geometry(stride, padding, dilation, groups, "none", (1, 1), (1, 1), (0, 0), False)
    else:
        pool_size = pair("pool_size", pool_size, 1)
        pool_stride = pool_size if pool_stride is None else pair("pool_stride", pool_stride, 1)
        pool_padding = pair("pool_padding", pool_padding, 0)
        if any(2 * p > k for p, k in zip(pool_padding, pool_size)):
            raise error(f"pool_padding of at most half of pool_size {pool_size}", pool_padding)
        geometry = Geometry(
            stride, padding, dilation, groups, pool, pool_size, pool_stride, pool_padding, bool(ceil_mode)
        )

    conv = geometry.conv_size((input[-2] + behind[0], input[-1] + behind[1]), weight[2:])
    pooled = geometry.pooled_size(conv)
    if min(*weight, *conv, *pooled) < 1:
        came = (
            f"a convolution of {conv} and an output of {pooled} from input {[*input]}, weight {[*weight]}, {geometry}"
        )
        raise error("something to compute", came)
    outputs = conv[0] * conv[1] * (input[0] if len(input) == 4 else 1)
    served = route(device, dtype, outputs, weight, geometry)
    if alone or (activation is None and device != "cpu"):
        served = by_itself(device, dtype, geometry, served)
    return Plan(geometry, behind, served)


cached_plan = functools.lru_cache(maxsize=4096, typed=True)(make_plan)  # typed: 1.0 is an error, and must stay one


def error(wanted: str, came) -> ValueError:
    return ValueError(f"conv_relu_pool: want {wanted}, got {came}")


def pair(what: str, value, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise error(f"{what} as one or two integers >= {least}", repr(value))
    return pair


def check(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None) -> None:
    """The tensors are tensors, on one device and of one dtype; the scale of 16 bits in float32."""
    named = ("input", input), ("weight", weight), ("bias", bias), ("scale", scale), ("residual", residual)
    for what, t in named:
        if t is None and what not in ("input", "weight"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"conv_relu_pool: want {what} as a tensor, got {type(t).__name__}")
        dtype = torch.promote_types(input.dtype, torch.float32) if what == "scale" else input.dtype
        if t.dtype != dtype or t.device != input.device:
            raise TypeError(
                f"conv_relu_pool: input is {input.dtype} on {input.device}, {what} is {t.dtype} on {t.device}"
            )
    for what, t in (("bias", bias), ("scale", scale)):
        if t is not None and t.shape != weight.shape[:1]:
            raise error(f"{what} {[*weight.shape[:1]]}", [*t.shape])


def route(device: str, dtype: torch.dtype, outputs: int, weight: tuple[int, ...], geometry: Geometry) -> Route:
    """The algorithm that serves a convolution with so many output places, or the reference."""
    if math.prod(geometry.pool_size) > (AVG_WINDOW if geometry.pool == "avg" else MAX_WINDOW):
        return Route(REFERENCE, "one byte of index cannot describe so large a pool window")
    if device == "cpu":
        return route_cpu(dtype, outputs, weight, geometry)
    if device == "cuda":
        return route_cuda(dtype, outputs, weight, geometry)
    return Route(REFERENCE, f"no kernel for {device}")


def route_cpu(dtype: torch.dtype, outputs: int, weight: tuple[int, ...], geometry: Geometry) -> Route:
    """Times in ms: one core of an AVX-512 EPYC (Zen 5), float32, channels_last, 2026-11-20."""
    if extension.cpu is None:
        return Route(REFERENCE, extension.no_cpu)
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return Route(REFERENCE, f"no CPU kernel for {dtype}")
    (K, C, R, S), (stride_h, stride_w) = weight, geometry.stride
    if math.prod(geometry.footprint((R, S))) > LARGEST_FOOTPRINT:
        return Route(REFERENCE, "one output looks at more input than a tile holds")
    if geometry.groups > 1 and K // geometry.groups < 8:  # depthwise 4x64x28x28 k3: direct 0.79, library 0.08
        return Route("library", "fewer than 8 output channels a group leave vectors empty")
    # 1x2048x3x3->512 k1: direct 1.24, library 0.77 (Zen 4); with 49 places 2.1 and 2.0, of stride 2 4.1 and 8.5
    plain = (R, S, *geometry.stride) == (1, 1, 1, 1)
    if plain and K * C >= 1 << 14 and not torch.compiler.is_compiling() and outputs <= 16:
        return Route("library", "too few places to pay for packing the filters")
    if geometry.dilation != (1, 1):  # 4x256x28x28->256 k3 dilation 2: direct 14.5, library 13.3
        return Route("library" if C >= 128 else "direct", "dilated")

    # Winograd computes tiles of 2x2 outputs; a stride is taken apart into phases: more channels of fewer taps.
    taps = 3 if R <= 3 * stride_h and S <= 3 * stride_w else 4
    products, channels = (taps + 1) ** 2 * stride_h * stride_w / 4, C * stride_h * stride_w
    saves = R <= 4 * stride_h and S <= 4 * stride_w and 1.5 * products <= R * S
    # 16x8x32x32->64 k3: direct 0.68, winograd 0.54; with 4 input channels 0.41 and 0.42
    if not saves or channels < 8:
        return Route("direct", "no algorithm with fewer products pays")
    # 1x512x7x7->512 k3, 16 tiles: direct 4.4, winograd 3.4 (Zen 4), and with one tile of 2x2 not slower either
    if taps == 3 and geometry.stride == (1, 1) and (R, S) == (3, 3) and geometry.tiles_are_windows():
        return Route("winograd", f"16 products instead of {4 * R * S} for 2x2 outputs")
    # 1x256x14x14->512 k3 stride 2, 16 tiles: direct 2.4, polyphase 10.2 (Zen 4). Compiled graphs must not be
    # specialised to the batch size, so they are taken to have tiles enough.
    if not torch.compiler.is_compiling() and outputs < 4 * 32:
        return Route("direct", "too few tiles to pay for Winograd's transform of the filters")
    # alexnet_conv1: direct 9.8, polyphase 6.6; 8x64x32x32->64 k3 pool 3 stride 2: direct 2.3, polyphase 1.3
    return Route("polyphase", f"{4 * products:.0f} products instead of {4 * R * S} for 2x2 outputs")


def by_itself(device: str, dtype: torch.dtype, geometry: Geometry, served: Route) -> Route:
    """The route of a convolution alone: with nothing to fuse only fewer products are a gain.

    Forward, input's and weight's gradient in ms, two cores of a Zen 4, float32, channels_last, 2026-11-27:
    8x64x56x56->64 k3: winograd 5.9, 5.9, 6.0, library 8.3, 8.4, 9.7; 8x256x14x14->256: 4.4, 4.5, 6.1, library 8.0, 8.3,
    8.8; 8x512x7x7->512: 6.0, 6.0, 8.2, library 9.5, 9.4, 16.2. In 16 bits a library may have instructions of its own.
    """
    whole = dtype in (torch.float32, torch.float64) and geometry.groups == 1
    if served.kernel == REFERENCE or (device == "cpu" and served.kernel == "winograd" and whole):
        return served
    return Route("library", "nothing to fuse, and no algorithm with fewer products")


def route_cuda(dtype: torch.dtype, outputs: int, weight: tuple[int, ...], geometry: Geometry) -> Route:
    """Computed from operations and bytes, not measured: no GPU was at hand long enough (2026-11-20)."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Route(REFERENCE, f"no CUDA kernel for {dtype}")
    (K, C, R, S), groups, terms = weight, geometry.groups, math.prod(weight[1:])
    footprint = geometry.footprint((R, S))
    # What surely fits the direct kernels' shared memory: none of 201,812 drawn geometries did not. With strides up to 8
    # and any dilation 871 of 185,184 did not.
    small = terms <= 512 and max(footprint) <= 128 and C * math.prod(footprint) <= 4096 and max(geometry.stride) <= 4
    small = small and (geometry.dilation == (1, 1) or max(R, S) <= 8)
    if extension.cuda is not None and groups == 1 and C <= 4 and small:
        return Route("direct", "few input channels starve tensor cores")
    if K // groups < 16:
        return Route("library", "few output channels a group leave tiles empty")
    if dtype == torch.float32:  # Triton's exact products leave the tensor cores; whether TF32 may be used can change
        return Route("library", "float32 convolutions are a library's strength")
    # An element of the convolution costs 2 terms / rate, and 4 bytes written and read again where it is not fused:
    # at 650 TFLOP/s of a library's kernel, 400 of ours and 4.3 TB/s (H200, bfloat16), both are even at 484 terms.
    if terms >= 1024:
        return Route("library", f"sums of {terms} terms outweigh the traffic that fusion saves")
    return Route("implicit_gemm", "the convolution's output would outweigh its sums")


def backend(device: str, algorithm: str) -> str:
    """The kernel by the name that people read in `fastarch.explain`."""
    if algorithm == REFERENCE:
        return REFERENCE
    if device == "cpu":
        return f"cpu-{extension.isa} {algorithm}"
    return "cuda direct" if algorithm == "direct" else f"triton {algorithm}"


def conv_relu_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    pool: str | None = "max",
    pool_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    activation: str | None = "relu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = pool(relu(a conv2d(x, w) + b + r)), in one pass over x and with one byte saved per output.

    conv[n, k, i, j] = sum_{c, r, s} x[n, c, i stride_h + r dilation_h - padding_h, ...] w[k, c, r, s]

    Args:
        input: x [N, C, H, W] or [C, H, W], contiguous, channels_last or with any other strides.
        weight: w [K, C/groups, R, S], of the input's dtype and device.
        bias: b [K], or None for 0.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, "valid" and "same" included.
        pool: "max", "avg" (padding counts, as in `avg_pool2d`) or None.
        pool_size, pool_stride, pool_padding, ceil_mode: as in `max_pool2d`; pool_stride None means pool_size.
        activation: "relu", or None for y = a conv2d(x, w) + b + r, which wants pool None.
        scale: a [K], or None for 1; with a batch norm's scale here, and its shift as bias, the two are one operation.
            In float32 where the input has 16 bits.
        residual: r, of the convolution's shape and the input's dtype, or None for 0.

    Returns:
        y [N, K, PH, PW] (or [K, PH, PW]), channels_last if x is.

    Raises:
        ValueError: shapes that do not fit together, sizes out of range, an empty output, an unknown `pool`.
        TypeError: arguments that are not tensors, or differ in dtype or device.

    Precision: float32 and float64 compute in their own precision, bfloat16 and float16 accumulate in float32 and round
    once, at the output. Max takes the first maximum of a window and propagates NaN, as torch does. Results are the same
    bits from run to run and for any number of threads.

    Kernels serve float32, float64, bfloat16 and float16 on CPUs (C++), all but float64 on CUDA (Triton, CUDA C++), and
    max windows of up to 255 elements, average windows of up to 8. A residual they add on CPUs, in inference (under
    `torch.no_grad`), in float32 and float64 and without a pool. A convolution alone, without activation, scale and
    residual, they serve on CPUs in float32 and float64 with 3x3 filters of stride 1; any other is
    `torch.nn.functional.conv2d`. Everything else, torch.func transforms and derivatives of second order run on the
    differentiable reference; `fastarch.explain` shows it.

    Sources: Winograd F(2x2, 3x3): Lavin and Gray 2016, arXiv 1509.09308, section 4.1.
    """
    device = input.device.type if isinstance(input, Tensor) else "cpu"
    input, weight, bias, residual = autocast.cast(device, input, weight, bias, residual)
    check(input, weight, bias, scale, residual)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias, scale))
    alone = activation is None and (trained or (scale is None and residual is None))
    options = (stride, padding, dilation, groups, pool, pool_size, pool_stride, pool_padding, ceil_mode)
    options += (activation, alone)
    shapes = (device, input.dtype, input.shape, weight.shape)
    try:
        plan = make_plan if torch.compiler.is_compiling() else cached_plan  # 6 us against 1
        geometry, behind, (algorithm, reason) = plan(*shapes, *options)
    except TypeError:  # symbolic sizes and lists cannot be looked up
        geometry, behind, (algorithm, reason) = make_plan(*shapes, *options)

    if residual is not None:
        check_residual(residual, input, weight, geometry, behind)
        if not (geometry.pool == "none" and adds_residual(input)):
            algorithm, reason = (
                REFERENCE,
                "a residual is added on CPUs, in inference, in full precision and without a pool",
            )
    if why := routing.reference_reason():
        algorithm, reason = REFERENCE, why
    routing.record("conv_relu_pool", backend, device, algorithm, reason, input=input, weight=weight)
    if behind != (0, 0):
        input = F.pad(input, (0, behind[1], 0, behind[0]))
    how = (geometry, activation == "relu", algorithm, trained)
    if input.dim() == 3:
        residual = None if residual is None else residual.unsqueeze(0)
        return run(input.unsqueeze(0), weight, bias, scale, residual, *how).squeeze(0)
    return run(input, weight, bias, scale, residual, *how)


def adds_residual(input: Tensor) -> bool:
    """Whether a kernel adds a residual to the convolution of such an input: on CPUs, where nothing has a gradient.

    In 16 bits torch's convolution may have instructions of its own, which outweigh a pass that is saved.
    """
    served = extension.cpu is not None and input.device.type == "cpu" and input.dtype in (torch.float32, torch.float64)
    return served and not torch.is_grad_enabled() and not autocast.is_on("cpu")


def check_residual(
    residual: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, behind: tuple[int, int]
) -> None:
    conv = geometry.conv_size((input.shape[-2] + behind[0], input.shape[-1] + behind[1]), weight.shape[2:])
    shape = [*input.shape[:-3], weight.shape[0], *conv]
    if [*residual.shape] != shape:
        raise error(f"residual {shape}", [*residual.shape])


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
    algorithm: str,
    trained: bool,
) -> Tensor:
    if algorithm == REFERENCE or (algorithm == "library" and not relu):  # which a convolution alone is
        return reference(input, weight, bias, *geometry, scale, residual, relu)
    if scale is not None and (trained or algorithm == "library" or input.device.type != "cpu"):
        weight, scale = scaled(weight, scale), None
    if trained:
        return ConvReLUPoolFunction.apply(input, weight, bias, geometry, relu, algorithm)
    if scale is None and residual is None and relu:
        return fwd(input, weight, bias, *geometry, algorithm, False)[0]
    return fwd(input, weight, bias, *geometry, algorithm, False, scale, residual, relu)[0]
