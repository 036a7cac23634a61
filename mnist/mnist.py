"""Train a LeNet on MNIST with HALO or another penalty, or with --percent prune a trained one.

    python mnist/mnist.py -a lenet_300_100 --halo --xi 1e-4 --psi 1e-4 --epochs 25 --schedule 12 18 --save_dir DIR
    python mnist/mnist.py --percent 0.9 0.95 0.99 --resume DIR/final.pth.tar --save_dir DIR/pruned

Runs from any folder. Convolutions and linear layers are penalised and pruned together. Leaves what cifar.py and
cifar_prune_iterative.py leave. -d digits needs no download.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's folder, wherever this is called from

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

from models import MNIST_ARCHS, resolve_depth
from utils import options
from utils.distributed import processes
from utils.files.preprocessing import GREY
from utils.halo.pruning import SCHEMES
from utils.run import run_script
from utils.stages.prune import prune_and_evaluate
from utils.training.data import datasets_of
from utils.training.experiment import train_or_evaluate

PRUNE_ONLY = ("of", "scheme", "recalibrate_bn")
TRAIN_ONLY = (
    *("penalty", "xi", "psi", "lambda_init", "reg_lr", "reg_wd", "released_lr", "evaluate", "no_test"),
    *("epochs", "train_batch", "lr", "momentum", "wd", "schedule", "gamma", "amp", "compile"),
    *("start", "mask", "gmp", "gmp_epochs"),
)


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    options.add_data(parser, datasets_of(GREY), default="mnist", recorded=True)
    options.add_model(parser, MNIST_ARCHS, default="lenet_300_100", own=False, recorded=True)
    options.add_penalty(parser)
    options.add_training(parser)
    options.add_zeros(parser)
    options.add_run(parser)
    options.add_prune(parser, SCHEMES)
    # The release decays every 25,000 steps of 100 images; these are the nearest whole epochs of 600 steps.
    parser.set_defaults(epochs=250, train_batch=100, wd=0.0, schedule=[42, 83, 125, 167, 208])
    parser.set_defaults(linear=None)  # they take part in all networks here
    parser.set_defaults(**options.NO_IMAGE_OPTIONS)  # these networks take images as they are
    return parser


def main(args: argparse.Namespace) -> dict:
    """Train, evaluate or prune, as the options say.

    Returns:
        The content of summary.json or prune.json; with --evaluate, `loss`, `top1`, `top5` and `epoch`.
    """
    if not args.percent:
        options.refuse_changed(args, get_parser(), PRUNE_ONLY, reason="without --percent")
        args.dataset, args.arch = args.dataset or "mnist", args.arch or "lenet_300_100"
        options.resolve(args, depth_of=resolve_depth)
        return train_or_evaluate(args)
    if processes() > 1:
        raise options.OptionError("--percent prunes in one process: start it with python, not torchrun")
    options.refuse_changed(args, get_parser(), TRAIN_ONLY, reason="with --percent, which prunes")
    options.resolve_prune(args)
    return prune_and_evaluate(args, dataset="mnist")


if __name__ == "__main__":
    run_script(main, get_parser(), distributed=True)
