"""What attention needs besides itself: positions."""

import torch
from torch import Tensor, nn


class SinusoidalPositionalEncoding(nn.Module):
    """y[..., t, 2i] = x[..., t, 2i] + sin(t / 10000^(2i/d)), y[..., t, 2i + 1] = x[..., t, 2i + 1] + cos(the same).

    Args:
        d_model: d, the size of x's last dimension, even or odd.
        max_len: the largest number of positions; the table is made once and is not part of the state_dict.
        batch_first: x is [N, T, d] (or [T, d]); False for [T, N, d].
        dropout: the probability that an element of y becomes 0 in training.

    forward(x, start=0): `start` is the position of x's first token, as in generation with a cache.

    Raises:
        ValueError: an x whose last size is not d_model, or with positions beyond max_len.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """

    def __init__(self, d_model: int, max_len: int = 5000, *, batch_first: bool = True, dropout: float = 0.0):
        super().__init__()
        self.batch_first, self.dropout = batch_first, nn.Dropout(dropout)
        position = torch.arange(max_len, dtype=torch.float64)[:, None]
        even = torch.arange(0, d_model, 2, dtype=torch.float64)
        angle = position / 10000 ** (even / d_model)  # in float64: in float32 the last of 5000 positions is off by 2e-4
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model]
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        time = 0 if x.dim() == 2 or not self.batch_first else 1
        length, (most, width) = x.shape[time], self.table.shape
        if x.shape[-1] != width or not 0 <= start <= most - length:
            raise ValueError(
                f"SinusoidalPositionalEncoding: want [..., {width}] with positions up to {most}, "
                f"got {[*x.shape]} from position {start}"
            )
        encoding = self.table[start : start + length].to(x.dtype)
        return self.dropout(x + (encoding if time == 1 or x.dim() == 2 else encoding[:, None]))
