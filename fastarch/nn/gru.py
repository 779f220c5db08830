"""Layers of gru."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastarch import autocast, ops
from fastarch.nn.leaf import Leaf


class GRUCell(Leaf, nn.GRUCell):
    """h' = (1 - z) * n + z * h.   x [N, C] or [C], h and h' [N, H] or [H]; h None stands for 0.

    `torch.nn.GRUCell`'s arguments, defaults, errors and state_dict, and by keyword `reset_after` (False: the reset gate
    acts before the recurrent product). `fastarch.ops.gru_cell` states equations and precision.
    """

    def __init__(self, *args, reset_after: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.reset_after = reset_after

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        for what, t in {"input": input, "hx": hx}.items():
            if t is not None and t.dim() not in (1, 2):
                raise ValueError(f"GRUCell: want {what} of one or two dimensions, got {[*t.shape]}")
        shape = (*input.shape[:-1], self.hidden_size)
        check("GRUCell", input, hx, self.weight_ih, shape, RuntimeError)
        if hx is None:
            hx = input.new_zeros(shape)
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return ops.gru_cell(input, hx, *parameters, reset_after=self.reset_after)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class GRU(Leaf, nn.RNNBase):
    """Gated recurrent units over sequences, in layers, in one direction or both.

    x [T, N, C], [N, T, C] with batch_first, or [T, C]; h0 and h_n [layers * directions, N, H]; output as x, with H or,
    in both directions, 2H features. Or x and output as a PackedSequence, sorted or not.

    `torch.nn.GRU`'s arguments, defaults, initialisation, errors and state_dict, and by keyword `reset_after` (False:
    the reset gate acts before the recurrent product). `forward` takes, by keyword, `lengths` [N] of int64 on x's device
    instead of a PackedSequence: what lies behind counts for nothing, and the output there is 0. `fastarch.ops.gru`
    states equations and precision.

    It is a torch.nn.RNNBase but no torch.nn.GRU, because torch.compile refuses to trace whatever is one.
    """

    def __init__(self, *args, reset_after: bool = True, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("GRU: want no proj_size, which LSTM alone has")
        super().__init__("GRU", *args, **kwargs)
        if self.proj_size:  # by position
            raise ValueError("GRU: want no proj_size, which LSTM alone has")
        self.reset_after = reset_after

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("GRU: want lengths with a padded input, got them with a PackedSequence")
            return self.packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: want input of two or three dimensions, got {[*input.shape]}")
        if hx is not None and hx.dim() != input.dim():
            raise RuntimeError(f"GRU: want hx of {input.dim()} dimensions, as input has, got {[*hx.shape]}")
        if input.dim() == 3:
            output, h_n = self.layers(input.transpose(0, 1) if self.batch_first else input, hx, lengths)
            return output.transpose(0, 1) if self.batch_first else output, h_n
        if lengths is not None:
            raise ValueError(f"GRU: want lengths with a batch, got them with input {[*input.shape]}")
        output, h_n = self.layers(input.unsqueeze(1), hx if hx is None else hx.unsqueeze(1), None)
        return output.squeeze(1), h_n.squeeze(1)

    def layers(self, x: Tensor, hx: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [T, N, C] to the output of the last layer and the last states of all."""
        T, N, _ = x.shape
        directions = 2 if self.bidirectional else 1
        check("GRU", x, hx, self.weight_ih_l0, (self.num_layers * directions, N, self.hidden_size), ValueError)
        if T == 0:
            raise RuntimeError(f"GRU: want a sequence of at least one step, got {[*x.shape]}")
        parameters = self.all_weights
        states = [x.new_zeros(N, self.hidden_size)] * len(parameters) if hx is None else hx.unbind()
        last = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            outputs = []
            for i in range(directions * layer, directions * (layer + 1)):
                options = {"reverse": i % directions == 1, "lengths": lengths, "reset_after": self.reset_after}
                output, h_n = ops.gru(x, states[i], *parameters[i], **options)
                outputs.append(output)
                last.append(h_n)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        return x, torch.stack(last)

    def packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """Through a padded tensor in the order of the packed sequences, from the longest to the shortest."""
        data, batch_sizes, order, inverse = input
        if data.dim() != 2:
            raise RuntimeError(f"GRU: want packed data [steps, C], got {[*data.shape]}")
        if order is not None and hx is not None:
            hx = hx.index_select(1, order)
        T, total = len(batch_sizes), len(data)
        N = int(batch_sizes[0]) if order is None else len(order)
        if order is None and hx is not None and torch.compiler.is_compiling():
            N = hx.shape[-2]  # the same, but a size that the compiler knows
        # row `first[t] + n` of the data is step t of sequence n; padding stands for any row
        first = batch_sizes.cumsum(0) - batch_sizes
        sequences = torch.arange(N, device=batch_sizes.device)
        rows = (first.unsqueeze(1) + sequences).clamp(max=total - 1).flatten().to(data.device)
        lengths = (sequences < batch_sizes.unsqueeze(1)).sum(0).to(data.device)
        steps = torch.arange(T, device=batch_sizes.device).repeat_interleave(batch_sizes, output_size=total)
        places = (steps * N + torch.arange(total, device=batch_sizes.device) - first[steps]).to(data.device)

        output, h_n = self.layers(data.index_select(0, rows).view(T, N, -1), hx, lengths)
        output = output.flatten(0, 1).index_select(0, places)
        h_n = h_n if inverse is None else h_n.index_select(1, inverse)
        return PackedSequence(output, batch_sizes, order, inverse), h_n

    def flatten_parameters(self) -> None:
        """Nothing: our kernels take the weights from wherever they are."""

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


def check(
    name: str, input: Tensor, hx: Tensor | None, w_ih: Tensor, shape: tuple[int, ...], mixed: type[Exception]
) -> None:
    """What torch.nn's twin refuses, with its class of error; `mixed` is that for another dtype than the weights'."""
    casts = autocast.is_on(input.device.type)
    if input.dtype != w_ih.dtype and not casts:
        raise mixed(f"{name}: want input in {w_ih.dtype} as the weights, got {input.dtype}")
    if input.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(f"{name}: want input of {w_ih.shape[1]} features, got {[*input.shape]}")
    if hx is not None and hx.shape != shape:
        raise RuntimeError(f"{name}: want hx {[*shape]} for input {[*input.shape]}, got {[*hx.shape]}")
    if hx is not None and hx.dtype != input.dtype and not casts:
        raise RuntimeError(f"{name}: want hx in {input.dtype} as input, got {hx.dtype}")
    for what, t in {"hx": input if hx is None else hx, "weights": w_ih}.items():
        if t.device != input.device:
            raise RuntimeError(f"{name}: input is on {input.device}, {what} on {t.device}")
