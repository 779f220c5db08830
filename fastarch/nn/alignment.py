"""Attention of one sequence's states to another's, which returns its weights: where the reader looks, to be plotted.

    e_lj = score(s_l, h_j),  alpha_l = softmax_j(e_l),  c_l = sum_j alpha_lj h_j

s [N, L, S] are the reader's states, h [N, T, H] what it looks at, alpha [N, L, T], c [N, L, H]. Where j >= lengths, h_j
is padding: alpha is 0 there, whatever h_j is. Of a sequence without any step all of alpha and c are 0.
"""

import torch
from torch import Tensor, nn

from fastarch.nn.leaf import Leaf


class BahdanauAttention(Leaf):
    """Additive attention: e_lj = v' tanh(W s_l + U h_j).   s [N, L, S], h [N, T, H] -> c [N, L, H], alpha [N, L, T]

    Args:
        state_size: S. memory_size: H.
        width: of W s + U h, whose W [width, S] has no bias, because U [width, H] has one.

    Source: Bahdanau, Cho and Bengio 2014, arXiv 1409.0473, section A.1.2.
    """

    def __init__(self, state_size: int, memory_size: int, width: int):
        super().__init__()
        self.state = nn.Linear(state_size, width, bias=False)
        self.memory = nn.Linear(memory_size, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, states: Tensor, memory: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check("BahdanauAttention", states, memory, lengths)
        padding = beyond(lengths, memory)
        memory = memory if padding is None else memory.masked_fill(padding.unsqueeze(2), 0)
        energies = self.score((self.state(states).unsqueeze(2) + self.memory(memory).unsqueeze(1)).tanh())
        return attend(energies.squeeze(-1), memory, padding)


class DotAttention(Leaf):
    """Dot-product attention: e_lj = s_l' h_j.   s [N, L, H], h [N, T, H] -> c [N, L, H], alpha [N, L, T]

    Source: Luong, Pham and Manning 2015, arXiv 1508.04025, equation 8, the first of its scores.
    """

    def forward(self, states: Tensor, memory: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check("DotAttention", states, memory, lengths)
        if states.shape[-1] != memory.shape[-1]:
            raise ValueError(f"DotAttention: want states of {memory.shape[-1]} features, got {[*states.shape]}")
        padding = beyond(lengths, memory)
        memory = memory if padding is None else memory.masked_fill(padding.unsqueeze(2), 0)
        return attend(states @ memory.mT, memory, padding)


def check(name: str, states: Tensor, memory: Tensor, lengths: Tensor | None) -> None:
    if states.dim() != 3 or memory.dim() != 3 or len(states) != len(memory):
        got = f"{[*states.shape]} and {[*memory.shape]}"
        raise ValueError(f"{name}: want states [N, L, S] and memory [N, T, H], got {got}")
    if lengths is not None and lengths.shape != memory.shape[:1]:
        raise ValueError(f"{name}: want lengths [{len(memory)}], got {[*lengths.shape]}")


def beyond(lengths: Tensor | None, memory: Tensor) -> Tensor | None:
    """Which steps of memory [N, T, H] are padding, [N, T]."""
    return None if lengths is None else torch.arange(memory.shape[1], device=memory.device) >= lengths.unsqueeze(1)


def attend(energies: Tensor, memory: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """energies [N, L, T], memory [N, T, H] to context [N, L, H] and weights [N, L, T]."""
    if padding is None:
        weights = energies.softmax(-1)
    else:  # the smallest number and not -inf: the softmax of nothing but -inf is NaN, in the gradient too
        padding = padding.unsqueeze(1)
        weights = energies.masked_fill(padding, torch.finfo(energies.dtype).min).softmax(-1).masked_fill(padding, 0)
    return weights @ memory, weights
