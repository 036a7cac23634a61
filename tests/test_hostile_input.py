"""Options, paths, JSON and images that no run can use: one line with value and remedy, and nothing half-written."""

import json
import os
import shlex
import shutil
import signal
import time
from contextlib import suppress

import pytest
import torch
from conftest import TINY, train, write_images
from PIL import Image

import adaptivity
import check_params
import cifar
import cifar_prune_iterative
import compare_pruning
import reproduce
from utils.files.checkpoint import load_checkpoint, save_checkpoint
from utils.halo.penalties import HALO, L1
from utils.plot_methods import plot_comparison
from utils.run import all_or_none, read_json, write_json
from utils.studies.measurements import read_log, read_measurement
from utils.training.row import run_epoch

LOST = os.fsdecode(b"x\xff$x^{")  # no UTF-8, and half a formula
REPORT = {
    **{"dataset": "digits", "images": "test", "arch": "resnet", "depth": 8, "scheme": "global"},
    "before": {"top1": 90.0, "sparsity": 0.0},
    "results": [{"asked": 0.5, "after": {"top1": 80.0}, "sparsity": 0.5}],
}


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run of HALO with held-out images, of two epochs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    options = ["-d", "folder", "--data", str(images), *TINY, "--halo", "--val_split", "6", "--no_test"]
    train(*options, "--save_dir", folder)
    return folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--seed " + str(2**70), str(2**70)),
        ("--train_batch 1" + 30 * "0", "out of range"),
        ("--test_batch 1" + 30 * "0", "out of range"),
        ("--epochs 1" + 30 * "0", "out of range"),
        ("--halo --lambda_init 1e300", "1e300"),
        ("--halo --lambda_init 1e-300", "1e-300"),
        ("--l1 --lambda_init 1e-200", "1e-200"),
        ("--halo --xi 1e300", "1e300"),
        ("--lr 1e300", "1e300"),
        ("-d folder --image_size 1" + 30 * "0", "2048"),
    ],
)
def test_numbers_that_nothing_can_hold(fails, tmp_path, line, words):
    status, message = fails(*shlex.split(line), "--save_dir", tmp_path / "run")
    assert status == 2 and words in message and "give " in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [HALO, L1])
@pytest.mark.parametrize("value", [0.0, 1e300, -1e-300, float("nan")])
def test_a_lam_without_a_square_is_refused_by_the_penalty(kind, value):
    more = {"psi": 1.0} if kind is HALO else {}
    with pytest.raises(ValueError, match="lambda_init"):
        kind({"w": torch.ones(2)}, xi=1.0, lambda_init=value, **more)


def test_a_folder_that_begins_with_a_dash_gets_a_command_that_works(heeded, tiny, monkeypatch, tmp_path, fails, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*tiny[:-2], "--save_dir=-dash"]
    assert "from its weights with --start=-dash/checkpoint.pth.tar in" in fails(*options, "--lr", "1e30")[1]
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.experiment.run_epoch", lambda run: signal.raise_signal(signal.SIGINT))
        status, line = fails(*options, "--overwrite")
    command = shlex.split(line.split("continue with: ")[1])
    args = cifar.get_parser().parse_args(command[2:])
    assert status == 130 and args.resume == "-dash/checkpoint.pth.tar" and os.path.exists(args.resume)
    train(*options, "--epochs", 1, "--overwrite")
    command = shlex.split(capsys.readouterr().out.split("next, prune: ")[1])
    assert cifar_prune_iterative.get_parser().parse_args(command[2:]).resume == "-dash/final.pth.tar"


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_killed_process_set_aside_is_what_was_there(tmp_path, fails):
    """It was killed when it had written half of `first`; `second` was still to come, `third` it did not have."""
    for name, content in (("first", "half"), (".first.before", "old"), (".second.before", "old"), ("third", "old")):
        (tmp_path / name).write_text(content)
    paths = [tmp_path / name for name in ("first", "second", "third", "fourth")]
    with suppress(OSError), all_or_none(paths):
        for path in paths:
            path.write_text("new")
        if fails:
            raise OSError
    expected = dict.fromkeys(["first", "second", "third"], "old") if fails else {path.name: "new" for path in paths}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected


def test_an_output_that_cannot_be_set_aside_stays(tmp_path, monkeypatch):
    first, second = paths = [tmp_path / "first", tmp_path / "second"]
    for path in paths:
        path.write_text("old")
    replace = type(first).replace

    def refuse(path, target):
        if path == second:
            raise OSError
        return replace(path, target)

    monkeypatch.setattr(type(first), "replace", refuse)
    with pytest.raises(OSError), all_or_none(paths):
        pytest.fail("an output was to be lost")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"first": "old", "second": "old"}


@pytest.mark.parametrize("fails", [False, True])
def test_an_output_that_is_a_link_stays_one(tmp_path, fails):
    """What it names is replaced, or as it was."""
    (tmp_path / "shared").mkdir()
    target, link = tmp_path / "shared" / "a.json", tmp_path / "a.json"
    write_json(target, {"a": 1})
    link.symlink_to(target)
    with suppress(ZeroDivisionError), all_or_none([link]):
        write_json(link, {"a": 2})
        1 / (not fails)
    assert link.is_symlink() and read_json(target)["a"] == (1 if fails else 2)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["a.json"]


def test_a_loop_of_links_is_no_checkpoint(tiny, tmp_path, fails):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    status, line = fails(*tiny, "--resume", loop)
    assert status == 1 and f"no checkpoint at {loop}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
    status, line = fails(*tiny[:-1], loop / "run")
    assert status == 1 and "choose another folder" in line


def test_paths_that_are_no_utf8_and_hold_half_a_formula(images, tmp_path, capsys, figures):
    data, folder = tmp_path / LOST, tmp_path / LOST / "run"
    write_images(data / "images")
    for split in ("train", "test"):
        (data / "images" / split / "class0").rename(data / "images" / split / LOST)
    options = ["-d", "folder", "--data", data / "images", *TINY, "--halo", "--save_dir", folder]
    train(*options, "--epochs", 1)
    train(*options, "--resume", folder / "checkpoint.pth.tar")

    def call(script, *more):
        return script.main(script.get_parser().parse_args([*map(str, more)]))

    final, place = folder / "final.pth.tar", ["--data", data / "images"]
    call(cifar_prune_iterative, "--resume", final, "--percent", 0.5, *place)
    made = [folder / f"x.{kind}" for kind in ("png", "json", "halo")]
    outputs = ["--plot", made[0], "--json", made[1], "--compact", made[2]]
    call(check_params, "--checkpoint", final, *place, *outputs)
    report = folder / "pruned" / "prune.json"
    compare = call(compare_pruning, report, "--labels", LOST, "--save", folder / "compare.png")
    assert compare == {LOST: pytest.approx({0.0: read_json(report)["before"]["top1"], 0.5: compare[LOST][0.5]})}
    assert all(path.exists() for path in made) and "\\udcff$x^{" in capsys.readouterr().out
    assert load_checkpoint(made[2])["class_names"][-1] == LOST


def test_powers_of_ten_stay_formulas_and_labels_do_not(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or original(self, *a, **k))
    plot_comparison({"$x^{": {0.0: 1.0, 0.5: 2.0}}, tmp_path / "c.png", title="$y^{")
    (figure,) = figures
    assert figure.get_suptitle() == "$y^{" and not figure._suptitle.get_parse_math()
    assert figure.axes[0].xaxis.get_ticklabels()[0].get_parse_math()


def test_a_path_for_two_outputs_or_for_an_input_is_refused(finished, tmp_path, fails_in):
    final, out = finished / "final.pth.tar", tmp_path / "x"
    before = final.read_bytes()
    check = ["--checkpoint", final, "--no_data"]
    (tmp_path / "link").symlink_to(final)
    (tmp_path / "prune.json").write_text(json.dumps(REPORT))
    calls = [
        (check_params, [*check, "--json", out, "--compact", out]),
        (check_params, [*check, "--compact", final, "--overwrite"]),
        (check_params, [*check, "--json", tmp_path / "link", "--overwrite"]),
        (check_params, [*check, "--json", "/dev/null", "--overwrite"]),
        (compare_pruning, [tmp_path / "prune.json", "--save", tmp_path / "prune.json", "--overwrite"]),
    ]
    for script, options in calls:
        status, line = fails_in(script, *options)
        assert status == 1 and "give " in line
    assert final.read_bytes() == before and not out.exists() and not os.path.isfile("/dev/null")


@pytest.fixture
def small_disk():
    """A function that limits what a file of this process may hold, until the test ends."""
    import resource

    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_before_the_first_checkpoint_leaves_nothing(tiny, tmp_path, fails, small_disk):
    for size in (100, 100_000):
        small_disk(size)
        status, line = fails(*tiny)
        assert status == 1 and "free space" in line and "start it again" in line
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_later_says_how_to_go_on(tiny, tmp_path, fails, small_disk, monkeypatch):
    def draw(*_, **__):
        raise OSError("cannot write curves.png: No space left")

    with monkeypatch.context() as patch:
        patch.setattr("utils.training.outputs.draw_curves", draw)
        status, line = fails(*tiny)
    assert status == 1 and "continue with: python" in line and f"--resume {tmp_path}/run/checkpoint.pth.tar" in line
    train(*tiny, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_full_disk_takes_away_what_pruning_has_written(finished, images, tmp_path, fails_in, monkeypatch):
    def draw(*_, **__):
        raise OSError("cannot write it: No space left")

    monkeypatch.setattr("utils.plots.plot_accuracy_vs_sparsity", draw)
    options = ["--resume", finished / "final.pth.tar", "--percent", "0.5", "--data", images]
    status, line = fails_in(cifar_prune_iterative, *options, "--save_dir", tmp_path / "a" / "pruned")
    assert status == 1 and "No space left" in line and list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_elsewhere_can_be_continued_there_at_once(finished, images, tmp_path, fails):
    options = ["-d", "folder", "--data", str(images), *TINY, "--halo", "--val_split", "6", "--no_test"]
    checkpoint = finished / "checkpoint.pth.tar"
    changed = load_checkpoint(checkpoint)
    rows = changed["history"]
    rows[0]["val_top1"], rows[1]["val_top1"] = 90.0, 10.0  # the first epoch is the best, so its network is needed
    (tmp_path / "from").mkdir()
    save_checkpoint(tmp_path / "from" / "checkpoint.pth.tar", changed)
    best = load_checkpoint(finished / "model_best.pth.tar")
    save_checkpoint(tmp_path / "from" / "model_best.pth.tar", best | {"epoch": 1, "acc": 90.0})
    more = ["--resume", tmp_path / "from" / "checkpoint.pth.tar", "--save_dir", tmp_path / "to"]
    train(*options, *more)
    assert load_checkpoint(tmp_path / "to" / "model_best.pth.tar")["epoch"] == 1
    assert load_checkpoint(tmp_path / "to" / "checkpoint.pth.tar")["epoch"] == 2
    (tmp_path / "from" / "model_best.pth.tar").unlink()
    tested = [option for option in options if option != "--no_test"]
    changed["config"]["no_test"] = False
    save_checkpoint(tmp_path / "from" / "checkpoint.pth.tar", changed)
    status, line = fails(*tested, *more[:2], "--save_dir", tmp_path / "other")
    assert status == 1 and "best epoch so far (1)" in line and not (tmp_path / "other").exists()
    assert line.endswith("or give --no_test")
    train(*options, *more[:2], "--save_dir", tmp_path / "other")  # what the message says


def test_a_run_that_goes_on_in_the_folder_of_another_leaves_nothing_of_it(finished, images, tmp_path):
    options = ["-d", "folder", "--data", str(images), *TINY, "--halo", "--val_split", "6", "--no_test", "--epochs", 3]
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    (other / "notes.txt").write_text("mine")
    (other / "init.pth.tar").write_text("of the run that was there")
    source = tmp_path / "source"  # without an init.pth.tar of its own, which it would bring along
    source.mkdir()
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        shutil.copy(finished / name, source)
    train(*options, "--resume", source / "checkpoint.pth.tar", "--save_dir", other, "--overwrite")
    assert load_checkpoint(other / "final.pth.tar")["epoch"] == 3 and (other / "notes.txt").exists()
    assert not (other / "init.pth.tar").exists()


def test_the_best_network_of_epochs_that_are_trained_anew_goes(finished, images, tmp_path):
    options = ["-d", "folder", "--data", str(images), *TINY, "--halo", "--val_split", "6", "--no_test"]
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    older = load_checkpoint(folder / "checkpoint.pth.tar")
    for row, top1 in zip(older["history"], (90.0, 10.0), strict=True):
        row["val_top1"] = top1
    save_checkpoint(folder / "older.pth.tar", older)
    (tmp_path / "link").symlink_to(folder / "older.pth.tar")
    best = load_checkpoint(folder / "model_best.pth.tar")
    save_checkpoint(folder / "model_best.pth.tar", best | {"epoch": 1, "acc": 90.0})
    train(*options, "--resume", tmp_path / "link", "--save_dir", folder)  # it lies beside what the link names
    assert load_checkpoint(folder / "model_best.pth.tar")["epoch"] == 1
    for other in ({"epoch": 7, "acc": 90.0}, {"epoch": 1, "acc": 80.0}):  # of another run
        save_checkpoint(folder / "model_best.pth.tar", best | other)
        train(*options, "--resume", folder / "older.pth.tar", "--save_dir", folder)
        assert not (folder / "model_best.pth.tar").exists()


def test_a_missing_best_network_is_noticed_before_the_training(finished, images, tmp_path, fails):
    options = ["-d", "folder", "--data", str(images), *TINY, "--halo", "--val_split", "6", "--epochs", 3]
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    state = load_checkpoint(folder / "checkpoint.pth.tar")
    for row, top1 in zip(state["history"], (90.0, 10.0), strict=True):
        row["val_top1"] = top1
    state["config"]["no_test"] = False
    save_checkpoint(folder / "checkpoint.pth.tar", state)
    status, line = fails(*options, "--save_dir", folder, "--resume", folder / "checkpoint.pth.tar")
    assert status == 1 and "model_best.pth.tar with the best epoch so far (1) is not beside" in line
    assert load_checkpoint(folder / "checkpoint.pth.tar")["epoch"] == 2 and (folder / "summary.json").exists()


@pytest.mark.parametrize(("name", "epoch"), [("checkpoint.pth.tar", 1), ("model_best.pth.tar", 2)])
def test_a_full_disk_leaves_a_checkpoint_and_its_best_network(images, tmp_path, fails, monkeypatch, name, epoch):
    """The second epoch is the best, and its first or its second file cannot be written."""
    options = ["-d", "folder", "--data", str(images), *TINY, "--val_split", "6"]
    options += ["--save_dir", str(tmp_path / "run")]
    monkeypatch.setattr("utils.training.experiment.Experiment.best", property(lambda run: (run.history or [None])[-1]))

    def save(path, state):
        if path.name == name and state["epoch"] == 2:
            raise OSError("No space left on device")
        save_checkpoint(path, state)

    with monkeypatch.context() as patch:
        patch.setattr("utils.training.state.save_checkpoint", save)
        status, line = fails(*options)
    checkpoint, best = (tmp_path / "run" / file for file in ("checkpoint.pth.tar", "model_best.pth.tar"))
    assert status == 1 and f"holds the last finished epoch ({epoch}); continue with" in line
    assert load_checkpoint(checkpoint)["epoch"] == epoch and load_checkpoint(best)["epoch"] == 1
    summary = train(*options, "--resume", checkpoint)
    assert summary["best"]["epoch"] == summary["test_of_best"]["epoch"] == load_checkpoint(best)["epoch"] == 2


def test_a_finished_run_that_is_extended_and_stopped_is_not_finished(
    heeded, finished, images, tmp_path, fails, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    options = ["-d", "folder", "--data", str(images), *TINY, "--halo", "--val_split", "6", "--no_test", "--epochs", 4]

    def third(run):
        return run_epoch(run) if run.epoch == 2 else signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("utils.training.experiment.run_epoch", third)
    status, line = fails(*options, "--save_dir", folder, "--resume", folder / "checkpoint.pth.tar")
    left = {"config.json", "log.csv", "init.pth.tar", "checkpoint.pth.tar", "model_best.pth.tar"}
    assert status == 130 and "finished epoch (3)" in line and {path.name for path in folder.iterdir()} == left


def test_ctrl_c_while_a_checkpoint_is_written_saves_the_epoch_whole(heeded, tiny, tmp_path, fails, monkeypatch):
    def save(path, state):
        if path.name == "checkpoint.pth.tar" and state["epoch"] == 1:
            signal.raise_signal(signal.SIGINT)
        save_checkpoint(path, state)

    monkeypatch.setattr("utils.training.state.save_checkpoint", save)
    status, line = fails(*tiny)
    folder = tmp_path / "run"
    assert status == 130 and "finished epoch (1)" in line
    assert load_checkpoint(folder / "checkpoint.pth.tar")["epoch"] == 1 and (folder / "model_best.pth.tar").exists()
    assert len((folder / "log.csv").read_text().splitlines()) == 2


def test_a_loss_that_is_nan_on_the_held_out_images_alone_is_one_line(tiny, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("utils.training.row.evaluate", lambda *_, **__: {"loss": float("nan"), "top1": 9, "top5": 50})
    status, line = fails(*tiny)
    assert (
        status == 1 and "epoch 1, the test loss after it is nan: lower --lr. " in line and "finished epoch (0)" in line
    )


DAMAGED = {
    "a list": "[1]",
    "half": '{"before": ',
    "deep": "[" * 100_000,
    "no results": json.dumps({key: value for key, value in REPORT.items() if key != "results"}),
    "results in words": json.dumps(REPORT | {"results": "good"}),
    "a result in words": json.dumps(REPORT | {"results": ["good"]}),
    "a ratio beyond 1": json.dumps(REPORT | {"results": [{"asked": 2, "after": {"top1": 80.0}}]}),
    "accuracy in words": json.dumps(REPORT | {"before": {"top1": "high"}}),
    "accuracy that is NaN": json.dumps(REPORT | {"before": {"top1": float("nan")}}),
    "accuracy beyond any float": json.dumps(REPORT | {"before": {"top1": 10**400}}),
    "accuracy beyond 100": json.dumps(REPORT | {"before": {"top1": 101.0}}),
    "no data set": json.dumps({key: value for key, value in REPORT.items() if key != "dataset"}),
    "a depth in words": json.dumps(REPORT | {"depth": "deep"}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_prune_json_is_named(name, tmp_path, fails_in):
    path = tmp_path / "prune.json"
    path.write_text(DAMAGED[name])
    status, line = fails_in(compare_pruning, path)
    assert status == 1 and str(path) in line and "use another" in line


def test_what_is_no_text_file_is_not_read(tmp_path, fails_in):
    path = tmp_path / "prune.json"
    os.mkfifo(path)
    for script in (compare_pruning, reproduce):
        status, line = fails_in(script, path)
        assert status == 1 and f"{path} is no file" in line
    path.unlink()
    path.write_bytes(b"\xff{}")
    assert "no text in UTF-8" in fails_in(compare_pruning, path)[1]
    with open(path, "wb") as file:
        file.truncate(1 << 33)  # takes no space
    assert "8,589,934,592 bytes" in fails_in(compare_pruning, path)[1]


def test_a_changed_number_in_a_json_of_ours_is_noticed(tmp_path, fails_in):
    path = tmp_path / "prune.json"
    write_json(path, REPORT)
    assert read_json(path) == REPORT and read_measurement(path) == REPORT
    path.write_text(path.read_text().replace("80.0", "81.0"))
    status, line = fails_in(compare_pruning, path)
    assert status == 1 and "checksum" in line
    path.write_text(path.read_text().replace('"checksum"', '"checksun"'))
    assert "checksum" in fails_in(compare_pruning, path)[1]
    path.write_text(json.dumps(REPORT))  # of an older version
    assert read_json(path) == REPORT


def test_a_json_of_many_keys_is_read_in_no_time(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(dict.fromkeys(map(str, range(50_000)))))
    start = time.process_time()
    assert len(read_json(tmp_path / "x.json")) == 50_000 and time.process_time() - start < 5


def test_a_log_that_is_not_of_its_run_is_noticed(finished, tmp_path, fails_in):
    columns = {"columns": ("strength_q50", "lr"), "epochs": 2}
    assert [row["lr"] for row in read_log(finished, **columns)] == [0.1, pytest.approx(0.01)]
    for name in ("log.csv", "summary.json", "final.pth.tar"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    log = tmp_path / "log.csv"
    log.write_text(log.read_text().replace("0.1", "0.2", 1))
    assert "log.csv was damaged" in fails_in(adaptivity, tmp_path, "--percent", "0.5")[1]
    (tmp_path / "summary.json").unlink()
    for text in ("", "epoch,lr\n1,0.1\n", "strength_q50,lr\na,b\n1,2\n", "strength_q50,lr\n1,2\n", "\0"):
        log.write_text(text)
        assert "log.csv holds no number" in fails_in(adaptivity, tmp_path, "--percent", "0.5")[1]
    log.unlink()
    assert "no log" in fails_in(adaptivity, tmp_path, "--percent", "0.5")[1]


@pytest.mark.parametrize("content", [{"seed": 1}, {}])
def test_a_setting_of_other_controls_is_refused(finished, content, tmp_path, fails_in):
    write_json(tmp_path / "setting.json", content)
    status, line = fails_in(adaptivity, finished, "--percent", "0.5", "--save_dir", tmp_path)
    assert status == 1 and "controls of other runs" in line


def pipe(path):
    os.mkfifo(path)


def link_to_itself(path):
    path.symlink_to(path)


def endless(path):
    path.symlink_to("/dev/zero")


def huge(path):
    Image.new("1", (20000, 20000)).save(path)


def strip(path):
    Image.new("1", (1, 1 << 22)).save(path, format="BMP")


def program(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nquit\n")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (pipe, "is no file"),
        (link_to_itself, "is no file"),
        (endless, "is no file"),
        (huge, "67,108,864"),
        (strip, "too long a strip"),
        (program, "no readable image"),
    ],
)
def test_what_lies_between_images_is_named(make, words, tmp_path, fails):
    root = write_images(tmp_path / "images", train=2, test=1)
    make(root / "train" / "class1" / "odd.png")
    status, line = fails("-d", "folder", "--data", root, *TINY, "--save_dir", tmp_path / "run")
    assert status == 1 and words in line and "odd.png" in line and not (tmp_path / "run").exists()
