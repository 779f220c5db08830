"""BERT: Devlin et al. 2018, "Pre-training of deep bidirectional transformers", arXiv 1810.04805, BERT-base.

With the names, shapes and initialisation of Hugging Face's BertModel, whose state_dict loads and back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastarch import nn
from fastarch.nn import functional as F

EPSILON = 1e-12  # of the published layer norms


class Encoded(NamedTuple):
    """States [N, L, width], and the first token's [N, width] once more through the pooler."""

    last_hidden_state: Tensor
    pooler_output: Tensor


class Embeddings(nn.Module):
    def __init__(self, vocabulary: int, context: int, types: int, width: int, dropout: float, padding: int | None):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.position_embeddings = nn.Embedding(context, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.word_embeddings(tokens) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class SelfAttention(nn.Module):
    """x [N, L, width] to [N, L, width], every token to all where mask [N, 1, 1, L] is True."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in layers)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return y.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """LayerNorm(residual + dropout(W x + b))"""

    def __init__(self, inputs: int, width: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(width, heads, dropout), "output": Output(width, width, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = Output(4 * width, width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BERT(nn.Module):
    """Tokens [N, L] of int64, L <= context, to Encoded.

    Args:
        attention_mask: [N, L], 0 at padding, which no token looks at, whatever it is; None for no padding.
        token_type_ids: int64 [N, L], which sentence a token belongs to; None for the first.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        types: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        padding: int | None,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"bert: want a width that is a multiple of heads, got {width} and {heads}")
        self.embeddings = Embeddings(vocabulary, context, types, width, dropout, padding)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.apply(initialise)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Encoded:
        context = self.embeddings.position_embeddings.num_embeddings
        if tokens.shape[1] > context:
            raise ValueError(f"bert: want at most {context} tokens, got {tokens.shape[1]}")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(f"bert: want attention_mask {[*tokens.shape]}, got {[*attention_mask.shape]}")
        x = self.embeddings(tokens, torch.zeros_like(tokens) if token_type_ids is None else token_type_ids)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return Encoded(x, self.pooler["dense"](x[:, 0]).tanh())


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.normal_(std=0.02)
    if isinstance(module, nn.Linear):
        module.bias.zero_()
    elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()


def bert(
    vocabulary: int = 30522,
    context: int = 512,
    types: int = 2,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    dropout: float = 0.1,
    padding: int | None = 0,
) -> BERT:
    """109,482,240 parameters. `padding` is the token whose embedding is 0 and stays so."""
    return BERT(vocabulary, context, types, width, layers, heads, dropout, padding)
