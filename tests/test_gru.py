"""gru and gru_cell on CPUs: values and gradients."""

import pytest
import torch
from gru_cases import CASES, compare

from fastarch import extension
from fastarch.ops import gru

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    compare(gru, case, dtype)
