"""Ways to run one network on one batch: torch's, ours, and engines that are measured where they are installed."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.halo import SparseNetwork, shrink

Call = Callable[[], object]


def eager(model: nn.Module, images: Tensor, *, layout: torch.memory_format = torch.channels_last) -> Call:
    """Return a call of the network as people run it: fp32, channels_last."""
    model, images = copy.deepcopy(model).to(memory_format=layout), images.to(memory_format=layout)
    return lambda: model(images)


def contiguous(model: nn.Module, images: Tensor) -> Call:
    """Return a call of the network in the layout that torch has unasked."""
    return eager(model, images, layout=torch.contiguous_format)


def compiled(model: nn.Module, images: Tensor) -> Call:
    """Return a call of torch.compile with frozen weights, channels_last."""
    torch._dynamo.reset()
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    fast = torch.compile(model, dynamic=False, options={"freezing": True})
    return lambda: fast(images)


def bf16(model: nn.Module, images: Tensor) -> Call:
    """Return a call of the network in bf16, channels_last."""
    return eager(copy.deepcopy(model).bfloat16(), images.bfloat16())


def sparse(model: nn.Module, images: Tensor) -> Call:
    """Return a call of halo.SparseNetwork."""
    fast = SparseNetwork(model)
    return lambda: fast(images)


def shrunk(model: nn.Module, images: Tensor) -> Call:
    """Return a call of the smaller dense network in torch."""
    return eager(shrink(model), images)


def _exported(model: nn.Module, images: Tensor, folder: str) -> str:
    path = str(Path(folder) / "network.onnx")
    torch.onnx.export(copy.deepcopy(model), (images,), path, dynamo=True, verbose=False)
    return path


def onnxruntime(model: nn.Module, images: Tensor) -> Call:
    """Return a call of onnxruntime, fp32."""
    import onnxruntime as engine

    options = engine.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow the others down
    with tempfile.TemporaryDirectory() as folder:
        session = engine.InferenceSession(_exported(model, images, folder), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def openvino(model: nn.Module, images: Tensor, *, precision: str = "f32") -> Call:
    """Return a call of OpenVINO."""
    import openvino as engine

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    with tempfile.TemporaryDirectory() as folder:
        core = engine.Core()
        network = core.compile_model(core.read_model(_exported(model, images, folder)), "CPU", settings)
    request, array = network.create_infer_request(), images.numpy()
    return lambda: request.infer([array], share_inputs=True)


def openvino_bf16(model: nn.Module, images: Tensor) -> Call:
    """Return a call of OpenVINO in bf16."""
    return openvino(model, images, precision="bf16")


ENGINES: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "torch eager": eager,
    "torch eager, contiguous": contiguous,
    "torch.compile": compiled,
    "torch bf16": bf16,
    "shrunk, torch eager": shrunk,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
    "OpenVINO bf16": openvino_bf16,
    "sparse": sparse,
}


def missing() -> list[str]:
    """Return the engines that cannot be measured here."""
    needs = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "OpenVINO": ("onnx", "onnxscript", "openvino")}
    needs["OpenVINO bf16"] = needs["OpenVINO"]
    return [name for name, packages in needs.items() if not all(map(find_spec, packages))]
