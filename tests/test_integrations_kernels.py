"""Hugging Face's kernels puts our forwards into layers of torch.nn's attributes, by its own loader and checks."""

import copy

import pytest
import torch
from torch import nn

import fastarch
from fastarch import extension

pytest.importorskip("kernels")
from fastarch.integrations.kernels import layers, mapping
from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

LAYERS = {
    name: use_kernel_forward_from_hub(name)(type(name, (getattr(nn, name),), {})) for name in layers.__all__
}  # classes of a user's own: torch.nn's stay as they are
SEQUENCE = torch.nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
CASES = {
    "BatchNorm1d": (lambda layer: layer(3), (torch.randn(8, 3),)),
    "BatchNorm2d": (lambda layer: layer(3, momentum=None), (torch.randn(4, 3, 5, 5),)),
    "BatchNorm3d": (lambda layer: layer(3, affine=False), (torch.randn(4, 3, 2, 5, 5),)),
    "GRU": (lambda layer: layer(3, 4, num_layers=2, bidirectional=True), (torch.randn(7, 2, 3), torch.randn(4, 2, 4))),
    "GRU packed": (lambda layer: layer(3, 4, bias=False), (SEQUENCE,)),
    "GRUCell": (lambda layer: layer(3, 4), (torch.randn(2, 3),)),
    "MultiheadAttention": (lambda layer: layer(8, 2, batch_first=True), (*torch.randn(3, 2, 5, 8), None, False)),
}
MODES = {
    "inference": Mode.INFERENCE,
    "training": Mode.TRAINING,
    "compiled": Mode.TRAINING | Mode.TORCH_COMPILE,
}


def kernelized(layer: nn.Module, mode: Mode, **options) -> nn.Module:
    with use_kernel_mapping(mapping(), inherit_mapping=False):
        return kernelize(copy.deepcopy(layer).train(Mode.TRAINING in mode), device="cpu", mode=mode, **options)


def tensors(results) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for result in results if result is not None for t in tensors(result)] if results is not None else []


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in CASES for mode in MODES if not (mode == "compiled" and case in ("GRU", "GRU packed"))],
)
def test_a_kernelized_layer_computes_the_same(case, mode):
    build, arguments = CASES[case]
    name = case.split()[0]
    torch.manual_seed(0)
    plain = build(LAYERS[name])
    layer = kernelized(plain, MODES[mode], use_fallback=False)
    plain.train(layer.training)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if mode == "compiled" else layer
    got, want = tensors(call(*arguments)), tensors(plain(*arguments))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    for model, results in ((layer, got), (plain, want)):
        if any(p.requires_grad for p in model.parameters()):
            results[0].square().sum().backward()
    for (parameter, p), (_, q) in zip(layer.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=parameter)
    for buffer, t in layer.named_buffers():
        torch.testing.assert_close(t, plain.get_buffer(buffer), msg=buffer)


@pytest.mark.skipif(extension.cpu is None, reason="fastarch._C is not built")
@pytest.mark.parametrize("case", CASES)
def test_our_kernels_serve_it(case):
    build, arguments = CASES[case]
    plain = build(LAYERS[case.split()[0]])
    assert fastarch.explain(plain, *arguments, timed=False) == []
    calls = fastarch.explain(kernelized(plain, Mode.INFERENCE), *arguments, timed=False)
    assert calls
    assert all(call.kernel.startswith(f"cpu-{extension.isa} ") for call in calls)


def test_what_torch_compile_refuses_keeps_its_forward():
    layer = kernelized(LAYERS["GRU"](3, 4), Mode.INFERENCE | Mode.TORCH_COMPILE)
    assert fastarch.explain(layer, torch.randn(5, 2, 3), timed=False) == []
    with pytest.raises(ValueError, match="does not support mode"):
        kernelized(LAYERS["GRU"](3, 4), Mode.INFERENCE | Mode.TORCH_COMPILE, use_fallback=False)


def test_attributes_of_our_own_layers_count():
    """Of a class of a user's own on them, with the arguments of torch.nn's, which kernels insists on."""

    @use_kernel_forward_from_hub("BatchNorm2d")
    class Ours(fastarch.nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input)

    plain, x = Ours(3, activation="relu"), torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(kernelized(plain, Mode.TRAINING)(x), plain(x))


def test_every_name_is_one_of_torch_nn_for_cpus_and_cuda():
    assert {name: [*devices] for name, devices in mapping().items()} == {
        name: ["cpu", "cuda"] for name in layers.__all__
    }
    assert all(hasattr(nn, name) and hasattr(fastarch.nn, name) for name in layers.__all__)
