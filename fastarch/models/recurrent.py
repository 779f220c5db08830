"""Recurrent networks that read a sequence and answer once: many to one.

Elman 1990, "Finding structure in time"; the LSTM of Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al.
2000; the GRU of Cho et al. 2014, arXiv 1406.1078, with the reset gate after the product.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fastarch import nn


class SequenceClassifier(nn.Module):
    """Sequences x [N, T, channels], and lengths [N] where they differ, to logits [N, classes].

    The answer is read off the last layer's state after a sequence's last step; with `bidirectional` also off that of
    the walk back, after the first. `dropout` is before the answer and between layers.

    lengths: int64, 1 to T; what lies behind counts for nothing.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        classes: int,
        channels: int,
        width: int,
        layers: int,
        bidirectional: bool,
        dropout: float,
    ):
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.rnn = layer(channels, width, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width if bidirectional else width, classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            _, states = self.rnn(x)
        elif isinstance(self.rnn, nn.GRU):
            _, states = self.rnn(x, lengths=lengths)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            _, states = self.rnn(packed)
        h_n = states[0] if isinstance(states, tuple) else states  # LSTM's state is h and c
        last = h_n[-2:] if self.rnn.bidirectional else h_n[-1:]
        return self.fc(self.dropout(last.transpose(0, 1).flatten(1)))


def elman(
    classes: int = 10,
    channels: int = 28,
    width: int = 128,
    layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
) -> SequenceClassifier:
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).   21,514 parameters, for the 28 rows of a 28x28 image."""
    return SequenceClassifier(nn.RNN, classes, channels, width, layers, bidirectional, dropout)


def gru_classifier(
    classes: int = 10,
    channels: int = 28,
    width: int = 128,
    layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
) -> SequenceClassifier:
    """Gated recurrent units.   61,962 parameters, for the 28 rows of a 28x28 image."""
    return SequenceClassifier(nn.GRU, classes, channels, width, layers, bidirectional, dropout)


def lstm_classifier(
    classes: int = 10,
    channels: int = 28,
    width: int = 128,
    layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
) -> SequenceClassifier:
    """Long short-term memory.   82,186 parameters, for the 28 rows of a 28x28 image."""
    return SequenceClassifier(nn.LSTM, classes, channels, width, layers, bidirectional, dropout)
