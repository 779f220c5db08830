"""What fastarch is compared with: other ways to run the same torch module. Each returns a function of no arguments."""

import copy
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn


def eager(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: module(*inputs)


def channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    inputs = tuple(like(t, t.detach().to(memory_format=torch.channels_last)) for t in inputs)
    return lambda: module(*inputs)


def compiled(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    torch._dynamo.reset()
    run = torch.compile(module)
    return lambda: run(*inputs)


def frozen(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """torch.compile with the weights frozen and repacked; for inference."""
    torch._dynamo.reset()
    run = torch.compile(module, options={"freezing": True})
    return lambda: run(*inputs)


def onnx_model(module: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(module, inputs, dynamo=True, verbose=False).save(file)
    return file.getvalue()


def onnxruntime(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(onnx_model(module, inputs), options, providers=["CPUExecutionProvider"])
    feed = {i.name: t.detach().numpy() for i, t in zip(session.get_inputs(), inputs)}
    return lambda: session.run(None, feed)


def openvino(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(core.read_model(io.BytesIO(onnx_model(module, inputs))), "CPU", settings)
    request = model.create_infer_request()
    feed = dict(enumerate(t.detach().numpy() for t in inputs))
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


INFERENCE = {
    "eager": eager,
    "channels_last": channels_last,
    "compile": compiled,
    "freezing": frozen,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
TRAINING = {"eager": eager, "channels_last": channels_last, "compile": compiled}


def like(before: Tensor, after: Tensor) -> Tensor:
    return after.requires_grad_(before.requires_grad)
