"""What `fastarch tune` times: the workloads as calls of the Triton launchers, each of one pass, whatever the route is.

Nothing else is called, but where a kernel stands between a library's: then the library's time is in every tile's.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from fastarch.kernels import attention, batch_norm, conv_relu_pool, gru
from torch import Tensor
from workloads import ATTENTION, BATCH_NORM, CONV_RELU_POOL, DECODE, GRUS

from fastarch.ops.conv_relu_pool import Geometry

MODULES = {"attention": attention, "batch_norm": batch_norm, "conv_relu_pool": conv_relu_pool, "gru": gru}
KINDS = ((torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee"))  # dtype, and its products
MULTIPLIERS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
EPS = 1e-5
Run = Callable[[], tuple[Tensor, ...]]


class Launch(NamedTuple):
    """A pass of a workload: `draw` makes its tensors and gives what runs it."""

    kernel: str  # the keys that it is to measure begin so; it may take others besides
    workload: str
    dtype: torch.dtype
    precision: str  # of float32 products: "tf32" or "ieee"
    draw: Callable[[torch.device], Run]

    def prepare(self, device: torch.device) -> Run:
        multiply_in(self.precision)
        run = self.draw(device)

        def in_precision():
            multiply_in(self.precision)  # launchers look it up
            return run()

        return in_precision


def multiply_in(precision: str) -> None:
    for backend in MULTIPLIERS:
        backend.fp32_precision = precision


def of(operation: str) -> list[Launch]:
    """Those in bfloat16, which GPUs are bought for, before those in float32."""
    found = {
        "attention": of_attention,
        "batch_norm": of_batch_norm,
        "conv_relu_pool": of_conv_relu_pool,
        "gru": of_gru,
    }
    return list(found[operation]())


def of_attention() -> Iterator[Launch]:
    for kind in KINDS:
        for name, (B, H, Lq, Lk, D, causal, dropout) in ATTENTION.items():
            shapes = [(B, H, L, D) for L in (Lq, Lk, Lk)]
            for kernel in ("fwd", "bwd_q", "bwd_kv"):
                yield Launch(kernel, name, *kind, attend(kernel, shapes, causal, dropout, kind[0]))
        for name, (B, Hq, Hkv, Lk, D) in DECODE.items():
            shapes = [(B, Hq, 1, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D)]
            yield Launch("split", name, *kind, attend("split", shapes, False, 0.0, kind[0]))


def attend(kernel: str, shapes: list[tuple], causal: bool, dropout: float, dtype: torch.dtype):
    def draw(device: torch.device) -> Run:
        q, k, v = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
        seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout else None
        tensors = q, k, v, *(None,) * 5, seed
        numbers = q.shape[2], k.shape[2], q.shape[3] ** -0.5, -1, 0 if causal else -1, False, 0.0, dropout

        def forward():
            output, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
            algorithm = "split" if kernel == "split" else "flash"
            attention.attention_fwd(*tensors, *numbers, algorithm, output, lse)
            return output, lse

        if kernel in ("fwd", "split"):
            return forward
        output, lse = forward()
        wanted = (q, None, None) if kernel == "bwd_q" else (None, k, v)

        def backward():
            grads = [t if t is None else torch.empty_like(t) for t in wanted]
            attention.attention_bwd(output, None, *tensors, output, lse, *numbers, *grads, None)
            return tuple(grad for grad in grads if grad is not None)

        return backward

    return draw


def of_batch_norm() -> Iterator[Launch]:
    """With a residual and ReLU: all that the kernels can do."""
    for dtype in (torch.bfloat16, torch.float32):  # there are no products
        for name, sizes in BATCH_NORM.items():
            for kernel, layout in (("channels", torch.channels_last), ("values", torch.contiguous_format)):
                for back in (False, True):
                    workload = f"{name} {'backward' if back else 'forward'}"
                    yield Launch(kernel, workload, dtype, "tf32", normalise(sizes, layout, back, dtype))


def normalise(sizes: tuple, layout: torch.memory_format, back: bool, dtype: torch.dtype):
    def draw(device: torch.device) -> Run:
        x, r = (torch.randn(sizes, dtype=dtype, device=device).contiguous(memory_format=layout) for _ in range(2))
        w, b = torch.rand(2, x.shape[1], device=device)

        def forward():
            y, mean, var, _ = batch_norm.batch_norm_fwd(x, r, w, b, None, None, EPS, True, True)
            return y, mean, var

        if not back:
            return forward
        _, mean, var, mask = batch_norm.batch_norm_fwd(x, r, w, b, None, None, EPS, True, True)
        saved = r, x, mask, w, b, mean, var, None, None, EPS, True, True, (True,) * 4
        return lambda: batch_norm.batch_norm_bwd(*saved)

    return draw


def of_conv_relu_pool() -> Iterator[Launch]:
    """In channels_last and bfloat16, what convolutions on GPUs run in; float32 goes to the library."""
    for name, workload in CONV_RELU_POOL.items():
        for kernel in ("fwd", "bwd_input", "bwd_weight"):
            yield Launch(kernel, name, torch.bfloat16, "tf32", convolve(workload, kernel))
        for kernel in ("library_fwd", "library_bwd"):
            yield Launch("pool", f"{name} {kernel}", torch.bfloat16, "tf32", convolve(workload, kernel))


def convolve(workload: tuple, kernel: str):
    N, C, H, W, K, taps, stride, padding, *pool = workload
    geometry = Geometry((stride,) * 2, (padding,) * 2, (1, 1), 1, "max", *((n,) * 2 for n in pool), False)
    algorithm = "library" if kernel.startswith("library") else "implicit_gemm"
    wanted = {"bwd_input": (True, False, False), "bwd_weight": (False, True, False), "library_bwd": (True,) * 3}

    def draw(device: torch.device) -> Run:
        like = dict(dtype=torch.bfloat16, device=device)
        x = torch.randn(N, C, H, W, **like).contiguous(memory_format=torch.channels_last)
        w, b = torch.randn(K, C, taps, taps, **like), torch.randn(K, **like)

        def forward():
            return conv_relu_pool.conv_relu_pool_fwd(x, w, b, geometry, algorithm, True)

        if kernel not in wanted:
            return lambda: forward()[:1]
        y, index = forward()
        return lambda: conv_relu_pool.conv_relu_pool_bwd(y, x, w, index, geometry, algorithm, wanted[kernel])

    return draw


def of_gru() -> Iterator[Launch]:
    """A layer in one direction; "gates" is what is left where a library multiplies."""
    for kind in KINDS:
        for name, (T, N, C, H, *_) in GRUS.items():
            for kernel, algorithm in (("fwd", "cell"), ("bwd", "cell"), ("gates", "pointwise")):
                yield Launch(kernel, name, *kind, recur(T, N, C, H, kernel, algorithm, kind[0]))


def recur(T: int, N: int, C: int, H: int, kernel: str, algorithm: str, dtype: torch.dtype):
    def draw(device: torch.device) -> Run:
        like = dict(dtype=dtype, device=device)
        x, h0 = torch.randn(T, N, C, **like), torch.randn(N, H, **like)
        weights = [torch.randn(3 * H, n, **like) * H**-0.5 for n in (C, H)]
        biases = [torch.randn(3 * H, **like) for _ in range(2)]

        def forward():
            return gru.gru_fwd(x, h0, *weights, *biases, None, False, True, True, algorithm)

        if kernel == "fwd":
            return forward
        y, h_n, gates = forward()
        saved = x, h0, *weights, y, gates, None, False, True

        def backward():
            return gru.gru_bwd(y, h_n, *saved, algorithm, (True,) * 6)

        return backward if kernel == "bwd" else lambda: (*forward(), *backward())

    return draw
