"""From zeros to speed: a pruned network by its non-zero weights only, and as a smaller dense one that any tool opens.

    python deploy.py --checkpoint pruned_0.95.pth.tar --save OUT   # data set and network stand in our files
    python deploy.py -d cifar10 -a resnet --depth 20 --checkpoint pruned_0.95.pth.tar --save runs/x/small

Proves both forms on the test images, measures them, and leaves OUT.pth.tar (the smaller network: every script takes
it), OUT.pt2 (the same for torch alone, BatchNorm folded, any batch size), OUT.json and OUT.png.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse

from models import ARCHS
from utils import options
from utils.run import run_script
from utils.stages.deploy import deploy
from utils.training.data import DATASETS


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    options.add_data(parser, DATASETS, recorded=True)
    options.add_model(parser, ARCHS, recorded=True)
    options.add_stage(parser)
    parser.set_defaults(device="cpu")  # where sparse inference runs
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="the pruned checkpoint or compact file")
    parser.add_argument("--save", metavar="OUT", required=True, help="writes OUT.pth.tar, OUT.pt2, OUT.json, OUT.png")
    text = "batch sizes to measure"
    parser.add_argument("--batch", type=options.whole(1), nargs="+", default=[1, 16, 64, 256], metavar="N", help=text)
    parser.add_argument("--no_data", action="store_true", help="prove both forms on random images instead")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out, which may take minutes")
    text = "also write OUT.onnx (requirements-deploy.txt)"
    parser.add_argument("--onnx", action="store_true", help=text)
    text = "also write the smaller network's weights as OUT.safetensors (requirements-deploy.txt)"
    parser.add_argument("--safetensors", action="store_true", help=text)
    return parser


def main(args: argparse.Namespace) -> dict:
    """Build, prove, measure and write both forms as the options say.

    Returns:
        The content of OUT.json; of a checkpoint without zeros nothing but its sparsity, and nothing is written.
    """
    return deploy(args)


if __name__ == "__main__":
    run_script(main, get_parser())
