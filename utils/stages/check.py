"""The checking stage: what a checkpoint holds, how well it does, and how small it can be written."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from models import ARCHS, build_model
from utils import plots
from utils.files.checkpoint import load_checkpoint, load_weights
from utils.files.compact import entropy_bound, same_bits, save_compact
from utils.halo.parameters import prunable_weights
from utils.halo.pruning import count_macs, dead_filters, overall_sparsity, savings, sparsity_per_layer
from utils.logger import say
from utils.run import choose_device, refuse_existing, write_json
from utils.training.data import load_dataset
from utils.training.epoch import evaluate
from utils.training.loading import make_loader, memory_format

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "mnist": 10}  # without reading the images


def check(args: argparse.Namespace) -> dict:
    """Do what the options of check_params.py say.

    Args:
        args: the options, `depth` resolved.

    Returns:
        The content of `--json`.

    Raises:
        ValueError, OSError: unusable checkpoint, images or output.
    """
    device, arch = choose_device(args.device), ARCHS[args.arch]
    refuse_existing([Path(p) for p in (args.json, args.plot, args.compact) if p], overwrite=args.overwrite)
    state = load_checkpoint(args.checkpoint)
    data = None if args.no_data else load_dataset(args.dataset, args.data, shape=arch.shape)
    classes = NUM_CLASSES.get(args.dataset, _classes_in(state)) if data is None else len(data.classes)
    model = build_model(args.arch, classes, args.depth)
    load_weights(model, state["state_dict"], path=args.checkpoint)
    model.to(device, memory_format=memory_format(args.arch, device))
    report = {"checkpoint": str(args.checkpoint), "stored_top1": state.get("acc"), **describe_sparsity(model, args)}
    if data is not None:
        loader = make_loader(data, "test", device, arch=args.arch, batch_size=args.test_batch)
        report["test"] = evaluate(model, loader, device=device)
    if args.compact:
        report["compact"] = write_compact(Path(args.compact), state, model, args)
    print_report(report, tau=args.tau)
    if args.json:
        write_json(args.json, report)
    if args.plot:
        title = f"{100 * report['sparsity']:.2f}% of the prunable weights are zero\n{args.checkpoint}"
        plots.plot_layers(report["layers"], args.plot, title=title)
    return report


def _classes_in(state: dict) -> int:
    """Return the number of classes of a checkpoint: the rows of its last matrix."""
    matrices = [tensor for tensor in state["state_dict"].values() if tensor.dim() == 2]
    return len(matrices[-1]) if matrices else 2


def describe_sparsity(model: nn.Module, args: argparse.Namespace) -> dict:
    """Count zeros, parameters and multiply-accumulate operations of a network."""
    arch = ARCHS[args.arch]
    weights = prunable_weights(model, linear=arch.linear)
    layers = sparsity_per_layer(weights)
    dead = dead_filters(weights)
    below = {name: int((w.detach().abs() <= args.tau).sum()) for name, w in weights.items()}
    total = sum(layer.total for layer in layers)
    return {
        **savings(model, arch.shape),
        "prunable": total,
        "prunable_nonzero": sum(layer.remaining for layer in layers),
        "sparsity": overall_sparsity(layers),
        "fraction_below_tau": sum(below.values()) / total,
        "layers": [
            {
                **layer._asdict(),
                "sparsity": layer.sparsity,
                "fraction_below_tau": below[layer.name] / layer.total,
                "filters": len(weights[layer.name]),
                "dead_filters": dead[layer.name],
            }
            for layer in layers
        ],
        "macs": [m._asdict() for m in count_macs(model, arch.shape)],
    }


def write_compact(path: Path, state: dict, model: nn.Module, args: argparse.Namespace) -> dict:
    """Write the compact file, read it back and compare it bit for bit.

    Raises:
        ValueError: what was read back differs (the file is removed).
    """
    save_compact(path, state)
    if not same_bits(state["state_dict"], load_checkpoint(path)["state_dict"]):
        path.unlink()
        raise ValueError(f"{path} did not read back bit-equal and was removed: please report this")
    bound = entropy_bound(prunable_weights(model, linear=ARCHS[args.arch].linear))
    dense = sum(tensor.numel() * tensor.element_size() for tensor in state["state_dict"].values())
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "checkpoint_bytes": Path(args.checkpoint).stat().st_size,
        "dense_bytes": dense,
        "entropy_bound_bytes": bound,
        "ratio_to_bound": path.stat().st_size / bound,
    }


def print_report(report: dict, *, tau: float) -> None:
    """Print the report as a table."""
    say(f"{'layer':<34}{'total':>10}{'non-zero':>10}{'sparsity':>10}{f'<= {tau:g}':>10}{'dead filters':>16}")
    for layer in report["layers"]:
        dead = f"{layer['dead_filters']} of {layer['filters']}"
        numbers = f"{layer['sparsity']:>10.4f}{layer['fraction_below_tau']:>10.4f}{dead:>16}"
        say(f"{layer['name']:<34}{layer['total']:>10}{layer['remaining']:>10}{numbers}")
    total = f"{report['prunable']:>10}{report['prunable_nonzero']:>10}{report['sparsity']:>10.4f}"
    say(f"{'all prunable weights':<34}{total}{report['fraction_below_tau']:>10.4f}")
    say(f"parameters: {report['parameters']}, {report['parameters_nonzero']} of them not zero")
    say(f"compression ratio {report['compression_ratio']:.2f} (all parameters / non-zero parameters)")
    say(f"multiply-accumulates an image: {report['macs_dense']} dense, {report['macs_nonzero']} with zeros skipped")
    say("  (sum over Conv2d and Linear of weights x output positions; biases, BatchNorm and pooling not counted)")
    say(f"theoretical speed-up {report['theoretical_speedup']:.2f} (dense / remaining multiply-accumulates)")
    if "compact" in report:
        c = report["compact"]
        say(f"compact file {c['file']}: {c['bytes']} bytes, read back bit-equal")
        say(f"  the checkpoint has {c['checkpoint_bytes']} bytes, its tensors {c['dense_bytes']}")
        bound = f"{c['entropy_bound_bytes']:.0f} bytes"
        say(f"  N*H(p) + 32*nonzeros bits of the prunable weights: {bound}, {c['ratio_to_bound']:.3f} times that")
    stored = report["stored_top1"]
    said = "no accuracy" if stored is None else f"top-1 {float(stored):.2f}%"
    if "test" in report:
        t = report["test"]
        say(f"test loss {t['loss']:.4f}  top-1 {t['top1']:.2f}%  top-5 {t['top5']:.2f}%  (the file records {said})")
    else:
        say(f"not evaluated (--no_data); the file records {said}")
