"""What a run says of itself: three lines before the first epoch, one after the last."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models import ARCHS, find_arch
from utils.distributed import processes
from utils.halo.lambda_sgd import FusedHALO
from utils.run import REPOSITORY
from utils.training.dataset import Dataset

if TYPE_CHECKING:
    from utils.training.experiment import Experiment


def data_line(args: argparse.Namespace, data: Dataset) -> str:
    """Say what the images are."""
    splits = {"training": data.train, "held-out": data.val, "test": data.test}
    counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items() if split is not None)
    size = "x".join(map(str, data.shape))
    where = f" from {args.data}" if args.dataset != "digits" else ""
    return f"data     {args.dataset}: {counts} images of {size}, {len(data.classes)} classes{where}"


def opening_lines(run: Experiment) -> list[str]:
    """Say what the network is, where it is computed and where everything goes."""
    args = run.args
    depth = f" --depth {args.depth}" if find_arch(args.arch).depths else ""
    total = sum(p.numel() for p in run.model.parameters())
    penalized = sum(w.numel() for w in run.penalty.penalized.values())
    coefficients = "".join(f" {n} {getattr(args, n):g}" for n in ("xi", "psi", "lambda_init") if getattr(args, n))
    by = f"{penalized:,} penalised by {args.penalty}{coefficients}" if args.penalty != "none" else "no penalty"
    network = f"network  {args.arch}{depth}: {total:,} parameters, {by}"
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device)
    several = f", {processes()} processes" if processes() > 1 else ""
    place = f"{device}, {torch.get_num_threads()} threads{several}, {args.amp or 'fp32'}{kernel(run)}"
    return [network, f"compute  {place}; save_dir {run.folder}"]


def kernel(run: Experiment) -> str:
    """Say whether the step of HALO has its compiled kernel; nothing where there is no such step."""
    steps = [optimizer for optimizer in run.optimizers if isinstance(optimizer, FusedHALO)]
    if not steps:
        return ""
    with_kernel = run.device.type == "cpu" and steps[0].slow_because is None
    return ", HALO's kernel" if with_kernel else ", HALO without its kernel"


def script_path(name: str) -> str:
    """Return a script of this project as a command names it from the current folder."""
    return os.path.relpath(REPOSITORY / name)


def next_command(args: argparse.Namespace, checkpoint: Path) -> str:
    """Return the command that prunes a trained network."""
    small = find_arch(args.arch) in [arch for arch in ARCHS.values() if arch.linear]
    parts = ["python", script_path("mnist/mnist.py" if small else "cifar_prune_iterative.py")]
    parts += ["--percent", "0.9", "0.95", "0.98", "--resume", str(checkpoint)]
    if args.arch not in ARCHS:
        parts += ["-a", args.arch]  # the code of a network of the user's own runs only where it is named
    if args.data != "data":
        parts += ["--data", str(args.data)]
    return shlex.join(parts)
