"""How files are named where no folder of this machine may show: in reports, labels and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def portable_path(path: str | Path) -> str:
    """Name a file so that no folder of this machine shows, for what is kept or shown to others.

    Args:
        path: of a file or folder; a relative one is left as it is.

    Returns:
        An absolute path relative to the repository, or its last two parts where it lies elsewhere.
    """
    absolute = Path(path)
    if not absolute.is_absolute():
        return str(path)
    if absolute.is_relative_to(REPOSITORY):
        return absolute.relative_to(REPOSITORY).as_posix()
    return "/".join(absolute.parts[1:][-2:])


def labels_of(paths: Sequence[str | Path]) -> list[str]:
    """Name each of several files by as few of the last parts of its path as tell them apart, two at least.

    A path that is given twice has the same label twice.
    """
    labels = [portable_path(path) for path in paths]
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(2, max(map(len, parts), default=2)):
        if len({*labels}) == len({*parts}):
            break
        labels = ["/".join(part[1:][-count:]) for part in parts]
    return labels


def portable_arguments(arguments: Iterable[str]) -> list[str]:
    """Return a command line with the paths in it, those behind `--option=` too, as portable_path names them."""
    named = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        named.append(f"{option}{equals}{portable_path(value)}")
    return named
