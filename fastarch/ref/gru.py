"""gru: h_t = (1 - z_t) * n_t + z_t * h_{t-1} for every step t, x [T, N, C], h [N, H].

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr),  z_t likewise
    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))    reset after the product: PyTorch, cuDNN
    n_t = tanh(W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn)    before it: Cho et al. 2014

w_ih [3H, C] and w_hh [3H, H] hold the rows of r, z, n in this order, b_ih and b_hh [3H] alike.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reset_after: bool = True,
) -> Tensor:
    H = hx.shape[-1]
    i_rz, i_n = F.linear(input, w_ih, b_ih).split([2 * H, H], -1)
    if reset_after:
        h_rz, h_n = F.linear(hx, w_hh, b_hh).split([2 * H, H], -1)
        r, z = (i_rz + h_rz).sigmoid().chunk(2, -1)
        n = (i_n + r * h_n).tanh()
    else:
        b_rz, b_n = (None, None) if b_hh is None else b_hh.split([2 * H, H])
        w_rz, w_n = w_hh.split([2 * H, H])
        r, z = (i_rz + F.linear(hx, w_rz, b_rz)).sigmoid().chunk(2, -1)
        n = (i_n + F.linear(r * hx, w_n, b_n)).tanh()
    return (1 - z) * n + z * hx


def gru(
    input: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset_after: bool = True,
) -> tuple[Tensor, Tensor]:
    T, N, _ = input.shape
    h, outputs = h0, [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        x = input[t]
        if lengths is None:
            outputs[t] = h = gru_cell(x, h, w_ih, w_hh, b_ih, b_hh, reset_after)
        else:  # padding: the state stays, the output is 0, and what stands in x, NaN included, plays no part
            live = (t < lengths).unsqueeze(1)
            after = gru_cell(x.where(live, 0), h, w_ih, w_hh, b_ih, b_hh, reset_after)
            h, outputs[t] = after.where(live, h), after.where(live, 0)
    return torch.stack(outputs) if outputs else input.new_empty(0, N, h0.shape[1]), h
