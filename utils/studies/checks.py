"""What a study file may say: found out before the first run starts, with key, value and remedy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from utils.options import PENALTIES
from utils.studies.measurements import is_number
from utils.studies.methods import as_list, joined

MOST_CONFIGS = 10_000  # of one method; a grid beyond it is a slip, and merely listing it would take minutes
KEYS_OF_A_METHOD = ("penalty", "grid", "gmp", "finetune", "percent")
NAME = re.compile(r"[A-Za-z0-9][\w .+-]*")  # of a method, which becomes a folder
OF_THE_RUNNER = ("save_dir", "seed", "resume", "overwrite", "data", "no_test")  # reproduce.py gives these itself
OF_THE_RUNNER += ("start", "mask", "gmp", "gmp_epochs")  # as the methods say
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
        if not is_number(value, low, high) or (whole and not isinstance(value, int)):
            _refuse(key, value, f"give {kind} {span}")
    names = [str(value) if whole else f"{value:g}" for value in values]  # as in the names of folders and files
    for name, count in Counter(names).items():
        if count > 1:
            digits = "" if whole else " to six digits"
            _refuse(key, values, f"{name} stands there twice{digits}; leave one out")


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
    check_size(method, grid)


def check_size(method: str, grid: Mapping) -> None:
    """Raise unless a grid has few enough combinations.

    Raises:
        ValueError: naming key, value and remedy.
    """
    size = math.prod(len(values) for values in grid.values())
    if size > MOST_CONFIGS:
        _refuse(f"the grid of {method}", f"{size} combinations", f"give {MOST_CONFIGS} at most")


def check_after(method: str, after: object) -> None:
    """Raise unless what is chosen after the cut is a grid with the share of the epochs before it.

    Raises:
        ValueError: naming key, value and remedy.
    """
    what = f"'finetune' of {method}"
    if not isinstance(after, dict) or "share" not in after:
        _refuse(what, after, 'give {"share": [fractions of the epochs before the cut], "lr": [after it]}')
    check_numbers(f"{what}, share", after["share"], low=0, high=1)
    check_grid(method, {key: values for key, values in after.items() if key != "share"})


def check_kind(method: str, choice: Mapping) -> None:
    """Raise unless a method says in one way when its zeros come, and its grids go with that.

    Raises:
        ValueError: naming key, value and remedy.
    """
    for key in choice:
        if key not in KEYS_OF_A_METHOD:
            _refuse(f"the method {method}", key, f"give {', '.join(KEYS_OF_A_METHOD)}")
    if choice.get("penalty", "none") not in [*PENALTIES] or not {"penalty", "gmp", "finetune"} & {*choice}:
        _refuse(f"the method {method}", choice, f'give it a "penalty": {", ".join(PENALTIES)}')
    if choice.get("gmp", True) is not True:
        _refuse(f"'gmp' of {method}", choice["gmp"], "give true, or leave it out")
    if {"gmp", "finetune"} <= {*choice}:
        _refuse(f"the method {method}", "gmp and finetune", "give one of them")
    for grid in as_list(choice.get("grid", {})):
        both = {"A", "B"} & {*grid} if isinstance(grid, dict) else set()
        if both and ("gmp" not in choice or len(both) < 2):
            _refuse(f"the grid of {method}", " ".join(sorted(both)), 'give "A" and "B" together, and with "gmp"')
        if isinstance(grid, dict) and "share" in grid:
            _refuse(f"the grid of {method}", "share", 'it belongs to "finetune"')


def check_methods(methods: object) -> None:
    """Raise unless the methods have names that are folders, and grids that can be tried.

    Raises:
        ValueError: naming key, value and remedy.
    """
    if not isinstance(methods, dict) or not methods:
        _refuse("'methods'", methods, 'give {"name": {"penalty": "..."}}, at least one')
    for method, choice in methods.items():
        if not NAME.fullmatch(method) or method.endswith((".", " ")):
            _refuse("a method's name", method, "it becomes a folder; give letters, digits, spaces, . _ + and -")
        if not isinstance(choice, dict):
            _refuse(f"the method {method}", choice, 'give {"penalty": "..."}')
        check_kind(method, choice)
        for key in ("grid", "finetune"):
            if choice.get(key) == []:
                _refuse(f"{key!r} of {method}", [], "give one grid at least, or leave it out")
        for grid in as_list(choice.get("grid", {})):
            check_grid(method, grid)
        for after in as_list(choice.get("finetune", {"share": [0.5]})):
            check_after(method, after)
            for grid in as_list(choice.get("grid", {})):
                check_size(method, joined(grid, after))


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
    own = [method for method, choice in content["methods"].items() if {"gmp", "finetune"} & {*choice}]
    if own and 0 in content["percent"]:
        _refuse("'percent'", 0, f"the runs of {own[0]} have zeros; give ratios above 0")
    if not isinstance(content["controls"], list):
        _refuse("'controls'", content["controls"], "give a list of methods, [] for none")
    for method, choice in content["methods"].items():
        if "percent" in choice:
            check_numbers(f"'percent' of {method}", choice["percent"], low=0, high=1)
            if method not in own or not set(choice["percent"]) <= set(content["percent"]):
                _refuse(f"'percent' of {method}", choice["percent"], 'some of the study\'s, with "gmp" or "finetune"')
    for method in content["controls"]:
        if method in own:
            _refuse("'controls'", method, "its zeros are there before it could be pruned otherwise; leave it out")
