"""Measure on a GPU what a training step takes: with HALO and without, recorded or not, compiled or not.

    python benchmarks/gpu.py                                  # VGG-16, ResNet-50 and ResNet-20
    python benchmarks/gpu.py --network "ResNet-50 (6n+2)"     # one of them

Prints tables in Markdown and leaves results.json in --save (default runs/bench_gpu). The host waits for the GPU
after every STEPS steps only, as it does in training.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.report import markdown
from benchmarks.run import LAYOUTS, NETWORKS, SGD_FACTORS, Training, step_of
from benchmarks.timing import interleave, rows
from utils.halo.lambda_sgd import LambdaSGD
from utils.options import OptionError, Parser
from utils.run import choose_device, describe, run_script, write_json
from utils.training.recorded import RecordedStep

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


def recorded(training: Training, step: Callable[[], None]) -> Callable[[], None]:
    """Return a step that runs from a recording, as in training."""
    batch = torch.zeros(1, device=training.device), torch.zeros(1, device=training.device)
    recording = RecordedStep([training.optimizer, *training.lam_optimizers], training.penalty, batch_size=1)

    def take(*inputs: Tensor) -> tuple[Tensor, ...]:
        step()
        return inputs

    return lambda: recording.run(take, *batch)


def layouts(name: str, device: torch.device) -> list[dict]:
    """Compare layouts and precisions without a penalty, recorded."""
    functions = {}
    for amp in (None, "bf16"):
        for label, layout in LAYOUTS.items():
            training = Training(name, halo=False, amp=amp, layout=layout, device=device)
            functions[f"{label}, {amp or 'fp32'}"] = recorded(training, step_of(training, None))
    return timed(functions, reference="contiguous, fp32", faster=True)


def penalties(name: str, device: torch.device, *, record: bool, compiled: bool) -> list[dict]:
    """Compare the forms of the step of HALO with no penalty, in bf16."""
    functions = {}
    for label in ("no penalty", "HALO", "HALO, add_grad_() and SGD"):
        training = Training(name, halo=label != "no penalty", amp="bf16", compiled=compiled, device=device)
        (lam_optimizer,) = training.lam_optimizers or [None]
        if label == "HALO, add_grad_() and SGD":
            lam_optimizer = LambdaSGD(training.penalty, **SGD_FACTORS)
        step = step_of(training, lam_optimizer and lam_optimizer.step)
        functions[label] = recorded(training, step) if record else step
    return timed(functions, reference="no penalty", faster=False)


def comparisons(name: str, device: torch.device, *, compile_too: bool) -> dict[str, Callable[[], list[dict]]]:
    """Return what is measured of a network, by the title of its table."""
    modes = {
        "kernel by kernel": {"record": False, "compiled": False},
        "recorded": {"record": True, "compiled": False},
        "recorded, --compile": {"record": True, "compiled": True},
    }
    tables = {f"Step without penalty, {name}, recorded": partial(layouts, name, device)}
    for mode, options in modes.items():
        if compile_too or not options["compiled"]:
            tables[f"Step in bf16, {name}, {mode}"] = partial(penalties, name, device, **options)
    return tables


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(__doc__)
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
        for title, measure in comparisons(name, device, compile_too=not args.no_compile).items():
            results["tables"][title] = measure()
            print(markdown(title, results["tables"][title]), flush=True)
            write_json(folder / "results.json", results)
    print(json.dumps(results["machine"]), flush=True)
    return results


if __name__ == "__main__":
    run_script(main, get_parser())
