"""What a run says: the CSV log, the progress bar, and the lines on the terminal. With the scripts, all that prints."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from progress.bar import Bar

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
    """A progress bar with ETA, loss and accuracy on a terminal; nothing elsewhere.

    Args:
        title: shown in front, such as "epoch 3/160".
        batches: number of batches to come.
    """

    def __init__(self, title: str, batches: int) -> None:
        self.shown = sys.stderr.isatty() and is_main()
        suffix = "%(index)d/%(max)d  ETA %(eta_td)s  %(numbers)s"
        # The cursor stays: a killed process could not bring it back.
        self.bar = Bar(title, max=batches, suffix=suffix, file=sys.stderr, hide_cursor=False, numbers="")

    def update(self, done: int, numbers: str) -> None:
        """Show the number of batches done and a text such as "loss 1.2  top-1 55.0%"."""
        self.bar.numbers = numbers
        self.bar.goto(done)

    def close(self) -> None:
        """Clear the line."""
        if self.shown:
            self.bar.writeln("")
            sys.stderr.write("\r")


def say(text: str) -> None:
    """Print one line of results on standard output, at once; of several processes only the first does."""
    if is_main():
        print(text, flush=True)


def warn(text: str) -> None:
    """Print one line on standard error that the user should read; of several processes only the first does."""
    if is_main():
        print(f"note: {text}", file=sys.stderr, flush=True)


def epoch_line(row: dict, *, epochs: int) -> str:
    """Format one row of the log for the terminal."""
    held_out = "val" if "val_top1" in row else "test"
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:.3g}  "
        f"train loss {row['train_loss']:.4f} (+ penalty {row['train_loss_penalized'] - row['train_loss']:.4g})  "
        f"train top-1 {row['train_top1']:.2f}  {held_out} top-1 {row[f'{held_out}_top1']:.2f}  "
        f"|w| <= 1e-3: {100 * row['fraction_1e-3']:.1f}%  {row['seconds']:.1f} s"
    )
