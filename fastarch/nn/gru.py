"""Layers of gru."""

from torch import Tensor, nn

from fastarch import ops


class GRUCell(nn.GRUCell):
    """h' = (1 - z) * n + z * h.   x [N, C] or [C], h and h' [N, H] or [H]; h None stands for 0.

    `torch.nn.GRUCell`'s arguments, defaults, errors and state_dict, and by keyword `reset_after` (False: the reset gate
    acts before the recurrent product). `fastarch.ops.gru_cell` states precision and errors.
    """

    def __init__(self, *args, reset_after: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.reset_after = reset_after

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if hx is None:
            hx = input.new_zeros(*input.shape[:-1], self.hidden_size)
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return ops.gru_cell(input, hx, *parameters, reset_after=self.reset_after)
