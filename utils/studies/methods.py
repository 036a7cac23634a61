"""The methods of a study: what can be chosen for each, the runs that this takes, and their options."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from utils.options import OptionError

AFTER = "then_"  # before the name of an option, in a name or table: its value after the cut


@dataclass(frozen=True)
class Config:
    """One method with one choice of its coefficients; with a ratio, one run of it.

    Attributes:
        method: its name.
        penalty: "none", or which one.
        coefficients: of the penalty and of training. With `gmp` also "A" and "B" of --gmp_epochs; with `finetune` the
            "share" of the epochs before the cut, and as "then_lr" (say) what holds after it.
        kind: when zeros come: "once" after training, with "gmp" during it, with "finetune" in between. "uncut" is the
            first part of a run with `finetune`, which all ratios and all that may follow it share.
        ratio: the fraction of zeros that the run is trained for; None for a whole method, or one run for all ratios.
        percent: the ratios that the method is trained for; none for all of the study's.
    """

    method: str
    penalty: str
    coefficients: tuple[tuple[str, float], ...]
    kind: str = "once"
    ratio: float | None = None
    percent: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder, such as "xi0.0001_psi0.0001" or "A1_B20_at0.95"."""
        name = "_".join(f"{key}{value:g}" for key, value in self.coefficients) or "plain"
        return name if self.ratio is None else f"{name}_at{self.ratio:g}"

    def at(self, ratio: float) -> Config:
        """Return the run that is measured at a ratio."""
        return self if self.kind == "once" else replace(self, ratio=ratio)

    def runs(self, percent: tuple[float, ...]) -> dict[Config, tuple[float, ...]]:
        """Return the runs that are measured at some ratios: one for all, or one each."""
        if self.kind == "once":
            return {self: percent}
        return {self.at(ratio): (ratio,) for ratio in percent if ratio in (self.percent or percent)}

    @property
    def before(self) -> Config | None:
        """The run whose network this one goes on from, cut."""
        if self.kind != "finetune":
            return None
        own = tuple((key, value) for key, value in self.coefficients if not key.startswith(AFTER))
        return Config(self.method, self.penalty, own, kind="uncut")

    @property
    def part(self) -> float:
        """The fraction of the study's epochs that the run takes."""
        share = dict(self.coefficients).get("share", 1.0)
        return 1 - share if self.kind == "finetune" else share

    @property
    def flags(self) -> list[str]:
        """Its part of the command line."""
        values = dict(self.coefficients)
        values.pop("share", None)
        flags = [] if self.penalty == "none" else [f"--{self.penalty}"]
        if self.kind == "gmp":
            flags += ["--gmp", str(self.ratio)]
            epochs = [values.pop(key) for key in ("A", "B") if key in values]
            flags += ["--gmp_epochs", *map(str, epochs)] if epochs else []
        elif self.kind == "finetune":  # the penalty has had its time
            flags, values = [], {k.removeprefix(AFTER): v for k, v in values.items() if k.startswith(AFTER)}
        return flags + [part for key, value in values.items() for part in (f"--{key}", _as_text(value))]

    def take_part(self, args: argparse.Namespace) -> None:
        """Leave of the epochs and the schedule of the study what belongs to this part of it, in place.

        The first part ends after `share` of the epochs, rounded to whole ones, the second takes the rest. Each decays
        the learning rate where the study does; at the cut itself the second begins with a learning rate of its own.

        Raises:
            OptionError: one of the parts would have no epoch.
        """
        share = dict(self.coefficients).get("share")
        if share is None:
            return
        cut = round(share * args.epochs)
        if not 0 < cut < args.epochs:
            text = f"share {share:g} of {args.epochs} epochs leaves none on one side of the cut"
            raise OptionError(f"{text}: give one from {1 / args.epochs:.2g} to {1 - 1 / args.epochs:.2g}")
        if self.kind == "uncut":
            args.epochs, args.schedule = cut, [epoch for epoch in args.schedule if epoch < cut]
        else:
            args.epochs, args.schedule = args.epochs - cut, [epoch - cut for epoch in args.schedule if epoch > cut]


def _as_text(value: float) -> str:
    """Return a value as the command line takes it: whole numbers without a point, as --train_batch wants them."""
    return str(int(value)) if value.is_integer() else str(value)


def as_list(grids: Mapping | list) -> list:
    """Return grids as a list, also where a study file has one alone."""
    return grids if isinstance(grids, list) else [grids]


def joined(grid: Mapping, after: Mapping) -> dict:
    """Return one grid of what is chosen for a run and for its part after the cut."""
    return {**grid, **{key if key == "share" else AFTER + key: values for key, values in after.items()}}


def configs_of(methods: Mapping) -> tuple[Config, ...]:
    """Return all methods of a study file with all their coefficients."""
    configs = []
    for method, choice in methods.items():
        kind = next((key for key in ("gmp", "finetune") if key in choice), "once")
        own = {"kind": kind, "percent": tuple(choice.get("percent", ()))}
        for pair in itertools.product(as_list(choice.get("grid", {})), as_list(choice.get("finetune", {}))):
            grid = joined(*pair) if kind == "finetune" else pair[0]
            for values in itertools.product(*grid.values()):
                coefficients = tuple(zip(grid, map(float, values), strict=True))
                configs.append(Config(method, choice.get("penalty", "none"), coefficients, **own))
    return tuple(dict.fromkeys(configs))  # grids may overlap
