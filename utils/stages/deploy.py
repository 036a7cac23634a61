"""The deploying stage: both forms of a pruned network, proved and measured, and the files that other programs open."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.widths import widths_of
from utils.files.atomic import atomic_write
from utils.files.checkpoint import described, load_weights, save_checkpoint
from utils.files.record import build_recorded
from utils.halo.parameters import prunable_weights
from utils.halo.pruning import overall_sparsity, savings, sparsity_per_layer
from utils.halo.shrink import shrink
from utils.halo.sparse import SparseNetwork
from utils.logger import say, warn
from utils.options import OptionError
from utils.paths import portable_path
from utils.plot_deploy import plot_deploy
from utils.run import all_or_none, describe, made_folder, refuse_existing, write_json
from utils.stages import export
from utils.stages.compiler import Compiler
from utils.stages.proof import PROOF, Form, images_of, print_proof, prove
from utils.stages.subject import Subject, load_subject, recorded_images
from utils.stages.timing import interleave_enough

KINDS = ("pth.tar", "pt2", "json", "png", "onnx", "safetensors")


def deploy(args: argparse.Namespace) -> dict:
    """Do what the options of deploy.py say.

    Args:
        args: the options.

    Returns:
        The content of OUT.json; where zeros save no multiplication only what is deployed and its `sparsity`.

    Raises:
        ValueError, OSError: unusable checkpoint, images or output; or a form that computes something else.
        OptionError: an output would replace the checkpoint, or a package is missing.
    """
    paths, folder = outputs(args), Path(args.save).parent
    if folder.is_dir():
        refuse_existing(paths.values(), overwrite=args.overwrite, inputs=[args.checkpoint])
    subject = load_subject(args, args.checkpoint, images=not args.no_data)
    small = shrink(subject.model.eval().cpu())
    report, sizes = describe_subject(args, subject), describe_sizes(subject, small)
    if min(sizes["macs"].values()) == sizes["macs"]["dense"]:
        text = f"{args.checkpoint} has no zeros that save a multiplication, so there is nothing to gain"
        warn(f"{text}: prune it first; nothing was written")
        return report
    with made_folder(folder), all_or_none(paths.values()):
        return _deploy(args, subject, small, report | sizes, paths)


def _deploy(args: argparse.Namespace, subject: Subject, small: nn.Module, report: dict, paths: dict[str, Path]) -> dict:
    """Prove both forms, measure and write them; return the content of OUT.json."""
    model = subject.model.to(subject.device)
    forms = {"shrunk": small.to(subject.device, memory_format=_layout(small))}
    if sparse := sparse_form(model, subject.device, subject.preprocessing.shape):
        forms["sparse"] = sparse
    say(headline(report))
    report["proof"] = prove(model, forms, images_of(args, subject), path=args.checkpoint)
    print_proof(report)
    state = small_state(args, subject, small, report)
    require_loadable(args, state, paths["pth.tar"])
    files = contents(args, subject, small, state)
    report["milliseconds"] = measure(args, subject, forms)
    report["sentence"] = finding(report["milliseconds"])
    print_times(report["milliseconds"])
    report |= {key: value for key, value in describe(args, subject.device).items() if key != "arguments"}
    write(paths, files, state, report)
    say(f"\n{report['sentence']}")
    return report


def outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Return the files to write, by kind.

    Raises:
        OptionError: --save is a folder, one of them is the checkpoint itself, or a package is missing.
    """
    if Path(args.save).is_dir():
        raise OptionError(f"--save {args.save} is a folder: give a name in it, such as {Path(args.save) / 'small'}")
    stem = args.save
    for kind in KINDS:
        stem = stem.removesuffix(f".{kind}")
    chosen = [kind for kind in export.PACKAGES if getattr(args, kind)]
    for kind in chosen:
        export.require_packages(kind)
    paths = {kind: Path(f"{stem}.{kind}") for kind in KINDS if kind not in export.PACKAGES or kind in chosen}
    for path in paths.values():
        if path.resolve() == Path(args.checkpoint).resolve():
            raise OptionError(f"--save {args.save} would replace the checkpoint that is read: choose another name")
    return paths


def sparse_form(model: nn.Module, device: torch.device, shape: tuple[int, int, int]) -> SparseNetwork | None:
    """Return the network that multiplies non-zero weights only; None, with a note, where there is none.

    Args:
        model: the network.
        device: where the other forms run.
        shape: of an image; that the operations fit on it shows when one is given.
    """
    if device.type != "cpu":
        warn(f"sparse inference runs on the CPU: left out with --device {device.type}")
        return None
    try:
        sparse = SparseNetwork(model)
        sparse(torch.zeros(1, *shape))
    except ValueError as error:
        warn(f"no sparse form: {error}")
        return None
    return sparse if sparse.compiled else None  # it has said why


def describe_subject(args: argparse.Namespace, subject: Subject) -> dict:
    """Return what is deployed, and the fraction of its prunable weights that are zero."""
    report = {"checkpoint": str(args.checkpoint), "dataset": args.dataset, "arch": args.arch, "depth": args.depth}
    layers = sparsity_per_layer(prunable_weights(subject.model, linear=subject.linear))
    return report | {"sparsity": overall_sparsity(layers)}


def describe_sizes(subject: Subject, small: nn.Module) -> dict:
    """Return what there is to multiply in each form, and the widths before and after; both are on the CPU."""
    shape = subject.preprocessing.shape
    dense, shrunk = savings(subject.model, shape), savings(small, shape)
    before, after = widths_of(subject.model), widths_of(small)
    return {
        "macs": {"dense": dense["macs_dense"], "shrunk": shrunk["macs_dense"], "sparse": dense["macs_nonzero"]},
        "parameters": {"dense": dense["parameters"], "shrunk": shrunk["parameters"]},
        "parameters_nonzero": dense["parameters_nonzero"],
        "layers": [
            {"name": name, "channels": before[name][0], "kept": after[name][0]}
            for name in before
            if len(before[name]) == 2  # not BatchNorm, which has those of the layer before it
        ],
    }


def headline(report: dict) -> str:
    """Say what is deployed and what there is to save."""
    network = report["arch"] + (f" --depth {report['depth']}" if report["depth"] else "")
    macs = report["macs"]
    gain = ", ".join(f"{macs[form]:,} {form}" for form in macs)
    zeros = f"{100 * report['sparsity']:.2f}% of the prunable weights are zero"
    name = portable_path(report["checkpoint"])
    return f"{name}: {network} on {report['dataset']}, {zeros}\nmultiply-adds an image: {gain}"


def _layout(model: nn.Module) -> torch.memory_format:
    """Return the layout in which convolutions of images are fastest, which torch has for no other ones."""
    deep = any(tensor.dim() == 5 for tensor in (*model.parameters(), *model.buffers()))
    return torch.contiguous_format if deep else torch.channels_last


def measure(args: argparse.Namespace, subject: Subject, forms: dict[str, Form]) -> dict[str, dict]:
    """Time dense, compiled dense and both forms in turn, at every batch size.

    Returns:
        Batch size (as text, for JSON) to form to `n`, `ms` (median), `quartiles` and `times_faster` than dense.
    """
    device = subject.device
    warn_if_busy()
    dense = subject.model.to(memory_format=_layout(subject.model))
    compiler = None if args.no_compile else Compiler(dense)
    report = {}
    for batch in sorted(set(args.batch)):
        generator = torch.Generator().manual_seed(batch)
        plain = torch.randn(batch, *subject.preprocessing.shape, generator=generator).to(device)
        images = plain.to(memory_format=torch.channels_last)
        compiled = compiler.compile(images) if compiler else None
        runs = {"dense": dense} | ({} if compiled is None else {"compiled": compiled}) | forms
        with torch.no_grad():
            inputs = {name: plain if name == "sparse" else images for name in runs}  # each in its own layout
            times = interleave_enough({name: _timed(run, inputs[name]) for name, run in runs.items()})
        report[str(batch)] = {name: _summary(times[name], times["dense"]) for name in times}
    return report


def warn_if_busy() -> None:
    """Say so where the cores were busy, since threads that wait for each other then take far longer."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 2 * cores:
        text = f"the load of the last minute was {load:.1f} on {cores} cores"
        warn(f"{text}: if other processes still run, these times mislead")


def _timed(run: Form, images: Tensor) -> Callable[[], None]:
    """Return a call that ends when the device has finished."""
    accelerator = getattr(torch, images.device.type) if images.device.type != "cpu" else None

    def call() -> None:
        run(images)
        if accelerator:
            accelerator.synchronize()

    return call


def _summary(times: list[float], dense: list[float]) -> dict:
    low, _, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(d / t for d, t in zip(dense, times, strict=True))
    ms = 1e3 * statistics.median(times)
    return {"n": len(times), "ms": ms, "quartiles": [1e3 * low, 1e3 * high], "times_faster": ratio}


def print_times(times: dict[str, dict]) -> None:
    """Print milliseconds a batch by form, and how many times faster than dense."""
    forms = list(dict.fromkeys(form for row in times.values() for form in row))
    titles = {"dense": "dense (eager)", "compiled": "torch.compile"}
    say("\nmilliseconds a batch, medians of interleaved runs; in brackets times faster than dense")
    say(f"{'batch':>5}" + "".join(f"{titles.get(form, form):>18}" for form in forms))
    for batch, row in times.items():
        cells = (f"{row[f]['ms']:.2f} ({row[f]['times_faster']:.1f})" if f in row else "" for f in forms)
        say(f"{batch:>5}" + "".join(f"{cell:>18}" for cell in cells))


def finding(times: dict[str, dict]) -> str:
    """Say in one sentence what the faster form gains at batch 64 and 1, or at the largest and smallest measured."""
    wanted = ["64" if "64" in times else list(times)[-1], "1" if "1" in times else list(times)[0]]
    forms = {form for form in ("sparse", "shrunk") if form in times[wanted[0]]}
    name = max(sorted(forms), key=lambda form: times[wanted[0]][form]["times_faster"])
    ratios = {batch: times[batch][name]["times_faster"] for batch in wanted}
    (first, ratio), *others = ratios.items()
    rest = "".join(f", {other:.1f} at batch {batch}" for batch, other in others)
    comparison = "faster than" if min(ratios.values()) >= 1 else "as fast as"
    return f"The {name} network is {ratio:.1f} times {comparison} dense at batch {first}{rest}."


def contents(args: argparse.Namespace, subject: Subject, small: nn.Module, state: dict) -> dict[str, bytes]:
    """Return the files for other programs, by kind, of the smaller network, which `state` describes.

    Raises:
        ValueError: --onnx cannot be written, or what torch.export wrote gives other logits.
    """
    plain = copy.deepcopy(small).cpu().to(memory_format=torch.contiguous_format)
    shape, files = subject.preprocessing.shape, {}
    if args.safetensors:
        files["safetensors"] = export.safetensors_bytes(plain, state)
    try:
        program = export.export(plain, shape)
    except ValueError as error:
        if args.onnx:
            raise
        warn(f"no .pt2 file: {error}")
        return files
    files["pt2"] = export.pt2_bytes(program)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, have = plain(images), export.run_pt2(files["pt2"], images)
    if not (have - wanted).abs().max() <= PROOF * wanted.abs().max():
        raise ValueError(f"torch.export computes something else for {args.checkpoint}: please report this")
    if args.onnx:
        files["onnx"] = export.onnx_bytes(program)
    return files


def small_state(args: argparse.Namespace, subject: Subject, small: nn.Module, report: dict) -> dict:
    """Return the smaller network as a checkpoint that every script loads."""
    state = subject.state
    config = dict(state.get("config") or {})
    config |= {"dataset": args.dataset, "arch": args.arch, "depth": args.depth, "widths": widths_of(small)}
    config["num_classes"] = report["proof"]["classes"]
    top1 = report["proof"]["top1"]
    return described(state, "pruning") | {
        "state_dict": {name: tensor.cpu().contiguous() for name, tensor in small.state_dict().items()},
        "acc": state.get("acc") if top1 is None else report["proof"]["forms"]["shrunk"]["top1"],
        "acc_images": recorded_images(state) if top1 is None else "test",
        "config": config,
        "preprocessing": subject.preprocessing.record(),
    }


def require_loadable(args: argparse.Namespace, state: dict, path: Path) -> None:
    """Raise ValueError unless the smaller network can be built and loaded as every script does it."""
    try:
        model = build_recorded(args.arch, state["config"]["num_classes"], args.depth, state, path)
        load_weights(model, state["state_dict"], path=path)
    except ValueError as error:
        remedy = "nothing is written; please report this"
        raise ValueError(f"the smaller network would not load again ({error}): {remedy}") from error


def write(paths: dict[str, Path], files: dict[str, bytes], state: dict, report: dict) -> None:
    """Write all files, each whole or not at all, and say which."""
    for kind, content in files.items():
        with atomic_write(paths[kind]) as file:
            file.write(content)
    if "pt2" not in files:
        paths["pt2"].unlink(missing_ok=True)  # that of an earlier call is of another network
    for old in (paths["json"].with_suffix(f".{kind}") for kind in KINDS if kind not in paths):
        if old.exists():
            warn(f"{old} was there before and may be of another network: give --{old.suffix[1:]} too, or remove it")
    save_checkpoint(paths["pth.tar"], state)
    plot_deploy(report, paths["png"])
    write_json(paths["json"], report)
    written = [kind for kind in paths if kind in files or kind in ("pth.tar", "json", "png")]
    sizes = {kind: f" ({paths[kind].stat().st_size / 1e3:.0f} kB)" for kind in written if kind not in ("json", "png")}
    names = ", ".join(f"{paths[kind].name}{sizes.get(kind, '')}" for kind in written)
    say(f"\nwrote in {paths['json'].parent}: {names}")
