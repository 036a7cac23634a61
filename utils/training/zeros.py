"""What a new run begins from, and which of its weights are zero: by a file, by a schedule, or none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from models import takes_linear
from utils.files.checkpoint import check_network, load_checkpoint, load_weights
from utils.files.record import unseen_images
from utils.halo.gradual import GradualPruning
from utils.halo.masks import FixedZeros
from utils.halo.parameters import prunable_weights
from utils.halo.pruning import overall_sparsity, sparsity_per_layer
from utils.logger import warn
from utils.options import OptionError
from utils.run import RUN_FILES
from utils.training.fingerprint import had_images

if TYPE_CHECKING:
    from utils.training.experiment import Experiment


def begin(run: Experiment) -> None:
    """Begin a new run as --start, --mask and --gmp say.

    Raises:
        CheckpointError: a file is unusable or of another network.
        OptionError: a file lies where the run will write, or --mask has zeros that cannot be kept.
        ValueError: --mask names a network without zeros.
    """
    args = run.args
    for path in filter(None, (args.start, args.mask)):
        place = Path(path).resolve()
        if place.name in RUN_FILES and place.parent == run.folder.resolve():
            raise OptionError(f"{path} lies in --save_dir, whose run would replace it: choose another --save_dir")
    if args.start:
        state = load_checkpoint(args.start)
        load_weights(run.model, state["state_dict"], path=args.start)
        note_seen_images(run, state)
        share = overall_sparsity(sparsity_per_layer(weights_of(run)))
        if args.gmp and share > 0.01:
            warn(f"{share:.0%} of the weights of {args.start} are zero; --gmp begins from none, so that they come back")
    run.zeros = make_zeros(run, read_masks(run, args.mask) if args.mask else None)


def note_seen_images(run: Experiment, state: dict) -> None:
    """Say so where a network was trained on images of this data set that are now to be held out, and record it.

    Which are held out goes by position, so of images that are others, or in another order, nobody can tell.
    """
    path, config, wanted = run.args.start, state.get("config"), run.args.val_split
    if not wanted or (isinstance(config, dict) and config.get("dataset") != run.args.dataset):
        return
    if isinstance(config, dict) and not state.get("epoch") and not config.get("start"):
        return
    unseen = unseen_images(state)
    if unseen is None or not had_images(run.data, state):
        run.args.unseen = None  # with the options, so that nothing that this run writes claims to know it
        what = (
            "does not say on what it was trained"
            if unseen is None
            else "was trained on other images, or in another order"
        )
        warn(f"{path} {what}: whether on those now held out is not known")
    elif unseen < wanted:
        run.args.unseen = unseen  # with the options, so that all that this run writes records it
        seen = f"{path} was trained on {wanted - unseen} of the {wanted} held-out images"
        warn(f"{seen}: accuracy on them says too much" + (f"; --val_split {unseen} is safe" if unseen else ""))


def read_masks(run: Experiment, path: str) -> dict[str, Tensor]:
    """Return where the prunable weights of a file are zero, and warn of layers in which all are.

    Raises:
        CheckpointError: the file is unusable or of another network.
        ValueError: there is no zero in it.
        OptionError: it was pruned with its Linear layers, and they take no part here.
    """
    state = load_checkpoint(path)
    state_dict = state["state_dict"]
    check_network(run.model, state_dict, path=path)
    there = takes_linear(run.args.arch, run.model, asked=state.get("config", {}).get("linear") is True)
    if there and not takes_linear(run.args.arch, run.model, asked=bool(run.args.linear)):
        raise OptionError(f"--mask {path} was pruned with Linear layers, which take no part in this run: add --linear")
    masks = {name: state_dict[name] == 0 for name in weights_of(run)}
    if not any(mask.any() for mask in masks.values()):
        raise ValueError(f"{path} has no zeros to keep: prune it first, or leave --mask out")
    for name, mask in masks.items():
        if mask.all():
            warn(f"--mask {path}: no weight is left in {name}, and none will come back")
    return masks


def weights_of(run: Experiment) -> dict[str, Tensor]:
    """Return the prunable weights of a run."""
    return prunable_weights(run.model, linear=takes_linear(run.args.arch, run.model, asked=bool(run.args.linear)))


def make_zeros(run: Experiment, masks: dict[str, Tensor] | None) -> FixedZeros | None:
    """Return what holds weights of a run at zero, None where nothing does.

    Args:
        run: with its options.
        masks: where, with --mask.
    """
    args = run.args
    if args.mask:
        return FixedZeros(weights_of(run), masks)
    if not args.gmp:
        return None
    first, last = (round(epoch * len(run.train_loader)) for epoch in args.gmp_epochs)
    end = max(last, 1)  # never later than the epoch that was asked for: the run may end there
    steps = {"begin": min(first, end - 1), "end": end}
    lam = {"lambdas": run.penalty.lambdas, "lam_optimizer": next(iter(run.optimizers[1:]), None)}
    return GradualPruning(weights_of(run), optimizer=run.optimizers[0], sparsity=args.gmp, **lam, **steps)


def restore(run: Experiment, state: dict) -> None:
    """Hold at zero what a checkpoint of the run says."""
    run.zeros = make_zeros(run, state["zeros"]["masks"] if run.args.mask else None)
    if run.zeros:
        run.zeros.load_state_dict(state["zeros"])


def describe_zeros(run: Experiment) -> dict:
    """Return what config.json and the checkpoints say of --mask: where it is from, how many zeros, of how many."""
    if not run.args.mask:
        return {}
    return {"mask": {"source": run.args.mask, "zeros": run.zeros.zeros, "prunable": run.zeros.total}}


def sparsity(run: Experiment) -> dict[str, float]:
    """Return the fraction of zeros among the prunable weights as `sparsity`, where a run holds some at zero."""
    return {"sparsity": overall_sparsity(sparsity_per_layer(run.zeros.weights))} if run.zeros else {}
