"""conv_relu_pool on drawn shapes, strides, layouts and options, on integers: every result is exact, or wrong."""

import importlib
import os

import torch
from conv_relu_pool_cases import reference_of, run
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

op = importlib.import_module("fastarch.ops.conv_relu_pool")

EXAMPLES = int(os.environ.get("FASTARCH_FUZZ_EXAMPLES", "150"))


@st.composite
def problems(draw):
    """Shapes of x and w, options, is there a bias, layouts of x and w, are there scale and residual, dtype, seed."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, stride = pair(1, 5), pair(1, 3)
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (3, 3)]))
    if draw(st.booleans()):
        kernel, stride, dilation = (3, 3), (1, 1), (1, 1)  # Winograd's
    padding, pool = pair(0, 3), draw(st.sampled_from(["max", "max", "avg", None]))
    sizes = pair(1, 4) if pool == "max" else draw(st.sampled_from([(1, 1), (2, 4), (4, 2), (1, 2)]))
    pool_size = draw(st.sampled_from([(2, 2), sizes]))
    pool_stride = draw(st.sampled_from([None, pair(1, 4)]))
    pool_padding = tuple(draw(st.integers(0, k // 2)) for k in pool_size)

    size = []
    for i in (0, 1):  # backwards from a few pooled outputs
        conv = draw(st.integers(1, 9))
        if pool:
            conv = (conv - 1) * (pool_stride or pool_size)[i] + pool_size[i] - 2 * pool_padding[i]
        under = (conv - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - 2 * padding[i]
        size.append(max(1, under + draw(st.integers(0, 2))))
    groups, channels, filters = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 36))
    x, w = (draw(st.integers(1, 3)), channels * groups, *size), (filters * groups, channels, *kernel)
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, pool=pool)
    options |= dict(pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding)
    options |= dict(ceil_mode=pool == "max" and draw(st.booleans()))  # an average that overhangs may divide by 3
    options |= dict(activation="relu" if pool else draw(st.sampled_from(["relu", None])))
    layouts = [draw(st.sampled_from(["contiguous", "channels_last", "sliced"])) for _ in range(2)]
    return (
        x,
        w,
        options,
        draw(st.booleans()),
        layouts,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([torch.float32, torch.float64])),
        draw(st.integers(0, 2**32)),
    )


def on_torchs_own(function, *args):
    """function(*args) without oneDNN, which crashes on some problems that our kernels serve.

    F.conv2d(x [3, 32, 54, 1], w [32, 32, 3, 1], bias, stride=2, padding=(0, 3), dilation=3) in channels_last: no column
    of the result sees x, and the process ends (torch 2.13.0 with oneDNN 3.12 on a Xeon).
    """
    with torch.backends.mkldnn.flags(enabled=False):
        return function(*args)


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "sliced":
        return torch.cat([t, t], -1)[..., ::2].copy_(t)
    return t.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_results_are_exact(problem):
    x_shape, w_shape, options, has_bias, (layout, w_layout), scaled, adds, dtype, seed = problem
    torch.manual_seed(seed)

    def integers(shape, multiple: int) -> torch.Tensor:
        return multiple * torch.randint(-1, 2, shape).to(dtype)

    # multiples that averages over 8 and the filter transform of four taps, over 81, divide without a rest
    x, w, b = (
        laid_out(integers(x_shape, 1), layout),
        laid_out(integers(w_shape, 648), w_layout),
        integers(w_shape[:1], 648),
    )
    b = b if has_bias else None
    try:
        plan = op.make_plan("cpu", dtype, x.shape, w.shape, **options)
    except ValueError as error:
        assert "want something to compute" in str(error)
        return
    note(f"{plan}")
    relu = options["activation"] == "relu"
    reference = reference_of(plan.geometry, relu)
    grad_output = laid_out(integers(on_torchs_own(reference, x, w, b).shape, 8), layout)
    got = run(lambda *t: op.conv_relu_pool(*t, **options), (x, w, b), grad_output)
    for name, want in on_torchs_own(run, reference, (x, w, b), grad_output).items():
        assert torch.equal(got[name], want), name

    scale = 2.0 ** torch.randint(-1, 2, w_shape[:1]).to(dtype) if scaled else None
    adds = adds and plan.geometry.pool == "none"
    residual = laid_out(integers(grad_output.shape, 648), layout) if adds else None
    with torch.no_grad():
        y = op.conv_relu_pool(x, w, b, **options, scale=scale, residual=residual)
    want = on_torchs_own(op.reference, x, w, b, *plan.geometry, scale, residual, relu)
    assert torch.equal(y, want), "inference"
