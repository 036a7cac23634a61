"""What a run says: the CSV log, the progress bar, and the lines on the terminal. With the scripts, all that prints."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from utils.distributed import is_main
from utils.files.atomic import write_text


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """Write rows that share their keys as a CSV file, atomically. No row gives an empty file.

    Raises:
        OSError: the file cannot be written; what it held before is untouched.
    """
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, text.getvalue())


class BatchBar:
    """A progress bar with loss and accuracy on a terminal, in one line whatever its width; nothing elsewhere.

    The cursor stays at the start of the line: a terminal that is made narrower and breaks the line keeps it there, so
    that the next update erases all of it.

    Args:
        title: shown in front, such as "epoch 3/160".
        batches: number of batches to come.
    """

    shown_now: BatchBar | None = None  # what must go before a line is printed

    def __init__(self, title: str, batches: int) -> None:
        self.shown = sys.stderr.isatty() and is_main()
        self.title, self.batches, self.due = title, batches, 0.0

    def wants(self, done: int) -> bool:
        """Tell whether to update now: ten times a second, and at the end."""
        return self.shown and (done == self.batches or time.monotonic() >= self.due)

    def update(self, done: int, numbers: Sequence[str]) -> None:
        """Show the number of batches done and texts such as "loss 1.2", the most important first."""
        self.due = time.monotonic() + 0.1
        line = bar_line(self.title, done, self.batches, numbers, columns=terminal_columns() - 1)
        BatchBar.shown_now = self
        self._write(f"{line}\x1b[J\r")

    def clear(self) -> None:
        """Clear the line."""
        if BatchBar.shown_now is self:
            BatchBar.shown_now = None
            self._write("\x1b[J")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def terminal_columns() -> int:
    """Return the width of the terminal behind standard error as it is now, 80 where it does not tell."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def bar_line(title: str, done: int, total: int, numbers: Sequence[str], *, columns: int) -> str:
    """Return "title |###   | 3/9  ..." in at most so many columns; what does not fit is left out, never cut."""
    parts = [f"{done}/{total}", *numbers]
    while parts and len("  ".join([title, *parts])) > columns:
        parts.pop()
    text = "  ".join(parts)
    room = min(columns - len(f"{title} || {text}"), 32)
    if room < 4:
        text = "  ".join([title, *parts])
        return text if len(text) <= columns else ""
    filled = room * done // total
    return f"{title} |{'#' * filled}{' ' * (room - filled)}| {text}"


def clock(seconds: float) -> str:
    """Format a time to come as 0:05, 12:34 or 3:24:10."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def duration(seconds: float) -> str:
    """Format a time that was taken or will be, such as "45 s", "12 min" or "3.4 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


# What the package says of its arguments, and what stands for it in the scripts.
IN_SCRIPTS = {
    "(linear=True takes them)": "(cifar.py --linear takes them)",
    "pass linear=True to take its Linear layers": "cifar.py --linear takes its Linear layers",
    " Name in exclude= what is to stay out, and this note ends.": "",
}


def in_scripts(text: str) -> str:
    """Return what the package says of its arguments as the scripts say it."""
    for in_a_loop, here in IN_SCRIPTS.items():
        text = text.replace(in_a_loop, here)
    return text


def show_warnings_as_notes() -> None:
    """Let what libraries warn of appear in one line, as our own notes do, and name the options that scripts have."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        warn(in_scripts(" ".join(str(message).split())))

    warnings.showwarning = show


def _clear_bar() -> None:
    if BatchBar.shown_now:
        BatchBar.shown_now.clear()


def say(text: str) -> None:
    """Print one line of results on standard output, at once; of several processes only the first does."""
    if is_main():
        _clear_bar()
        print(_for(sys.stdout, text), flush=True)


def warn(text: str) -> None:
    """Print one line on standard error that the user should read; of several processes only the first does."""
    if is_main():
        _clear_bar()
        print(_for(sys.stderr, f"note: {text}"), file=sys.stderr, flush=True)


def one_line(error: BaseException, most: int = 200) -> str:
    """Return what an error says in one line: of a page of torch's, or of a value of a damaged file, both ends."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-(most // 2) :]}"


def _for(stream: IO[str], text: str) -> str:
    """Return a text in which what a stream cannot encode, such as a path that is not UTF-8, stands as \\udcff."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def result_text(result: dict, *, classes: int | None) -> str:
    """Format loss and accuracy; top-5 only where there are more than five classes, or where their number is unknown."""
    top5 = f"  top-5 {result['top5']:.2f}%" if classes is None or classes > 5 else ""
    return f"loss {result['loss']:.4f}  top-1 {result['top1']:.2f}%{top5}"


LINE = 100  # columns of an epoch's line


def epoch_line(row: dict, *, epochs: int, left: float) -> str:
    """Format one row of the log for the terminal, in at most LINE columns: log.csv has all of it.

    Args:
        row: the row.
        epochs: of the run.
        left: seconds until the run will be done.
    """
    held_out = "val" if "val_top1" in row else "test"
    penalty = row["train_loss_penalized"] - row["train_loss"]
    parts = [  # the text, and when it goes if there is no room: the highest first
        (f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", 0),
        (f"lr {row['lr']:.3g}", 5),
        (f"loss {_short(row['train_loss'])}" + (f" + {penalty:.3g}" if penalty else ""), 2),
        (f"train {row['train_top1']:.2f}%", 1),
        (f"{held_out} {row[f'{held_out}_top1']:.2f}%", 0),
        (f"|w| <= 1e-3: {100 * row['fraction_1e-3']:.1f}%", 3),
        (f"{_short(row['seconds'], digits=1)} s", 6),
        (f"ETA {clock(left)}", 4) if left > 0 else ("", 7),
    ]
    while len(text := "  ".join(part for part, _ in parts if part)) > LINE:
        parts.remove(max(parts, key=lambda part: part[1]))
    return text


def _short(value: float, *, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.4g}"
