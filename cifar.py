"""Train one network on CIFAR-10/100, on digits or on your own image folder, with HALO or another penalty.

    python cifar.py --halo                                        # the release's VGG-16 experiment on CIFAR-10
    python cifar.py -d digits -a resnet --depth 20 --halo --xi 1e-3 --psi 1e-3 --wd 0 --epochs 10 --schedule 6 8

Leaves in --save_dir (default runs/<dataset>_<arch>_<penalty>_seed<k>): config.json, log.csv (a row an epoch),
init, checkpoint, model_best and final .pth.tar, arrays as .npy, curves.png, regularization.png, summary.json.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse

from models import CIFAR_ARCHS, resolve_depth
from utils import options
from utils.files.preprocessing import RGB
from utils.run import run_script
from utils.training.data import datasets_of
from utils.training.experiment import train_or_evaluate


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    options.add_data(parser, datasets_of(RGB), default="cifar10")
    options.add_images(parser)
    options.add_model(parser, CIFAR_ARCHS, default="vgg16_bn")
    options.add_linear(parser)
    options.add_penalty(parser)
    options.add_training(parser)
    options.add_zeros(parser)
    options.add_run(parser)
    return parser


def main(args: argparse.Namespace) -> dict:
    """Train, or with --evaluate only evaluate, as the options say.

    Returns:
        The content of summary.json; with --evaluate, `loss`, `top1`, `top5` and `epoch`.
    """
    options.resolve(args, depth_of=resolve_depth)
    return train_or_evaluate(args)


if __name__ == "__main__":
    run_script(main, get_parser(), distributed=True)
