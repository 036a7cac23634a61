"""What a run says of itself: three lines before the first epoch, one after the last."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

import torch
from torch import nn

from models import ARCHS, find_arch
from utils.command_line import option
from utils.distributed import processes
from utils.halo.lambda_sgd import is_halo, load_kernel
from utils.halo.penalties import Penalty
from utils.paths import REPOSITORY
from utils.training.dataset import Dataset
from utils.training.precision import computes_quickly


def data_line(args: argparse.Namespace, data: Dataset) -> str:
    """Say what the images are."""
    splits = {"training": data.train, "held-out": data.val, "test": data.test}
    counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items() if split is not None)
    size = "x".join(map(str, data.shape))
    where = f" from {args.data}" if args.dataset != "digits" else ""
    return f"data     {args.dataset}: {counts} images of {size}, {len(data.classes)} classes{where}"


def network_line(args: argparse.Namespace, model: nn.Module, penalty: Penalty) -> str:
    """Say what the network is, and how much of it is penalised."""
    depth = f" --depth {args.depth}" if find_arch(args.arch).depths else ""
    total = sum(p.numel() for p in model.parameters())
    penalized = sum(w.numel() for w in penalty.penalized.values())
    coefficients = "".join(f" {n} {getattr(args, n):g}" for n in ("xi", "psi", "lambda_init") if getattr(args, n))
    by = f"{penalized:,} penalised by {args.penalty}{coefficients}" if args.penalty != "none" else "no penalty"
    return f"network  {args.arch}{depth}: {total:,} parameters, {by}"


def compute_line(args: argparse.Namespace, penalty: Penalty, device: torch.device) -> str:
    """Say where the network is computed and where everything goes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    several = f", {processes()} processes" if processes() > 1 else ""
    how = f"{precision(args.amp, device)}{kernel(penalty, device)}"
    return f"compute  {name}, {torch.get_num_threads()} threads{several}, {how}; save_dir {args.save_dir}"


def precision(amp: str | None, device: torch.device) -> str:
    """Say in which type the network is computed."""
    if amp is None or computes_quickly(device, amp):
        return amp or "fp32"
    return f"{amp} by products in fp32 (this CPU has none in {amp}: --amp saves no time)"


def kernel(penalty: Penalty, device: torch.device) -> str:
    """Say whether the step of HALO has its compiled kernel; nothing where there is no such step, or none on a CPU."""
    if not is_halo(penalty) or device.type != "cpu":
        return ""
    try:
        load_kernel()
    except OSError:  # the optimizer will say why
        return ", HALO without its kernel"
    return ", HALO's kernel"


def script_path(name: str) -> str:
    """Return a script of this project as a command names it from the current folder."""
    return os.path.relpath(REPOSITORY / name)


def next_command(args: argparse.Namespace, checkpoint: Path) -> str:
    """Return the command that prunes a trained network."""
    small = find_arch(args.arch) in [arch for arch in ARCHS.values() if arch.linear]
    parts = ["python", script_path("mnist/mnist.py" if small else "cifar_prune_iterative.py")]
    parts += ["--percent", "0.9", "0.95", "0.98", *option("--resume", checkpoint)]
    if args.arch not in ARCHS:
        parts += ["-a", args.arch]  # the code of a network of the user's own runs only where it is named
    if args.data != "data":
        parts += option("--data", args.data)
    return shlex.join(parts)
