"""Weights of a gated recurrent unit in the conventions of PyTorch, of Keras, and of the literature.

torch   h_t = (1 - z_t) n_t + z_t h_{t-1}.  w_ih [3H, C], w_hh [3H, H], b_ih [3H], b_hh [3H], rows of r, z, n
keras   the same unit.  kernel [C, 3H], recurrent_kernel [H, 3H], columns of z, r, n; bias [2, 3H], of the input and
        of the state, or with reset_after=False [3H], for both
chung   h_t = (1 - z_t) h_{t-1} + z_t n_t.  Shapes and order as in torch
"""

from collections.abc import Iterable

import torch
from torch import Tensor

CONVENTIONS = ("torch", "keras", "chung")


def convert_gru_weights(
    weights: Iterable[Tensor], source: str, target: str, *, reset_after: bool = True
) -> tuple[Tensor, ...]:
    """The weights of one layer in one direction, from one convention to another that computes the same.

        >>> layer = fastarch.nn.GRU(8, 16)
        >>> kernel, recurrent_kernel, bias = fastarch.nn.convert_gru_weights(layer.all_weights[0], "torch", "keras")
        >>> kernel.shape, recurrent_kernel.shape, bias.shape
        (torch.Size([8, 48]), torch.Size([16, 48]), torch.Size([2, 48]))

    Args:
        weights: in the order of the table below, with biases or without: what `all_weights` of a torch.nn.GRU or ours
            holds for each layer and direction, or `map(torch.from_numpy, layer.get_weights())` of a Keras layer.
        source, target: "torch" (PyTorch, cuDNN; also the equations of Cho et al. 2014), "keras", or "chung" (Chung et
            al. 2014, Bahdanau et al. 2014 and many lecture notes: z lets the new state in, where PyTorch's keeps the
            old one. sigmoid(-a) = 1 - sigmoid(a), so the rows of z change their sign).
        reset_after: which of its two units a Keras layer is, by the argument of that name there as here. The unit stays
            what it is: no weights of one compute the other.

    Returns:
        Tensors that share no memory with the weights, in their dtype. Nothing is rounded, except that
        reset_after=False has one bias for both in Keras, their sum: back in torch it is b_ih, and b_hh is 0.

    Raises:
        ValueError: an unknown convention, another number of tensors, or shapes that do not fit together.

    Sources: Cho et al. 2014, arXiv 1406.1078, equations 5 to 8; Chung et al. 2014, arXiv 1412.3555, section 3.2;
    Keras's `keras.layers.GRU`.
    """
    for what, name in (("source", source), ("target", target)):
        if name not in CONVENTIONS:
            raise ValueError(f"convert_gru_weights: want {what} as one of {', '.join(CONVENTIONS)}, got {name!r}")
    weights = [weight.detach() for weight in weights]
    check(weights, source, reset_after)
    if source == "keras":
        weights = from_keras(weights)
    elif source == "chung":
        weights = [negate_z(weight) for weight in weights]
    if target == "keras":
        weights = to_keras(weights, reset_after)
    elif target == "chung":
        weights = [negate_z(weight) for weight in weights]
    return tuple(weight.clone(memory_format=torch.contiguous_format) for weight in weights)


def check(weights: list[Tensor], source: str, reset_after: bool) -> None:
    biases = 1 if source == "keras" else 2
    if len(weights) not in (2, 2 + biases):
        raise ValueError(f"convert_gru_weights: want 2 or {2 + biases} tensors for {source}, got {len(weights)}")
    H, C = (weights[1].shape[-1], weights[0].shape[-1]) if source != "keras" else (len(weights[1]), len(weights[0]))
    if source == "keras":
        wanted = [(C, 3 * H), (H, 3 * H), (2, 3 * H) if reset_after else (3 * H,)]
    else:
        wanted = [(3 * H, C), (3 * H, H), (3 * H,), (3 * H,)]
    wanted = [[*shape] for shape in wanted[: len(weights)]]
    got = [[*weight.shape] for weight in weights]
    if got != wanted:
        unit = f"reset_after={reset_after}"
        raise ValueError(f"convert_gru_weights: want {wanted} for {source} and {unit}, got {got}")


def from_keras(weights: list[Tensor]) -> list[Tensor]:
    matrices = [swap(weight.T) for weight in weights[:2]]
    if len(weights) == 2:
        return matrices
    bias = weights[2]
    return [*matrices, *([swap(bias), torch.zeros_like(bias)] if bias.dim() == 1 else map(swap, bias))]


def to_keras(weights: list[Tensor], reset_after: bool) -> list[Tensor]:
    w_ih, w_hh, *biases = (swap(weight) for weight in weights)
    if biases:
        biases = [torch.stack(biases) if reset_after else torch.add(*biases)]
    return [w_ih.T, w_hh.T, *biases]


def swap(weight: Tensor) -> Tensor:
    """Rows of r, z, n to z, r, n and back."""
    first, second, n = weight.chunk(3)
    return torch.cat([second, first, n])


def negate_z(weight: Tensor) -> Tensor:
    r, z, n = weight.chunk(3)
    return torch.cat([r, -z, n])
