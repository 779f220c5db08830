"""Encoder and decoder: Cho et al. 2014, arXiv 1406.1078, and Sutskever, Vinyals and Le 2014, arXiv 1409.3215.

With the attention of Bahdanau, Cho and Bengio 2014 (arXiv 1409.0473, additive) or Luong, Pham and Manning 2015 (arXiv
1508.04025, dot product). As in the latter's section 3.1 the state after a step looks at the encoder's, so that teacher
forcing runs all steps of the decoder in one call; in the former it is the state before the step. Without attention all
that the decoder knows of the source is the state that it starts from, the context vector.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastarch import nn
from fastarch.models.beam_search import Beams, beam_search


class Encoded(NamedTuple):
    """What the decoder knows of the source: every step [N, T, width] and the last states [layers, N, width]."""

    memory: Tensor
    lengths: Tensor | None
    state: Tensor


class Decoded(NamedTuple):
    """Tokens [N, L] without `begin`, `end` from the end on, and with attention its weights [N, L, T]."""

    tokens: Tensor
    weights: Tensor | None


class Seq2Seq(nn.Module):
    """Source tokens [N, T] and target tokens [N, L], which begin with `begin`, to logits [N, L, target_size].

    logits[:, l] are of the token after target[:, l] (teacher forcing). Tokens are int64; source may be padded with
    anything behind its lengths [N], target too: later tokens play no part in earlier logits.

    Args:
        attention: None, "additive" or "dot".
        source_size, target_size: of the vocabularies. begin, end: tokens of the target's.
        width: of the decoder's state, even: the encoder reads in both directions, each half as wide.
    """

    def __init__(
        self,
        attention: str | None,
        source_size: int,
        target_size: int,
        embedding: int,
        width: int,
        layers: int,
        dropout: float,
        begin: int,
        end: int,
    ):
        super().__init__()
        if attention not in (None, "additive", "dot"):
            raise ValueError(f"seq2seq: want attention None, 'additive' or 'dot', got {attention!r}")
        if width % 2:
            raise ValueError(f"seq2seq: want an even width, got {width}")
        self.begin = begin
        self.end = end
        options = {"batch_first": True, "dropout": dropout if layers > 1 else 0.0}
        self.source = nn.Embedding(source_size, embedding)
        self.encoder = nn.GRU(embedding, width // 2, layers, bidirectional=True, **options)
        self.target = nn.Embedding(target_size, embedding)
        self.decoder = nn.GRU(embedding, width, layers, **options)
        self.attention = None
        if attention is not None:
            self.attention = nn.BahdanauAttention(width, width, width) if attention == "additive" else nn.DotAttention()
            self.combine = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, target_size)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        encoded = self.encode(source, lengths)
        return self.decode(target, encoded.state, encoded)[0]

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Encoded:
        memory, h_n = self.encoder(self.dropout(self.source(source)), lengths=lengths)
        state = torch.cat([h_n[0::2], h_n[1::2]], -1)  # of both directions
        return Encoded(memory, lengths, state)

    def decode(self, tokens: Tensor, state: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [N, L] to logits [N, L, target_size], the next state, and weights [N, L, T] if there is attention."""
        h, state = self.decoder(self.dropout(self.target(tokens)), state)
        weights = None
        if self.attention is not None:
            context, weights = self.attention(h, encoded.memory, encoded.lengths)
            h = self.combine(torch.cat([context, h], -1)).tanh()
        return self.fc(self.dropout(h)), state, weights

    @torch.no_grad()
    def greedy(self, source: Tensor, max_length: int, lengths: Tensor | None = None) -> Decoded:
        """The likeliest token, one after the other, until all sequences ended or had max_length >= 1 of them."""
        encoded = self.encode(source, lengths)
        state = encoded.state
        token = source.new_full((len(source), 1), self.begin)
        ended = torch.zeros_like(token, dtype=torch.bool)
        tokens, looked = [], []
        for _ in range(max_length):
            logits, state, weights = self.decode(token, state, encoded)
            token = logits.argmax(-1).masked_fill(ended, self.end)
            ended = token == self.end
            tokens.append(token)
            looked.append(weights)
            if ended.all():
                break
        return Decoded(torch.cat(tokens, 1), None if self.attention is None else torch.cat(looked, 1))

    @torch.no_grad()
    def beam(self, source: Tensor, max_length: int, beams: int = 5, lengths: Tensor | None = None) -> Beams:
        """The `beams` likeliest continuations of the `beams` likeliest beginnings, step by step; ends as `greedy`."""
        memory, lengths, state = self.encode(source, lengths)
        lengths = None if lengths is None else lengths.repeat_interleave(beams)
        state = state.repeat_interleave(beams, 1)
        encoded = Encoded(memory.repeat_interleave(beams, 0), lengths, state)

        def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return self.decode(tokens, state, encoded)[:2]

        begin = source.new_full((len(source),), self.begin)
        return beam_search(step, lambda state, parents: state[:, parents], state, begin, self.end, beams, max_length)


def seq2seq(
    attention: str | None = None,
    source_size: int = 10_000,
    target_size: int = 10_000,
    embedding: int = 256,
    width: int = 512,
    layers: int = 1,
    dropout: float = 0.0,
    begin: int = 1,
    end: int = 2,
) -> Seq2Seq:
    """12,222,224 parameters without attention, 12,747,024 with "dot", 13,272,336 with "additive"."""
    return Seq2Seq(attention, source_size, target_size, embedding, width, layers, dropout, begin, end)
