"""On processors that this one is not, emulated by qemu-x86_64: the right kernels are chosen, run, and are right.

Each operation forward and backward, in float32 and bfloat16, against this machine's generic kernels. Debian: qemu-user.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.modules["numpy"] = None  # nothing here needs it, and its wheels do not start without SSE4.2, where torch's do
import torch  # noqa: E402

from fastarch import extension, ops  # noqa: E402

EXPECTED = {  # by processor, as qemu names them: the kernels to choose
    "Haswell": "avx2",  # AVX2, FMA and F16C, no AVX-512
    "SandyBridge": "generic",  # AVX, not AVX2
    "Nehalem": "generic",  # no AVX
    "qemu64": "generic",  # SSE3: about what x86-64 guarantees
}


def compute() -> dict[str, torch.Tensor]:
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)

        def drawn(*shape: int, dtype=dtype) -> torch.Tensor:
            return (torch.randn(shape) / 2).to(dtype).requires_grad_()

        x, w, w_library = drawn(2, 5, 11, 13), drawn(7, 5, 3, 3), drawn(6, 5, 5, 2)
        q, k, v = drawn(1, 4, 37, 20), drawn(1, 2, 45, 20), drawn(1, 2, 45, 20)
        sequence, h0, w_ih, w_hh = drawn(5, 3, 7), drawn(3, 19), drawn(57, 7), drawn(57, 19)
        for name, inputs, y in (
            ("conv_relu_pool 3x3", (x, w), ops.conv_relu_pool(x, w, padding=1)),
            ("conv_relu_pool 5x2", (x, w_library), ops.conv_relu_pool(x, w_library, stride=2, pool="avg")),
            ("batch_norm", (x,), ops.batch_norm(x, None, None, training=True, activation="relu")),
            ("gru", (sequence, h0, w_ih, w_hh), ops.gru(sequence, h0, w_ih, w_hh)[0]),
            ("gru, a step", (sequence, h0, w_ih, w_hh), ops.gru(sequence[:1], h0, w_ih, w_hh)[0]),
            ("attention", (q, k, v), ops.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)),
        ):
            grads = torch.autograd.grad(y, inputs, torch.randn(y.shape).to(dtype))
            results |= {f"{name} {dtype} {i}": t for i, t in enumerate((y.detach(), *grads))}
    return results


def run(command: list[str], folder: str, **environment: str) -> tuple[str, dict[str, torch.Tensor], float]:
    """The instruction set and the results of this script in another process, and how long it took."""
    file, start = Path(folder, "results.pt"), time.perf_counter()
    subprocess.run([*command, sys.executable, __file__, str(file)], check=True, env={**os.environ, **environment})
    isa, results = torch.load(file)
    return isa, results, time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        isa, want, _ = run([], folder, FASTARCH_CPU_ISA="generic")
        assert isa == "generic"
        for processor, expected in EXPECTED.items():
            isa, got, seconds = run(["qemu-x86_64", "-cpu", processor], folder)
            assert isa == expected, f"{processor}: want {expected} kernels, got {isa}"
            assert got.keys() == want.keys()
            for name, t in got.items():
                # sums in another order; a maximum may be another element's where two are all but equal: no such draw
                tolerance = 1e-4 if t.dtype == torch.float32 else 3e-2
                torch.testing.assert_close(t, want[name], rtol=tolerance, atol=tolerance, msg=f"{processor}: {name}")
            print(f"{processor}: {isa} kernels, {len(got)} results as here, {seconds:.0f} s", flush=True)


if len(sys.argv) > 1:
    torch.save((extension.isa, compute()), sys.argv[1])
else:
    main()
