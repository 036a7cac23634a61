"""A command line whose errors are one line, and the types of its values. No torch here."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

LARGEST = 3.4e38  # magnitude of a number in fp32, in which everything is computed
SMALLEST = 1e-18  # of one whose square, as that of lam, must not be 0 there
MOST = 2**31 - 1  # of whatever is counted


class OptionError(ValueError):
    """A wrong option or a wrong combination of options: exit status 2."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, except where the help text states what stands for None, and for flags."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or action.default is False or action.default == "none"
        return action.help if unsaid else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which takes no abbreviations."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=(description or "").split("\n")[0],
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        # Before Python 3.14 argparse takes "-1e-8" for an option, and its error would not show the value.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse, and refuse a text that can be no path or name: an empty one would mean this folder."""
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and (not text.strip() or "\0" in text):
                    self.error(f"argument --{name}: {text!r} is no path or name; give one, or leave the option out")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def real(low: float = -math.inf, *, high: float = math.inf, nonzero: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a number in [low, high], of a magnitude that fp32 has (and SMALLEST with `nonzero`)."""
    bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f">= {low:g}" if low > -math.inf else "finite"
    rule = bounds + (f" and not 0 nor nearer to it than {SMALLEST:g}" if nonzero else "")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one that is {rule}") from None
        if not low <= value <= high or not abs(value) <= LARGEST or (nonzero and abs(value) < SMALLEST):
            raise argparse.ArgumentTypeError(f"{text} is out of range; give a number that is {rule}")
        return value

    return parse


def whole(low: int, *, high: int = MOST) -> Callable[[str], int]:
    """Return an argparse type: a whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one >= {low}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; give a whole number in [{low}, {high}]")
        return value

    return parse


def option(name: str, value: object) -> list[str]:
    """Return an option and its value as parts of a command line; one with a dash in front is joined by =."""
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


def architecture(names: Iterable[str], *, own: bool) -> Callable[[str], str]:
    """Return an argparse type: one of some names, or with `own` also module:function."""
    known = list(names)

    def parse(text: str) -> str:
        if text not in known and not (own and ":" in text):
            also = ", or name a network of your own as module:function" if own else ""
            raise argparse.ArgumentTypeError(f"no network {text!r}: choose from {', '.join(known)}{also}")
        return text

    return parse
