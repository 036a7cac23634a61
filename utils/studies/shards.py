"""Parts of a study for the jobs of a batch array: several commands in one --out, each with its own share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.command_line import OptionError
from utils.files.lock import Lock, LockedError, folder_lock, holder_of
from utils.studies.jobs import Job


@dataclass(frozen=True)
class Shard:
    """One of several parts of a study.

    Attributes:
        index: which, from 1.
        count: how many there are.
    """

    index: int
    count: int

    @property
    def name(self) -> str:
        """Its name in those of files."""
        return f"_{self.index}of{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def part(self, jobs: list[Job]) -> list[Job]:
        """Return this part of all jobs of a phase, done or not: what others finish meanwhile must not move it."""
        return jobs[self.index - 1 :: self.count]


def parse_shard(text: str) -> Shard:
    """Return the part that "I/N" means.

    Raises:
        OptionError: there is no such part.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match:
        raise OptionError(f"--shard {text} is not of the form I/N: give 1/4 for the first of four parts")
    index, count = map(int, match.groups())
    if not 1 <= index <= count:
        example = f"1/{count} to {count}/{count}" if count else "such as 1/4"
        raise OptionError(f"--shard {text}: parts are counted from 1, give {example}")
    return Shard(index, count)


@contextmanager
def study_lock(out: Path, shard: Shard | None) -> Iterator[Lock]:
    """Hold a study's folder: alone for all of it, beside other parts for one of them.

    Each takes its own lock before it looks for the others', so that of two at the same moment at most one goes on.

    Args:
        out: the folder.
        shard: the part; None for the whole study.

    Raises:
        LockedError: the whole study runs there, or the same part, or a part where the whole should.
    """
    name = f".shard{shard.name}.lock" if shard else ".lock"
    with folder_lock(out, name=name, remedy="choose another --out") as lock:
        for other in [out / ".lock"] if shard else sorted(out.glob(".shard*.lock")):
            holder = holder_of(other)
            if holder:
                what = "all of the study" if shard else "a part of the study"
                raise LockedError(
                    f"process {holder['process']} on {holder['host']} runs {what} in {out}: "
                    "wait for it, or choose another --out"
                )
        yield lock


def missing_text(jobs: list[Job], shard: Shard) -> str | None:
    """Say which jobs of a phase are missing, with one of them and its part; None if none is."""
    missing = [(job, position) for position, job in enumerate(jobs) if not job.done]
    if not missing:
        return None
    job, position = missing[0]
    number = f"{len(missing)} of {len(jobs)} runs are missing"
    return f"{number}, such as {job}, of --shard {position % shard.count + 1}/{shard.count}"
