"""Evaluate a checkpoint and report its sparsity, its multiply-accumulates and its size.

    python check_params.py --checkpoint FILE                       # data set and network stand in our files
    python check_params.py -d cifar100 -a vgg16_bn --depth 16 --checkpoint FILE    # in the authors' they do not

Prints a table. --json FILE and --plot FILE keep it, --compact FILE writes the network losslessly as small as is
sensible; every script that loads a checkpoint loads such a file too.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse

from models import ARCHS
from utils import options
from utils.run import run_script
from utils.stages.check import check
from utils.training.data import DATASETS


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    options.add_data(parser, DATASETS, recorded=True)
    options.add_model(parser, ARCHS, recorded=True)
    options.add_stage(parser)
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="the checkpoint to look at")
    parser.add_argument("--tau", type=options.real(0), default=1e-3, help="also count weights with |w| <= TAU")
    parser.add_argument("--no_data", action="store_true", help="everything but the accuracy, without images")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw sparsity and density per layer, as PNG")
    parser.add_argument("--compact", metavar="FILE", help="write the network as a small file")
    text = "in that file, store negative zeros (which other programs may leave) as zeros, not bit for bit"
    parser.add_argument("--plain_zeros", action="store_true", help=text)
    return parser


def main(args: argparse.Namespace) -> dict:
    """Check as the options say.

    Returns:
        The content of --json.
    """
    if args.plain_zeros and not args.compact:
        raise options.OptionError("--plain_zeros does nothing without --compact FILE: leave it out")
    return check(args)


if __name__ == "__main__":
    run_script(main, get_parser())
