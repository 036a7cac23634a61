"""How many directions each layer's output uses: eigenvalue energy of its covariance (Figure 1c of the paper).

    python compute_energy.py --checkpoint FILE --save OUT          # data set and network stand in our files
    python compute_energy.py -d cifar100 -a vgg16_bn --depth 16 --checkpoint FILE --save OUT

Writes OUT.npz (eigenvalues by layer name, descending, of sum 1), OUT.json (how many of them reach 50/90/95/99%, and
the effective rank) and OUT.png. Several checkpoints are overlaid: --checkpoint dense.pth.tar halo.pth.tar.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse
from pathlib import Path

import torch

from models import ARCHS
from utils import options, plots
from utils.files.archive import write_npz
from utils.files.atomic import atomic_write, printable
from utils.files.checkpoint import load_checkpoint
from utils.files.record import read_record, same_subject
from utils.logger import say, warn
from utils.paths import labels_of
from utils.run import all_or_none, refuse_existing, run_script, write_json
from utils.stages.energy import POOLS, components, effective_rank, layer_energies, measured_layers
from utils.stages.subject import Subject, load_subject
from utils.training.data import DATASETS
from utils.training.loading import make_loader


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    options.add_data(parser, DATASETS, recorded=True)
    options.add_model(parser, ARCHS, recorded=True)
    options.add_stage(parser)
    parser.add_argument("--checkpoint", metavar="FILE", nargs="+", required=True, help="one or more, to overlay")
    parser.add_argument("--labels", metavar="TEXT", nargs="+", help="names of the checkpoints (default: their paths)")
    parser.add_argument("--save", metavar="OUT", required=True, help="writes OUT.npz, OUT.json and OUT.png")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="images, without augmentation")
    parser.add_argument("--pool", choices=list(POOLS), default="max", help="how a map becomes one number")
    parser.add_argument("--layers", metavar="NAME", nargs="+", help="only these layers (default: all)")
    return parser


def refuse_different(paths: list[str]) -> None:
    """Make sure that the files that record their data set and network record the same.

    Raises:
        OptionError: they do not.
    """
    records = [(path, read_record(load_checkpoint(path), path)) for path in paths]
    records = [(path, record) for path, record in records if record]
    for path, record in records[1:]:
        other, first = records[0]
        if not same_subject(record, first):
            is_of, was_of = (f"-d {its.dataset} {its.network}" for its in (record, first))
            raise options.OptionError(f"{path} is of {is_of}, {other} of {was_of}: measure one at a time")


def load_all(args: argparse.Namespace) -> list[Subject]:
    """Load the checkpoints, and the images once.

    Raises:
        OptionError: they are of different networks, or of differently prepared images.
    """
    if len(args.checkpoint) > 1:
        refuse_different(args.checkpoint)
    subjects: list[Subject] = []
    for path in args.checkpoint:
        subjects.append(load_subject(args, path, data=subjects[0].data if subjects else None))
        if subjects[-1].preprocessing != subjects[0].preprocessing:
            raise options.OptionError(
                f"{path} was trained on images that were prepared in another way than those of {args.checkpoint[0]}: "
                "measure one at a time"
            )
        if subjects[-1].linear != subjects[0].linear and not args.layers:
            raise options.OptionError(
                f"of {path} and {args.checkpoint[0]} only one was trained with --linear: name --layers that both have"
            )
    return subjects


def measure(subject: Subject, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return the energies of one checkpoint by layer name."""
    layers = measured_layers(subject.model, linear=subject.linear, shape=subject.preprocessing.shape)
    unknown = [name for name in args.layers or [] if name not in layers]
    if unknown:
        raise options.OptionError(f"--layers {unknown[0]}: no such layer; choose from {', '.join(layers)}")
    chosen = {name: layers[name] for name in args.layers or layers}
    loader = make_loader(subject.data, args.split, subject.device, arch=args.arch, batch_size=args.test_batch)
    energies = layer_energies(subject.model, chosen, loader, pool=args.pool) if chosen else {}
    for name in chosen.keys() - energies.keys():
        warn(f"{name} did not run, and is left out")
    if not energies:
        raise options.OptionError(
            f"{args.arch} has nothing to measure: no Conv2d, or no hidden Linear layer, that runs"
        )
    return energies


def describe(energies: dict[str, torch.Tensor]) -> dict:
    """Return channels, components and effective rank of every layer."""
    return {
        name: {"channels": len(e), "components": components(e), "effective_rank": effective_rank(e)}
        for name, e in energies.items()
    }


def main(args: argparse.Namespace) -> dict:
    """Measure and draw as the options say.

    Returns:
        The content of OUT.json.
    """
    labels = args.labels or [printable(label) for label in labels_of(args.checkpoint)]
    if not len(set(labels)) == len(labels) == len(args.checkpoint):
        raise options.OptionError("give as many different --labels as there are checkpoints")
    stem = Path(args.save).with_suffix("") if Path(args.save).suffix in (".npz", ".json", ".png") else Path(args.save)
    if not stem.name or args.save.endswith("/"):
        raise options.OptionError(f"--save {args.save} is a folder: give a name in it, such as {stem / 'energy'}")
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("npz", "json", "png")}
    refuse_existing(paths.values(), overwrite=args.overwrite, inputs=args.checkpoint)
    subjects = load_all(args)
    energies = {label: measure(subject, args) for label, subject in zip(labels, subjects, strict=True)}

    alone = len(labels) == 1
    arrays = {n if alone else f"{label}/{n}": e.numpy() for label, es in energies.items() for n, e in es.items()}
    report = {"pool": args.pool, "split": args.split, "dataset": args.dataset}
    report["checkpoints"] = {label: describe(es) for label, es in energies.items()}
    with all_or_none(paths.values()):
        with atomic_write(paths["npz"]) as file:
            write_npz(file, arrays)
        write_json(paths["json"], report)
        plots.plot_energy(report["checkpoints"], paths["png"], pool=args.pool, energies=energies)
    for label, layers in report["checkpoints"].items():
        say(label)
        for name, layer in layers.items():
            reach = "  ".join(f"{count:>4} for {level}" for level, count in layer["components"].items())
            say(f"  {name:<28}{layer['channels']:>4} channels: {reach}  effective rank {layer['effective_rank']:.1f}")
    say(f"wrote {paths['npz']}, {paths['json']}, {paths['png']}")
    return report


if __name__ == "__main__":
    run_script(main, get_parser())
