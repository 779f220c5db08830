"""Shapes and options that gru is tested on, and the results to hold it against."""

import importlib
from typing import NamedTuple

import torch
from closeness import assert_close
from torch import Tensor

from fastarch.ref.gru import gru as reference

op = importlib.import_module("fastarch.ops.gru")  # the module, not the function of its name

GRADIENTS = ("dx", "dh0", "dw_ih", "dw_hh", "db_ih", "db_hh")


class Case(NamedTuple):
    """x [T, N, C], h [N, H], the direction, which biases there are, and whether sequences differ in length."""

    T: int
    N: int
    C: int
    H: int
    reverse: bool = False
    lengths: bool = False
    reset_after: bool = True
    b_ih: bool = True
    b_hh: bool = True

    def __str__(self) -> str:
        options = [name for name in ("reverse", "lengths") if getattr(self, name)]
        options += [f"no_{name}" for name in ("b_ih", "b_hh") if not getattr(self, name)]
        options += [] if self.reset_after else ["reset_before"]
        return "_".join([f"T{self.T}", f"N{self.N}", f"C{self.C}", f"H{self.H}", *options])

    @property
    def options(self) -> dict:
        return {"reverse": self.reverse, "reset_after": self.reset_after}


CASES = [
    Case(1, 1, 1, 1),
    Case(7, 3, 5, 9),
    Case(5, 2, 3, 4, reverse=True),
    Case(6, 5, 4, 7, lengths=True),
    Case(6, 5, 4, 7, reverse=True, lengths=True),
    Case(4, 17, 33, 65),  # one past a block of any kernel, in every dimension
    Case(3, 40, 16, 48, b_ih=False),
    Case(3, 9, 20, 31, b_hh=False, reverse=True),
    Case(9, 1, 12, 50, b_ih=False, b_hh=False),
    Case(70, 2, 6, 10),
    Case(2, 33, 70, 129, lengths=True),
    Case(1, 64, 24, 40),
    Case(300, 1, 2, 3, lengths=True),
    *(
        Case(T, N, C, H, reverse, lengths, False, b_ih, b_hh)
        for T, N, C, H, reverse, lengths, b_ih, b_hh in (
            (7, 3, 5, 9, False, False, True, True),
            (6, 5, 4, 7, True, True, True, False),
            (4, 17, 33, 65, False, True, False, True),
            (9, 1, 12, 50, True, False, False, False),
        )
    ),
]

ONE_STEP = [  # weights are used as they stand, along the sum for few sequences, across many; and packed for 140
    Case(1, 1, 40, 130),
    Case(1, 5, 300, 37, lengths=True),
    Case(1, 12, 33, 129, reset_after=False),
    Case(1, 13, 33, 129, reset_after=False, lengths=True, b_hh=False),
    Case(1, 70, 300, 150, b_ih=False),
    Case(1, 128, 7, 200, reset_after=False),
    Case(1, 140, 30, 90),
]

PLAIN = Case(5, 3, 4, 6)
FULL = Case(6, 5, 7, 18, reverse=True, lengths=True)
BEFORE = FULL._replace(reset_after=False)


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    """The arguments by name, from the seed; weights as torch.nn.GRU initialises them, twice as large, but those of more
    inputs than units smaller: of 54 inputs and one unit gates differed by 1e-6 in torch too, and by luck not at all."""
    T, N, C, H = case[:4]

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(shape) - 1) * 2 * max(H, shape[-1] if len(shape) == 2 else 1) ** -0.5

    drawn = {"input": torch.randn(T, N, C), "h0": torch.randn(N, H).clamp(-1, 1)}
    drawn |= {"w_ih": uniform(3 * H, C), "w_hh": uniform(3 * H, H)}
    drawn |= {name: uniform(3 * H) if getattr(case, name) else None for name in ("b_ih", "b_hh")}
    drawn = {name: t if t is None else t.to(device, dtype) for name, t in drawn.items()}
    lengths = torch.randint(0, T + 1, (N,)) if case.lengths else None
    if lengths is not None and N > 2:
        lengths[0], lengths[-1] = T, 0
    return drawn | {"lengths": lengths if lengths is None else lengths.to(device)}


def draw_gradients(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Of the output and of the last state."""
    return tuple(torch.randn(shape).to(device, dtype) for shape in ((case.T, case.N, case.H), (case.N, case.H)))


def run(function, drawn: dict[str, Tensor | None], gradients=None, **options) -> dict[str, Tensor]:
    """The output, the last state and, with the gradients of both, every gradient by name."""
    leaves = {k: t.detach().requires_grad_() for k, t in drawn.items() if t is not None and k != "lengths"}
    output, h_n = function(**drawn | leaves, **options)
    results = {"output": output.detach(), "h_n": h_n.detach()}
    if gradients is not None:
        names = dict(zip(("input", "h0", "w_ih", "w_hh", "b_ih", "b_hh"), GRADIENTS))
        grads = torch.autograd.grad((output, h_n), list(leaves.values()), gradients)
        results |= {names[k]: g for k, g in zip(leaves, grads)}
    return results


def in_torch(**arguments) -> tuple[Tensor, Tensor]:
    return reference(**arguments)


def double(drawn: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: t if t is None or name == "lengths" else t.double() for name, t in drawn.items()}


def compare(function, case: Case, dtype: torch.dtype, device: str = "cpu", most: int = 50) -> None:
    """Values and every gradient, by the rule of closeness.py, over some draws together: the greatest error of one draw
    can be small by eager's luck, the more so the fewer elements there are; `most` is for what takes long."""
    results = []
    for _ in range(2 if case.T >= 300 else min(most, max(6, 4000 // (case.T * case.N * case.H)))):
        drawn, gradients = draw(case, dtype, device), draw_gradients(case, dtype, device)
        got = run(function, drawn, gradients, **case.options)
        eager = run(in_torch, drawn, gradients, **case.options)
        truth = run(in_torch, double(drawn), [g.double() for g in gradients], **case.options)
        assert got.keys() == truth.keys()
        results.append((got, eager, truth))
    for name in results[0][-1]:
        assert_close(name, *(torch.stack([of[name] for of in each]) for each in zip(*results)))


def arguments_of_fwd(case: Case, dtype: torch.dtype, save_gates: bool = True) -> dict:
    return draw(case, dtype) | case.options | {"save_gates": save_gates, "algorithm": "sequence"}


def arguments_of_bwd(case: Case, dtype: torch.dtype) -> dict:
    given = arguments_of_fwd(case, dtype)
    output, _, gates = op.fwd(**given)
    saved = dict(zip(("grad_output", "grad_h_n"), draw_gradients(case, dtype)))
    saved |= {name: given[name] for name in ("input", "h0", "w_ih", "w_hh")}
    saved |= {"output": output, "gates": gates, "lengths": given["lengths"]} | case.options
    return saved | {"algorithm": "sequence", "output_mask": [True] * 6}
