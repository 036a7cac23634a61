"""A network as files that other programs open: torch.export, ONNX, safetensors. Optional packages are imported here."""

from __future__ import annotations

import importlib
import io
import json
import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from utils.halo.fold import fold_batch_norm
from utils.logger import one_line
from utils.options import OptionError

PACKAGES = {"onnx": ("onnx", "onnxscript"), "safetensors": ("safetensors",)}  # what each option needs


def require_packages(kind: str) -> None:
    """Find out before the work whether the packages of an option are there.

    Raises:
        OptionError: one is not; with the command that installs it.
    """
    for package in PACKAGES[kind]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            remedy = "pip install -r requirements-deploy.txt"
            raise OptionError(f"--{kind} needs the package {package}, which is not installed: {remedy}") from error


@torch.no_grad()
def export(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """Return a network as a program of torch's operations alone, BatchNorm folded, for any number of images.

    Args:
        model: the network, in evaluation mode.
        shape: of one image.

    Raises:
        ValueError: torch.export cannot follow it.
    """
    images = torch.zeros(2, *shape)  # not 1, which torch.export would take for a constant
    try:
        batch = ({0: torch.export.Dim("batch")},)
        return torch.export.export(fold_batch_norm(model), (images,), dynamic_shapes=batch)
    except (RuntimeError, TypeError) as error:
        reason = one_line(error)
        raise ValueError(
            f"torch.export cannot follow {type(model).__name__} ({reason}): write it in torch's own "
            "operations, without branches that depend on the images"
        ) from error


def pt2_bytes(program: torch.export.ExportedProgram) -> bytes:
    """Return the file that torch.export.load opens."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


@torch.no_grad()
def run_pt2(content: bytes, images: Tensor) -> Tensor:
    """Return the logits that the network in such a file gives, as a program without this project gets them."""
    return torch.export.load(io.BytesIO(content)).module()(images)


def onnx_bytes(program: torch.export.ExportedProgram) -> bytes:
    """Return an ONNX file.

    Raises:
        ValueError: torch.onnx has no operation for one of the network's.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # else it tells of every optimisation
    try:
        buffer = io.BytesIO()
        torch.onnx.export(program, (), dynamo=True, verbose=False).save(buffer)
        return buffer.getvalue()
    except RuntimeError as error:
        reason = one_line(error)
        raise ValueError(f"torch.onnx cannot write this network ({reason}): leave --onnx out") from error
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def safetensors_bytes(model: nn.Module, state: Mapping) -> bytes:
    """Return a file of the weights by name, with what is needed to build and to feed the network as metadata.

    Args:
        model: the network.
        state: its checkpoint, which describes it.
    """
    from safetensors.torch import save

    config = {key: state["config"][key] for key in ("arch", "depth", "num_classes", "widths")}
    described = {"config": config} | {key: state.get(key) for key in ("preprocessing", "class_names")}

    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    return save(tensors, metadata={"format": "pt"} | {key: json.dumps(value) for key, value in described.items()})
