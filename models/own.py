"""Networks that are not of this project, named as module:function."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = ("benchmarks", "models", "results", "tests", "utils")  # folders with code
GIVEN = ("preprocess", "class_names")  # attributes of a network that load_model returns
SIZES_TO_TRY = (8, 16, 24, 28, 32, 40, 48, 64, 96, 128, 160, 192, 224, 256)


def import_network(name: str, *, here: bool) -> Callable[..., nn.Module]:
    """Return the callable that `module:function` names.

    Args:
        name: with a colon.
        here: also look into the current directory. If not, it is left out also where Python has put it on the path,
            since the script lies there; not where PYTHONPATH names it. So is all of this project.

    Raises:
        ValueError: there is none, or importing it failed.
    """
    module, _, function = name.partition(":")
    if here and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing installed is hidden
    try:
        if not module or module.partition(".")[0] in sys.stdlib_module_names:
            raise ImportError(f"{module!r} holds no networks")
        if not here and _is_here(module):
            raise ImportError(f"{module!r} is in the current directory")
        found = getattr(importlib.import_module(module), function)
        if not (inspect.isfunction(found) or inspect.isclass(found)):
            raise ImportError(f"{function!r} is no function or class")
        if not here and _is_ours(found):
            raise ImportError(f"{function!r} is of this project, not a network of your own")
    except Exception as error:  # whatever the user's module raises
        path = "the Python path or in the current directory" if here else "the Python path"
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"-a {name}: no such network on {path} ({reason}); give module:function") from error
    return found


def _is_ours(found: Callable) -> bool:
    """Return whether a function or class is of this project."""
    place = Path(inspect.getfile(inspect.unwrap(found))).resolve()
    return any(place.is_relative_to(REPOSITORY / folder) for folder in OURS)


def _is_here(module: str) -> bool:
    """Return whether a module that was not imported yet would come from the current directory."""
    here = Path.cwd()
    named = [Path(path).resolve() for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if module in sys.modules or here in named:
        return False
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    inside = [Path(place).resolve() for place in places if place and Path(place).resolve().is_relative_to(here)]
    # Not what is installed into an environment that lies here.
    return any(place.relative_to(here).parts[0].partition(".")[0] == package for place in inside)


def build_network(name: str, function: Callable[..., nn.Module], num_classes: int) -> nn.Module:
    """Call a function that makes a network.

    Raises:
        ValueError: it fails, or returns something else.
    """
    parameters = inspect.signature(function).parameters.values()
    by_name = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    try:
        model = function(num_classes=num_classes) if by_name else function(num_classes)
    except Exception as error:  # whatever the user's function raises
        raise ValueError(f"-a {name} failed with {num_classes} classes ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"-a {name} returned {type(model).__name__}: it must return a torch.nn.Module")
    return model


def check_network(name: str, model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Run a network of your own once in each mode, on two black images, so that a wrong one is noticed before training.

    Raises:
        ValueError: see `check_output`; or it returns something else in training, holds infinity, or has an attribute
            that `load_model` gives to a network.
    """
    check_output(name, model, shape, num_classes)
    _check_training(name, model, shape, torch.Size((2, num_classes)))
    _check_finite(name, model)
    for key in GIVEN:
        if hasattr(model, key):
            raise ValueError(f"-a {name} has {key!r}, which load_model gives to a network: name it otherwise")


def check_output(name: str, model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Run a network of your own once, in evaluation mode, on two black images.

    Raises:
        ValueError: it cannot take such images (with the sizes that it can take), or returns no logits.
    """
    found = _output_of(model, shape)
    if isinstance(found, Tensor) and found.shape == (2, num_classes):
        return
    got = tuple(found.shape) if isinstance(found, Tensor) else found
    size = "x".join(map(str, shape))
    works = [str(n) for n in SIZES_TO_TRY if isinstance(_output_of(model, (shape[0], n, n)), Tensor)]
    if isinstance(found, Tensor) or not works:
        raise ValueError(f"-a {name} must map two {size} images to logits (2, {num_classes}): it gives {got}")
    raise ValueError(f"-a {name} cannot take {size} images ({got}): of the sizes tried it takes {', '.join(works)}")


def _check_training(name: str, model: nn.Module, shape: tuple[int, int, int], wanted: torch.Size) -> None:
    """Raise ValueError if a network returns something else in training, as those of torchvision with aux_logits do.

    A copy runs, so that neither its running estimates nor torch's generators on a CPU or on CUDA move; those of Python
    and numpy are seeded anew for every epoch. What fails, the training itself will show.
    """
    images = torch.zeros(2, *shape, device=_device(model))
    try:
        with torch.no_grad(), torch.random.fork_rng([images.device] if images.is_cuda else []):
            found = copy.deepcopy(model).train()(images)
    except Exception:  # whatever the user's network raises
        return
    if not isinstance(found, Tensor) or found.shape != wanted:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"-a {name} must return logits {tuple(wanted)} in training too, it gives {got}: wrap it")


def _check_finite(name: str, model: nn.Module) -> None:
    """Raise ValueError if a buffer that a checkpoint would hold is infinite or NaN: none with such is read again."""
    buffers, kept = dict(model.named_buffers()), model.state_dict()
    for key in buffers.keys() & kept.keys():
        if not buffers[key].isfinite().all():
            remedy = "register a constant such as a mask with persistent=False"
            raise ValueError(f"-a {name}: {key} holds infinity or NaN before the training: {remedy}")


def _device(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)


def _output_of(model: nn.Module, shape: tuple[int, int, int]) -> object:
    """Return what a network makes of two black images, or a text that says why it cannot."""
    training = model.training
    try:
        with torch.no_grad():  # inference_mode would make what the network keeps useless for training
            output = model.eval()(torch.zeros(2, *shape, device=_device(model)))
        return output if isinstance(output, Tensor) else type(output).__name__
    except Exception as error:  # whatever the user's network raises
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        model.train(training)
