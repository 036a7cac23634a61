"""What a study file may say: found out before the first run starts, with key, value and remedy."""

from __future__ import annotations

import math
import re

MOST_CONFIGS = 10_000  # of one method; a grid beyond it is a slip, and merely listing it would take minutes
NAME = re.compile(r"[A-Za-z0-9][\w .+-]*")  # of a method, which becomes a folder
OF_THE_RUNNER = ("save_dir", "seed", "resume", "overwrite", "data", "no_test")  # reproduce.py gives these itself
OF_THE_STUDY = ("epochs", "dataset", "arch", "depth", "val_split")  # equal for all, else nothing is compared


def _refuse(key: str, value: object, rule: str) -> None:
    raise ValueError(f"{key} is {value!r}: {rule}")


def check_numbers(key: str, values: object, *, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Raise unless `values` is a list of different finite numbers in [low, high], at least one.

    Raises:
        ValueError: naming key, value and remedy.
    """
    kind = "whole numbers" if whole else "numbers"
    span = f"in [{low:g}, {high:g}]" if high < math.inf else f">= {low:g}" if low > -math.inf else "that are finite"
    if not isinstance(values, list) or not values:
        _refuse(key, values, f"give a list of {kind} {span}")
    for value in values:
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            _refuse(key, value, f"give {kind} {span}")
    names = [f"{value:g}" for value in values]  # as in the names of folders and files, to six digits
    for name in names:
        if names.count(name) > 1:
            _refuse(key, values, f"{name} stands there twice to six digits; leave one out")


def check_grid(method: str, grid: object) -> None:
    """Raise unless a grid maps coefficients to lists of numbers, and few enough combinations.

    Raises:
        ValueError: naming key, value and remedy.
    """
    if not isinstance(grid, dict):
        _refuse(f"the grid of {method}", grid, 'give {"coefficient": [values]}, or a list of such grids')
    for key, values in grid.items():
        if key in OF_THE_RUNNER + OF_THE_STUDY:
            _refuse(f"the grid of {method}", key, "a grid varies coefficients; leave it out")
        check_numbers(f"the grid of {method}, {key}", values, low=-math.inf)
    size = math.prod(len(values) for values in grid.values())
    if size > MOST_CONFIGS:
        _refuse(f"the grid of {method}", f"{size} combinations", f"give {MOST_CONFIGS} at most")


def check_methods(methods: object) -> None:
    """Raise unless the methods have names that are folders, a penalty each, and grids that can be tried.

    Raises:
        ValueError: naming key, value and remedy.
    """
    if not isinstance(methods, dict) or not methods:
        _refuse("'methods'", methods, 'give {"name": {"penalty": "..."}}, at least one')
    for method, choice in methods.items():
        if not NAME.fullmatch(method) or method.endswith((".", " ")):
            _refuse("a method's name", method, "it becomes a folder; give letters, digits, spaces, . _ + and -")
        if not isinstance(choice, dict) or not isinstance(choice.get("penalty"), str):
            _refuse(f"the method {method}", choice, 'give it a "penalty", such as "halo" or "none"')
        grids = choice.get("grid", {})
        for grid in grids if isinstance(grids, list) else [grids]:
            check_grid(method, grid)


def check_content(content: dict) -> None:
    """Raise unless a study file's values can be used; its keys are checked where it is read.

    Args:
        content: the parsed file.

    Raises:
        ValueError: naming key, value and remedy.
    """
    if not isinstance(content["title"], str):
        _refuse("'title'", content["title"], "give a text")
    if not isinstance(content["options"], dict):
        _refuse("'options'", content["options"], 'give {"option": value}')
    for key in OF_THE_RUNNER:
        if key in content["options"]:
            _refuse("'options'", key, "reproduce.py gives it itself; leave it out")
    check_numbers("'percent'", content["percent"], low=0, high=1)
    for key in ("tune_seeds", "seeds"):
        check_numbers(f"'{key}'", content[key], low=0, high=2**64 - 1, whole=True)
    check_methods(content["methods"])
    if not isinstance(content["controls"], list):
        _refuse("'controls'", content["controls"], "give a list of methods, [] for none")
