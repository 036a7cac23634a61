"""A study: a grid of runs, the choice among them on held-out images, and the chosen ones on the test images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from models import ARCHS, find_arch, resolve_depth
from utils import options
from utils.files.texts import parse_json
from utils.halo.pruning import SCHEMES
from utils.options import OptionError
from utils.studies.checks import check_content
from utils.studies.measurements import accuracies_of, read_measured
from utils.studies.methods import Config, configs_of
from utils.training.data import datasets_of

KEYS = ("title", "options", "percent", "tune_seeds", "seeds", "methods", "controls")


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: of the file, without its ending.
        title: what the study asks.
        options: of every run, as a command line.
        percent: the fractions of weights to remove.
        tune_seeds: of the runs on which coefficients are chosen.
        seeds: of the runs of the chosen coefficients.
        configs: all methods with all their coefficients.
        controls: methods that are also pruned by the other schemes.
    """

    name: str
    title: str
    options: tuple[str, ...]
    percent: tuple[float, ...]
    tune_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    configs: tuple[Config, ...]
    controls: tuple[str, ...]

    @property
    def methods(self) -> list[str]:
        """The names of the methods, in order."""
        return list(dict.fromkeys(config.method for config in self.configs))

    def of_method(self, method: str) -> list[Config]:
        """Return the configurations of one method."""
        return [config for config in self.configs if config.method == method]


def _command_line(chosen: dict) -> tuple[str, ...]:
    parts: list[str] = []
    for key, value in chosen.items():
        if value is True:
            parts.append(f"--{key}")
        elif value is not False:
            parts += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return tuple(parts)


def load_study(path: str | Path) -> Study:
    """Read a study file (JSON); results/studies/README.md describes it.

    Raises:
        ValueError: the file is missing or says something that cannot be done, with what and how to correct it.
    """
    path = Path(path)
    try:
        content = parse_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"no study file {path}: python reproduce.py --list shows those there are") from error
    try:
        if set(content) != set(KEYS):
            wrong = sorted(set(content) ^ set(KEYS))[0]
            raise ValueError(f"{'unknown' if wrong in content else 'missing'} key {wrong!r}")
        check_content(content)
        study = Study(
            name=path.stem,
            title=content["title"],
            options=_command_line(content["options"]),
            percent=tuple(content["percent"]),
            tune_seeds=tuple(content["tune_seeds"]),
            seeds=tuple(content["seeds"]),
            configs=configs_of(content["methods"]),
            controls=tuple(content["controls"]),
        )
        unknown = [method for method in study.controls if method not in study.methods]
        if unknown:
            raise ValueError(f"'controls' names {unknown[0]!r}, which is no method")
        _check_options(study)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no study file: {error}; correct the file") from error
    return study


def _check_options(study: Study) -> None:
    """Raise unless each choice of each method makes runs that can be begun, all different."""
    cuts: dict[tuple, Config] = {}
    for config in study.configs:
        for run in filter(None, (config.before, config.at(study.percent[0]))):
            arguments = training_arguments(study, run, seed=1, folder=Path("unused"), data="data")
            penalty = "none" if run.kind == "finetune" else run.penalty
            if arguments.penalty != penalty:
                raise ValueError(
                    f"{config.method} would have the penalty {arguments.penalty}, not {penalty}: 'methods' name it"
                )
            if not arguments.val_split:
                raise ValueError("'options' lacks val_split: without held-out images nothing can be chosen")
        if config.before:
            others = tuple(pair for pair in config.coefficients if pair[0] != "share")
            twin = cuts.setdefault((config.method, others, arguments.epochs), config)
            if twin != config:
                raise ValueError(
                    f"{config.method} {twin.name} and {config.name} cut after the same epoch: leave one out"
                )


class _Parser(options.Parser):
    """Raises where a script's parser would end the process."""

    def error(self, message: str) -> None:
        raise OptionError(message)


def _shape(study: Study) -> tuple[int, int, int]:
    arch = study.options[study.options.index("--arch") + 1] if "--arch" in study.options else None
    if arch is None:
        raise OptionError(f"'options' needs an arch: choose from {', '.join(ARCHS)}")
    return find_arch(arch).shape


def _parser(study: Study) -> options.Parser:
    shape = _shape(study)
    parser = _Parser(None)
    options.add_data(parser, datasets_of(shape), default=datasets_of(shape)[0])
    options.add_images(parser)
    options.add_model(parser, [name for name, arch in ARCHS.items() if arch.shape == shape], default=None)
    return parser


def training_arguments(study: Study, config: Config, *, seed: int, folder: Path, data: str) -> argparse.Namespace:
    """Return the options of one training run, with the defaults of cifar.py, for the LeNets too.

    Raises:
        OptionError: the study's options do not go together.
    """
    parser = _parser(study)
    options.add_linear(parser)
    options.add_penalty(parser)
    options.add_training(parser)
    options.add_zeros(parser)
    options.add_run(parser)
    own = [f"--data={data}", f"--save_dir={folder / 'run'}", "--seed", str(seed), "--no_test"]
    args = parser.parse_args([*study.options, *config.flags, *own])
    config.take_part(args)
    checkpoint = folder / "run" / "checkpoint.pth.tar"
    args.resume = str(checkpoint) if checkpoint.exists() else None
    args.overwrite = args.resume is None  # the numbers of a run whose network was deleted, which is trained again
    if args.dataset == "folder":
        args.image_size = args.image_size or 32  # also of a run that goes on
    options.resolve(args, depth_of=resolve_depth)
    return args


def pruning_arguments(
    training: argparse.Namespace, *, percent: tuple[float, ...], of: str, scheme: str, images: str, folder: Path
) -> argparse.Namespace:
    """Return the options of pruning one trained run.

    Args:
        training: the options of the run.
        percent: the fractions to remove.
        of: "nonzero" weights, or "all", where zeros that are there count.
        scheme: what to remove; a key of utils.halo.pruning.SCHEMES.
        images: "val" to measure on the held-out images, "test" on the test images.
        folder: where to write.
    """
    values = {name: getattr(training, name) for name in ("dataset", "data", "test_batch", "arch", "depth", "seed")}
    values |= {"val_split": training.val_split if images == "val" else 0, "device": training.device}
    values |= {"percent": list(percent), "scheme": scheme, "of": of, "recalibrate_bn": 0, "overwrite": True}
    checkpoint = Path(training.save_dir) / "final.pth.tar"
    return argparse.Namespace(**values, resume=str(checkpoint), save_dir=str(folder))


def run_folder(out: Path, config: Config, seed: int) -> Path:
    """Return the folder of one run."""
    return out / config.method / config.name / f"seed{seed}"


def held_out_accuracy(study: Study, out: Path, config: Config) -> dict[float, float]:
    """Return the mean top-1 on the held-out images over the tuning seeds, by ratio.

    0 is the network before pruning, where one run serves all ratios. Ratios of which a run diverged are left out.
    """
    found: dict[float, float] = {}
    for run, ratios in config.runs(study.percent).items():
        reports = [read_measured(run_folder(out, run, seed) / "val") for seed in study.tune_seeds]
        seeds = [accuracies_of(report) for report in reports if report is not None]
        own = (0.0, *ratios) if run.ratio is None else ratios
        if len(seeds) == len(reports) and all(accuracies.keys() >= {*own} for accuracies in seeds):
            found |= {ratio: mean(accuracies[ratio] for accuracies in seeds) for ratio in own}
    return found


def choose(study: Study, out: Path) -> dict[str, dict[float, Config]]:
    """Return for each method and ratio the run that is best on the held-out images (the first of equals).

    A method, or a ratio, of which every run diverged has none.
    """
    chosen: dict[str, dict[float, Config]] = {}
    for method in study.methods:
        accuracies = {config: held_out_accuracy(study, out, config) for config in study.of_method(method)}
        for ratio in study.percent:
            there = {config: values[ratio] for config, values in accuracies.items() if ratio in values}
            if there:
                chosen.setdefault(method, {})[ratio] = max(there, key=there.get).at(ratio)
    return chosen


def on_edge(study: Study, config: Config, out: Path | None = None) -> list[str]:
    """Return the coefficients at which the grid of the method ends, so that a better one may lie beyond.

    Args:
        study: its definition.
        config: a choice of coefficients.
        out: folder of the outputs: what has not been run yet is left out of the grid.
    """

    def was_run(other: Config) -> bool:
        folders = [run_folder(out, run, study.tune_seeds[0]) for run in other.runs((config.ratio or study.percent[0],))]
        return any((folder / name).exists() for folder in folders for name in ("val/prune.json", "failed.json"))

    grid = [dict(other.coefficients) for other in study.of_method(config.method) if out is None or was_run(other)]
    result = []
    for key, value in config.coefficients:
        tried = {other[key] for other in grid if key in other}  # its grids may differ in their coefficients
        if len(tried) > 1 and value in (min(tried), max(tried)):
            result.append(key)
    return result


CONTROLS = tuple(scheme for scheme in SCHEMES if scheme != "global")
