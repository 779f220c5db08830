"""Every operation forward and backward, on sizes that are worth several threads: for tests of what may disturb them."""

import torch
from torch import Tensor

from fastarch import ops


def results(scale: int = 1) -> list[Tensor]:
    """Outputs and gradients, always of the same numbers."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, w = draw(8 * scale, 16, 40, 40), draw(32, 16, 3, 3)
    sequence, h0, w_ih, w_hh = draw(20, 16 * scale, 64), draw(16 * scale, 96), draw(288, 64), draw(288, 96)
    q = draw(2 * scale, 4, 200, 64)
    found = []
    for inputs, compute in (
        ((x, w), lambda: ops.conv_relu_pool(x, w, padding=1)),
        ((x,), lambda: ops.batch_norm(x, None, None, training=True, activation="relu")),
        ((sequence, w_hh), lambda: ops.gru(sequence, h0, w_ih, w_hh)[0]),
        ((q,), lambda: ops.scaled_dot_product_attention(q, q, q, is_causal=True)),
    ):
        y = compute()
        found += [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all bits are."""
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))
