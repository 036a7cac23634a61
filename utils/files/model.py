"""A network from a file, in one call."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from models import build_model, fitting_arch
from models.own import GIVEN
from utils.files.checkpoint import CheckpointError, load_checkpoint, load_weights
from utils.files.preprocessing import unrecorded
from utils.files.record import Record, build_recorded, classes_of, read_record, require_known, same_network
from utils.options import OptionError


def load_model(path: str | Path, *, arch: str | None = None) -> nn.Module:
    """Return the network of a checkpoint or compact file, ready for evaluation.

    Args:
        path: any file that this project writes, or a checkpoint of the authors' release.
        arch: needed only for a network of your own that is not on the Python path, or that the file does not record:
            its `module:function`, which may then be in the current directory. Code beside a file does not run unasked.

    Returns:
        The network in evaluation mode, on the CPU. Its `preprocess` (`utils.files.preprocessing.Preprocessing`) turns
        a PIL image, or uint8 pixels, into its input; its `class_names` name its outputs, None where a file does not
        tell (the authors', and those of versions before 0.1.0).

    Raises:
        CheckpointError: the file is unusable, or of no network that can be built.
        OptionError: arch is another network than that of the file, or is needed.
    """
    state = load_checkpoint(path)
    record = read_record(state, path)
    if record is not None:
        model = _recorded(record, state, path, arch)
        preprocessing, names = record.preprocessing, record.class_names
    else:
        model = _fitting(state["state_dict"], path, arch)
        first = next(iter(state["state_dict"].values()))  # (out, in, H, W) of a convolution, (out, pixels) of a Linear
        preprocessing, names = unrecorded(None, first.shape[1] if first.dim() == 4 else 1), None
    load_weights(model, state["state_dict"], path=path)
    taken = [name for name in GIVEN if hasattr(model, name)]
    if taken:
        raise CheckpointError(f"{path} is of a network that has {taken[0]!r} itself: name it otherwise, or build it")
    model.preprocess, model.class_names = preprocessing, names
    return model.eval()


def _recorded(record: Record, state: dict, path: str | Path, arch: str | None) -> nn.Module:
    if arch is None:
        require_known(record, path)
    elif not same_network(arch, record.arch):
        raise OptionError(f"{path} is of {record.network}, not of {arch}")
    return build_recorded(record.arch, record.num_classes, record.depth, state, path)


def _fitting(state_dict: dict[str, Tensor], path: str | Path, arch: str | None) -> nn.Module:
    """Build the network that was named, with the classes of the last matrix, or the one that the weights fit."""
    if arch is not None:
        return build_model(arch, classes_of(state_dict))
    fit = fitting_arch(state_dict)
    if fit is None:
        raise CheckpointError(f"{path} does not record its network, and its weights fit none here: name it as arch=")
    return build_model(*fit)
