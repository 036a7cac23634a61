"""Show where the time of one training step with HALO goes, by torch.profiler.

python benchmarks/profile_step.py            # VGG-16 and ResNet-50 (6n+2), batch 64, default precision
python benchmarks/profile_step.py --amp      # the same in bf16
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.profiler import ProfilerActivity, profile

from benchmarks.report import markdown
from benchmarks.run import Training, step_of
from utils import options
from utils.run import run_script

STEPS = 5


def top_costs(name: str, *, amp: str | None, count: int) -> list[dict]:
    """Return the operations that take most of a step's time, on their own without what they call."""
    training = Training(name, amp=amp)
    step = step_of(training, training.lam_optimizers[0].step)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operation": event.key,
            "calls a step": event.count // STEPS,
            "ms a step": event.self_cpu_time_total / STEPS / 1e3,
            "% of the step": 100 * event.self_cpu_time_total / total,
        }
        for event in events[:count]
    ]


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("--amp", action="store_const", const="bf16", help="compute the network in bf16")
    parser.add_argument("--top", type=options.whole(1), default=8, metavar="N", help="operations to show")
    return parser


def main(args: argparse.Namespace) -> dict:
    """Profile and print.

    Returns:
        The tables by their title.
    """
    networks = ("VGG-16", "ResNet-50 (6n+2)")
    tables = {name: top_costs(name, amp=args.amp, count=args.top) for name in networks}
    for name, table in tables.items():
        print(markdown(f"One step with HALO, {name}, batch 64, {args.amp or 'fp32'}", table), flush=True)
    return tables


if __name__ == "__main__":
    run_script(main, get_parser())
