"""convert_gru_weights against each convention's equations, and back again."""

import pytest
import torch
from test_nn_gru import named
from torch import Tensor

from fastarch import nn

N, C, H = 5, 3, 4
BIASES = [True, False]


def drawn(source: str, reset_after: bool, bias: bool) -> list[Tensor]:
    """Weights as the convention's own layer has them."""
    shapes = [(3 * H, C), (3 * H, H), (3 * H,), (3 * H,)]
    if source == "keras":
        shapes = [(C, 3 * H), (H, 3 * H), (2, 3 * H) if reset_after else (3 * H,)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes][: None if bias else 2]


def keras(x: Tensor, h: Tensor, weights: list[Tensor], reset_after: bool) -> Tensor:
    """keras.layers.GRUCell: columns of z, r, n; z keeps the old state."""
    kernel, recurrent, *rest = weights
    bias = rest[0] if rest else torch.zeros(2 if reset_after else 1, 3 * H, dtype=x.dtype)
    b, b_h = bias if reset_after else (bias.squeeze(), torch.zeros(3 * H, dtype=x.dtype))
    x_z, x_r, x_n = (x @ kernel + b).chunk(3, 1)
    h_z, h_r, h_n = (h @ recurrent + b_h).chunk(3, 1)
    z, r = (x_z + h_z).sigmoid(), (x_r + h_r).sigmoid()
    n = (x_n + (r * h_n if reset_after else (r * h) @ recurrent[:, 2 * H :])).tanh()
    return z * h + (1 - z) * n


def chung(x: Tensor, h: Tensor, weights: list[Tensor], reset_after: bool) -> Tensor:
    """Rows of r, z, n; z lets the new state in."""
    w, u, *biases = weights
    b, c = biases or torch.zeros(2, 3 * H, dtype=x.dtype)
    x_r, x_z, x_n = (x @ w.T + b).chunk(3, 1)
    h_r, h_z, h_n = (h @ u.T + c).chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + (r * h_n if reset_after else (r * h) @ u[2 * H :].T + c[2 * H :])).tanh()
    return (1 - z) * h + z * n


def pytorch(x: Tensor, h: Tensor, weights: list[Tensor], reset_after: bool) -> Tensor:
    cell = nn.GRUCell(C, H, bias=len(weights) == 4, dtype=x.dtype, reset_after=reset_after)
    cell.load_state_dict(dict(zip(cell.state_dict(), weights)))
    with torch.no_grad():
        return cell(x, h)


FORMULAS = {"torch": pytorch, "keras": keras, "chung": chung}
pytestmark = pytest.mark.parametrize("reset_after", [True, False], ids=["reset_after", "reset_before"])


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("target", FORMULAS)
@pytest.mark.parametrize("source", FORMULAS)
def test_computes_the_same(source, target, bias, reset_after):
    x, h = torch.randn(N, C, dtype=torch.float64), torch.randn(N, H, dtype=torch.float64)
    weights = drawn(source, reset_after, bias)
    converted = nn.convert_gru_weights(weights, source, target, reset_after=reset_after)
    assert [t.shape for t in converted] == [t.shape for t in drawn(target, reset_after, bias)]
    got, want = (FORMULAS[name](x, h, w, reset_after) for name, w in ((target, [*converted]), (source, weights)))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("other", FORMULAS)
@pytest.mark.parametrize("source", FORMULAS)
def test_and_back_is_exact(source, other, bias, reset_after):
    weights = drawn(source, reset_after, bias)
    if other == "keras" and not reset_after and bias and source != "keras":
        weights[3].zero_()  # Keras has one bias for both
    there = nn.convert_gru_weights(weights, source, other, reset_after=reset_after)
    back = nn.convert_gru_weights(iter(there), other, source, reset_after=reset_after)
    for i, (got, want) in enumerate(zip(back, weights, strict=True)):
        assert torch.equal(got, want), i
        assert got.is_contiguous()
        assert got.data_ptr() != want.data_ptr()


def test_takes_what_layers_hold(reset_after):
    layer = nn.GRU(C, H, 2, bidirectional=True, reset_after=reset_after)
    for i, parameters in enumerate(layer.all_weights):
        kernel, recurrent, _ = nn.convert_gru_weights(parameters, "torch", "keras", reset_after=reset_after)
        assert not kernel.requires_grad
        torch.testing.assert_close(kernel[:, :H], parameters[0][H : 2 * H].T, rtol=0, atol=0, msg=named(f"z of {i}"))
        torch.testing.assert_close(recurrent[:, H : 2 * H], parameters[1][:H].T, rtol=0, atol=0, msg=named(f"r of {i}"))


@pytest.mark.parametrize(
    ("message", "source", "target", "change"),
    [
        ("want source as one of torch, keras, chung, got 'onnx'", "onnx", "torch", lambda w: w),
        ("want target as one of torch, keras, chung, got None", "torch", None, lambda w: w),
        ("want 2 or 4 tensors for torch, got 3", "torch", "keras", lambda w: w[:3]),
        ("want 2 or 3 tensors for keras, got 0", "keras", "torch", lambda w: []),
        (
            r"want \[\[12, 3\], .* for chung and reset_after=.*, got \[\[12, 3\], ",
            "chung",
            "torch",
            lambda w: [*w[:3], w[0]],
        ),
        (
            r"want .* for keras and .*, got \[\[12, 3\], \[12, 4\]\]",
            "keras",
            "torch",
            lambda w: drawn("torch", True, False),
        ),
        (r"want .* for torch and .*, got .*\[3, 12\]", "torch", "keras", lambda w: drawn("keras", True, False)),
    ],
)
def test_errors(message, source, target, change, reset_after):
    weights = change(drawn(source, reset_after, True) if source in FORMULAS else [])
    with pytest.raises(ValueError, match=f"^convert_gru_weights: {message}"):
        nn.convert_gru_weights(weights, source, target, reset_after=reset_after)
