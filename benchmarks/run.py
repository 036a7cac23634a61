"""Measure the speed and the memory of HALO against the plain step and against a naive HALO.

    python benchmarks/run.py                       # everything, 20 minutes: make bench
    python benchmarks/run.py --only step memory    # some of it

Prints tables in Markdown; leaves results.json, tables.md and scaling.png in --save (default runs/bench).
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from benchmarks.naive import NaiveTraining, pil_loader, random_dataset
from benchmarks.report import markdown, plot_scaling
from benchmarks.timing import interleave, rows
from models import ARCHS, build_model
from utils.files.atomic import write_text
from utils.halo.lambda_sgd import FusedHALO, LambdaSGD
from utils.halo.masks import FixedZeros
from utils.halo.parameters import penalized_parameters, prunable_weights
from utils.halo.penalties import HALO, Penalty
from utils.halo.pruning import prune_by_magnitude_
from utils.logger import warn
from utils.options import Parser
from utils.run import describe, run_script, write_json
from utils.training.augment import Loader
from utils.training.compiled import CompiledNetwork
from utils.training.epoch import train_one_epoch
from utils.training.loading import memory_format
from utils.training.memory import keep_freed_memory
from utils.training.precision import Precision

CPU = torch.device("cpu")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COEFFICIENTS = {"xi": 1e-6, "psi": 1e-6}
SGD_FACTORS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
NETWORKS = {"VGG-16": ("vgg16_bn", None), "ResNet-50 (6n+2)": ("resnet", 50), "ResNet-20": ("resnet", 20)}
NETWORKS |= {"LeNet-300-100": ("lenet_300_100", None), "LeNet-5": ("lenet_5", None)}
BATCH = {"vgg16_bn": 64, "resnet": 64, "lenet_300_100": 100, "lenet_5": 100}


class Training:
    """A network with its penalty and optimizers, as utils/training/experiment.py sets them up."""

    def __init__(
        self,
        name: str,
        *,
        halo: bool = True,
        amp: str | None = None,
        compiled: bool = False,
        layout: torch.memory_format | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.arch, depth = NETWORKS[name]
        torch.manual_seed(0)
        self.device, self.layout = device, layout or memory_format(self.arch, device)
        self.model = build_model(self.arch, 10, depth).to(device, memory_format=self.layout)
        params = penalized_parameters(self.model, linear=ARCHS[self.arch].linear)
        self.penalty = HALO(params, **COEFFICIENTS) if halo else Penalty(params)
        self.optimizer = SGD(self.model.parameters(), **SGD_FACTORS, fused=True)
        self.lam_optimizers = []
        if halo:
            options = {"weights": self.optimizer, "compiled": compiled and device != CPU}
            self.lam_optimizers = [FusedHALO(self.penalty, **options, **SGD_FACTORS)]
        self.precision = Precision(device, amp)
        self.forward = self.model
        if compiled:
            self.forward = CompiledNetwork(self.model, batch_size=BATCH[self.arch], round_casts=self.precision.in_fp32)

    def epoch(self, loader: Loader) -> None:
        """Train on all batches."""
        parts = (self.penalty, self.optimizer, *self.lam_optimizers)
        train_one_epoch(self.model, loader, *parts, device=self.device, forward=self.forward, precision=self.precision)


def step_of(
    training: Training, step_penalty: Callable[[], None] | None, zeros: FixedZeros | None = None
) -> Callable[[], None]:
    """Return a function that trains on one batch, always the same, and may hold weights at zero."""
    images = torch.randn(BATCH[training.arch], *ARCHS[training.arch].shape)
    images = images.to(training.device, memory_format=training.layout)
    labels = torch.randint(10, (len(images),), device=training.device)
    training.model.train()

    def step() -> None:
        with training.precision.autocast():
            logits = training.forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        if zeros:
            zeros.clear_grad_()
        if step_penalty:
            step_penalty()
        training.optimizer.step()
        training.optimizer.zero_grad()

    return step


def without_kernel(optimizer: FusedHALO) -> FusedHALO:
    """Return the optimizer as it is where there is no C++ compiler."""
    optimizer._kernel = None
    return optimizer


def bench_step() -> dict[str, list[dict]]:
    """Compare one step with HALO with the same step of the same network without a penalty."""
    tables = {}
    for name, repeats, inner in (("VGG-16", 25, 1), ("ResNet-50 (6n+2)", 25, 1), ("LeNet-300-100", 41, 50)):
        training = Training(name)
        pieces = without_kernel(FusedHALO(training.penalty, **SGD_FACTORS))
        readable = LambdaSGD(training.penalty, **SGD_FACTORS)
        functions = {
            "no penalty": step_of(training, None),
            "HALO, default": step_of(training, training.lam_optimizers[0].step),
            "HALO, without a C++ compiler": step_of(training, pieces.step),
            "HALO, add_grad_() and SGD": step_of(training, readable.step),
        }
        times = interleave(functions, repeats=repeats, inner=inner)
        tables[f"One step, {name}, batch {BATCH[training.arch]}"] = rows(times, reference="no penalty", faster=False)
    return tables | masked_step("VGG-16")


def masked_step(name: str) -> dict[str, list[dict]]:
    """Compare a step with HALO with the same step while 95% of the weights are held at zero."""
    training = Training(name)
    weights = prunable_weights(training.model, linear=ARCHS[training.arch].linear)
    prune_by_magnitude_(weights, 0.95)
    step = training.lam_optimizers[0].step
    functions = {
        "HALO": step_of(training, step),
        "HALO, 95% held at zero": step_of(training, step, FixedZeros(weights)),
    }
    table = rows(interleave(functions, repeats=41), reference="HALO", faster=False)
    return {f"One step with a mask, {name}, batch {BATCH[training.arch]}": table}


def bench_layout() -> dict[str, list[dict]]:
    """Compare the two layouts of images and convolutions, which decides `channels_last` in models/__init__.py."""
    tables = {}
    for name, inner in (("VGG-16", 1), ("ResNet-50 (6n+2)", 1), ("ResNet-20", 1), ("LeNet-5", 20)):
        functions = {
            f"{label}, {amp or 'fp32'}": step_of(Training(name, halo=False, amp=amp, layout=layout), None)
            for amp in (None, "bf16")
            for label, layout in LAYOUTS.items()
        }
        times = interleave(functions, repeats=9, inner=inner)
        tables[f"One step without penalty, {name}"] = rows(times, reference="contiguous, fp32", faster=True)
    return tables


def bench_products() -> dict[str, list[dict]]:
    """Compare the ways of --amp on a CPU: products of torch in that type, and products of rounded values in fp32."""
    tables = {}
    for amp in ("bf16", "fp16"):
        trainings = {"fp32": Training("ResNet-20", halo=False)}
        for in_fp32, label in enumerate((f"products in {amp}", "products in fp32")):
            trainings[f"--amp {amp}, {label}"] = training = Training("ResNet-20", halo=False, amp=amp)
            training.precision.in_fp32 = bool(in_fp32)
        functions = {label: step_of(training, None) for label, training in trainings.items()}
        table = rows(interleave(functions, repeats=5), reference="fp32", faster=True)
        tables[f"One step without penalty, ResNet-20, batch 64, {amp}"] = table
    return tables


def bench_penalty() -> dict[str, list[dict]]:
    """Compare the penalty and the step of lam alone: VGG-16 tensor by tensor, and as many parameters in one tensor."""
    model = Training("VGG-16").model
    layers = penalized_parameters(model)
    count = sum(w.numel() for w in layers.values())
    whole = {"w": nn.Parameter(torch.randn(count))}
    title = f"Penalty and step of lam alone, {count:,} parameters in"
    return {f"{title} {len(layers)} tensors": penalty_alone(layers), f"{title} one tensor": penalty_alone(whole)}


def penalty_alone(params: dict[str, nn.Parameter]) -> list[dict]:
    """Compare the forms of the penalty, and what the compiled one makes of the memory's bandwidth."""
    for p in params.values():
        p.grad = torch.zeros_like(p)
    penalty, count = HALO(params, **COEFFICIENTS), sum(w.numel() for w in params.values())
    a, b = torch.zeros(count), torch.zeros(count)
    functions = {
        "autograd": NaiveTraining(nn.ParameterList(params.values()), penalty).penalty_step,
        "add_grad_() and SGD": LambdaSGD(penalty, **SGD_FACTORS).step,
        "one pass, without a C++ compiler": without_kernel(FusedHALO(penalty, **SGD_FACTORS)).step,
        "one pass, compiled (default)": FusedHALO(penalty, **SGD_FACTORS).step,
        "triad a += s * b": lambda: a.add_(b, alpha=0.5),
    }
    table = rows(interleave(functions, repeats=15), reference="autograd", faster=True)
    kernel, triad = table[3], table[4]
    for row, streams in ((kernel, 7), (triad, 3)):  # reads and writes of 4 bytes a parameter
        row["GB/s"] = 4 * streams * count / row["ms"] / 1e6
    kernel["of_triad"] = kernel["GB/s"] / triad["GB/s"]
    del triad["ratio"]
    return table


def bench_scaling() -> dict[str, list[dict]]:
    """Measure the penalty and the step of lam from 1e5 to 1e8 parameters in one tensor."""
    table = []
    for exponent in (5, 5.5, 6, 6.5, 7, 7.5, 8):
        w = nn.Parameter(torch.randn(round(10**exponent)))
        w.grad = torch.zeros_like(w)
        penalty = HALO({"w": w}, **COEFFICIENTS)
        functions = {
            "autograd": NaiveTraining(nn.ParameterList([w]), penalty).penalty_step,
            "pieces": without_kernel(FusedHALO(penalty, **SGD_FACTORS)).step,
            "compiled": FusedHALO(penalty, **SGD_FACTORS).step,
        }
        times = interleave(functions, repeats=5 if exponent > 7 else 11)
        table.append({"parameters": len(w)} | {f"{k} ms": 1e3 * statistics.median(v) for k, v in times.items()})
    return {"Cost against the number of parameters": table}


def in_process(function: Callable, *arguments: object) -> object:
    """Return what a function returns in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> int:
    """Return the peak memory of this process in bytes. Not by getrusage, whose maximum begins with the parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def peak_of_steps(form: str) -> int:
    """Train VGG-16 for three steps; return the peak memory in bytes."""
    training = Training("VGG-16", halo=form != "plain")
    if form == "naive":
        naive = NaiveTraining(training.model, training.penalty)
        images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
        step = lambda: naive.step(images, labels)  # noqa: E731
    else:
        step = step_of(training, training.lam_optimizers[0].step if form == "halo" else None)
    for _ in range(3):
        step()
    return peak_memory()


def bench_memory() -> dict[str, list[dict]]:
    """Compare the peak memory of whole processes, one for each form and repetition."""
    peaks = {"plain": [], "halo": [], "naive": []}
    for _ in range(3):
        for form, values in peaks.items():
            values.append(in_process(peak_of_steps, form))
    weights = 4 * sum(p.numel() for p in penalized_parameters(build_model("vgg16_bn", 10)).values())
    plain = statistics.median(peaks["plain"])
    table = []
    for form, values in peaks.items():
        extra = (statistics.median(values) - plain) / weights
        spread = [v / 1e6 for v in (min(values), max(values))]
        table.append({"what": form, "n": 3, "peak MB": statistics.median(values) / 1e6, "min, max MB": spread})
        table[-1]["above plain, in copies of the weights"] = extra
    return {"Peak memory of a process, VGG-16, batch 64": table}


def steps_with_malloc(name: str, options: dict, keep: bool) -> dict:
    """Train for some steps on one core; return the seconds of one, the pages it was given, and the peak memory."""
    import resource  # not on Windows

    torch.set_num_threads(1)
    if keep and not keep_freed_memory():
        raise OSError("malloc is not glibc's, or the environment (GLIBC_TUNABLES, MALLOC_*) sets its thresholds")
    training = Training(name, **options)
    step = step_of(training, training.lam_optimizers[0].step)
    interleave({"step": step}, repeats=5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = interleave({"step": step}, repeats=10, warm_up=0)["step"]
    pages = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
    return {"seconds": statistics.median(seconds), "pages a step": pages, "peak MB": peak_memory() / 1e6}


def bench_malloc() -> dict[str, list[dict]]:
    """Compare steps in processes that keep the memory which a step frees, and in others that return it."""
    tables = {}
    for options in ({}, {"amp": "bf16"}, {"amp": "bf16", "compiled": True}):
        runs = {"returned to the system": [], "kept (default)": []}
        for _ in range(5):
            for keep, values in enumerate(runs.values()):
                values.append(in_process(steps_with_malloc, "ResNet-50 (6n+2)", options, bool(keep)))
        times = {what: [run["seconds"] for run in values] for what, values in runs.items()}
        table = rows(times, reference="returned to the system", faster=True)
        for row in table:
            for column in ("pages a step", "peak MB"):
                row[column] = statistics.median(run[column] for run in runs[row["what"]])
        label = ", ".join(["bf16" if options else "fp32", *(["compiled"] if "compiled" in options else [])])
        tables[f"Freed memory, one step of ResNet-50 (6n+2) with HALO, {label}, one core"] = table
    return tables


def bench_loader() -> dict[str, list[dict]]:
    """Compare the loader in memory with torchvision's transforms in two worker processes, over CIFAR shapes."""
    data = random_dataset((3, 32, 32), images=6400, augment=True)
    functions = {"DataLoader, PIL, 2 workers": lambda: [*pil_loader(data, batch_size=64)]}
    for name, layout in LAYOUTS.items():
        loader = Loader(data.train, data, batch_size=64, generator=torch.Generator(), memory_format=layout)
        functions[f"in memory, {name}"] = lambda loader=loader: [None for _ in loader]
    table = rows(interleave(functions, repeats=5), reference="DataLoader, PIL, 2 workers", faster=True)
    for row in table:
        row["images/s"] = 1e3 * 6400 / row["ms"]
    return {"6,400 augmented images of 32x32, batch 64": table}


def epochs_of(name: str, *, images: int, variants: dict[str, dict]) -> dict[str, list[dict]]:
    """Compare an epoch over this many images, written naively, with the project's in some variants."""
    arch, depth = NETWORKS[name]
    shape = ARCHS[arch].shape
    data, batch = random_dataset(shape, images=images, augment=shape[0] == 3), BATCH[arch]
    torch.manual_seed(0)
    model = build_model(arch, 10, depth)
    naive = NaiveTraining(model, HALO(penalized_parameters(model, linear=ARCHS[arch].linear), **COEFFICIENTS))
    functions = {"naive": lambda: naive.epoch(pil_loader(data, batch_size=batch))}
    for label, options in variants.items():
        training = Training(name, **options)
        loader = Loader(data.train, data, batch_size=batch, generator=torch.Generator(), memory_format=training.layout)
        functions[label] = lambda training=training, loader=loader: training.epoch(loader)
    times = interleave(functions, repeats=3, warm_up=1)  # an epoch is many steps
    table = rows(times, reference="naive", faster=True)
    for row in table:
        row["images/s"] = 1e3 * images / row["ms"]
    return {f"Epoch of {images:,} images, {name}, HALO, batch {batch}": table}


def bench_mnist() -> dict[str, list[dict]]:
    """Compare whole epochs over 60,000 images of MNIST's shape."""
    return epochs_of("LeNet-300-100", images=60_000, variants={"default": {}, "default, no penalty": {"halo": False}})


def bench_epoch() -> dict[str, list[dict]]:
    """Compare epochs of the CIFAR networks, shortened to some thousand images."""
    variants = {
        "default": {},
        "--amp": {"amp": "bf16"},
        "--compile": {"compiled": True},
        "--amp --compile": {"amp": "bf16", "compiled": True},
    }
    return (
        epochs_of("VGG-16", images=64 * 6, variants=variants)
        | epochs_of("ResNet-50 (6n+2)", images=64 * 12, variants=variants)
        | epochs_of("ResNet-20", images=64 * 24, variants=variants)
    )


BENCHMARKS = {
    "step": bench_step,
    "layout": bench_layout,
    "products": bench_products,
    "penalty": bench_penalty,
    "scaling": bench_scaling,
    "memory": bench_memory,
    "malloc": bench_malloc,
    "loader": bench_loader,
    "mnist": bench_mnist,
    "epoch": bench_epoch,
}


def measured(name: str) -> dict[str, list[dict]]:
    """Return the tables of a benchmark; none, with a line that says why, where this machine cannot do it."""
    try:
        return BENCHMARKS[name]()
    except OSError as error:  # no compiler, no /proc, a malloc that is set otherwise
        warn(f"{name} was left out: {error}")
        return {}


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), help="which of them")
    parser.add_argument("--save", metavar="DIR", default="runs/bench", help="folder of the outputs")
    return parser


def main(args: argparse.Namespace) -> dict:
    """Measure, print and write.

    Returns:
        The content of results.json.
    """
    folder = Path(args.save)
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": describe(args, CPU), "tables": {}}
    for name in args.only:
        for title, table in measured(name).items():
            results["tables"][title] = table
            print(markdown(title, table), flush=True)
            write_json(folder / "results.json", results)
            if name == "scaling":
                plot_scaling(table, folder / "scaling.png")
    write_text(folder / "tables.md", "\n".join(markdown(*item) for item in results["tables"].items()))
    print(json.dumps(results), flush=True)
    return results


if __name__ == "__main__":
    run_script(main, get_parser())
