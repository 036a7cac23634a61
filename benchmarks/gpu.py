"""Measure on a GPU what a training step takes: by layout, precision and --compile, and with HALO against no penalty.

    python benchmarks/gpu.py                                  # VGG-16, ResNet-50 and ResNet-20
    python benchmarks/gpu.py --network "ResNet-50 (6n+2)"     # one of them

Prints tables in Markdown and leaves results.json in --save (default runs/bench_gpu). The host waits for the GPU
after every STEPS steps only, as it does in training.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.report import markdown
from benchmarks.run import LAYOUTS, NETWORKS, SGD_FACTORS, Training, step_of
from benchmarks.timing import interleave, rows
from utils.halo.lambda_sgd import FusedHALO, LambdaSGD
from utils.options import OptionError
from utils.run import choose_device, describe, run_script, write_json

STEPS = 20  # between two waits for the GPU
REPEATS = 5
CIFAR = [name for name, (arch, _) in NETWORKS.items() if not arch.startswith("lenet")]


def timed(functions: dict[str, Callable[[], None]], *, reference: str, faster: bool) -> list[dict]:
    """Time steps in turn, STEPS of each at a time; return the rows of a table in milliseconds a step."""

    def block(step: Callable[[], None]) -> None:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()

    times = interleave({name: lambda f=f: block(f) for name, f in functions.items()}, repeats=REPEATS, warm_up=1)
    each = {name: [seconds / STEPS for seconds in values] for name, values in times.items()}
    return rows(each, reference=reference, faster=faster)


def layouts(name: str, device: torch.device, *, compiled: bool) -> list[dict]:
    """Compare layouts and precisions without a penalty; compiled, which takes a minute for each, layouts in bf16."""
    functions = {}
    for amp in ("bf16",) if compiled else (None, "bf16"):
        for label, layout in LAYOUTS.items():
            training = Training(name, halo=False, amp=amp, compiled=compiled, layout=layout, device=device)
            functions[f"{label}, {amp or 'fp32'}"] = step_of(training, None)
    return timed(functions, reference=next(iter(functions)), faster=True)


def penalties(name: str, device: torch.device, *, compiled: bool) -> list[dict]:
    """Compare the forms of the step of HALO with no penalty, in bf16."""
    training = Training(name, amp="bf16", compiled=compiled, device=device)
    (default,) = training.lam_optimizers
    functions = {
        "no penalty": step_of(training, None),
        "HALO, default": step_of(training, default.step),
        "HALO, beside the step of the weights": step_of(training, FusedHALO(training.penalty, **SGD_FACTORS).step),
        "HALO, add_grad_() and SGD": step_of(training, LambdaSGD(training.penalty, **SGD_FACTORS).step),
    }
    return timed(functions, reference="no penalty", faster=False)


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--network", nargs="+", choices=CIFAR, default=CIFAR, help="which networks")
    parser.add_argument("--no_compile", action="store_true", help="leave --compile out, which takes minutes")
    parser.add_argument("--save", metavar="DIR", default="runs/bench_gpu", help="folder of results.json")
    return parser


def main(args: argparse.Namespace) -> dict:
    """Measure, print and write.

    Returns:
        The content of results.json.

    Raises:
        OptionError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise OptionError("benchmarks/gpu.py needs a CUDA device; on a CPU use benchmarks/run.py")
    device, folder = choose_device("cuda"), Path(args.save)
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": describe(args, device), "gpu": torch.cuda.get_device_name(device), "tables": {}}
    for name in args.network:
        for compiled in (False,) if args.no_compile else (False, True):
            for title, measure in (("Step without penalty", layouts), ("Step", penalties)):
                title = f"{title}, {name}" + (", --compile" if compiled else "")
                results["tables"][title] = measure(name, device, compiled=compiled)
                print(markdown(title, results["tables"][title]), flush=True)
                write_json(folder / "results.json", results)
    print(json.dumps(results["machine"]), flush=True)
    return results


if __name__ == "__main__":
    run_script(main, get_parser())
