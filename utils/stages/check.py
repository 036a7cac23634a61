"""The checking stage: what a checkpoint holds, how well it does, and how small it can be written."""

from __future__ import annotations

import argparse
from pathlib import Path

from utils import plots
from utils.files.checkpoint import load_checkpoint
from utils.files.compact import entropy_bound, same_bits, save_compact, without_negative_zeros
from utils.halo.parameters import prunable_weights
from utils.halo.pruning import count_macs, dead_filters, overall_sparsity, savings, sparsity_per_layer
from utils.halo.shrink import shrink
from utils.logger import result_text, say
from utils.run import all_or_none, refuse_existing, write_json
from utils.stages.subject import Subject, load_subject, recorded_images
from utils.training.epoch import evaluate
from utils.training.loading import make_loader


def check(args: argparse.Namespace) -> dict:
    """Do what the options of check_params.py say.

    Args:
        args: the options.

    Returns:
        The content of `--json`.

    Raises:
        ValueError, OSError: unusable checkpoint, images or output.
    """
    outputs = [Path(p) for p in (args.json, args.plot, args.compact) if p]
    refuse_existing(outputs, overwrite=args.overwrite, inputs=[args.checkpoint])
    with all_or_none(outputs):
        return _check(args)


def _check(args: argparse.Namespace) -> dict:
    subject = load_subject(args, args.checkpoint, images=not args.no_data)
    model, data, device = subject.model, subject.data, subject.device
    stored = {"stored_top1": subject.state.get("acc"), "stored_images": recorded_images(subject.state)}
    report = {"checkpoint": str(args.checkpoint)} | stored
    report |= {"dataset": args.dataset, "arch": args.arch, "depth": args.depth}
    report |= describe_sparsity(subject, tau=args.tau)
    if data is not None:
        loader = make_loader(data, "test", device, arch=args.arch, batch_size=args.test_batch)
        report["test"] = evaluate(model, loader, device=device)
    if args.compact:
        report["compact"] = write_compact(Path(args.compact), subject, args)
    print_report(report, tau=args.tau, classes=len(data.classes) if data else None)
    if args.json:
        write_json(args.json, report)
    if args.plot:
        plots.plot_layers(report["layers"], args.plot, title=plots.layers_title(report))
    if written := [path for path in (args.json, args.plot) if path]:
        say(f"wrote {', '.join(written)}")
    return report


def describe_sparsity(subject: Subject, *, tau: float) -> dict:
    """Count zeros, weights of magnitude up to tau, parameters and multiply-accumulate operations of a network."""
    model, shape = subject.model, subject.preprocessing.shape
    weights = prunable_weights(model, linear=subject.linear)
    layers = sparsity_per_layer(weights)
    dead = dead_filters(weights)
    below = {name: int((w.detach().abs() <= tau).sum()) for name, w in weights.items()}
    total = sum(layer.total for layer in layers)
    return {
        **savings(model, shape),
        **after_shrinking(subject),
        "prunable": total,
        "prunable_nonzero": sum(layer.remaining for layer in layers),
        "sparsity": overall_sparsity(layers),
        "fraction_below_tau": sum(below.values()) / (total or 1),
        "layers": [
            {
                **layer._asdict(),
                "sparsity": layer.sparsity,
                "fraction_below_tau": below[layer.name] / (layer.total or 1),
                "filters": len(weights[layer.name]),
                "dead_filters": dead[layer.name],
            }
            for layer in layers
        ],
        "macs": [m._asdict() for m in count_macs(model, shape)],
    }


def after_shrinking(subject: Subject) -> dict:
    """Return the multiply-accumulates of the smaller dense network as `macs_shrunk`, None where it cannot be made."""
    try:
        small = shrink(subject.model.cpu())
    except ValueError:
        return {"macs_shrunk": None}
    finally:
        subject.model.to(subject.device)
    return {"macs_shrunk": sum(layer.dense for layer in count_macs(small, subject.preprocessing.shape))}


def write_compact(path: Path, subject: Subject, args: argparse.Namespace) -> dict:
    """Write the compact file, read it back and compare it bit for bit.

    Negative zeros, which other programs may leave, stay what they are unless --plain_zeros makes them zeros.

    Raises:
        ValueError: what was read back differs (the file is removed).
    """
    plain, negative_zeros = without_negative_zeros(subject.state["state_dict"])
    state = subject.state | ({"state_dict": plain} if args.plain_zeros else {})
    save_compact(path, state)
    if not same_bits(state["state_dict"], load_checkpoint(path)["state_dict"]):
        path.unlink()
        raise ValueError(f"{path} did not read back bit-equal and was removed: please report this")
    bound = entropy_bound(prunable_weights(subject.model, linear=subject.linear))
    dense = sum(tensor.numel() * tensor.element_size() for tensor in state["state_dict"].values())
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "checkpoint_bytes": Path(args.checkpoint).stat().st_size,
        "dense_bytes": dense,
        "entropy_bound_bytes": bound,
        "ratio_to_bound": path.stat().st_size / bound if bound else None,
        "negative_zeros": negative_zeros,
        "plain_zeros": args.plain_zeros,
    }


def print_report(report: dict, *, tau: float, classes: int | None) -> None:
    """Print the report as a table."""
    _print_layers(report, tau=tau)
    _print_savings(report)
    if "compact" in report:
        _print_compact(report["compact"])
    stored = report["stored_top1"]
    of = " of held-out images" if report["stored_images"] == "val" else ""
    said = "no accuracy" if stored is None else f"top-1 {float(stored):.2f}%{of}"
    if "test" in report:
        say(f"test {result_text(report['test'], classes=classes)}  (the file records {said})")
    else:
        say(f"not evaluated (--no_data); the file records {said}")


def _print_layers(report: dict, *, tau: float) -> None:
    say(f"{'layer':<34}{'total':>10}{'non-zero':>10}{'sparsity':>10}{f'<= {tau:g}':>10}{'dead filters':>16}")
    for layer in report["layers"]:
        dead = f"{layer['dead_filters']} of {layer['filters']}"
        numbers = f"{layer['sparsity']:>10.4f}{layer['fraction_below_tau']:>10.4f}{dead:>16}"
        say(f"{layer['name']:<34}{layer['total']:>10}{layer['remaining']:>10}{numbers}")
    total = f"{report['prunable']:>10}{report['prunable_nonzero']:>10}{report['sparsity']:>10.4f}"
    say(f"{'all prunable weights':<34}{total}{report['fraction_below_tau']:>10.4f}")


def _print_savings(report: dict) -> None:
    say(f"parameters: {report['parameters']}, {report['parameters_nonzero']} of them not zero")
    say(f"compression ratio {report['compression_ratio']:.2f} (all parameters / non-zero parameters)")
    say(f"multiply-accumulates an image: {report['macs_dense']} dense, {report['macs_nonzero']} with zeros skipped")
    say("  (sum over convolutions and Linear of weights x output positions; biases, BatchNorm and pooling not counted)")
    say(f"theoretical speed-up {report['theoretical_speedup']:.2f} (dense / remaining multiply-accumulates)")
    if report["macs_shrunk"] is not None:
        times = report["macs_dense"] / max(report["macs_shrunk"], 1)
        say(f"  after shrinking {report['macs_shrunk']} dense ones are left: {times:.2f} (deploy.py makes both forms)")


def _print_compact(c: dict) -> None:
    say(f"compact file {c['file']}: {c['bytes']} bytes, read back bit-equal")
    say(f"  the checkpoint has {c['checkpoint_bytes']} bytes, its tensors {c['dense_bytes']}")
    bound = f"{c['entropy_bound_bytes']:.0f} bytes"
    times = f", {c['ratio_to_bound']:.3f} times that" if c["ratio_to_bound"] else ""
    say(f"  N*H(p) + 32*nonzeros bits of the prunable weights: {bound}{times}")
    say(f"  {negative_zeros(c)}")


def negative_zeros(compact: dict) -> str:
    """Say how many negative zeros a network has, and what became of them in its compact file."""
    count = compact["negative_zeros"]
    if not count:
        return "no negative zeros"
    if compact["plain_zeros"]:
        return f"{count} negative zeros were stored as zeros: the network computes the same"
    return (
        f"{count} negative zeros are kept bit for bit and cost as much as weights: --plain_zeros stores them as zeros"
    )
