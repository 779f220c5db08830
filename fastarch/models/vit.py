"""Vision Transformer: Dosovitskiy et al. 2020, "An image is worth 16x16 words", arXiv 2010.11929, table 1.

With torchvision's initialisation and state_dict, whose pretrained weights load.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from fastarch import nn

EPS = 1e-6  # of layer norms


class EncoderBlock(nn.Module):
    """y = x + attention(ln_1(x)), then y + mlp(ln_2(y)).   x [N, L, hidden_dim] -> [N, L, hidden_dim]"""

    def __init__(self, num_heads: int, hidden_dim: int, mlp_dim: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim, EPS)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, attention_dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(hidden_dim, EPS)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, hidden_dim),
            nn.Dropout(dropout),
        )
        for linear in (self.mlp[0], self.mlp[3]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Tokens x [N, length, hidden_dim], to which it adds their positions, to as many."""

    def __init__(
        self,
        length: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
    ):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, hidden_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        layers = OrderedDict()
        for i in range(num_layers):
            block = EncoderBlock(num_heads, hidden_dim, mlp_dim, dropout, attention_dropout)
            layers[f"encoder_layer_{i}"] = block
        self.layers = nn.Sequential(layers)
        self.ln = nn.LayerNorm(hidden_dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class VisionTransformer(nn.Module):
    """Images x [N, 3, image_size, image_size] to logits [N, classes], which are read off the class token.

    Args:
        image_size: a multiple of patch_size, both in pixels; there are (image_size / patch_size)^2 patches.
        dropout: of embeddings and of what attention and mlp add. attention_dropout: of attention's weights.

    Raises:
        ValueError: sizes that no patches fill; images of another size.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        classes: int = 1000,
    ):
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(f"vit: want an image_size that is a multiple of {patch_size}, got {image_size}")
        self.image_size = image_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.conv_proj = nn.Conv2d(3, hidden_dim, patch_size, stride=patch_size)
        length = 1 + (image_size // patch_size) ** 2
        sizes = (num_layers, num_heads, hidden_dim, mlp_dim)
        self.encoder = Encoder(length, *sizes, dropout, attention_dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(hidden_dim, classes)))
        # torchvision truncates this one at 2, in ViT-B/16 the 55-fold of its deviation
        nn.init.normal_(self.conv_proj.weight, std=(3 * patch_size**2) ** -0.5)
        nn.init.zeros_(self.conv_proj.bias)
        nn.init.zeros_(self.heads.head.weight)
        nn.init.zeros_(self.heads.head.bias)
        self.register_load_state_dict_pre_hook(rename_published_keys)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"vit: want images [N, 3, {self.image_size}, {self.image_size}], got {[*x.shape]}")
        patches = self.conv_proj(x).flatten(2).mT  # [N, patches, hidden_dim]
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1)
        return self.heads(self.encoder(tokens)[:, 0])


def rename_published_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Some of the files that torchvision links to were written when the linear layers of an mlp had names."""
    for key in [*state]:
        renamed = key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
        state[renamed] = state.pop(key)


def vit_b_16(
    classes: int = 1000, image_size: int = 224, dropout: float = 0.0, attention_dropout: float = 0.0
) -> VisionTransformer:
    """ViT-Base with patches of 16x16.   86,567,656 parameters with a thousand classes and images of 224x224."""
    sizes = {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}
    return VisionTransformer(image_size, **sizes, dropout=dropout, attention_dropout=attention_dropout, classes=classes)
