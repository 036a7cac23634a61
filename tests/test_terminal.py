"""What a run shows in a terminal: one line at every width, no number cut, and what to do next."""

import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios

import pytest
from conftest import PATIENCE, ROOT, train
from forked import Forked

from models import build_model
from utils import logger, penalized_parameters

WIDTHS = (60, 80, 100, 200)


def set_columns(terminal, columns):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def last_words(terminal, text):
    """Read what is there already behind a text; return what follows the last whole update."""
    while select.select([terminal], [], [], 0)[0]:
        try:
            text = (text + os.read(terminal, 10_000).decode()).rpartition("\r")[2]
        except OSError:  # the other side is closed
            break
    return text


def watch(*options, widths):
    """Train in a pseudo-terminal whose width changes while the bar is drawn; return what appeared at each width.

    Updates that were written before the width changed are left out, but for one that was being written then.
    """
    terminal, inside = pty.openpty()
    set_columns(terminal, widths[0])
    process = Forked(*options, stderr=os.ttyname(inside))
    assert select.select([terminal], [], [], 120)[0]
    os.close(inside)  # the process has opened it by now; when that ends, so does reading
    seen, text = {width: [] for width in widths}, ""
    position = 0
    while True:
        try:
            text += os.read(terminal, 10_000).decode()
        except OSError:  # the other side is closed
            break
        *updates, text = text.split("\r")
        for update in updates:
            seen[widths[position]].append(update)
            if len(seen[widths[position]]) == 3 and position + 1 < len(widths):
                position += 1
                set_columns(terminal, widths[position])
                text = last_words(terminal, text)
                break
    output, _ = process.communicate(timeout=PATIENCE)
    os.close(terminal)
    assert process.returncode == 0
    return seen, output


def test_the_bar_fits_a_terminal_that_is_resized(tiny):
    options = ["--device", "cpu", "--epochs", "20", "--schedule", "--train_batch", "4"]
    seen, _ = watch(*tiny, *options, widths=(200, 60, 100, 80))
    narrowest = 200
    for width, updates in seen.items():
        shown = [re.sub(r"\x1b\[[JK]", "", update) for update in updates]
        assert len(shown) >= 3 and not any("\n" in text for text in shown), (width, updates)
        # The first one may have been on its way when the width changed.
        assert all(len(text) < width for text in shown[1:]), (width, shown)
        assert all(update.endswith("\x1b[J") for update in updates)  # erases what a wider line left, below it too
        narrowest = min(narrowest, width)
    assert narrowest == 60 and any(" run " in text for text in seen[200])


@pytest.mark.parametrize("columns", range(20, 201, 20))
def test_the_bar_leaves_out_what_does_not_fit_and_cuts_no_number(columns):
    numbers = ["ETA 1:23, run 13:24:10", "loss 12.345", "top-1 100.0%"]
    line = logger.bar_line("epoch 160/160", 782, 782, numbers, columns=columns)
    assert len(line) <= columns
    assert [word for word in line.replace("|", " ").replace("#", " ").split() if word] == [
        word for part in ["epoch 160/160", "782/782", *numbers] if part in line for word in part.split()
    ]
    assert all(number in line for number in numbers) == (columns >= 80)
    if columns >= 60:
        assert "loss 12.345" in line and "run 13:24:10" in line


def test_the_bar_fills():
    assert logger.bar_line("e", 0, 4, [], columns=20) == "e |            | 0/4"
    assert logger.bar_line("e", 2, 4, [], columns=20) == "e |######      | 2/4"
    assert logger.bar_line("e", 4, 4, [], columns=200).count("#") == 32
    assert logger.bar_line("epoch 1/2", 4, 4, [], columns=5) == ""


ROW = {"epoch": 7, "lr": 0.1, "train_loss": 0.1234, "train_loss_penalized": 0.2468, "train_top1": 97.5, "seconds": 80.1}
ROW |= {"test_top1": 93.61, "fraction_1e-3": 0.951}


def test_an_epochs_line():
    line = logger.epoch_line(ROW, epochs=12, left=400.4)
    numbers = "loss 0.1234 + 0.123  train 97.50%  test 93.61%  |w| <= 1e-3: 95.1%"
    assert line == f"epoch  7/12  lr 0.1  {numbers}  ETA 6:40"  # with the seconds it has more than 100 columns
    assert logger.epoch_line(ROW, epochs=12, left=0) == f"epoch  7/12  lr 0.1  {numbers}  80.1 s"
    assert logger.epoch_line(ROW | {"lr": 1e-3}, epochs=1600, left=48_250).endswith("ETA 13:24:10")


@pytest.mark.parametrize("epochs, loss, seconds", [(1, 0.1, 1.0), (1600, 123.4567, 12345.6), (100_000, 1e30, 1e6)])
def test_an_epochs_line_has_at_most_100_columns_and_whole_numbers(epochs, loss, seconds):
    row = ROW | {"epoch": epochs, "lr": 1.234e-5, "train_loss": loss, "train_loss_penalized": loss * 1.5}
    row |= {"train_top1": 100.0, "test_top1": 100.0, "fraction_1e-3": 1.0, "seconds": seconds}
    line = logger.epoch_line(row, epochs=epochs, left=seconds * 1000)
    assert len(line) <= 100 and f"{epochs}/{epochs}" in line and "train 100.00%" in line and "test 100.00%" in line
    whole = {f"{loss:.4f}", f"{loss:.4g}", f"{loss / 2:.3g}", "1.23e-05", "100.0%", logger.clock(seconds * 1000)}
    whole |= {f"{seconds:.1f}", f"{seconds:.4g}", "1e-3:", "100.00%", f"{epochs}/{epochs}"}
    assert {word for word in line.split() if word[0].isdigit()} <= whole


def test_times_for_reading():
    assert [logger.clock(s) for s in (4.6, 65, 3599, 3600, 48_250)] == ["0:05", "1:05", "59:59", "1:00:00", "13:24:10"]
    assert [logger.duration(s) for s in (4.6, 99, 150, 5400, 12_240)] == ["5 s", "99 s", "2 min", "90 min", "3.4 h"]


def test_top5_only_where_there_are_more_than_five_classes():
    result = {"loss": 1.0, "top1": 50.0, "top5": 100.0}
    assert [("top-5" in logger.result_text(result, classes=n)) for n in (3, 5, 6, None)] == [False, False, True, True]


def test_a_run_says_what_it_is_and_what_comes_next(tiny, tmp_path, images, capsys):
    train(*tiny, "--halo", "--epochs", "1", "--schedule", "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data     folder: 36 training, 18 test images of 3x32x32, 3 classes from {images}"
    model = build_model("resnet", 3, 8)
    total, taken = (sum(p.numel() for p in ps) for ps in (model.parameters(), penalized_parameters(model).values()))
    by = "halo xi 1e-08 psi 1e-08 lambda_init 1"
    assert lines[1] == f"network  resnet --depth 8: {total:,} parameters, {taken:,} penalised by {by}"
    assert lines[2].startswith("compute  cpu, ") and "fp32, HALO's kernel" in lines[2]
    assert lines[2].endswith(f"save_dir {tmp_path / 'run'}")
    assert lines[3].startswith("epoch 1/1") and "top-5" not in "".join(lines)
    said = re.fullmatch(r"outputs in (\S+); next, prune: python (.*)", lines[-1])
    assert said[1] == str(tmp_path / "run")
    script, *arguments = shlex.split(said[2])
    process = Forked(*arguments, script=script)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    names = "pruned_0.9.pth.tar, pruned_0.95.pth.tar, pruned_0.98.pth.tar, prune.json"
    assert output.splitlines()[-1].startswith(f"wrote in {tmp_path / 'run' / 'pruned'}: {names}")


def test_with_held_out_images_the_end_says_how_the_best_epoch_does_on_the_test_images(tiny, capsys):
    summary = train(*tiny, "--epochs", "1", "--schedule", "--val_split", "6")
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.startswith("val top-1 ")
    assert line.endswith(f"(epoch 1); its test top-1 {summary['test_of_best']['top1']:.2f}%")


def test_the_first_lines_come_before_anything_slow(tiny, monkeypatch):
    """They are to come within a second of the data: before the optimizers, which load a second and more of torch."""
    from utils.training import experiment

    said = []
    monkeypatch.setattr(experiment, "say", said.append)
    monkeypatch.setattr(experiment, "make_optimizers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(*tiny, "--halo")
    assert [line.split()[0] for line in said] == ["data", "network", "compute"]


def test_a_line_reaches_a_pipe_at_once():
    """Whatever buffers a pipe: who follows `... | tee run.log` sees each epoch when it is done."""
    code = "import time; from utils.logger import say; say('done'); time.sleep(600)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env=environment) as process:
        ready, _, _ = select.select([process.stdout], [], [], 300)
        process.kill()
    assert ready


def test_time_left_counts_the_epochs_to_come(tiny):
    from types import SimpleNamespace

    from utils.training.row import time_left

    run = SimpleNamespace(train_loader=range(10), args=SimpleNamespace(epochs=5), epoch=1, history=[])
    assert time_left(run, 2.0, 5) == (2.0, 2.0 + 3 * 4.0)  # none is finished: an epoch takes what this one promises
    run.history = [{"seconds": s} for s in (100, 6, 6, 7, 7, 8)]
    assert time_left(run, 2.0, 5) == (2.0, 2.0 + 3 * 7)


def test_a_line_in_mid_epoch_clears_the_bar_first(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = logger.BatchBar("epoch 1/2", 10)
    assert bar.wants(1)
    bar.update(1, ["loss 1.0"])
    assert not bar.wants(2) and bar.wants(10)  # ten times a second, and at the end
    logger.warn("something")
    bar.clear()
    shown = capsys.readouterr().err
    assert shown.endswith("\x1b[J\r\x1b[Jnote: something\n")
