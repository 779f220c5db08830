"""Transformer, encoder and decoder: Vaswani et al. 2017, "Attention is all you need", arXiv 1706.03762.

As in the paper layer norms stand behind each sum, positions are sinusoids, and embeddings are multiplied by
sqrt(d_model). Decoding keeps every token's keys and values: a new token passes through the decoder alone, and attends
to what is kept of the older ones and of the source.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastarch import nn
from fastarch.models.beam_search import Beams, beam_search
from fastarch.nn import functional as F


class Encoded(NamedTuple):
    """What the decoder knows of the source: memory [N, T, d_model], and [N, T] where it is padding."""

    memory: Tensor
    padding: Tensor | None


class Decoded(NamedTuple):
    """Tokens [N, L] without `begin`, `end` from the end on, and if wanted weights [N, layers, heads, L, T]."""

    tokens: Tensor
    weights: Tensor | None


class LayerCache(NamedTuple):
    """Keys and values, of tokens [N * beams, heads, capacity, d_model / heads], of memory [N, heads, T, the same]."""

    keys: Tensor
    values: Tensor
    memory_keys: Tensor
    memory_values: Tensor


class Cache(NamedTuple):
    """What is kept of `length` tokens and the source; mask [N, 1, 1, T] is True where there is no padding."""

    layers: list[LayerCache]
    mask: Tensor | None
    beams: int
    length: int


class DecoderLayer(nn.TransformerDecoderLayer):
    """A layer that also decodes token by token."""

    def cache(self, memory: Tensor, beams: int, capacity: int) -> LayerCache:
        """For `capacity` tokens in each of N * beams sequences, with the keys and values of memory [N, T, d_model]."""
        memory_keys, memory_values = project(self.multihead_attn, memory, 1, 3)
        N, H, _, D = memory_keys.shape
        keys, values = (memory_keys.new_empty(N * beams, H, capacity, D) for _ in range(2))
        return LayerCache(keys, values, memory_keys, memory_values)

    def step(self, x: Tensor, cache: LayerCache, mask: Tensor | None, length: int) -> Tensor:
        """The newest token of each beam, x [N, beams, d_model], through the layer in evaluation, and into its cache."""
        q, k, v = project(self.self_attn, x.reshape(-1, 1, x.shape[2]), 0, 3)
        keys, values = (t[:, :, : length + 1] for t in (cache.keys, cache.values))
        keys[:, :, length:] = k
        values[:, :, length:] = v
        y = F.attention_decode(q, keys, values)
        x = self.norm1(x + self.self_attn.out_proj(y.reshape(x.shape)))

        (q,) = project(self.multihead_attn, x, 0, 1)
        # the beams of a source look at one memory, as if they were its queries
        y = F.scaled_dot_product_attention(q, cache.memory_keys, cache.memory_values, mask)
        x = self.norm2(x + self.multihead_attn.out_proj(y.transpose(1, 2).flatten(2)))
        return self.norm3(x + self.linear2(self.linear1(x).relu()))

    def look(self, x: Tensor, memory: Tensor, causal: Tensor, padding: Tensor | None) -> Tensor:
        """Weights [N, heads, L, T] with which the layer's input x [N, L, d_model] looks at memory, in evaluation."""
        x = self.norm1(x + self.self_attn(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0])
        options = {"key_padding_mask": padding, "need_weights": True, "average_attn_weights": False}
        return self.multihead_attn(x, memory, memory, **options)[1]


def project(attention: nn.Module, x: Tensor, first: int, last: int) -> list[Tensor]:
    """x [N, L, d_model] to those of (queries, keys, values)[first:last], each [N, heads, L, d_model / heads]."""
    rows = slice(first * x.shape[2], last * x.shape[2])
    projected = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    return [t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in projected.chunk(last - first, 2)]


class Transformer(nn.Module):
    """Source tokens [N, T] and target tokens [N, L], which begin with `begin`, to logits [N, L, target_size].

    logits[:, l] are of the token after target[:, l] (teacher forcing). Tokens are int64; source may be padded with
    anything behind its lengths [N], target too: later tokens play no part in earlier logits. Lengths are at least 1.

    Args:
        source_size, target_size: of the vocabularies. begin, end: tokens of the target's.
        num_layers: of the encoder, and as many of the decoder. d_ff: width inside their feed-forward networks.
        dropout: of embeddings, attention's weights, and what each part of a layer adds.
        max_len: the largest T, and the largest L.
        tied: one vocabulary, whose embeddings are the weight of the last layer too (section 3.4 of the paper).

    Raises:
        ValueError: a d_model that heads do not divide; tied, with different sizes; sequences longer than max_len.
    """

    def __init__(
        self,
        source_size: int,
        target_size: int,
        d_model: int,
        num_heads: int,
        num_layers: int,
        d_ff: int,
        dropout: float,
        max_len: int,
        begin: int,
        end: int,
        tied: bool,
    ):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"transformer: want num_heads that divide d_model {d_model}, got {num_heads}")
        if tied and source_size != target_size:
            raise ValueError(f"transformer: want one size of a tied vocabulary, got {source_size} and {target_size}")
        self.max_len = max_len
        self.begin = begin
        self.end = end
        self.scale = math.sqrt(d_model)
        sizes = (d_model, num_heads, d_ff, dropout)
        self.source = nn.Embedding(source_size, d_model)
        self.target = self.source if tied else nn.Embedding(target_size, d_model)
        self.position = nn.SinusoidalPositionalEncoding(d_model, max_len, dropout=dropout)
        encoder_layer = nn.TransformerEncoderLayer(*sizes, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder_layer, num_layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(DecoderLayer(*sizes, batch_first=True), num_layers)
        self.fc = nn.Linear(d_model, target_size)
        if tied:
            self.fc.weight = self.source.weight
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)  # the layers of a stack are copies of one
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=1 / self.scale)  # of deviation 1 where positions are added

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.decode(target, self.encode(source, lengths))

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Encoded:
        steps = torch.arange(source.shape[1], device=source.device)
        padding = None if lengths is None else steps >= lengths.unsqueeze(1)
        x = self.position(self.scale * self.source(source))
        return Encoded(self.encoder(x, src_key_padding_mask=padding), padding)

    def decode(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        """Tokens [N, L] to logits [N, L, target_size]."""
        x = self.position(self.scale * self.target(tokens))
        options = {"tgt_is_causal": True, "memory_key_padding_mask": encoded.padding}
        return self.fc(self.decoder(x, encoded.memory, causal_mask(tokens), **options))

    @torch.no_grad()
    def cross_attention(self, tokens: Tensor, encoded: Encoded) -> Tensor:
        """Where each of tokens [N, L], of which the first is `begin`, looks: weights [N, layers, heads, L, T]."""
        memory, padding = encoded
        x, causal = self.position(self.scale * self.target(tokens)), causal_mask(tokens)
        weights = []
        for layer in self.decoder.layers:
            weights.append(layer.look(x, memory, causal, padding))
            x = layer(x, memory, causal, tgt_is_causal=True, memory_key_padding_mask=padding)
        return torch.stack(weights, 1)

    def cache(self, encoded: Encoded, beams: int, capacity: int) -> Cache:
        """An empty one, for up to `capacity` tokens in each of N * beams sequences."""
        if capacity > self.max_len:
            raise ValueError(f"transformer: want a max_length of at most max_len {self.max_len}, got {capacity}")
        layers = [layer.cache(encoded.memory, beams, capacity) for layer in self.decoder.layers]
        return Cache(layers, None if encoded.padding is None else ~encoded.padding[:, None, None], beams, 0)

    def step(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """The newest tokens [N * beams, 1] to logits [N * beams, 1, target_size], and the cache that holds them."""
        layers, mask, beams, length = cache
        x = self.position(self.scale * self.target(tokens), start=length)
        x = x.view(-1, beams, x.shape[2])
        for layer, kept in zip(self.decoder.layers, layers):
            x = layer.step(x, kept, mask, length)
        return self.fc(x).flatten(0, 1).unsqueeze(1), cache._replace(length=length + 1)

    @torch.no_grad()
    def greedy(
        self, source: Tensor, max_length: int, lengths: Tensor | None = None, need_weights: bool = False
    ) -> Decoded:
        """The likeliest token, one after the other, until all sequences ended or had max_length >= 1 of them."""
        encoded = self.encode(source, lengths)
        cache = self.cache(encoded, 1, max_length)
        token = source.new_full((len(source), 1), self.begin)
        ended = torch.zeros_like(token, dtype=torch.bool)
        tokens = [token]
        for _ in range(max_length):
            logits, cache = self.step(token, cache)
            token = logits.argmax(-1).masked_fill(ended, self.end)
            ended = token == self.end
            tokens.append(token)
            if ended.all():
                break
        tokens = torch.cat(tokens, 1)
        return Decoded(tokens[:, 1:], self.cross_attention(tokens[:, :-1], encoded) if need_weights else None)

    @torch.no_grad()
    def beam(self, source: Tensor, max_length: int, beams: int = 5, lengths: Tensor | None = None) -> Beams:
        """The `beams` likeliest continuations of the `beams` likeliest beginnings, step by step; ends as `greedy`."""
        cache = self.cache(self.encode(source, lengths), beams, max_length)
        begin = source.new_full((len(source),), self.begin)
        return beam_search(self.step, select, cache, begin, self.end, beams, max_length)


def causal_mask(tokens: Tensor) -> Tensor:
    """[L, L], True where a token must not look: at later ones."""
    return torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)


def select(cache: Cache, parents: Tensor) -> Cache:
    """With beam parents[i] in place of beam i, in the same memory."""
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            kept[:, :, : cache.length] = kept[parents, :, : cache.length]
    return cache


def transformer(
    source_size: int = 10_000,
    target_size: int = 10_000,
    d_model: int = 512,
    num_heads: int = 8,
    num_layers: int = 6,
    d_ff: int = 2048,
    dropout: float = 0.1,
    max_len: int = 5000,
    begin: int = 1,
    end: int = 2,
    tied: bool = False,
) -> Transformer:
    """The paper's base model.   59,508,496 parameters, 63,119,496 with the paper's 37,000 tokens, tied."""
    sizes = (d_model, num_heads, num_layers, d_ff)
    return Transformer(source_size, target_size, *sizes, dropout, max_len, begin, end, tied)
