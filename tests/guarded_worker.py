"""Every operation of the CPU kernels on awkward shapes, between the pages of guard_pages.c; run by test_guard_pages.py.

python guarded_worker.py all                   every operation, forward and backward: what leaves its buffers crashes
python guarded_worker.py behind|before|freed   one byte that a crash must answer: the proof that there are fences
"""

import ctypes
import itertools
import sys

import attention_cases as attention
import batch_norm_cases as batch_norm
import conv_relu_pool_cases as conv_relu_pool
import gru_cases as gru
import torch

from fastarch import extension, ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LAYOUTS = [False, True]  # whether channels, or tokens, are innermost


def run_conv_relu_pool() -> None:
    for case, dtype, channels_last in itertools.product(conv_relu_pool.CASES, DTYPES, LAYOUTS):
        tensors = conv_relu_pool.draw(case, dtype, channels_last)
        y = ops.conv_relu_pool(*tensors, **case.options)
        conv_relu_pool.run(lambda *t, of=case.options: ops.conv_relu_pool(*t, **of), tensors, torch.randn_like(y))


def run_batch_norm() -> None:
    for case, dtype, channels_last in itertools.product(batch_norm.CASES, DTYPES, LAYOUTS):
        drawn = batch_norm.draw(case, dtype, channels_last)
        batch_norm.run(ops.batch_norm, drawn, torch.randn_like(drawn["input"]), **case.options)


def run_gru() -> None:
    for case, dtype in itertools.product(gru.CASES + gru.ONE_STEP, DTYPES):
        gru.run(ops.gru, gru.draw(case, dtype), gru.draw_gradients(case, dtype), **case.options)


def run_attention() -> None:
    for case, dtype, tokens_first in itertools.product(attention.CASES, DTYPES, LAYOUTS):
        drawn = attention.draw(case, dtype, tokens_first)
        o, _ = attention.ours(case, drawn)
        attention.run(attention.ours, case, drawn, torch.randn_like(o))
    for dtype in DTYPES:
        q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((23, 6, 40), (31, 2, 40), (31, 2, 24)))
        ends = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 1, 1, 18, 23], [0, 3, 9, 20, 31])]
        torch.autograd.grad(ops.attention_varlen(q, k, v, *ends, 17, 11, is_causal=True).sum(), (q, k, v))
        q, k, v = (torch.randn(3, *shape).to(dtype) for shape in ((4, 3, 40), (2, 300, 40), (2, 300, 24)))
        ops.attention_decode(q, k, v, torch.tensor([1, 77, 300], dtype=torch.int32))


def touch(what: str) -> None:
    t = torch.zeros(5000)  # of no whole number of pages
    first, size = t.data_ptr(), t.nbytes
    ctypes.string_at(first, size)
    if what == "freed":
        del t
    ctypes.string_at({"behind": first + size, "before": first - 1, "freed": first}[what], 1)


if sys.argv[1] == "all":
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for run in (run_conv_relu_pool, run_batch_norm, run_gru, run_attention):
        run()
        print(f"{run.__name__} on {extension.isa}: done", flush=True)
else:
    touch(sys.argv[1])
    print("nothing stopped it")
