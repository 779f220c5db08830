"""The one rule by which results are judged: at most twice the error of torch's own operation in the same dtype.

Errors are against the reference in float64. One rounding unit of the dtype at the output's scale comes on top, because
where torch happens to be exact twice nothing would be nothing.
"""

import torch
from torch import Tensor

TIMES_EAGER = 2.0

# Where the rule cannot hold: dtype -> (times eager's error, rounding units), with the reason.
EXCEPTIONS = {
    # the reference is computed in float64 as well: its own rounding, which is not the kernel's, counts as our error
    torch.float64: (2.0, 64.0),
}


def assert_close(name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """got and eager in one dtype, truth in float64."""
    assert got.shape == truth.shape, f"{name}: shape {[*got.shape]}, want {[*truth.shape]}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, want {eager.dtype}"
    times, units = EXCEPTIONS.get(got.dtype, (TIMES_EAGER, 1.0))
    if not truth.numel():
        return
    assert torch.equal(got.isnan(), eager.isnan()), f"{name}: NaN in other places than in torch's"
    finite = truth.isfinite() & eager.isfinite()
    assert torch.equal(got[~finite].double().nan_to_num(7.0), eager[~finite].double().nan_to_num(7.0)), (
        f"{name}: infinity"
    )
    if not finite.any():
        return
    error, own = ((t.double() - truth)[finite].abs().max().item() for t in (got, eager))
    unit = torch.finfo(got.dtype).eps * truth[finite].abs().max().item()
    allowed = times * own + units * unit
    assert error <= allowed, (
        f"{name}: error {error:.3g}, allowed {allowed:.3g} = {times} * {own:.3g} + {units} * {unit:.3g}"
    )


def assert_all_close(got: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """The rule for all gradients of a deep network at once, each divided by its norm.

    For one of them alone it does not hold: the rounding of many layers adds up in it by chance, in eager's as in ours.
    """
    assert got.keys() == eager.keys() == truth.keys()
    assert [t.dtype for t in got.values()] == [t.dtype for t in eager.values()]
    norms = {name: t.norm() for name, t in truth.items()}
    joined = (
        torch.cat([(t.double() / norms[name]).flatten() for name, t in each.items()]) for each in (got, eager, truth)
    )
    assert_close("all of them", *joined)
