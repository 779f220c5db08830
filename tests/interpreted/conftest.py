"""The Triton kernels themselves, executed on the CPU by Triton's interpreter, in a process of their own:

TRITON_INTERPRET=1 pytest tests/interpreted
"""

import numpy as np
import pytest
import triton
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


@triton.jit
def probe():
    pass


if not isinstance(probe, InterpretedFunction):
    raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1 in the environment before Triton is imported")


def dot(builder, a, b, acc, input_precision, max_num_imprecise_acc):
    """The interpreter keeps bfloat16 as its bits, and its own dot multiplies those; here they are widened first.

    Sums are of float64: in what order and how wide they are summed is the device's business, not the kernel's.
    """
    a, b = (
        (t.data.astype(np.uint32) << 16).view(np.float32) if t.dtype.scalar.is_bf16() else t.data.astype(np.float32)
        for t in (a, b)
    )
    product = np.matmul(a.astype(np.float64), b.astype(np.float64))
    return TensorHandle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)


InterpreterBuilder.create_dot = dot
