"""What fastarch is compared with: other ways to run the same torch module."""

import copy
import io
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """A prepared module: run() gives its output; gradients are taken at `inputs` and the module's parameters."""

    run: Callable[[], Tensor]
    module: nn.Module
    inputs: tuple[Tensor, ...]


def eager(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    module = copy.deepcopy(module)
    return Call(lambda: module(*inputs), module, inputs)


def channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    inputs = tuple(
        t.detach().contiguous(memory_format=torch.channels_last).requires_grad_(t.requires_grad) for t in inputs
    )
    return Call(lambda: module(*inputs), module, inputs)


def compiled(module: nn.Module, inputs: tuple[Tensor, ...], **options) -> Call:
    module = copy.deepcopy(module)
    run = torch.compile(module, options=options or None)
    return Call(lambda: run(*inputs), module, inputs)


def autotuned(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """torch.compile at its best, in channels_last. Its CUDA graphs stay off: nobody else here uses any."""
    call = channels_last(module, inputs)
    run = torch.compile(call.module, mode="max-autotune-no-cudagraphs")
    return Call(lambda: run(*call.inputs), call.module, call.inputs)


def frozen(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    """torch.compile with the weights constant and repacked."""
    return compiled(module, inputs, freezing=True)


def onnx_model(module: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(copy.deepcopy(module), inputs, dynamo=True, verbose=False).save(file)
    return file.getvalue()


def onnxruntime(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(onnx_model(module, inputs), options, providers=["CPUExecutionProvider"])
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs)}
    return Call(lambda: torch.from_numpy(session.run(None, feed)[0]), module, inputs)


def openvino(module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(core.read_model(io.BytesIO(onnx_model(module, inputs))), "CPU", settings)
    request = model.create_infer_request()
    feed = dict(enumerate(t.numpy() for t in inputs))
    return Call(lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0]), module, inputs)


CPU = {"eager": eager, "channels_last": channels_last, "compile": compiled}
CPU_INFERENCE = CPU | {"freezing": frozen, "onnxruntime": onnxruntime, "openvino": openvino}
GPU = {"eager": eager, "channels_last": channels_last, "max-autotune": autotuned}
ALL = CPU_INFERENCE | GPU


def of(device: torch.device, mode: str) -> dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Call]]:
    """By name, what there is to compare with."""
    return GPU if device.type == "cuda" else CPU_INFERENCE if mode == "inference" else CPU
