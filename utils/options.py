"""Command-line options shared by the scripts, and the rules between them. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from utils.command_line import SMALLEST, OptionError, Parser, architecture, real, whole

__all__ = ["OptionError", "Parser", "real", "whole"]  # handed on, so that a script needs this module alone

# The coefficients that each penalty has, with their defaults. Those of HALO are the release's; MCP with them would
# do nothing (it is flat beyond |w| = psi * xi), so it starts from a threshold of 0.1.
PENALTIES: dict[str, dict[str, float]] = {
    "none": {},
    "halo": {"xi": 1e-8, "psi": 1e-8, "lambda_init": 1.0},
    "l1": {"xi": 1e-8, "lambda_init": 1.0},
    "ws": {"xi": 1e-8, "psi": 1e-8, "lambda_init": 1.0},
    "mcp": {"xi": 1e-4, "psi": 1e3},
}
MEANINGS = {
    "halo": "one learned coefficient per weight",
    "l1": "lasso",
    "ws": "SWS: lasso with one learned strength",
    "mcp": "minimax concave penalty",
}
MOST_SEED = 2**64 - 1  # that torch takes
LARGEST_SIDE = 2048  # of an image: one batch of larger ones fits into no memory
DEVICES = ["auto", "cpu", "cuda", "mps"]
LEARNED = ("halo", "ws")  # penalties with a trained lam, hence an optimizer of its own


def _default_text(default: str | None, *, recorded: bool) -> str:
    """Say what stands for an option that is None because the checkpoint tells it, all the time or when pruning."""
    if not recorded:
        return ""
    return f" (default: {f'{default}, when pruning ' if default else ''}what the checkpoint records)"


def add_data(
    parser: argparse.ArgumentParser, datasets: Iterable[str], *, default: str | None = None, recorded: bool = False
) -> None:
    """Add the options that choose the images; with `recorded`, None stands for what the checkpoint records."""
    group = parser.add_argument_group("data")
    text = "which images" + _default_text(default, recorded=recorded)
    value = None if recorded else default
    group.add_argument("-d", "--dataset", choices=list(datasets), default=value, help=text)
    group.add_argument("--data", default="data", metavar="DIR", help="folder that holds the images")
    group.add_argument("--test_batch", type=whole(1), default=500, metavar="N", help="batch size of evaluation")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the options of your own images, and of the augmentation."""
    add = parser.add_argument_group("your own images (-d folder), and augmentation").add_argument
    text = "height and width; the shorter side is resized, the centre cropped (default: 32)"
    add("--image_size", type=whole(1, high=LARGEST_SIDE), metavar="N", help=text)
    text = "random crops after black borders of N pixels, 0 for none (default: 4, MNIST 0)"
    add("--padding", type=whole(0), metavar="N", help=text)
    add("--no_flip", action="store_true", help="show no mirror images: for writing, or whatever has a left and a right")


# What the options of `add_images` are where a script lacks them, or where an older version has written the options.
NO_IMAGE_OPTIONS = {"image_size": None, "padding": None, "no_flip": False}


def add_model(
    parser: argparse.ArgumentParser,
    archs: Iterable[str],
    *,
    default: str | None = None,
    own: bool = True,
    recorded: bool = False,
) -> None:
    """Add the options that choose the network; with `recorded`, None stands for what the checkpoint records."""
    group, names = parser.add_argument_group("network"), list(archs)
    text = ", ".join(names) + (", or module:function for a network of your own" if own else "")
    parse = architecture(names, own=own)
    text += _default_text(default, recorded=recorded)
    value = None if recorded else default
    group.add_argument("-a", "--arch", type=parse, default=value, metavar="ARCH", help=text)
    group.add_argument("--depth", type=whole(1), help="depth of the network (default: what the arch implies)")


def add_penalty(parser: argparse.ArgumentParser) -> None:
    """Add the penalties and their coefficients."""
    group = parser.add_argument_group("penalty (one at most)")
    flags = group.add_mutually_exclusive_group()
    for name, text in MEANINGS.items():
        flags.add_argument(f"--{name}", dest="penalty", action="store_const", const=name, default="none", help=text)
    add = group.add_argument
    add("--xi", type=real(0), help="strength of the penalty on |w| (default: 1e-8, for MCP 1e-4)")
    add("--psi", type=real(0), help="pull on lam (HALO, SWS; default: 1e-8), concavity (MCP; default: 1000)")
    limit = 1 / SMALLEST  # its square is a number, too
    add("--lambda_init", type=real(-limit, high=limit, nonzero=True), help="starting value of lam (default: 1)")
    add("--reg_lr", type=real(0), help="learning rate of lam (default: that of the weights)")
    add("--reg_wd", type=real(0), help="weight decay of lam (default: that of the weights)")
    add("--released_lr", action="store_true", help="decay as the release does: lam twice a milestone")


def add_linear(parser: argparse.ArgumentParser) -> None:
    """Add the option that takes the Linear layers of a network of the user's own."""
    group = parser.add_argument_group("network of your own")
    text = "penalise and prune its Linear and attention layers beside its convolutions"
    group.add_argument("--linear", action="store_const", const=True, help=text)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of stochastic gradient descent."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole(1), default=160, metavar="N", help="passes over the training images")
    add("--train_batch", type=whole(1), default=64, metavar="N", help="batch size, over all processes")
    add("--lr", type=real(0), default=0.1, help="learning rate")
    add("--momentum", type=real(0), default=0.9, help="momentum, of the weights and of lam")
    add("--wd", type=real(0), default=1e-4, help="weight decay")
    add("--schedule", type=whole(1), nargs="*", default=[80, 120], metavar="EPOCH", help="decay after these epochs")
    add("--gamma", type=real(0), default=0.1, help="factor of each decay")
    text = "hold N training images out, choose the best epoch on them, read the test set once at the end"
    add("--val_split", type=whole(0), default=0, metavar="N", help=text)
    text = "with --val_split, leave the test images alone at the end too"
    add("--no_test", action="store_true", help=text)
    text = "compute the network in bf16, or in fp16 with a scaled loss; weights and penalty stay in fp32"
    add("--amp", choices=["bf16", "fp16"], nargs="?", const="bf16", help=text)
    add("--compile", action="store_true", help="compile the network: up to a minute the first time, then cached")


def add_zeros(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a run begins from, and which of its weights are zero."""
    add = parser.add_argument_group("beginning, and zeros (docs/after_pruning.md)").add_argument
    add("--start", metavar="FILE", help="begin a new run from the weights of a checkpoint or compact file")
    add("--mask", metavar="FILE", help="the prunable weights that are zero in FILE stay zero from first to last step")
    text = "gradual magnitude pruning: the fraction of zeros rises to P while training (Zhu and Gupta 2017)"
    add("--gmp", type=real(0, high=1, nonzero=True), metavar="P", help=text)
    text = "when it rises, in epochs (default: from 1/12 to 2/3 of all)"
    add("--gmp_epochs", type=real(0), nargs=2, metavar=("A", "B"), help=text)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run: where it writes, where it computes, what it starts from."""
    add = parser.add_argument_group("run").add_argument
    add("--save_dir", metavar="DIR", help="the outputs (default: runs/<dataset>_<arch>_<penalty>_seed<k>)")
    add("--overwrite", action="store_true", help="replace the run that --save_dir holds")
    add("--resume", metavar="FILE", help="continue from this checkpoint")
    add("-e", "--evaluate", action="store_true", help="evaluate --resume on the test images and stop")
    add("--seed", type=whole(0, high=MOST_SEED), default=1, help="seed of every random generator")
    add("--device", choices=DEVICES, default="auto", help="where to compute")


def resolve(args: argparse.Namespace, *, depth_of: Callable[[str, int | None], int | None]) -> None:
    """Check the rules between options and replace the Nones by what they stand for, in place.

    Args:
        args: the parsed options.
        depth_of: maps an arch and a depth or None to the depth, or raises ValueError (`models.resolve_depth`).

    Raises:
        OptionError: an option does not go with the others.
    """
    resolve_depth_option(args, depth_of)
    if args.dataset == "folder":
        from_file = args.resume or args.start or args.mask
        args.image_size = args.image_size or (None if from_file else 32)  # None: what the file has
    elif args.image_size is not None:
        raise OptionError(f"--image_size is for -d folder: the images of {args.dataset} have one size")
    resolve_penalty(args)
    if args.momentum >= 1:
        raise OptionError(f"--momentum {args.momentum:g}: no step would ever fade; give less than 1, such as 0.9")
    if args.no_test and not args.val_split:
        raise OptionError("--no_test leaves nothing to choose the best epoch on: add --val_split N")
    if args.linear and ":" not in args.arch:
        raise OptionError(
            f"--linear is for networks of your own; what takes part in {args.arch} is settled: leave it out"
        )
    if args.evaluate and args.no_test:
        raise OptionError("--evaluate reads the test images, --no_test leaves them alone: give one of them")
    if args.evaluate and not args.resume:
        raise OptionError("--evaluate needs the checkpoint to evaluate: add --resume FILE")
    resolve_zeros(args)
    if args.save_dir is None:
        args.save_dir = f"runs/{args.dataset}_{args.arch.replace(':', '_')}_{args.penalty}_seed{args.seed}"


def resolve_penalty(args: argparse.Namespace) -> None:
    """Replace the coefficients that were not given by those of the penalty, in place.

    Raises:
        OptionError: the penalty does not have what was given.
    """
    coefficients, learned = PENALTIES[args.penalty], args.penalty in LEARNED
    for name in ("xi", "psi", "lambda_init"):
        if getattr(args, name) is None:
            setattr(args, name, coefficients.get(name))
        elif name not in coefficients:
            _useless(f"--{name}", args.penalty)
    for name, inherited in (("reg_lr", args.lr), ("reg_wd", args.wd)):
        if getattr(args, name) is None:
            setattr(args, name, inherited if learned else None)
        elif not learned:
            _useless(f"--{name}", args.penalty)
    if args.released_lr and not learned:
        _useless("--released_lr", args.penalty)
    if args.penalty == "mcp" and args.psi == 0:
        raise OptionError("--psi 0 makes MCP divide by zero: give a positive number")


def resolve_zeros(args: argparse.Namespace) -> None:
    """Check the options of beginning and zeros, and say when --gmp prunes unless a checkpoint will, in place.

    Raises:
        OptionError: they do not go together.
    """
    if args.start and args.resume:
        raise OptionError("--start begins a new run, --resume continues one, which holds its weights: give one of them")
    if args.mask and args.gmp:
        raise OptionError("--mask fixes the zeros, --gmp chooses them: give one of them")
    if args.evaluate and (args.mask or args.gmp):
        raise OptionError(f"--{'mask' if args.mask else 'gmp'} does nothing with --evaluate: leave it out")
    if args.gmp and not args.gmp_epochs and not args.resume:
        args.gmp_epochs = [args.epochs / 12, args.epochs * 2 / 3]
    check_gmp(args)


def check_gmp(args: argparse.Namespace) -> None:
    """Raise unless the epochs of --gmp lie within the run.

    Raises:
        OptionError: they do not, or there are none to be given.
    """
    if not args.gmp_epochs:
        return
    if not args.gmp:
        raise OptionError("--gmp_epochs does nothing without --gmp P: leave it out")
    first, last = args.gmp_epochs
    if not first < last <= args.epochs:
        raise OptionError(f"--gmp_epochs {first:g} {last:g} must be A < B <= --epochs {args.epochs}")


def add_prune(parser: argparse.ArgumentParser, schemes: Iterable[str]) -> None:
    """Add the options of pruning."""
    add = parser.add_argument_group("pruning").add_argument
    text = "fractions of the weights to remove, in [0, 1]; each from the same starting weights"
    add("--percent", type=real(0, high=1), nargs="+", metavar="P", help=text)
    text = "of which weights: those that are not zero, or all, so that P is the sparsity afterwards"
    add("--of", choices=["nonzero", "all"], default="nonzero", help=text)
    add("--scheme", choices=list(schemes), default="global", help="what to remove")
    text = "also report the accuracy with BatchNorm re-estimated on N training images; 0: no"
    add("--recalibrate_bn", type=whole(0), default=0, metavar="N", help=text)


def add_stage(parser: argparse.ArgumentParser) -> None:
    """Add the options that every stage after training has."""
    add = parser.add_argument_group("run").add_argument
    add("--overwrite", action="store_true", help="replace outputs that exist")
    add("--device", choices=DEVICES, default="auto", help="where to compute")


def resolve_depth_option(args: argparse.Namespace, depth_of: Callable[[str, int | None], int | None]) -> None:
    """Replace --depth None by the depth of the architecture, in place.

    Raises:
        OptionError: --depth contradicts --arch.
    """
    try:
        args.depth = depth_of(args.arch, args.depth)
    except ValueError as error:
        raise OptionError(str(error)) from error


def resolve_prune(args: argparse.Namespace) -> None:
    """Check the options of pruning, and choose the folder where none is given, in place.

    Raises:
        OptionError: no checkpoint to prune, no ratio, or one twice.
    """
    if not args.percent or not args.resume:
        raise OptionError("pruning needs --percent P [P ...] and --resume FILE")
    names = [f"{percent:g}" for percent in args.percent]  # as in the names of the files, to six digits
    if len(set(names)) < len(names):
        raise OptionError(f"--percent {' '.join(names)} names a ratio twice: each writes a file of its own")
    if args.save_dir is None:
        args.save_dir = str(Path(args.resume).parent / "pruned")


def refuse_changed(
    args: argparse.Namespace, parser: argparse.ArgumentParser, names: Iterable[str], *, reason: str
) -> None:
    """Refuse options that would do nothing.

    Args:
        args: the parsed options.
        parser: knows their defaults.
        names: options that must have them.
        reason: why they do nothing, for the message.

    Raises:
        OptionError: one of them was given.
    """
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            option = getattr(args, name) if name == "penalty" else name
            raise OptionError(f"--{option} does nothing {reason}: leave it out")


def _useless(option: str, penalty: str) -> NoReturn:
    takers = [f"--{name}" for name, known in PENALTIES.items() if option[2:] in known] or [f"--{n}" for n in LEARNED]
    without = "without a penalty" if penalty == "none" else f"with --{penalty}"
    raise OptionError(f"{option} does nothing {without}: leave it out, or choose one of {', '.join(takers)}")
