"""Beam search: the likeliest sequences of tokens that a decoder finds when it follows a few at a time.

Sutskever, Vinyals and Le 2014, arXiv 1409.3215, section 3.2, without a length penalty.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")  # whatever the decoder remembers


class Beams(NamedTuple):
    """The likeliest, best first: tokens [N, beams, L] as in Decoded, scores [N, beams] their log-probabilities."""

    tokens: Tensor
    scores: Tensor


def beam_search(
    step: Callable[[Tensor, State], tuple[Tensor, State]],
    select: Callable[[State, Tensor], State],
    state: State,
    begin: Tensor,
    end: int,
    beams: int,
    max_length: int,
) -> Beams:
    """The `beams` likeliest continuations of the `beams` likeliest beginnings, step by step, until all have ended.

    Args:
        step: the newest tokens [N * beams, 1] and the state to logits [N * beams, 1, size] and the next state. The
            beams of a sequence stand one after the other.
        select: the state whose beam i is beam parents[i] of the given one, parents [N * beams].
        state: before the first token, of N * beams sequences.
        begin: [N], the token that each sequence begins with. end: the token that ends one.
        max_length: of what is found, at least 1.
    """
    N, device = len(begin), begin.device
    tokens = begin.repeat_interleave(beams).unsqueeze(1)
    scores = torch.full((N, beams), -torch.inf, device=device)
    scores[:, 0] = 0  # all beams begin alike: one of them counts
    ended = torch.zeros(N * beams, dtype=torch.bool, device=device)
    first = beams * torch.arange(N, device=device).unsqueeze(1)  # beam of each sequence
    for _ in range(max_length):
        logits, state = step(tokens[:, -1:], state)
        gains = logits[:, 0].log_softmax(-1)
        gains[ended] = -torch.inf
        gains[ended, end] = 0  # what has ended stays as it is
        totals = scores.unsqueeze(2) + gains.unflatten(0, (N, beams))
        scores, best = totals.flatten(1).topk(beams)
        parents = (first + best // totals.shape[2]).flatten()
        tokens = torch.cat([tokens[parents], (best % totals.shape[2]).view(-1, 1)], 1)
        state = select(state, parents)
        ended = tokens[:, -1] == end
        if ended.all():
            break
    return Beams(tokens[:, 1:].unflatten(0, (N, beams)), scores)
