"""The product of two tiles, in the precision that is allowed."""

import triton
import triton.language as tl


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. In exact float32 the product is summed up first: long chains of additions round away more."""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # the last argument means nothing to float32 but keeps Triton from folding the addition into the product
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
