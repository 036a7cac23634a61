"""cifar.py from the command line: outputs, exact resume, interruption, and runs that must not be lost."""

import csv
import hashlib
import json
import os
import random
import signal
import time
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATIENCE, start, train, write_images
from forked import Forked

import cifar
from models import build_model
from utils.files.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.paths import portable_path
from utils.plot_lambda import histograms
from utils.run import RUN_FILES, read_json
from utils.training import loading
from utils.training.experiment import Experiment
from utils.training.state import KEPT_ON_RESUME, check_same_run
from utils.training.statistics import flatten

HALO = ["--halo", "--xi", "1e-3", "--psi", "1e-3"]
TIMES = ("seconds", "images_per_second")


def rows(folder):
    """Return log.csv without the columns that measure time."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def assert_equal_runs(one, other):
    """Compare weights, lam, momentum and log rows bit for bit."""
    assert rows(one) == rows(other)
    a, b = (load_checkpoint(folder / "checkpoint.pth.tar") for folder in (one, other))
    for key in ("state_dict", "lambdas"):
        assert list(a[key]) == list(b[key]) and all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    for key in ("optimizer", "reg_optimizer"):
        for index, state in (a[key] or {"state": {}})["state"].items():
            assert torch.equal(state["momentum_buffer"], b[key]["state"][index]["momentum_buffer"])


@pytest.mark.parametrize("penalty", [[], HALO])
def test_a_checkpoint_of_another_layout_is_continued_bit_for_bit(tiny, tmp_path, penalty):
    """As one of MPS, or of CUDA before its layouts were those of the CPU."""
    train(*tiny, *penalty, "--save_dir", tmp_path / "straight")
    train(*tiny, *penalty, "--epochs", 1, "--save_dir", tmp_path / "halves")
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    state, changed = load_checkpoint(checkpoint), 0
    for one in state["optimizer"]["state"].values():
        other = one["momentum_buffer"].contiguous()
        changed += other.stride() != one["momentum_buffer"].stride()
        one["momentum_buffer"] = other
    assert changed > 5
    save_checkpoint(checkpoint, state)
    train(*tiny, *penalty, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")


def test_resume_is_bit_exact_over_decays(tiny, tmp_path):
    options = [*tiny, *HALO, "--schedule", "1", "3"]
    train(*options, "--epochs", 4, "--save_dir", tmp_path / "straight")
    train(*options, "--epochs", 2, "--save_dir", tmp_path / "halves")
    halfway = load_checkpoint(tmp_path / "halves" / "checkpoint.pth.tar")
    torch.manual_seed(99)  # whatever happened in between does not matter
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    train(*options, "--epochs", 4, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")
    log = rows(tmp_path / "halves")
    assert [row["epoch"] for row in log] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in log] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    end = load_checkpoint(tmp_path / "halves" / "checkpoint.pth.tar")
    assert not torch.equal(end["lambdas"]["conv1.weight"], halfway["lambdas"]["conv1.weight"])


@pytest.mark.parametrize("penalty", [[], ["--l1"], ["--ws", "--xi", "1e-3"], ["--mcp"], ["--halo", "--released_lr"]])
def test_every_penalty_resumes_into_another_folder(tiny, tmp_path, penalty):
    train(*tiny, *penalty)
    train(*tiny, *penalty, "--epochs", "1", "--save_dir", tmp_path / "first")
    train(*tiny, *penalty, "--save_dir", tmp_path / "second", "--resume", tmp_path / "first" / "checkpoint.pth.tar")
    first, brought = (load_checkpoint(tmp_path / name / "init.pth.tar") for name in ("first", "second"))
    assert all(torch.equal(w, brought["state_dict"][name]) for name, w in first["state_dict"].items())
    if "--ws" in penalty or "--halo" in penalty:
        assert_equal_runs(tmp_path / "run", tmp_path / "second")
    assert rows(tmp_path / "run") == rows(tmp_path / "second")


def test_seconds_are_those_of_all_epochs(tiny, tmp_path):
    summary = train(*tiny)
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    assert summary["device"] == "cpu" or torch.accelerator.is_available()
    assert len(log) == 2 and summary["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in log))
    # Of training alone, so a little more than that of the whole epoch, which evaluates 18 images too.
    assert all(36 / float(row["seconds"]) <= float(row["images_per_second"]) for row in log)


def test_the_log_has_both_learning_rates(tiny, tmp_path):
    train(*tiny, *HALO, "--reg_lr", 0.2, "--gamma", 0.5, "--released_lr")
    log = rows(tmp_path / "run")
    assert [[float(row[key]) for row in log] for key in ("lr", "reg_lr")] == [[0.1, 0.05], [0.2, 0.05]]


def test_the_first_of_equally_good_epochs_is_the_best():
    history = [{"epoch": k, "val_top1": top1} for k, top1 in enumerate((60.0, 80.0, 70.0, 80.0), start=1)]
    run = SimpleNamespace(args=SimpleNamespace(gmp=None), history=history, held_out="val")
    assert Experiment.best.fget(run)["epoch"] == 2


def test_the_same_seed_is_the_same_run_and_another_is_not(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(*tiny, *HALO, "--seed", seed, "--save_dir", tmp_path / name)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


@pytest.mark.parametrize("penalty", [[], ["--l1"], ["--ws", "--xi", "1e-3"], ["--mcp"], ["--halo"]])
def test_every_penalty_has_its_figures(tiny, tmp_path, figures, penalty):
    train(*tiny, *penalty, "--epochs", 1)
    drawn = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert drawn == {"curves.png", "regularization.png"}


def test_what_a_run_leaves(tiny, tmp_path, figures):
    summary = train(*tiny, *HALO)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == set(RUN_FILES)
    for name in ("curves.png", "regularization.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert {"arguments", "command", "git_commit", "git_dirty", "versions", "device"} <= set(config)
    assert config["arguments"]["xi"] == 1e-3 and config["versions"]["torch"] == torch.__version__

    final = load_checkpoint(folder / "final.pth.tar")
    model = build_model("resnet", 3, 8)
    model.load_state_dict(final["state_dict"])
    convolutions = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    flat = torch.cat([w.detach().flatten() for w in convolutions]).numpy()
    assert np.array_equal(np.load(folder / "conv_params.npy"), flat)
    lam = np.load(folder / "reg_params.npy")
    assert np.array_equal(lam, torch.cat([t.flatten() for t in final["lambdas"].values()]).numpy())

    log = rows(folder)
    assert float(log[-1]["fraction_1e-3"]) == pytest.approx((np.abs(flat) <= 1e-3).mean())
    assert float(log[-1]["lambda_q0"]) == pytest.approx(np.abs(lam).min(), rel=1e-6)
    assert float(log[-1]["strength_q100"]) == pytest.approx(1e-3 / np.abs(lam).min() ** 2, rel=1e-5)
    gap = 1e-3 * (np.abs(flat) / lam**2).sum() + 1e-3 * np.abs(lam).sum()
    assert float(log[-1]["train_loss_penalized"]) - float(log[-1]["train_loss"]) == pytest.approx(gap, rel=1e-4)
    for split, (name, key) in product(("train", "test"), (("accs", "top1"), ("losses", "loss"))):
        assert np.load(folder / f"{split}_{name}.npy").tolist() == [float(row[f"{split}_{key}"]) for row in log]
    written = read_json(folder / "summary.json")
    for key in ("data", "save_dir"):  # a file that is kept names no folder of this machine
        assert written["arguments"].pop(key) == portable_path(summary["arguments"].pop(key))
    assert written == summary
    assert final["acc"] == summary["final"]["test_top1"] and final["epoch"] == 2
    best = load_checkpoint(folder / "model_best.pth.tar")
    assert best["acc"] == best["best_acc"] == max(float(row["test_top1"]) for row in log)


def test_training_learns_and_evaluate_agrees(tiny, tmp_path):
    summary = train(*tiny, "--epochs", "8", "--schedule", "6", "--lr", "0.05")
    assert summary["final"]["test_top1"] > 80
    again = train(*tiny, "--evaluate", "--resume", tmp_path / "run" / "final.pth.tar")
    assert again["top1"] == summary["final"]["test_top1"]
    assert again["loss"] == pytest.approx(summary["final"]["test_loss"], rel=1e-6)


def test_val_split_leaves_the_test_set_alone(tiny, tmp_path, monkeypatch):
    from utils.training import loading

    seen = []
    original = loading.make_loader

    def watch(data, split, *args, **kwargs):
        seen.append(split)
        return original(data, split, *args, **kwargs)

    monkeypatch.setattr(loading, "make_loader", watch)
    summary = train(*tiny, "--val_split", "9")
    assert seen == ["train", "val", "test"]
    log = rows(tmp_path / "run")
    assert "val_top1" in log[0] and "test_top1" not in log[0]
    best = load_checkpoint(tmp_path / "run" / "model_best.pth.tar")
    assert summary["test_of_best"]["epoch"] == best["epoch"]
    evaluated = train(*tiny, "--evaluate", "--resume", tmp_path / "run" / "model_best.pth.tar")
    assert summary["test_of_best"] == evaluated


def test_the_figure_of_weights_and_lam_is_of_one_epoch(tiny, tmp_path):
    """Not the weights of the best epoch, which is tested at the end, with lam of the last."""
    options = ["--halo", "--xi", "1e-3", "--psi", "1e-3", "--epochs", 3, "--schedule", 2, "--gamma", 30]
    summary = train(*tiny, *options, "--val_split", 9)
    final, best = (load_checkpoint(tmp_path / "run" / f"{name}.pth.tar") for name in ("final", "model_best"))
    assert best["epoch"] == summary["test_of_best"]["epoch"] < final["epoch"] == 3
    counts = [
        histograms(*(flatten(part).numpy() for part in ({n: state["state_dict"][n] for n in state["lambdas"]}, lam)))
        for state, lam in ((final, final["lambdas"]), (best, final["lambdas"]))
    ]
    with np.load(tmp_path / "run" / "regularization.npz") as written:
        same = [all(np.array_equal(written[key], found[key]) for key in found) for found in counts]
    assert same == [True, False]


def test_batches_have_the_sizes_that_are_asked_for(tiny, monkeypatch):
    sizes, original = {}, loading.make_loader

    def watch(data, split, *args, batch_size, **kwargs):
        sizes[split] = batch_size
        return original(data, split, *args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(loading, "make_loader", watch)
    train(*tiny, "--epochs", 1, "--schedule", "--test_batch", 7)
    assert sizes == {"train": 16, "test": 7}


def test_no_test_never_reads_the_test_images(tiny, tmp_path, monkeypatch):
    from utils.training import loading

    original = loading.make_loader

    def watch(data, split, *args, **kwargs):
        assert split != "test"
        return original(data, split, *args, **kwargs)

    monkeypatch.setattr(loading, "make_loader", watch)
    summary = train(*tiny, "--val_split", "9", "--no_test")
    assert "test_of_best" not in summary and "val_top1" in summary["final"]


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tiny, tmp_path, fails):
    train(*tiny, *HALO)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    status, line = fails(*tiny, "--l1")
    assert status == 1 and "--resume" in line and "--overwrite" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "run" / "mine.txt").write_text("keep")
    train(*tiny, "--l1", "--epochs", "1", "--overwrite")
    assert len(rows(tmp_path / "run")) == 1 and (tmp_path / "run" / "mine.txt").exists()


@pytest.fixture
def trained(tiny, tmp_path):
    """A finished run; returns the options that continue it."""
    train(*tiny, *HALO)
    return [*tiny, *HALO, "--resume", str(tmp_path / "run" / "checkpoint.pth.tar")]


@pytest.mark.parametrize(
    "change, words",
    [
        (["--depth", "14"], "depth 8 (now 14)"),
        (["--lr", "0.2"], "lr 0.1 (now 0.2)"),
        (["--epochs", "1"], "2 epochs already"),
        (["--psi", "1e-2"], "psi"),
        (["--resume", "nowhere.pth.tar"], "nowhere.pth.tar"),
    ],
)
def test_resume_refuses_another_run(trained, tmp_path, fails, change, words):
    before = (tmp_path / "run" / "checkpoint.pth.tar").read_bytes()
    options = [*trained, *change]
    if "--resume" in change:
        options += ["--save_dir", str(tmp_path / "other")]
    status, line = fails(*options)
    assert status == 1 and words in line
    assert (tmp_path / "run" / "checkpoint.pth.tar").read_bytes() == before


def test_resume_refuses_every_option_that_changes_what_is_computed(trained, fails):
    changes = [["--train_batch", 8], ["--gamma", 0.5], ["--seed", 2], ["--lambda_init", 0.5], ["--reg_lr", 0.2]]
    for option, *value in [*changes, ["--val_split", 3], ["--released_lr"], ["--no_flip"]]:
        status, line = fails(*trained, "--epochs", 3, option, *value)
        assert status == 1 and f"{option[2:]} " in line and "of another run" in line


def test_no_other_option_may_change_when_a_run_goes_on(monkeypatch):
    free = {"epochs", "data", "save_dir", "device", "test_batch", "overwrite", "resume", "evaluate", "compile"}
    monkeypatch.setattr("utils.training.state.check_images", lambda *_: None)
    args = cifar.get_parser().parse_args(["--halo", "--schedule", "1"])
    run = SimpleNamespace(args=args, data=SimpleNamespace(classes=["a"]))
    parts = dict.fromkeys(("optimizer", "schedulers", "scaler", "history", "rng"))
    config = vars(args) | {"num_classes": 1}
    check_same_run(run, {"config": config, "epoch": 1, **parts}, "a")
    for option in {*config} - {*free, "no_test", *KEPT_ON_RESUME}:
        state = {"config": config | {option: "another"}, "epoch": 1, **parts}
        with pytest.raises(CheckpointError, match=f"of another run: {option} another .now"):
            check_same_run(run, state, "a")


def test_resume_refuses_another_number_of_classes(trained, tmp_path, fails):
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    more = write_images(tmp_path / "more", classes=4)
    status, line = fails(*trained, "--data", more, "--save_dir", tmp_path / "other")
    assert status == 1 and "num_classes 3 (now 4)" in line
    network = ["-a", "resnet", "--depth", "8", "--evaluate", "--resume", checkpoint]
    status, line = fails("-d", "folder", "--data", more, *network)
    assert status == 1 and "fc.weight (3, 64) instead of (4, 64)" in line
    status, line = fails("-d", "digits", *network)
    assert status == 2 and "-d digits -a resnet --depth 8 is not what" in line
    assert line.endswith("give -d folder -a resnet --depth 8")


def test_resume_needs_more_than_weights(tiny, tmp_path, fails):
    train(*tiny, "--epochs", "1")
    final = tmp_path / "run" / "final.pth.tar"
    status, line = fails(*tiny, "--resume", final)
    assert status == 1 and "optimizer" in line and "checkpoint.pth.tar" in line
    state = load_checkpoint(final)
    released = {key: state[key] for key in ("epoch", "state_dict", "acc", "best_acc")}
    save_checkpoint(tmp_path / "released.pth.tar", released)
    assert train(*tiny, "--evaluate", "--resume", tmp_path / "released.pth.tar")["top1"] == released["acc"]


def test_resume_of_a_truncated_file(trained, tmp_path, fails):
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    status, line = fails(*trained)
    assert status == 1 and "truncated" in line


@pytest.mark.parametrize("where", ["/proc/run", "a_file/run"])
def test_a_folder_that_cannot_be_written(tiny, tmp_path, fails, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    status, line = fails(*tiny, "--save_dir", where)
    assert status == 1 and where in line and "choose another folder" in line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--lr", "1e30"], "the cross-entropy did it"),
        (["--halo", "--xi", "100", "--lambda_init", "1e-15"], "the penalty did it"),
    ],
)
def test_a_diverging_run_says_where_and_keeps_the_last_good_checkpoint(tiny, tmp_path, fails, options, words):
    status, line = fails(*tiny, *options)
    assert status == 1 and "epoch 1, batch " in line and words in line
    assert (f"smallest |lam| {options[-1]}" in line) == ("--halo" in options)
    assert str(tmp_path / "run" / "checkpoint.pth.tar") in line
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["epoch"] == 0


def test_a_diverged_run_is_not_sent_where_it_diverges_again(tiny, tmp_path, fails):
    """The same options would, and others are another run; the weights are there to begin from."""
    status, line = fails(*tiny, "--lr", "1e30", "--schedule")
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    assert status == 1 and "continue with" not in line
    assert f"begin again with --overwrite, or from its weights with --start {checkpoint} in another --save_dir" in line
    train(*tiny, "--start", checkpoint, "--save_dir", tmp_path / "other")
    train(*tiny, "--overwrite")


def test_an_epoch_that_ends_in_nan_is_not_saved(tiny, tmp_path, fails):
    """One batch an epoch: its loss is finite, and what its step did shows in no later loss."""
    status, line = fails(*tiny, "--train_batch", "36", "--lr", "1e38", "--wd", "10")
    assert status == 1 and "epoch 1, batch 1" in line and "infinite or NaN" in line
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["epoch"] == 0
    assert not (tmp_path / "run" / "model_best.pth.tar").exists()


def test_a_disk_that_fills_keeps_the_last_checkpoint(tiny, tmp_path):
    import resource

    train(*tiny, *HALO, "--epochs", "1")
    folder = tmp_path / "run"
    size = (folder / "checkpoint.pth.tar").stat().st_size

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    process = start(*tiny, *HALO, "--resume", folder / "checkpoint.pth.tar", preexec_fn=limit)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "cannot write" in errors and "Traceback" not in errors
    assert load_checkpoint(folder / "checkpoint.pth.tar")["epoch"] == 1
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def wait_for(condition, process, *, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path):
    process = Forked(*tiny, *HALO, "--epochs", "500")
    log = tmp_path / "run" / "log.csv"
    wait_for(lambda: log.exists() and len(rows(log.parent)) >= 1, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    assert f"--resume {checkpoint}" in errors
    finished = load_checkpoint(checkpoint)["epoch"]
    assert finished >= 1
    train(*tiny, *HALO, "--epochs", finished + 1, "--resume", checkpoint)


@pytest.mark.parametrize("epochs", [1, 2])
def test_killed_between_the_last_checkpoint_and_its_row_the_log_is_made_whole(tiny, tmp_path, epochs):
    options, folder = [*tiny, "--epochs", epochs], tmp_path / "run"
    train(*options)
    whole = (folder / "log.csv").read_bytes()
    (folder / "log.csv").write_bytes(b"".join(whole.splitlines(keepends=True)[:epochs]) if epochs > 1 else b"")
    (folder / "summary.json").unlink()
    train(*options, "--resume", folder / "checkpoint.pth.tar")
    assert (folder / "log.csv").read_bytes() == whole
    assert read_json(folder / "summary.json")["log_sha256"] == hashlib.sha256(whole).hexdigest()


def test_a_terminal_sees_a_bar_and_a_pipe_does_not(tiny, tmp_path):
    import pty

    terminal, inside = pty.openpty()
    command = [*tiny, "--device", "cpu", "--epochs", "1", "--train_batch", "2"]
    process = Forked(*command, stderr=os.ttyname(inside))
    output, _ = process.communicate(timeout=PATIENCE)
    os.close(inside)
    shown = os.read(terminal, 100_000).decode()
    assert process.returncode == 0 and "epoch 1/1 |" in shown and "ETA" in shown and "loss" in shown
    lines = output.splitlines()
    assert "ETA" not in output and [line.split()[0] for line in lines[:3]] == ["data", "network", "compute"]
    assert lines[3].startswith("epoch 1/1  lr 0.1  loss ")


def test_kill_nine_at_ten_random_moments_loses_nothing(tiny, tmp_path):
    """The last resume runs to the end and must equal a run that nobody disturbed."""
    options = [*tiny, *HALO]
    checkpoint, log = tmp_path / "run" / "checkpoint.pth.tar", tmp_path / "run" / "log.csv"
    moments = random.Random(0)
    resume, seen = [], [0]
    for _ in range(10):
        process = Forked(*options, "--epochs", 1000, *resume)
        # However fast the machine is: epochs later, and then anywhere between two ends of epochs.
        goal = seen[-1] + moments.randint(1, 3)
        wait_for(lambda goal=goal: log.exists() and len(rows(log.parent)) >= goal, process)
        time.sleep(moments.random() * load_checkpoint(checkpoint)["history"][-1]["seconds"])
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
        seen.append(load_checkpoint(checkpoint)["epoch"])
        assert seen[-1] >= goal
        resume = ["--resume", checkpoint]
    options += ["--epochs", seen[-1] + 2]
    process = Forked(*options, *resume)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    train(*options, "--save_dir", tmp_path / "straight")
    assert_equal_runs(tmp_path / "run", tmp_path / "straight")
