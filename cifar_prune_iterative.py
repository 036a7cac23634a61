"""Prune a trained network by magnitude at one or more ratios, and evaluate it before and after.

    python cifar_prune_iterative.py --percent 0.9 0.95 --resume MODEL    # data set and network stand in our files
    python cifar_prune_iterative.py -d cifar10 -a vgg16_bn --depth 16 --percent 0.95 --resume MODEL --save_dir DIR

Leaves in --save_dir: pruned_<percent>.pth.tar for each ratio, prune.json, prune.txt (per layer), and
accuracy_vs_sparsity.csv and .png. A pruned file can be pruned again: ratios count the weights that are not zero.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse

from models import CIFAR_ARCHS
from utils import options
from utils.files.preprocessing import RGB
from utils.halo.pruning import SCHEMES
from utils.run import run_script
from utils.stages.prune import prune_and_evaluate
from utils.training.data import datasets_of


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    options.add_data(parser, datasets_of(RGB), recorded=True)
    options.add_model(parser, CIFAR_ARCHS, recorded=True)
    options.add_prune(parser, SCHEMES)
    options.add_stage(parser)
    parser.add_argument("--resume", metavar="FILE", help="the checkpoint to prune")
    parser.add_argument("--save_dir", metavar="DIR", help="the outputs (default: the folder pruned beside --resume)")
    text = "measure on the N held-out training images of a run with the same --val_split, not on the test images"
    parser.add_argument("--val_split", type=options.whole(0), default=0, metavar="N", help=text)
    parser.add_argument(
        "--seed", type=options.whole(0, high=options.MOST_SEED), default=1, help="seed of the random schemes"
    )
    return parser


def main(args: argparse.Namespace) -> dict:
    """Prune and evaluate as the options say.

    Returns:
        The content of prune.json.
    """
    options.resolve_prune(args)
    return prune_and_evaluate(args)


if __name__ == "__main__":
    run_script(main, get_parser())
