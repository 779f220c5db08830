"""GPT-2: Radford et al. 2019, "Language models are unsupervised multitask learners", the small one of table 2.

With the names, shapes and initialisation of Hugging Face's GPT2LMHeadModel, whose state_dict loads and back: weights of
projections are [in, out], and the last layer shares its weight with the embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastarch import nn
from fastarch.nn import functional as F


class Cache(NamedTuple):
    """What a network has read: keys and values [layers, N, heads, capacity, D], and of how many tokens, int32 [N].

    A network that is called with it writes the new tokens' keys and values behind those, and counts them, in place.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor


class Projection(nn.Module):
    """y = x W + b.   x [..., in], W [in, out], b [out]"""

    def __init__(self, inputs: int, outputs: int, deviation: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=deviation)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Causal self-attention of x [N, L, width]."""

    def __init__(self, width: int, heads: int, dropout: float, deviation: float, residual_deviation: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = Projection(width, 3 * width, deviation)
        self.c_proj = Projection(width, width, residual_deviation)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> Tensor:
        """past: keys and values [N, heads, capacity, D], at which of them x is [N, L], and how many there are then."""
        q, k, v = self.c_attn(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # [N, heads, L, D]
        if past is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            keys, values, positions, lengths = past
            each = torch.arange(len(x), device=x.device).unsqueeze(1)
            keys[each, :, positions] = k.transpose(1, 2)
            values[each, :, positions] = v.transpose(1, 2)
            y = F.attention_decode(q, keys, values, lengths)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, deviation: float, residual_deviation: float):
        super().__init__()
        self.c_fc = Projection(width, 4 * width, deviation)
        self.c_proj = Projection(4 * width, width, residual_deviation)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, deviation: float, residual_deviation: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout, deviation, residual_deviation)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, deviation, residual_deviation)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), past))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Tokens [N, L] to their last states [N, L, width]."""

    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, heads: int, dropout: float, deviation: float
    ):
        super().__init__()
        # so many blocks add to a residual that their sum keeps the variance of one
        residual_deviation = deviation / (2 * layers) ** 0.5
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, heads, dropout, deviation, residual_deviation) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        nn.init.normal_(self.wte.weight, std=deviation)
        nn.init.normal_(self.wpe.weight, std=deviation)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        L = tokens.shape[1]
        if L > self.wpe.num_embeddings:
            raise ValueError(f"gpt2: want at most {self.wpe.num_embeddings} tokens, got {L}")
        positions = torch.arange(L, device=tokens.device)
        past = [None] * len(self.h)
        if cache is not None:
            positions = positions + cache.lengths.unsqueeze(1)
            lengths = cache.lengths + L
            past = [(keys, values, positions, lengths) for keys, values in zip(cache.keys, cache.values)]
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for block, of_block in zip(self.h, past):
            x = block(x, of_block)
        if cache is not None:
            cache.lengths.copy_(lengths)
        return self.ln_f(x)


class GPT2(nn.Module):
    """Tokens [N, L] of int64, L <= context, to logits [N, L, vocabulary]: [:, l] are of the token after tokens[:, l].

    With a `cache` (of the method of that name, without gradients) tokens continue those that it holds, and the answer
    is that of all together, of which the logits are returned from the new tokens on.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"gpt2: want a width that is a multiple of heads, got {width} and {heads}")
        self.transformer = Transformer(vocabulary, context, width, layers, heads, dropout, deviation=0.02)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self.lm_head(self.transformer(tokens, cache))

    def cache(self, N: int, capacity: int) -> Cache:
        """An empty one, for N sequences of up to `capacity` tokens."""
        weight, attention = self.lm_head.weight, self.transformer.h[0].attn
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (len(self.transformer.h), N, attention.heads, capacity, weight.shape[1] // attention.heads)
        keys, values = (weight.new_empty(shape, dtype=dtype) for _ in range(2))
        return Cache(keys, values, torch.zeros(N, dtype=torch.int32, device=weight.device))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        length: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        end: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens [N, L >= 1] and up to `length` more, one after the other: [N, L + length].

        Args:
            temperature: T >= 0. 0 takes the likeliest token, otherwise one is drawn from softmax(logits / T).
            top_k: of the k likeliest; None for all.
            end: behind it a sequence has nothing but `end`; what all of them have at the end is left out.
            generator: to draw with; None for torch's own.

        Raises:
            ValueError: a temperature below 0, a top_k below 1, no token to begin with, more tokens than the context.
        """
        N, L = tokens.shape
        context = self.transformer.wpe.num_embeddings
        if not 1 <= L <= context + 1 - length:  # the last token is not read
            raise ValueError(f"gpt2: want from 1 to {context + 1} tokens in all, got {L} and {length} more")
        if temperature < 0:
            raise ValueError(f"gpt2: want temperature >= 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"gpt2: want top_k >= 1 or None, got {top_k}")
        cache = self.cache(N, L + length - 1)
        ended = torch.zeros(N, 1, dtype=torch.bool, device=tokens.device)
        token, parts = tokens, [tokens]
        for _ in range(length):
            logits = self.lm_head(self.transformer(token, cache)[:, -1])
            token = choose(logits, temperature, top_k, generator)
            if end is not None:
                token = token.masked_fill(ended, end)
                ended = token == end
            parts.append(token)
            if ended.all():
                break
        return torch.cat(parts, 1)


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token [N, 1] for logits [N, vocabulary]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits / temperature).softmax(-1, dtype=torch.float32)
    return torch.multinomial(probabilities, 1, generator=generator)


def gpt2(
    vocabulary: int = 50257,
    context: int = 1024,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    dropout: float = 0.1,
) -> GPT2:
    """124,439,808 parameters."""
    return GPT2(vocabulary, context, width, layers, heads, dropout)
