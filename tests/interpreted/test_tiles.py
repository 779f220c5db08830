"""Launches with tiles from a table give what they give with the safe ones: a launch of each operation, in bfloat16."""

import importlib
import json

import pytest
import torch
from fastarch.kernels import tiles

from fastarch.ops.conv_relu_pool import Geometry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of masked lanes
GPU = "A GPU"
CACHED = tiles.of_device, tiles.of_gpu


def attend(kernels):
    q, k, v = (torch.randn(1, 2, 150, 64).bfloat16() for _ in range(3))
    output, lse = torch.empty_like(q), torch.empty(1, 2, 150)
    given = q, k, v, *(None,) * 6
    numbers = 150, 150, 0.125, -1, 0, False, 0.0, 0.0
    kernels.attention_fwd(*given, *numbers, "flash", output, lse)
    grads = [torch.empty_like(q) for _ in range(3)]
    kernels.attention_bwd(output, None, *given, output, lse, *numbers, *grads, None)
    return output, lse, *grads


def normalise(kernels):
    x, dy = (torch.randn(2, 6, 9, 20).bfloat16() for _ in range(2))
    w, b = torch.rand(2, 6)
    y, mean, var, mask = kernels.batch_norm_fwd(x, dy, w, b, None, None, 1e-5, True, True)
    saved = dy, x, mask, w, b, mean, var, None, None, 1e-5, True, True, (True,) * 4
    return y, mean, var, *kernels.batch_norm_bwd(*saved)


def convolve(kernels):
    x = torch.randn(2, 16, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last)
    w, b = torch.randn(32, 16, 3, 3).bfloat16(), torch.randn(32).bfloat16()
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1, "max", (2, 2), (2, 2), (0, 0), False)
    y, index = kernels.conv_relu_pool_fwd(x, w, b, geometry, "implicit_gemm", True)
    return y, *kernels.conv_relu_pool_bwd(y, x, w, index, geometry, "implicit_gemm", (True,) * 3)


def recur(kernels):
    x, h0 = torch.randn(3, 40, 48).bfloat16(), torch.randn(40, 80).bfloat16()
    weights = [(torch.randn(240, columns) / 9).bfloat16() for columns in (48, 80)]
    biases = [torch.randn(240).bfloat16() for _ in range(2)]
    y, h_n, gates = kernels.gru_fwd(x, h0, *weights, *biases, None, False, True, True, "cell")
    return y, *kernels.gru_bwd(y, h_n, x, h0, *weights, y, gates, None, False, True, "cell", (True,) * 6)


LAUNCHES = {"attention": attend, "batch_norm": normalise, "conv_relu_pool": convolve, "gru": recur}
TAKEN = {
    "attention": [(kernel, "half", 64, "plain") for kernel in ("fwd", "bwd_q", "bwd_kv")],
    "batch_norm": [("values", "vectors")],
    "conv_relu_pool": [
        *((kernel, "half", "narrow") for kernel in ("fwd", "bwd_input", "bwd_weight")),
        ("pool", "none", "wide"),
    ],
    "gru": [("fwd", "half", "vectors"), ("bwd", "half", "vectors"), ("gates", "any", "any")],
}


@pytest.mark.parametrize("operation", LAUNCHES)
def test_tiles_of_a_table(operation, monkeypatch, tmp_path, request):
    kernels = importlib.import_module(f"fastarch.kernels.{operation}")
    if operation == "attention":
        monkeypatch.setattr(kernels, "generation", lambda: 90)
    torch.manual_seed(0)
    want = LAUNCHES[operation](kernels)

    for function in CACHED:
        request.addfinalizer(function.cache_clear)
        function.cache_clear()
    entries = {tiles.name_of(key): {"tile": kernels.CANDIDATES[key][0]._asdict()} for key in TAKEN[operation]}
    table = {"gpu": GPU, "operations": {operation: {"date": "2026-11-26", "tiles": entries}}}
    (tmp_path / tiles.file_name(GPU)).write_text(json.dumps(table))
    monkeypatch.setenv("FASTARCH_TUNED", str(tmp_path))
    monkeypatch.setattr(tiles, "of_device", lambda index: tiles.of_gpu(GPU))
    monkeypatch.setattr(kernels, "TILES", dict(kernels.TILES))
    tiles.of_gpu(GPU)
    kernels.TILES.clear()  # a launch that looks here is an error
    torch.manual_seed(0)
    for got, expected in zip(LAUNCHES[operation](kernels), want, strict=True):
        error, scale = (got.float() - expected.float()).norm(), expected.float().norm()
        assert error <= 2e-3 * scale, (error, scale)
