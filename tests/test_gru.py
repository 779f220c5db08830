"""gru and gru_cell on CPUs: values and gradients."""

import pytest
import torch
from closeness import assert_close
from gru_cases import CASES, double, draw, draw_gradients, in_torch, run

from fastarch import extension
from fastarch.ops import gru

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

if extension.cpu is None:
    pytest.skip("fastarch._C is not built", allow_module_level=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    drawn, gradients = draw(case, dtype), draw_gradients(case, dtype)
    got = run(gru, drawn, gradients, **case.options)
    eager = run(in_torch, drawn, gradients, **case.options)
    truth = run(in_torch, double(drawn), [g.double() for g in gradients], **case.options)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_close(name, got[name], eager[name], truth[name])
