"""Pruned networks to measure: those of pretrained_models/, else random masks with the stated share a layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from models import ARCHS, build_model
from utils.files import load_model
from utils.halo import prunable_weights
from utils.options import OptionError

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {  # arch, depth, classes, packed file
    "ResNet-20": ("resnet", 20, 10, "cifar10_resnet20_halo"),
    "ResNet-50 (6n+2)": ("resnet", 50, 100, "cifar100_resnet50_halo"),
    "VGG-16": ("vgg16_bn", None, 10, "cifar10_vgg16_halo"),
    "LeNet-300-100": ("lenet_300_100", None, 10, "mnist_lenet300_halo"),
    "LeNet-5": ("lenet_5", None, 10, "mnist_lenet5_halo"),
}


def shape_of(name: str) -> tuple[int, ...]:
    """Return the shape of one image."""
    return ARCHS[NETWORKS[name][0]].shape


def pruned_network(name: str, sparsity: float, *, uniform: bool = False) -> tuple[nn.Module, str]:
    """Return a network in evaluation mode and where its zeros come from.

    Args:
        name: of NETWORKS.
        sparsity: fraction of its prunable weights that are zero.
        uniform: remove the same fraction of every layer at random.

    Raises:
        OptionError: there is no ResNet-20 of that sparsity, from which ResNet-50 takes the shares of its layers.
    """
    arch, depth, classes, packed = NETWORKS[name]
    file = ROOT / "pretrained_models" / f"{packed}_{sparsity}.halo"
    if file.exists() and not uniform:
        return load_model(file).eval(), "trained with HALO, pruned"
    torch.manual_seed(0)
    model = build_model(arch, classes, depth)
    weights = prunable_weights(model, linear=ARCHS[arch].linear)
    origin, shares = ("the same share a layer", dict.fromkeys(weights, 1.0))
    if name in SHARES and not uniform:
        of, shares_of = SHARES[name]
        origin, shares = f"shares of {of}", shares_of(weights, sparsity)
    mask_(weights, shares, sparsity)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.05, 0.2)
    return model.eval(), f"random masks, {origin}"


@torch.no_grad()
def mask_(weights: dict[str, nn.Parameter], shares: dict[str, float], sparsity: float) -> None:
    """Zero random weights so that layers keep in proportion to their shares (at most all of them)."""
    wanted = (1 - sparsity) * sum(w.numel() for w in weights.values())
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        kept = sum(w.numel() * min(1, shares[name] * middle) for name, w in weights.items())
        low, high = (middle, high) if kept < wanted else (low, middle)
    for name, w in weights.items():
        order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(w.numel()))
        w.view(-1)[order[round(w.numel() * min(1, shares[name] * high)) :]] = 0


def _vgg(weights: dict[str, nn.Parameter], sparsity: float) -> dict[str, float]:
    """Return the fraction that global pruning at 0.95 keeps of each layer of results/cifar10_vgg16."""
    layers = json.loads((ROOT / "results/cifar10_vgg16/pruned/prune.json").read_text())["results"][0]["layers"]
    return {layer["name"]: 1 - layer["sparsity"] for layer in layers}


def _resnet(weights: dict[str, nn.Parameter], sparsity: float) -> dict[str, float]:
    """Return the fractions that HALO's ResNet-20 keeps, its 3 blocks a stage stretched over those of a deeper one."""
    file = ROOT / "pretrained_models" / f"cifar10_resnet20_halo_{sparsity}.halo"
    if not file.exists():
        raise OptionError(f"ResNet-50 keeps of each layer what {file.name} does, which does not exist: see --sparsity")
    small = prunable_weights(load_model(file))
    kept = {name: float(w.count_nonzero()) / w.numel() for name, w in small.items()}
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layer1"))
    shares = {}
    for name in weights:
        stage, *rest = name.split(".")
        if name in ("conv1.weight",) or "downsample" in name:
            shares[name] = kept[name]
            continue
        place = int(rest[0]) * 2 / (blocks - 1)
        first = min(int(place), 1)
        one, two = (kept[f"{stage}.{i}.{rest[1]}.weight"] for i in (first, first + 1))
        shares[name] = one + (place - first) * (two - one)
    return shares


SHARES = {"ResNet-50 (6n+2)": ("HALO's ResNet-20", _resnet), "VGG-16": ("a HALO VGG-16 of 2 epochs", _vgg)}
