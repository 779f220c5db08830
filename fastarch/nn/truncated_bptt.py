"""Truncated backpropagation through time: a long sequence in chunks, the state handed on, its gradient stopped."""

from collections.abc import Iterator

from torch import Tensor


def bptt_chunks(*sequences: Tensor, length: int, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Consecutive chunks of sequences, `length` steps long, the last one maybe shorter.

        >>> layer = fastarch.nn.GRU(3, 8)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> inputs, targets = torch.randn(100, 2, 3), torch.randn(100, 2, 8)  # [T, N, C], [T, N, H]
        >>> state = None
        >>> for x, y in fastarch.nn.bptt_chunks(inputs, targets, length=30):
        ...     output, state = layer(x, fastarch.nn.detach_state(state))
        ...     optimizer.zero_grad()
        ...     (output - y).square().mean().backward()
        ...     optimizer.step()
        >>> len(output)
        10

    A gradient sees at most `length` steps back, and no more than these are kept for the backward. The state itself
    goes on: its value carries what came before.

    Args:
        sequences: tensors with as many steps each.
        length: of a chunk, in steps, at least 1.
        dim: the dimension of time: 0 of [T, N, C], 1 with batch_first.

    Yields:
        A view of each sequence, as a tuple, also of a single one.

    Raises:
        ValueError: no sequence, a length of less than 1, or sequences of different length.

    Source: Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories": their BPTT(h; h') with `length` for both.
    """
    steps = {sequence.shape[dim] for sequence in sequences}
    if len(steps) != 1:
        raise ValueError(f"bptt_chunks: want sequences of one length, got {[s.shape[dim] for s in sequences]}")
    if length < 1:
        raise ValueError(f"bptt_chunks: want a length of at least 1, got {length}")
    return zip(*(sequence.split(length, dim) for sequence in sequences))


def detach_state(state: Tensor | tuple | None) -> Tensor | tuple | None:
    """The state of a recurrent layer without its history: a tensor, a tuple of states (LSTM, several layers), or None.

    The same values in the same memory; no gradient passes.
    """
    if state is None or isinstance(state, Tensor):
        return state if state is None else state.detach()
    return type(state)(detach_state(part) for part in state)
