"""The controls of a HALO run: each differs from it in lam alone, and in lam as its name says."""

import json
import shutil

import pytest
import scipy.stats
import torch

import adaptivity
from mnist import mnist
from utils.files.checkpoint import load_checkpoint, save_checkpoint
from utils.files.lock import folder_lock
from utils.paths import portable_path
from utils.studies.adaptivity import (
    LABELS,
    AveragedHALO,
    GrowingL1,
    HaloRun,
    costless,
    describe_lambdas,
    load_run,
    measure_control,
    train_control,
)
from utils.studies.measurements import read_accuracies
from utils.training.epoch import NonFiniteLossError

DIGITS = ["-d", "digits", "-a", "lenet_300_100", "--epochs", "3", "--schedule", "2", "--lr", "0.05", "--wd", "0"]
HALO = ["--halo", "--xi", "1e-4", "--psi", "1e-2", "--val_split", "300", "--no_test"]


def train(folder, *options):
    arguments = [*DIGITS, *map(str, options), "--save_dir", str(folder)]
    mnist.main(mnist.get_parser().parse_args(arguments))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of HALO on digits."""
    folder = tmp_path_factory.mktemp("runs")
    return [train(folder / f"seed{seed}", *HALO, "--seed", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory):
    """What the script wrote and returned."""
    out = tmp_path_factory.mktemp("adaptivity")
    options = [*map(str, runs), "--percent", "0.9", "0.5", "--epochs", "2", "--save_dir", str(out)]
    return out, adaptivity.main(adaptivity.get_parser().parse_args(options))


def lambdas_of(folder):
    return load_checkpoint(folder / "run" / "final.pth.tar")["lambdas"]


def test_every_control_is_measured_on_the_held_out_images(done):
    out, result = done
    assert {row["method"] for row in result["rows"]} == set(LABELS.values())
    assert {(row["ratio"], row["n"]) for row in result["rows"]} == {(0.0, 2), (0.5, 2), (0.9, 2)}
    for name in LABELS:
        assert json.loads((out / name / "seed1" / "val" / "prune.json").read_text())["images"] == "val"
    text = (out / "adaptivity.md").read_text()
    assert all(label in text for label in LABELS.values()) and "dense" in text
    assert (out / "adaptivity.png").read_bytes().startswith(b"\x89PNG")


def test_halo_itself_is_measured_as_it_is(runs, done):
    out, _ = done
    report = json.loads((out / "halo" / "seed1" / "val" / "prune.json").read_text())
    assert report["checkpoint"] == portable_path(runs[0] / "final.pth.tar")


def test_averaged_lam_are_one_value_a_layer_and_still_learned(runs, done):
    lambdas, own = lambdas_of(done[0] / "averaged" / "seed1"), load_run(runs[0]).state["lambdas"]
    assert all((lam == lam.flatten()[0]).all() for lam in lambdas.values())
    assert all(lam.flatten()[0] < 1 for lam in lambdas.values())
    assert any((lam != lam.flatten()[0]).any() for lam in own.values())
    optimizer = load_checkpoint(done[0] / "averaged" / "seed1" / "run" / "checkpoint.pth.tar")["reg_optimizer"]
    momenta = [buffers["momentum_buffer"] for buffers in optimizer["state"].values()]
    assert len(momenta) == len(lambdas) and all((m == m.flatten()[0]).all() for m in momenta)


def test_later_epochs_start_from_the_end_and_leave_lam_alone(runs, done):
    out, run = done[0], load_run(runs[1])
    kept, averaged = lambdas_of(out / "then_kept" / "seed2"), lambdas_of(out / "then_averaged" / "seed2")
    for name, lam in run.state["lambdas"].items():
        assert torch.equal(kept[name], lam)
        assert torch.allclose(averaged[name], lam.mean().expand_as(lam))
    start = load_checkpoint(out / "then_kept" / "seed2" / "run" / "init.pth.tar")["state_dict"]
    assert all(torch.equal(start[name], w) for name, w in run.state["state_dict"].items())
    config = load_checkpoint(out / "then_kept" / "seed2" / "run" / "final.pth.tar")["config"]
    assert config["epochs"] == 2 and config["lr"] == pytest.approx(0.005) and config["schedule"] == []


def test_an_l1_grows_as_halos_median_did(runs, tmp_path, monkeypatch):
    seen, run_epoch = [], GrowingL1.run_epoch

    def watched(self):
        row = run_epoch(self)
        seen.append(row["strength_q50"])
        return row

    monkeypatch.setattr(GrowingL1, "run_epoch", watched)
    run = load_run(runs[0])
    measure_control(run, "growing_l1", tmp_path, data="data", epochs=1, percent=(0.5,))
    assert seen == pytest.approx(list(run.medians)) and run.medians[0] < run.medians[-1]
    config = load_checkpoint(tmp_path / "run" / "final.pth.tar")["config"]
    assert config["penalty"] == "l1" and config["seed"] == run.seed


def test_the_last_median_is_the_strength_of_an_l1(runs, done):
    config = load_checkpoint(done[0] / "last_l1" / "seed1" / "run" / "final.pth.tar")["config"]
    run = load_run(runs[0])
    lam = torch.cat([lam.flatten() for lam in run.state["lambdas"].values()])
    assert config["xi"] == pytest.approx(1e-4 / lam.median().item() ** 2, rel=1e-3)


def test_a_run_of_another_device_is_examined_on_what_is_here(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "final.pth.tar")
    state["config"]["device"] = "cuda:7"
    save_checkpoint(tmp_path / "run" / "final.pth.tar", state)
    args = train_control(load_run(tmp_path / "run"), "halo", tmp_path / "out", data="data", epochs=1)
    assert args.device == "auto"


def test_again_trains_nothing(runs, done):
    out, result = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth.tar")}
    options = [*map(str, runs), "--percent", "0.9", "0.5", "--epochs", "2", "--save_dir", str(out)]
    again = adaptivity.main(adaptivity.get_parser().parse_args(options))
    assert again == result and {path: path.stat().st_mtime_ns for path in out.rglob("*.pth.tar")} == before


def test_only_some_controls(runs, done, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    options = [
        str(runs[0]),
        "--percent",
        "0.5",
        "--only",
        "averaged",
        "--epochs",
        "2",
        "--save_dir",
        str(tmp_path / "out"),
    ]
    rows = adaptivity.main(adaptivity.get_parser().parse_args(options))["rows"]
    assert {row["method"] for row in rows} == {LABELS["halo"], LABELS["averaged"]} and {row["n"] for row in rows} == {1}


def test_the_title_takes_the_highest_ratio_that_costs_halo_at_most_a_point():
    top1 = {"HALO": {0.0: 98.0, 0.9: 97.5, 0.99: 60.0}, "L1": {0.0: 97.0, 0.9: 80.0, 0.99: 79.0}}
    rows = [{"method": m, "ratio": r, "top1_mean": value} for m, of in top1.items() for r, value in of.items()]
    assert costless(rows) == 0.9


def test_rows_hold_every_seed_and_whether_it_learned():
    found = {
        "halo": [{0.0: 98.0, 0.9: 97.0}, {0.0: 98.2, 0.9: 97.4}],
        "last_l1": [{0.0: 97.0, 0.9: 96.0}, {0.0: 10.0, 0.9: 10.0}],
    }
    rows = adaptivity.rows_of(found, (0.9,))
    row = next(row for row in rows if row["method"] == LABELS["last_l1"] and row["ratio"] == 0.9)
    assert row["top1_seeds"] == [96.0, 10.0] and row["failed"] == [False, True] and row["top1_mean"] == 53.0


def test_lam_is_described_over_all_layers(runs):
    run = load_run(runs[0])
    states = (run.state["lambdas"], run.state["state_dict"])
    lam, weights = (torch.cat([state[name].abs().flatten() for name in run.state["lambdas"]]) for state in states)
    found = describe_lambdas(run)
    assert found["rank_correlation"] == pytest.approx(scipy.stats.spearmanr(lam, weights).statistic, abs=1e-6)
    assert found["median_lambda"] == pytest.approx(lam.median().item())
    assert found["median_strength"] == pytest.approx(1e-4 / lam.median().item() ** 2, rel=1e-3)


def test_shares_of_the_variance_of_lam(runs):
    run = load_run(runs[0])
    layers = list(run.state["lambdas"])
    for number, name in enumerate(layers):
        run.state["lambdas"][name] = torch.full_like(run.state["lambdas"][name], 0.5 + number)
    assert describe_lambdas(run)["within_layers"] == pytest.approx(0, abs=1e-12)
    for name in layers:
        lam = run.state["lambdas"][name].fill_(0.5)
        lam.view(-1)[::2] = 1.0
    assert describe_lambdas(run)["within_layers"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [(HALO[:-3], "--val_split"), (["--l1", "--xi", "1e-4", *HALO[-3:]], "--halo")],
)
def test_a_run_that_cannot_be_a_start_is_one_line(tmp_path, fails_in, options, words):
    folder = train(tmp_path / "run", *options, "--epochs", 1, "--schedule")
    status, line = fails_in(adaptivity, folder, "--percent", 0.5, "--save_dir", tmp_path / "out")
    assert status == 1 and words in line and not (tmp_path / "out").exists()


def test_what_the_controls_cannot_repeat_is_refused(runs, tmp_path, fails_in):
    folder = shutil.copytree(runs[0], tmp_path / "grown")
    state = load_checkpoint(folder / "final.pth.tar")
    state["config"]["grow"] = 2
    save_checkpoint(folder / "final.pth.tar", state)
    status, line = fails_in(adaptivity, folder, "--percent", 0.5, "--save_dir", tmp_path / "out")
    assert status == 1 and "--grow, which its controls cannot repeat" in line


def test_code_beside_a_file_that_names_it_does_not_run(runs, tmp_path, fails_in, monkeypatch):
    folder = shutil.copytree(runs[0], tmp_path / "sent")
    state = load_checkpoint(folder / "final.pth.tar")
    state["config"]["arch"] = "sent_net:build"
    save_checkpoint(folder / "final.pth.tar", state)
    (tmp_path / "sent_net.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    status, line = fails_in(adaptivity, folder, "--percent", 0.5, "--save_dir", tmp_path / "out")
    assert status == 1 and "sent_net:build, which is not on the Python path" in line and "PYTHONPATH" in line
    assert not (tmp_path / "ran").exists()


def test_no_ratio_at_all_is_refused(runs, fails_in):
    status, line = fails_in(adaptivity, runs[0], "--percent", 0)
    assert status == 2 and "--percent" in line


def test_runs_that_differ_in_more_than_seed_are_refused(runs, tmp_path, fails_in):
    other = train(tmp_path / "run", *HALO, "--seed", 3, "--xi", "2e-4", "--epochs", 1, "--schedule")
    status, line = fails_in(adaptivity, runs[0], other, "--percent", 0.5, "--save_dir", tmp_path / "out")
    assert status == 1 and "seed" in line
    status, line = fails_in(adaptivity, runs[0], runs[0], "--percent", 0.5, "--save_dir", tmp_path / "out")
    assert status == 1 and "same seed" in line


def test_the_controls_of_other_runs_are_not_taken_over(runs, done, tmp_path, fails_in):
    shutil.copytree(done[0], tmp_path / "out")
    other = train(tmp_path / "run", *HALO, "--xi", "2e-4", "--epochs", 1, "--schedule")
    options = ["--percent", 0.5, "--epochs", 2, "--save_dir", tmp_path / "out"]
    status, line = fails_in(adaptivity, other, *options)
    assert status == 1 and "xi 0.0001, now 0.0002" in line and "--save_dir" in line
    status, line = fails_in(adaptivity, runs[0], *options[:3], 4, *options[4:])
    assert status == 1 and "epochs after the end 2, now 4" in line


def test_the_controls_of_a_run_that_was_trained_anew_are_not_taken_over(runs, done, tmp_path, fails_in, monkeypatch):
    """With the same options and seed: on another machine, say."""
    shutil.copytree(done[0], tmp_path / "out")
    monkeypatch.setattr(HaloRun, "identity", "of another log")
    status, line = fails_in(adaptivity, runs[0], "--percent", 0.5, "--epochs", 2, "--save_dir", tmp_path / "out")
    assert status == 1 and "seed 1 was another run" in line and "--save_dir" in line


def test_a_folder_that_another_call_works_in_is_left_alone(runs, tmp_path, fails_in):
    with folder_lock(tmp_path):
        status, line = fails_in(adaptivity, runs[0], "--percent", 0.5, "--save_dir", tmp_path)
    assert status == 1 and "works in" in line and not (tmp_path / "setting.json").exists()


def test_stopped_it_says_that_the_same_command_goes_on(runs, tmp_path, fails_in, monkeypatch):
    def stop(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        return run_epoch(self)

    run_epoch = AveragedHALO.run_epoch
    monkeypatch.setattr(AveragedHALO, "run_epoch", stop)
    options = [runs[0], "--percent", 0.5, "--only", "averaged", "--save_dir", tmp_path]
    status, line = fails_in(adaptivity, *options)
    assert status == 130 and "same command goes on" in line
    assert load_checkpoint(tmp_path / "averaged" / "seed1" / "run" / "checkpoint.pth.tar")["epoch"] == 1
    monkeypatch.setattr(AveragedHALO, "run_epoch", run_epoch)
    adaptivity.main(adaptivity.get_parser().parse_args([str(option) for option in options]))
    whole = measure_control(load_run(runs[0]), "averaged", tmp_path / "whole", data="data", epochs=1, percent=(0.5,))
    stopped = tmp_path / "averaged" / "seed1" / "val" / "prune.json"
    assert read_accuracies(stopped) == read_accuracies(whole)


def test_a_control_that_diverges_is_named(runs, tmp_path, fails_in, monkeypatch):
    def diverge(self):
        raise NonFiniteLossError("the cross-entropy is nan")

    monkeypatch.setattr(GrowingL1, "run_epoch", diverge)
    options = [runs[0], "--percent", 0.5, "--only", "growing_l1", "--save_dir", tmp_path]
    status, line = fails_in(adaptivity, *options)
    assert status == 1 and LABELS["growing_l1"] in line and "--only" in line


def test_a_folder_without_a_run_is_one_line(tmp_path, fails_in):
    status, line = fails_in(adaptivity, tmp_path / "nothing", "--percent", 0.5, "--save_dir", tmp_path / "out")
    assert status == 1 and "nothing" in line
