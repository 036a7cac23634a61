"""Train as cifar.py does, with a xi that grows over the first epochs: a recipe tried for short runs.

    python results/replication/short_runs/growing_xi.py --grow 6 -d cifar10 -a resnet --depth 20 --halo --xi 6e-5 ...

Epoch k of the first N of --grow N is trained with xi * k / N, the others with xi. All other options, the outputs and
--resume are those of cifar.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the project's folder, wherever this is called from

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import cifar
from models import resolve_depth
from utils import options
from utils.run import run_script
from utils.training.experiment import Experiment, train_or_evaluate


class GrowingHALO(Experiment):
    """HALO whose xi grows linearly over the first `args.grow` epochs."""

    def run_epoch(self) -> dict:
        """Train and evaluate once at this epoch's xi; return the row for log.csv."""
        self.penalty.xi = self.args.xi * min(1, (self.epoch + 1) / self.args.grow)
        return super().run_epoch()


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = cifar.get_parser()
    parser.description = __doc__.split("\n")[0]
    text = "epochs until xi is --xi"
    parser.add_argument("--grow", type=options.whole(1), required=True, metavar="N", help=text)
    return parser


def main(args: argparse.Namespace) -> dict:
    """Train, or with --evaluate only evaluate; return the content of summary.json.

    Raises:
        OptionError: there is no xi to grow, as other penalties have none or spell it differently.
    """
    options.resolve(args, depth_of=resolve_depth)
    if args.penalty != "halo":
        raise options.OptionError("--grow is of HALO's xi: add --halo")
    return train_or_evaluate(args, kind=GrowingHALO)


if __name__ == "__main__":
    run_script(main, get_parser(), distributed=True)
