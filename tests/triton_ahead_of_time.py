"""Compile Triton kernels for GPUs that are not here, exactly as their launchers would launch them; print what they use.

    python tests/triton_ahead_of_time.py SHARD SHARDS

compiles every case for one GPU: every other one for Hopper, the others for Ampere or Blackwell by turns.
FASTARCH_EVERY_GPU=1 (make every-gpu): each for all three, 217 launches instead of 83.

The launchers run on CPU tensors, under a driver that names a GPU and a `run` that compiles and does not launch: every
specialisation (integers that are 1 or multiples of 16, arguments that are None) is the launcher's own. Each line is one
compiled kernel, as JSON; a case that fails to compile gives a line with its error.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from fastarch.kernels import attention, gru
from fastarch.kernels import batch_norm as norm
from fastarch.kernels import conv_relu_pool as conv
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastarch.ops.conv_relu_pool import Geometry

GPUS = (80, 90, 100)
EPS = 1e-5


class Driver:
    """As much of a GPU driver as compiling asks for."""

    def __init__(self, gpu):
        self.gpu = gpu

    def get_current_device(self):
        return self.gpu  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.gpu, 32)


def compile_only(launch, gpu):
    """The kernels that launch() launches, compiled for the GPU: name, tile taken last before it, whether it is not
    told to leave products out, and kernel."""
    kernels, run = [], JITFunction.run

    def compile_one(self, *args, warmup, **options):
        multiplies = options.get("PRODUCT", True)  # of gru's kernels: False leaves products to a library
        kernels.append((self.fn.__name__, Recorder.taken, multiplies, run(self, *args, warmup=True, **options)))

    JITFunction.run = compile_one
    triton.runtime.driver.set_active(Driver(gpu))
    try:
        launch()
    finally:
        JITFunction.run = run
    return kernels


def resources(kernel):
    """Registers, spills and shared memory of a compiled kernel, and its machine instructions by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.check_output(
            [cuobjdump, "--dump-resource-usage", "-sass", cubin.name], text=True, stderr=subprocess.DEVNULL
        )
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    instructions = sorted(set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9_.]+)", text, re.M)))
    return dict(
        registers=used["REG"], stack=used["STACK"], local=used["LOCAL"], shared=kernel.metadata.shared,
        instructions=instructions,
    )  # fmt: skip


class ConvReLUPool(NamedTuple):
    dtype: torch.dtype = torch.bfloat16
    c: int = 64
    k: int = 64
    image: tuple = (16, 16)
    taps: int = 3
    stride: int = 1
    groups: int = 1
    pool: str = "max"
    pool_size: tuple = (2, 2)
    pool_stride: tuple = (2, 2)
    pool_padding: int = 0
    channels_last: bool = True
    training: bool = True
    bias: bool = True
    tf32: bool = True

    def launch(self):
        torch.backends.cudnn.conv.fp32_precision = "tf32" if self.tf32 else "ieee"
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.zeros(2, self.c * self.groups, *self.image, dtype=self.dtype).contiguous(memory_format=layout)
        w = torch.zeros(self.k * self.groups, self.c, self.taps, self.taps, dtype=self.dtype)
        b = torch.zeros(self.k * self.groups, dtype=self.dtype) if self.bias else None
        window = self.pool, self.pool_size, self.pool_stride, (self.pool_padding,) * 2, False
        geometry = Geometry((self.stride,) * 2, (self.taps // 2,) * 2, (1, 1), self.groups, *window)
        for algorithm in ("implicit_gemm", "library"):
            y, index = conv.conv_relu_pool_fwd(x, w, b, geometry, algorithm, self.training)
            if self.training:
                conv.conv_relu_pool_bwd(y, x, w, index, geometry, algorithm, [True] * 3)


RESNET = dict(c=3, taps=7, stride=2, image=(32, 32), pool_size=(3, 3), pool_padding=1)
ALEXNET = dict(c=3, taps=11, stride=4, image=(64, 64), pool_size=(3, 3))
CASES = [
    ConvReLUPool(),
    ConvReLUPool(c=128, k=128),
    ConvReLUPool(c=48, k=80),  # vectors, but channels that no BLOCK_K divides
    ConvReLUPool(pool="avg"),
    ConvReLUPool(pool="none", pool_size=(1, 1), pool_stride=(1, 1)),
    ConvReLUPool(pool_size=(1, 2), pool_stride=(1, 2)),
    ConvReLUPool(pool_size=(3, 3)),
    ConvReLUPool(pool_size=(3, 3), c=128, k=128),
    ConvReLUPool(groups=4),
    ConvReLUPool(training=False, bias=False),
    ConvReLUPool(channels_last=False),
    ConvReLUPool(channels_last=False, c=128, k=128, image=(14, 14)),
    ConvReLUPool(channels_last=False, c=1, k=6, taps=5, image=(32, 32)),
    ConvReLUPool(c=6, k=16, taps=5, image=(14, 14)),
    ConvReLUPool(c=1, k=1, taps=1, image=(2, 2)),
    ConvReLUPool(**RESNET),
    ConvReLUPool(channels_last=False, **RESNET),
    ConvReLUPool(**ALEXNET),
    ConvReLUPool(dtype=torch.float16),
    *(
        ConvReLUPool(dtype=torch.float32, tf32=tf32, **case)
        for tf32, case in product(
            (True, False),
            (
                dict(),
                dict(c=128, k=128),
                dict(pool="avg"),
                dict(pool_size=(3, 3)),
                dict(channels_last=False, c=1, k=6, taps=5),
                RESNET,
            ),
        )
    ),
]


class BatchNorm(NamedTuple):
    dtype: torch.dtype = torch.bfloat16
    c: int = 64
    image: tuple = (56, 56)
    channels_last: bool = True
    affine: bool = True

    def launch(self):
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.zeros(2, self.c, *self.image, dtype=self.dtype).contiguous(memory_format=layout)
        w, b = (torch.zeros(self.c) if self.affine else None for _ in range(2))
        mean, var = norm.batch_norm_stats(x)
        norm.batch_norm_fwd(x, x, w, b, mean, var, EPS, False, False)
        for relu, residual in ((False, None), (True, None), (True, x)):
            masked = relu and residual is not None
            mask = norm.batch_norm_fwd(x, residual, w, b, mean, var, EPS, relu, masked)[3]
            for training in (True, False):
                saved = x, x, mask if masked else None, w, b, mean, var
                norm.batch_norm_bwd(*saved, None, None, EPS, relu, training, [True, masked, True, True])


CASES += [
    *(
        BatchNorm(dtype, c, image, channels_last)
        for dtype in (torch.bfloat16, torch.float32)
        for c, image, channels_last in (
            (64, (56, 56), True),
            (20, (14, 14), True),
            (3, (224, 224), True),
            (64, (56, 56), False),
            (256, (14, 14), False),
            (512, (2, 2), False),
            (2048, (7, 7), False),
            (3, (33, 31), False),
            (1, (112, 112), False),
        )
    ),
    BatchNorm(torch.float16),
    BatchNorm(affine=False),
]


class GRU(NamedTuple):
    dtype: torch.dtype = torch.bfloat16
    algorithm: str = "cell"
    t: int = 2
    c: int = 128
    h: int = 256
    reset_after: bool = True
    lengths: bool = False
    reverse: bool = False
    bias: bool = True
    training: bool = True
    tf32: bool = True

    def launch(self):
        torch.backends.cudnn.rnn.fp32_precision = "tf32" if self.tf32 else "ieee"
        n = 3
        x, h0 = torch.zeros(self.t, n, self.c, dtype=self.dtype), torch.zeros(n, self.h, dtype=self.dtype)
        w_ih, w_hh = (torch.zeros(3 * self.h, columns, dtype=self.dtype) for columns in (self.c, self.h))
        b_ih, b_hh = (torch.zeros(3 * self.h, dtype=self.dtype) if self.bias else None for _ in range(2))
        lengths = torch.full((n,), self.t) if self.lengths else None
        options = self.reverse, self.reset_after
        y, h_n, gates = gru.gru_fwd(
            x, h0, w_ih, w_hh, b_ih, b_hh, lengths, *options, self.training, self.algorithm
        )  # fmt: skip
        if self.training:
            saved = x, h0, w_ih, w_hh, y, gates, lengths
            gru.gru_bwd(y, h_n, *saved, *options, self.algorithm, [True] * 6)


CASES += [
    GRU(t=1),
    GRU(reset_after=False, lengths=True, reverse=True),
    GRU(torch.float32, bias=False),
    GRU(torch.float32, t=1, reset_after=False),
    GRU(torch.float32, tf32=False),
    GRU(c=33, h=65),
    GRU(torch.float32, c=33, h=65, t=1, reset_after=False, training=False),
    GRU(torch.float32, c=33, h=65, lengths=True, tf32=False),
    GRU(algorithm="pointwise", lengths=True),
    GRU(torch.float16, training=False),
]


class Attention(NamedTuple):
    dtype: torch.dtype = torch.bfloat16
    d: int = 64
    dv: int | None = None
    options: str = ""  # some of: causal window lower_right softcap alibi dropout packed lengths bool float
    algorithm: str = "flash"
    tf32: bool = True

    def launch(self):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.tf32 else "ieee"
        wanted = {*self.options.split()}
        B, H, L = 1 if "packed" in wanted else 2, 4, 64
        q, k = torch.zeros(B, H, L, self.d, dtype=self.dtype), torch.zeros(B, 2, L, self.d, dtype=self.dtype)
        v = torch.zeros(B, 2, L, self.dv or self.d, dtype=self.dtype)
        mask = None
        if wanted & {"bool", "float"}:
            mask = torch.zeros(1, 1, L, L, dtype=torch.bool if "bool" in wanted else self.dtype)
        ends = torch.tensor([0, 30, L], dtype=torch.int32) if "packed" in wanted else None
        lengths = torch.tensor([L, 3], dtype=torch.int32) if "lengths" in wanted else None
        seed = torch.tensor([5]) if "dropout" in wanted else None
        slopes = torch.zeros(H) if "alibi" in wanted else None
        tensors = (q, k, v, mask, slopes, ends, ends, lengths, seed)
        window = 7 if "window" in wanted else -1, 0 if wanted & {"causal", "window"} else -1
        caps = 2.0 if "softcap" in wanted else 0.0, 0.1 if "dropout" in wanted else 0.0
        numbers = (L, L, 0.1, *window, "lower_right" in wanted, *caps)
        output, lse = torch.zeros(B, H, L, v.shape[3], dtype=self.dtype), torch.zeros(B, H, L)
        attention.attention_fwd(*tensors, *numbers, self.algorithm, output, lse)
        if self.algorithm == "flash":
            grads = [torch.empty_like(t) for t in (q, k, v)]
            grads.append(torch.empty_like(mask) if "float" in wanted else None)
            attention.attention_bwd(output, lse, *tensors, output, lse, *numbers, *grads)

    def may_spill(self, gpu):
        """kernels/attention.py, TILES, says where."""
        exact = self.dtype == torch.float32 and not self.tf32
        return exact or (gpu == 80 and (self.d > 128 or not {*self.options.split()} <= {"causal", "window", "packed"}))


EVERYTHING = "window lower_right softcap alibi dropout float"
CASES += [
    Attention(),
    Attention(d=128, options="causal"),
    Attention(options="float"),
    Attention(d=128, options="packed causal lower_right"),
    Attention(d=128, options="lengths alibi lower_right", algorithm="split"),
    Attention(torch.float32),
]
ON_HOPPER = [
    *(Attention(d=d, options=options) for d in (64, 128, 256) for options in (EVERYTHING, "bool lengths lower_right")),
    Attention(d=256),
    Attention(d=100, dv=40, options="dropout packed causal lower_right"),
    *(Attention(d=d, options="lengths lower_right", algorithm="split") for d in (64, 256)),
    *(Attention(torch.float32, d, options="causal") for d in (128, 256)),
    Attention(torch.float32, options="float alibi softcap"),
    Attention(torch.float32, tf32=False),
    Attention(torch.float32, tf32=False, algorithm="split"),
    Attention(torch.float16, options="causal"),
]
TURNS = [GPUS] if os.environ.get("FASTARCH_EVERY_GPU") == "1" else [(90,), (80,), (90,), (100,)]
PAIRS = [(case, gpu) for i, case in enumerate(CASES) for gpu in TURNS[i % len(TURNS)]]
PAIRS += [(case, 90) for case in ON_HOPPER]


class Recorder(dict):
    """A table of tiles that remembers which was taken last."""

    taken = None

    def __getitem__(self, key):
        Recorder.taken = key
        return super().__getitem__(key)


def main(shard, shards):
    for kernels in (attention, conv, gru, norm):
        kernels.TILES = Recorder(kernels.TILES)
    seen = set()
    for case, gpu in PAIRS[shard::shards]:
        label = dict(gpu=gpu, case=repr(case), half=case.dtype != torch.float32)
        label["may_spill"] = isinstance(case, Attention) and case.may_spill(gpu)
        try:
            kernels = compile_only(case.launch, gpu)
        except Exception as error:
            print(json.dumps(label | dict(error=f"{type(error).__name__}: {error}")), flush=True)
            continue
        for name, tile, multiplies, kernel in kernels:
            if id(kernel) not in seen:  # Triton keeps it: several cases can share it
                seen.add(id(kernel))
                about = label | dict(kernel=name, tile=tile, multiplies=multiplies)
                print(json.dumps(about | resources(kernel)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
