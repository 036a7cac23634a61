"""A study on a small grid of digits: tuned on held-out images, measured once, continued wherever it was stopped."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from statistics import mean, stdev

import pytest
import torch
from conftest import ROOT

import reproduce
from utils.files.lock import folder_lock
from utils.logger import duration
from utils.paths import portable_path
from utils.run import cores, read_json, write_json
from utils.studies import executors
from utils.studies.jobs import jobs_before, require_same_study, tuning_jobs
from utils.studies.measurements import read_accuracies, read_seconds
from utils.studies.progress import Progress, committed_seconds, to_come
from utils.studies.report import held_out_points, tried, write_report
from utils.studies.rows import final_rows
from utils.studies.study import (
    CONTROLS,
    choose,
    held_out_accuracy,
    load_study,
    on_edge,
    run_folder,
    training_arguments,
)

STUDY = {
    "title": "Digits: a small study",
    "options": {
        "dataset": "digits",
        "arch": "lenet_300_100",
        "epochs": 2,
        "schedule": [1],
        "train_batch": 64,
        "lr": 0.05,
        "val_split": 300,
    },
    "percent": [0.5, 0.95],
    "tune_seeds": [1],
    "seeds": [1, 2],
    "methods": {
        "none": {"penalty": "none"},
        "L1": {"penalty": "l1", "grid": {"xi": [1e-4, 1e-3, 1e30]}},
        "HALO": {"penalty": "halo", "grid": {"xi": [1e-4], "psi": [1e-3]}},
    },
    "controls": ["HALO"],
}


def write_study(folder, **changes):
    path = folder / "small.json"
    path.write_text(json.dumps(STUDY | changes))
    return path


def run(*options):
    return reproduce.main(reproduce.get_parser().parse_args([str(option) for option in options]))


@pytest.fixture(scope="module")
def done(tmp_path_factory, jobs_here):
    """A finished study: its file and its folder. One L1 diverges."""
    folder = tmp_path_factory.mktemp("study")
    path, out = write_study(folder), folder / "out"
    run(path, "--out", out, "--jobs", 2)
    return path, out


def test_every_configuration_is_tuned_and_a_diverged_one_is_recorded(done):
    path, out = done
    study = load_study(path)
    assert len(study.configs) == 5
    for config in study.configs:
        folder = out / config.method / config.name / "seed1"
        if config.name == "xi1e+30":
            reason = json.loads((folder / "failed.json").read_text())["reason"]
            assert "penalty did it" in reason and reason.endswith("The run ended after epoch 0")
            continue  # without options that a study does not have, or the folder of its machine
        report = json.loads((folder / "val" / "prune.json").read_text())
        assert report["images"] == "val" and [r["asked"] for r in report["results"]] == [0.5, 0.95]
        assert "test_of_best" not in json.loads((folder / "run" / "summary.json").read_text())
    text = (out / "table.md").read_text()
    assert "diverged" in text and f"{len(list(out.glob('*/*/seed*/run/summary.json')))} runs were trained" in text


def test_the_best_on_held_out_images_is_chosen_and_only_it_is_tested(done):
    path, out = done
    study, chosen = load_study(path), choose(load_study(path), out)
    for method, of_ratio in chosen.items():
        for ratio, config in of_ratio.items():
            others = [read_accuracies(out / method / c.name / "seed1/val/prune.json") for c in study.of_method(method)]
            mine = read_accuracies(out / method / config.name / "seed1/val/prune.json")
            assert mine[ratio] == max(other[ratio] for other in others if other)
    tested = {p.parent.parent.parent.relative_to(out) for p in out.glob("*/*/seed*/test/prune.json")}
    assert {str(p) for p in tested} == {f"{m}/{c.name}" for m, of in chosen.items() for c in of.values()}
    for name in tested:  # at the ratios at which it was chosen, and no other
        mine = [ratio for ratio, config in chosen[name.parent.name].items() if config.name == name.name]
        for report in out.glob(f"{name}/seed*/test*/prune.json"):
            assert [result["asked"] for result in read_json(report)["results"]] == sorted(mine), report


def test_table_holds_mean_and_spread_of_what_was_measured(done):
    path, out = done
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(r for r in rows if (r["scheme"], r["method"], r["ratio"]) == ("global", "none", "0.95"))
    values = [read_accuracies(out / "none/plain" / f"seed{seed}" / "test/prune.json")[0.95] for seed in (1, 2)]
    assert int(row["n"]) == 2 and float(row["top1_mean"]) == pytest.approx(sum(values) / 2)
    assert float(row["top1_std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert row["seeds"] == "1 2" and [float(v) for v in row["top1_seeds"].split()] == pytest.approx(values, rel=1e-5)
    text = (out / "table.md").read_text()
    command = f"python reproduce.py {portable_path(path)} --data DIR --out {portable_path(out)} --jobs 2"
    assert f"\n    {command}\n" in text and "n = 2 (seeds 1 2)" in text and "| 2 (1 2) |" in text
    assert float(row["compression"]) > 15  # 0.95 of the weights are gone, the biases are not
    assert {r["scheme"] for r in rows if r["method"] == "HALO"} == {"global", "layerwise", "random", "shuffle"}
    assert {r["scheme"] for r in rows if r["method"] == "L1"} == {"global"}
    for name in ("accuracy_vs_sparsity.png", "pareto.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_what_its_folder_says(done):
    measured = list(done[1].glob("*/*/seed*/*/prune.json"))
    assert len({path.parent.name for path in measured}) == 5  # val, test, and test with three schemes
    for path in measured:
        images, _, scheme = path.parent.name.partition("_")
        report = read_json(path)
        assert (report["images"], report["scheme"]) == (images, scheme or "global"), path


def halo_at(out, ratio):
    """Return what the two seeds of HALO have on the test images before the cut and at one ratio."""
    reports = [read_json(path) for path in sorted(out.glob("HALO/*/seed*/test/prune.json"))]
    cut = [next(result for result in report["results"] if result["asked"] == ratio) for report in reports]
    return [report["before"]["top1"] for report in reports], cut


def test_every_column_holds_what_its_header_says(done):
    out = done[1]
    before, cut = halo_at(out, 0.95)
    after = [result["after"]["top1"] for result in cut]
    with open(out / "table.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["scheme"], row["method"]) == ("global", "HALO")]
    row = next(row for row in rows if row["ratio"] == "0.95")
    values = {"dense_mean": mean(before), "dense_std": stdev(before), "top1_mean": mean(after)}
    columns = {"speedup": "theoretical_speedup", "compression": "compression_ratio"}
    values |= {column: mean(result[key] for result in cut) for column, key in columns.items()}
    assert {key: float(row[key]) for key in values} == pytest.approx(values)
    text = (out / "table.md").read_text()
    (cells,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| HALO | 0.95 |")]
    assert cells[4].startswith(f"{mean(before):.2f} ±") and cells[5].startswith(f"{mean(after):.2f} ±")
    tested = text.split("## On the test images")[1].split("\n\n")[1].splitlines()
    assert tested[0] == "| | 0.5 | 0.95 |"
    assert next(line for line in tested if line.startswith("| HALO |")).split(" | ")[2].startswith(f"{mean(after):.2f}")
    tuned = read_json(out / "none/plain/seed1/val/prune.json")
    tuned = [tuned["before"]["top1"], *(result["after"]["top1"] for result in tuned["results"])]
    assert f"| none | plain | {' | '.join(f'{top1:.2f}' for top1 in tuned)} |" in text
    seconds = [read_json(path)["seconds"] for path in out.glob("*/*/seed*/run/summary.json")]
    assert f"in {duration(sum(seconds))} taken together" in text


def test_the_pareto_figure_has_what_is_left_of_the_arithmetic(done):
    tuned = read_json(done[1] / "none/plain/seed1/val/prune.json")
    expected = [(1.0, tuned["before"]["top1"])]
    expected += [(1 / result["theoretical_speedup"], result["after"]["top1"]) for result in tuned["results"]]
    points = held_out_points(load_study(done[0]), done[1])["none"]
    assert [pytest.approx(point) for point in points] == expected


def test_a_run_that_was_at_chance_before_its_cut_has_failed(done, tmp_path):
    out = shutil.copytree(done[1], tmp_path / "out")
    path = out / "none/plain/seed2/test/prune.json"
    report = read_json(path)
    report["before"]["top1"] = 10.0
    write_json(path, report)
    rows = [row for row in final_rows(load_study(done[0]), out) if row["method"] == "none"]
    assert [row["failed"] for row in rows] == [[False, True]] * 2


def test_again_runs_nothing(done, capsys):
    path, out = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("final.pth.tar")}
    assert run(path, "--out", out, "--dry_run") == {"tuning": 0, "final": 0}
    capsys.readouterr()
    run(path, "--out", out, "--jobs", 1)
    assert "[" not in capsys.readouterr().out.splitlines()[0]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("final.pth.tar")} == before


def test_the_estimate_counts_only_runs_to_train(done, tmp_path, capsys):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "seconds.json").write_text(json.dumps({"a": 500.0, "b": 700.0}))
    shutil.rmtree(tmp_path / "out/none/plain/seed1/test")  # trained: only to be pruned
    shutil.rmtree(tmp_path / "out/none/plain/seed2")
    run(path, "--out", tmp_path / "out", "--jobs", 1, "--dry_run")
    assert "2 to do, 1 to train, about 10 min" in capsys.readouterr().out


def half_done(job, *, checkpoint=True):
    """Make the folder of a run that stands after the first of its two epochs."""
    folder = job.folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("epoch\n1\n")
    if checkpoint:
        (folder / "checkpoint.pth.tar").touch()


def test_the_estimate_leaves_out_epochs_that_are_done(tmp_path, capsys):
    path, out = write_study(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "seconds.json").write_text(json.dumps({"a": 600.0}))
    job = tuning_jobs(load_study(path), out, "data")[0]
    half_done(job, checkpoint=False)  # nothing to go on from
    run(path, "--out", out, "--jobs", 1, "--dry_run")
    assert "5 to train, about 50 min" in capsys.readouterr().out
    half_done(job)
    run(path, "--out", out, "--jobs", 1, "--dry_run")
    assert "5 to train, about 45 min" in capsys.readouterr().out


def test_the_seconds_of_a_run_that_went_on_are_those_of_a_whole_one(tmp_path):
    """50 s for the second of two epochs are 100 s a run. One that only wrote its last files says nothing."""
    path, out = write_study(tmp_path), tmp_path / "out"
    half, ended, whole, *_ = tuning_jobs(load_study(path), out, "data")
    half_done(half)
    half_done(ended)
    (ended.folder / "run" / "log.csv").write_text("epoch\n1\n2\n")
    progress = Progress([half, ended, whole], out, processes=1)
    for job, seconds in ((half, 50.0), (ended, 3.0), (whole, 80.0)):
        progress.add(job, seconds)
    assert read_seconds(out / "seconds.json") == {str(half): 100.0, str(whole): 80.0}


def test_the_estimate_counts_the_part_of_a_run_before_a_cut(tmp_path):
    """Of four epochs three come before the cut: its first done, two thirds of three quarters are left."""
    finetune = {"finetune": {"share": [0.75], "lr": [0.01]}}
    changes = {"options": STUDY["options"] | {"epochs": 4}, "methods": {"cut": finetune}, "controls": []}
    path, out = write_study(tmp_path, **changes), tmp_path / "out"
    (first,) = jobs_before(tuning_jobs(load_study(path), out, "data"))
    half_done(first)
    progress = Progress([first], out, processes=1, guess=600.0)
    assert progress.estimate().startswith("about 5 min")
    progress.add(first, 100.0)
    assert read_seconds(out / "seconds.json") == {str(first): pytest.approx(200.0)}


def test_one_run_is_one_run(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[1] / "none/plain/seed1", out / "none/plain/seed1")
    methods = {"none": {"penalty": "none"}}
    write_report(load_study(write_study(tmp_path, methods=methods, controls=[])), out, command="a command")
    assert "\n1 run was trained, in " in (out / "table.md").read_text()


def test_the_runs_to_come_are_counted(tmp_path, capsys):
    """5 configurations are tuned with seed 1. Seed 2 is new: one run of none and of HALO, one or two of L1's three."""
    path = write_study(tmp_path)
    assert run(path, "--out", tmp_path / "out", "--dry_run") == {"tuning": 5, "final": None}
    said = capsys.readouterr().out
    assert "tuning: 5 runs, 5 to do, 5 to train, unknown time" in said and "then 3 to 4 more to train" in said
    study = load_study(path)
    assert to_come(study, tmp_path / "out") == (3, 4)
    one_each = load_study(write_study(tmp_path, percent=[0.5]))
    assert to_come(one_each, tmp_path / "out") == (3, 3)
    folder = run_folder(tmp_path / "out", study.of_method("HALO")[0], 2) / "run"
    folder.mkdir(parents=True)
    for name in ("summary.json", "final.pth.tar"):
        (folder / name).touch()
    assert to_come(study, tmp_path / "out") == (2, 3)  # HALO's is trained already


def test_what_is_left_agrees_with_what_is_run(done, tmp_path, capsys):
    """Before and after tuning, the promise holds: as many runs are trained as it said."""
    path, out = done
    trained = len(list(out.glob("*/*/seed*/run/summary.json"))) + len(list(out.glob("*/*/seed*/failed.json")))
    fewest, most = to_come(load_study(path), tmp_path / "nothing")
    assert 5 + fewest <= trained <= 5 + most


def test_committed_measurements_give_an_estimate(capsys, tmp_path):
    run("mnist_lenet300", "--out", tmp_path / "out", "--jobs", 1, "--dry_run")
    said = capsys.readouterr().out
    study = load_study(ROOT / "results" / "studies" / "mnist_lenet300.json")
    jobs, seconds = tuning_jobs(study, tmp_path / "out", "data"), committed_seconds(study)
    jobs += jobs_before(jobs)
    assert f" {len(jobs)} to train" in said and 1 < seconds < 1000
    whole = sum(job.config.part for job in jobs)  # a run up to the cut, or from there on, takes its part of the time
    assert whole < len(jobs) and f"about {duration(whole * seconds)}, by the runs of results/replication" in said


@pytest.mark.parametrize("jobs", [1, 8])
def test_one_run_takes_no_less_time_with_more_processes(tmp_path, jobs):
    study = load_study(write_study(tmp_path, methods={"none": {"penalty": "none"}}, controls=[]))
    progress = Progress(tuning_jobs(study, tmp_path / "out", "data"), tmp_path / "out", processes=jobs, guess=60.0)
    assert progress.estimate().startswith(f"about {duration(60)}")


@pytest.mark.parametrize("device, seconds", [("cpu", 100.0), ("cuda:0", None)])
def test_the_seconds_of_a_gpu_tell_nothing_of_a_machine_without(tmp_path, monkeypatch, device, seconds):
    study = load_study(write_study(tmp_path))
    folder = tmp_path / "results" / "replication" / study.name
    (folder / "none" / "plain" / "seed1" / "run").mkdir(parents=True)
    (folder / "table.csv").write_text("method,coefficients,seconds\nnone,,100\n")
    write_json(folder / "none" / "plain" / "seed1" / "run" / "summary.json", {"device": device})
    monkeypatch.setattr("utils.studies.progress.REPOSITORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert committed_seconds(study) == seconds


def test_a_study_that_cannot_begin_leaves_no_tables(tmp_path, fails_in, jobs_here, capsys):
    path = write_study(tmp_path, options=STUDY["options"] | {"dataset": "folder", "arch": "resnet", "depth": 8})
    status, line = fails_in(reproduce, path, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert status == 1 and str(tmp_path / "none") in line and "wrote" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["log.txt"]


VAL = {"images": "val", "scheme": "global"}


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("val", {"images": "test"}),
        ("val", {"scheme": "random"}),
        ("test", {"images": "val"}),
        ("test_random", {"scheme": "global"}),
    ],
)
def test_nothing_is_chosen_or_reported_by_other_images_or_another_scheme(done, tmp_path, fails_in, place, change):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    report = min((tmp_path / "out").glob(f"*/*/seed1/{place}/prune.json"))
    write_json(report, read_json(report) | change)
    key, value = next(iter(change.items()))
    status, line = fails_in(reproduce, path, "--data", "unused", "--out", tmp_path / "out", "--dry_run")
    assert status == 1 and f"{report} has {key} {value}, not " in line and line.endswith(": remove it")


def test_a_choice_is_by_the_mean_of_the_tuning_seeds(tmp_path):
    """0.5: the best with seed 1 is not the best of both. 0.95: it diverged with seed 2, and is out."""
    grid = {"penalty": "l1", "grid": {"xi": [1e-4, 1e-3]}}
    study = load_study(write_study(tmp_path, tune_seeds=[1, 2], methods={"L1": grid}, controls=[]))
    first, second = study.of_method("L1")
    top1 = {(first, 1): 90.0, (first, 2): 70.0, (second, 1): 84.0, (second, 2): 82.0}
    for (config, seed), accuracy in top1.items():
        folder = run_folder(tmp_path, config, seed) / "val"
        folder.mkdir(parents=True)
        results = [{"asked": ratio, "after": {"top1": accuracy + ratio}} for ratio in study.percent]
        write_json(folder / "prune.json", VAL | {"before": {"top1": accuracy}, "results": results})
    assert held_out_accuracy(study, tmp_path, first) == {0.0: 80, 0.5: 80.5, 0.95: pytest.approx(80.95)}
    assert choose(study, tmp_path) == {"L1": {0.5: second, 0.95: second}}
    (run_folder(tmp_path, second, 2) / "val" / "prune.json").unlink()
    assert choose(study, tmp_path) == {"L1": {0.5: first, 0.95: first}}
    assert tried(study, tmp_path) == {"L1": [1, 1]}


def test_more_seeds_add_runs(done, tmp_path):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    counts = run(path, "--out", tmp_path / "out", "--seeds", 1, 2, 3, "--dry_run")
    chosen = choose(load_study(path), out)
    assert counts["final"] == sum(len(set(of.values())) for of in chosen.values())


def test_a_deleted_network_is_trained_again_only_when_it_is_needed(done, tmp_path):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.pth.tar"):
        file.unlink()
    before = read_accuracies(out / "none/plain/seed1/test/prune.json")
    shutil.rmtree(tmp_path / "out/none/plain/seed1/test")
    run(path, "--out", tmp_path / "out", "--jobs", 1)
    assert read_accuracies(tmp_path / "out/none/plain/seed1/test/prune.json") == before
    assert {p.parent.parent for p in (tmp_path / "out").rglob("final.pth.tar")} == {tmp_path / "out/none/plain/seed1"}


def test_another_study_in_the_same_folder_is_refused(done, tmp_path, fails_in):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.pth.tar"):  # what is measured counts, also where no network is left
        file.unlink()
    other = write_study(tmp_path, options=STUDY["options"] | {"lr": 0.06}, title="Another study", percent=[0.5])
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("table.md", "table.csv", "pareto.png")}
    for dry in ([], ["--dry_run"]):
        status, line = fails_in(reproduce, other, "--out", tmp_path / "out", "--jobs", 1, *dry)
        assert status == 1 and "lr 0.05" in line and "--out" in line
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in before.items())


def test_options_that_an_older_version_did_not_record_had_their_defaults(done, tmp_path):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    for file in (tmp_path / "out").rglob("summary.json"):
        summary = read_json(file)
        for key in ("padding", "no_flip", "mask", "gmp", "linear"):
            del summary["arguments"][key]
        write_json(file, summary)
    require_same_study(tuning_jobs(load_study(path), tmp_path / "out", "."))
    for value in (4, 0):
        other = load_study(write_study(tmp_path, options=STUDY["options"] | {"padding": value}))
        with pytest.raises(ValueError, match=f"was trained with padding None, the study now says {value}"):
            require_same_study(tuning_jobs(other, tmp_path / "out", "."))


def test_controls_that_a_study_no_longer_asks_for_are_in_no_table(done, tmp_path):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    study = dataclasses.replace(load_study(path), controls=())
    rows = write_report(study, tmp_path / "out", command="c")
    assert rows["global"] and not any(rows[scheme] for scheme in CONTROLS)
    assert "Control:" in (out / "table.md").read_text() and "Control:" not in (tmp_path / "out/table.md").read_text()


def test_what_is_chosen_is_what_was_trained_to_the_last_digit(tmp_path):
    grid = {"L1": {"penalty": "l1", "grid": {"xi": [10**-4.5]}}}
    study = load_study(write_study(tmp_path, methods=grid, controls=[]))
    (job,) = tuning_jobs(study, tmp_path / "out", "data")
    args = training_arguments(study, job.config, seed=1, folder=job.folder, data="data")
    assert args.xi == dict(job.config.coefficients)["xi"] == 10**-4.5


@pytest.mark.usefixtures("heeded")
def test_a_report_that_fails_does_not_hide_why_the_study_ended(tmp_path, monkeypatch, fails_in, capsys):
    def interrupted(*_, **__):
        (tmp_path / "out/L1/x/seed1").mkdir(parents=True)
        (tmp_path / "out/L1/x/seed1/failed.json").write_text("{}")
        raise KeyboardInterrupt

    def broken(*_, **__):
        raise ValueError("a measurement is damaged")

    monkeypatch.setattr(reproduce, "run_study", interrupted)
    monkeypatch.setattr("utils.studies.report.write_report", broken)
    status, line = fails_in(reproduce, write_study(tmp_path), "--out", tmp_path / "out", "--jobs", 1)
    assert status == 130 and "the same command goes on" in line
    monkeypatch.setattr(reproduce, "run_study", lambda *_, **__: None)
    status, line = fails_in(reproduce, write_study(tmp_path), "--out", tmp_path / "out", "--jobs", 1)
    assert status == 1 and "a measurement is damaged" in line


def test_what_was_measured_and_has_lost_its_options_is_refused(done, tmp_path):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    for name in ("run", "test"):
        shutil.rmtree(tmp_path / "out/none/plain/seed1" / name)
    jobs = tuning_jobs(load_study(path), tmp_path / "out", ".")
    with pytest.raises(ValueError, match="has lost its run/summary.json"):
        require_same_study(jobs)
    (tmp_path / "out/none/plain/seed1/run").mkdir()
    with folder_lock(tmp_path / "out/none/plain/seed1/run"):  # of a run that is trained again, and just begins
        require_same_study(jobs)
    (tmp_path / "out/none/plain/seed1/run").rmdir()
    (tmp_path / "out/none/plain/seed1/val").rename(tmp_path / "out/none/plain/seed1/cut")
    require_same_study(jobs)  # stopped between its cut and its training
    (tmp_path / "out/none/plain/seed1/cut").rename(tmp_path / "out/none/plain/seed1/val")
    (tmp_path / "out/none/plain/seed1/run").mkdir()
    (tmp_path / "out/none/plain/seed1/run/final.pth.tar").touch()
    require_same_study(jobs)  # trained again, and stopped between its network and its summary


def test_a_study_of_a_folder_of_images(images, tmp_path, jobs_here):
    options = {"dataset": "folder", "arch": "resnet", "depth": 8, "epochs": 1, "schedule": [], "val_split": 6}
    only = {"methods": {"none": {"penalty": "none"}}, "controls": [], "seeds": [1], "percent": [0.5]}
    study = write_study(tmp_path, options=options, **only)
    for _ in range(2):  # the second time it finds its checkpoint
        run(study, "--data", images, "--out", tmp_path / "out", "--jobs", 1)
    summary = read_json(tmp_path / "out/none/plain/seed1/run/summary.json")
    assert summary["arguments"]["image_size"] == 32


def test_a_run_that_diverged_with_other_options_is_refused_too(tmp_path, fails_in):
    only = {"methods": {"L1": {"penalty": "l1", "grid": {"xi": [1e30]}}}, "controls": []}
    run(write_study(tmp_path, **only), "--out", tmp_path / "out", "--jobs", 1)
    other = write_study(tmp_path, **only, options=STUDY["options"] | {"lr": 1e-3})
    status, line = fails_in(reproduce, other, "--out", tmp_path / "out", "--jobs", 1)
    assert status == 1 and "lr 0.05" in line


def test_a_run_that_is_trained_again_is_left_out_of_the_tables_meanwhile(done, tmp_path):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    again = tmp_path / "out" / "none/plain/seed2/run"
    for name in ("summary.json", "final.pth.tar"):
        (again / name).unlink()
    rows = write_report(load_study(path), tmp_path / "out", command="again")["global"]
    assert {row["n"] for row in rows if row["method"] == "none"} == {1}
    assert {row["n"] for row in rows if row["method"] == "HALO"} == {2}


def test_a_chosen_run_that_diverges_with_another_seed_is_named(done, tmp_path):
    path, out = done
    assert "Chosen, and diverged" not in (out / "table.md").read_text()
    shutil.copytree(out, tmp_path / "out")
    folder = tmp_path / "out" / "HALO/xi0.0001_psi0.001/seed2"
    shutil.rmtree(folder / "test")
    (folder / "failed.json").write_text('{"reason": "it diverged"}')
    write_report(load_study(path), tmp_path / "out", command="again")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "another seed, so in no mean: HALO xi0.0001_psi0.001, seed 2." in text


def test_the_tables_of_a_stopped_study_say_what_is_unfinished(done, tmp_path):
    """Stopped before the second tuning seed of any method: nothing can be chosen yet."""
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/L1/xi0.0001")
    study = load_study(write_study(tmp_path, tune_seeds=[1, 10**6 + 1]))
    assert write_report(study, tmp_path / "out", command="again")["global"] == []
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| none | plain | unfinished |" in text and "| L1 | xi0.0001 | not run |" in text
    assert "| L1 | xi1e+30 | diverged or failed |" in text
    assert "seed 1 1000001 on held-out" in text and "Configurations tried" not in text
    assert not (tmp_path / "out" / "accuracy_vs_sparsity.png").exists()


def test_networks_that_a_stopped_measurement_left_go(done, tmp_path):
    path, out = done
    shutil.copytree(out, tmp_path / "out")
    folder = tmp_path / "out" / "none/plain/seed1"
    left = [folder / "val" / "pruned_0.5.pth.tar", folder / "test" / ".pruned_0.95.pth.tar.x.tmp", folder / "cut" / "x"]
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    run(path, "--out", tmp_path / "out", "--jobs", 1)
    assert not any(file.exists() for file in left) and (folder / "run" / "final.pth.tar").exists()


def test_killed_with_all_its_workers_it_goes_on_where_it_was(tmp_path):
    path, out = write_study(tmp_path, seeds=[1], controls=[]), tmp_path / "out"
    command = [sys.executable, str(ROOT / "reproduce.py"), str(path), "--out", str(out), "--jobs", "1"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: list(out.glob("*/*/seed1/val/prune.json")))
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    finished = {p: p.stat().st_mtime_ns for p in out.glob("*/*/seed1/run/final.pth.tar")}
    rows = run(path, "--out", out, "--jobs", 1)
    assert {row["method"] for row in rows["global"]} == {"none", "L1", "HALO"}
    assert finished and all(p.stat().st_mtime_ns == time_ns for p, time_ns in finished.items())


def test_workers_end_when_only_the_command_itself_is_killed(tmp_path):
    options = STUDY["options"] | {"epochs": 10**6}
    path, out = write_study(tmp_path, options=options), tmp_path / "out"
    command = [sys.executable, str(ROOT / "reproduce.py"), str(path), "--out", str(out), "--jobs", "2"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: list(out.glob("*/*/seed1/run/log.csv")))
    job.kill()
    job.wait()

    def nobody_left() -> bool:
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:
            return True
        return False

    try:
        wait_until(nobody_left)
    finally:
        if not nobody_left():
            os.killpg(job.pid, signal.SIGKILL)


def wait_until(condition) -> None:
    """Wait, on a busy machine too; a minute is far more than any of this takes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gpu_of_a_worker(folder, workers):
    """What a worker may use, told once all of them are there."""
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) == workers)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_workers_take_the_gpus_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert executors.processes_here() == 2
    with executors.local_workers(3) as workers:
        pool = workers.submit.func.__self__
        told = [pool.submit(gpu_of_a_worker, tmp_path, 3) for _ in range(3)]
        assert sorted(future.result() for future in told) == ["5", "5", "GPU-7"]


@pytest.mark.parametrize("named, expected", [(None, ["0", "1"]), ("5,GPU-7", ["5", "GPU-7"]), ("3,4,5", ["3", "4"])])
def test_gpus_go_by_the_names_that_cuda_may_use(named, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert executors.gpus() == expected and executors.processes_here() == 2


def test_each_mig_instance_is_a_gpu_of_its_own_though_cuda_shows_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert executors.gpus() == ["MIG-a", "MIG-b"]


def test_without_a_gpu_workers_are_as_many_as_cores_and_nothing_is_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of a driver that is too old to use it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert executors.processes_here() == cores()
    with executors.local_workers(1) as workers:
        assert workers.submit.func.__self__.submit(gpu_of_a_worker, tmp_path, 1).result() == ""


def test_the_end_of_a_grid_is_seen(tmp_path):
    study = load_study(write_study(tmp_path))
    edges = {config.name: on_edge(study, config) for config in study.of_method("L1")}
    assert edges == {"xi0.0001": ["xi"], "xi0.001": [], "xi1e+30": ["xi"]}
    assert [on_edge(study, config) for config in study.of_method("HALO")] == [[]]  # one value each is no grid


def test_a_method_may_have_several_grids(tmp_path):
    grids = [{"xi": [1e-5, 1e-4], "psi": [1e-3]}, {"xi": [1e-4], "psi": [1e-3, 1e-2]}]
    study = load_study(write_study(tmp_path, methods={"HALO": {"penalty": "halo", "grid": grids}}))
    assert [config.name for config in study.configs] == ["xi1e-05_psi0.001", "xi0.0001_psi0.001", "xi0.0001_psi0.01"]


def test_grids_of_a_method_may_differ_in_their_coefficients(tmp_path):
    grids = [{"xi": [1e-5, 1e-4], "psi": [1e-3]}, {"xi": [1e-4], "psi": [1e-3], "lambda_init": [0.1, 0.2, 0.3]}]
    study = load_study(write_study(tmp_path, methods={"HALO": {"penalty": "halo", "grid": grids}}))
    assert [on_edge(study, config) for config in study.configs] == [
        ["xi"],
        ["xi"],
        ["xi", "lambda_init"],
        ["xi"],
        ["xi", "lambda_init"],
    ]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"methods": {"L1": {"penalty": "l1", "grid": {"psi": [1.0]}}}, "controls": []}, "--psi does nothing"),
        ({"methods": {"L1": {"penalty": "lasso"}}, "controls": []}, "none, halo, l1, ws, mcp"),
        ({"controls": ["L2"]}, "L2"),
        ({"options": {"arch": "lenet_300"}}, "arch"),
        ({"options": STUDY["options"] | {"val_split": 0}}, "val_split"),
        ({"options": STUDY["options"] | {"epoch": 3}}, "--epoch"),
        ({"options": STUDY["options"] | {"halo": True}}, "would have the penalty halo, not none"),
        ({"methods": {"L1": {"penalty": "compile"}}, "controls": []}, "none, halo, l1, ws, mcp"),
        ({"options": {"dataset": "digits", "arch": True}}, "no study file"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_study_file_is_one_line(tmp_path, fails_in, changes, words):
    status, line = fails_in(reproduce, write_study(tmp_path, **changes), "--out", tmp_path / "out")
    assert status == 1 and words in line and "small.json" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["no_such_study"], ["missing.json"], []])
def test_a_missing_study_says_where_to_look(fails_in, options):
    status, line = fails_in(reproduce, *options)
    assert status in (1, 2) and "--list" in line


def test_every_study_here_can_be_read(capsys):
    studies = ["cifar100_resnet50", "cifar100_resnet50_quarter", "cifar10_resnet20", "cifar10_resnet20_short"]
    studies += ["cifar10_vgg16", "mnist_lenet300", "mnist_lenet5"]
    assert list(run("--list")) == studies
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == studies, "a space between name and title"


def grid(**values):
    return {"methods": {"L1": {"penalty": "l1", "grid": values}}, "controls": []}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": {"../../x": {"penalty": "none"}}, "controls": []}, "../../x"),
        ({"methods": {"a/b": {"penalty": "none"}}, "controls": []}, "a/b"),
        ({"methods": {"..": {"penalty": "none"}}, "controls": []}, "'..'"),
        ({"methods": {}, "controls": []}, "at least one"),
        ({"methods": {"none": {}}, "controls": []}, "penalty"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": []}, "'seeds'"),
        ({"seeds": [1.5]}, "1.5"),
        ({"seeds": [2**70]}, str(2**70)),
        ({"tune_seeds": "1"}, "'tune_seeds'"),
        ({"percent": [0.5, 1.5]}, "1.5"),
        ({"percent": [float("nan")]}, "nan"),
        ({"percent": ["0.5"]}, "0.5"),
        ({"percent": [10**400]}, "'percent'"),
        ({"seeds": [10**400]}, "'seeds'"),
        ({"options": STUDY["options"] | {"save_dir": "elsewhere"}}, "save_dir"),
        ({"options": STUDY["options"] | {"seed": 3}}, "seed"),
        (grid(epochs=[1, 2]), "epochs"),
        (grid(save_dir=[1]), "save_dir"),
        (grid(xi=[1e-4, 1.0000000001e-4]), "twice"),
        (grid(xi=[float("nan")]), "nan"),
        (grid(xi=[float("inf")]), "inf"),
        (grid(xi=[10**400]), "that are finite"),
        (grid(xi=["1e-4"]), "1e-4"),
        (grid(xi=[]), "xi"),
        (grid(xi=[True]), "True"),
        (grid(xi=[k * 1e-6 for k in range(2000)], lambda_init=list(range(1, 2001))), "4000000"),
        ({"controls": "HALO"}, "HALO"),
        ({"title": 3}, "3"),
    ],
)
def test_what_a_study_cannot_mean_is_refused_before_the_first_run(changes, says, tmp_path, fails_in):
    path = write_study(tmp_path, **changes)
    start = time.process_time()
    for dry in (["--dry_run"], []):
        status, line = fails_in(reproduce, path, "--out", tmp_path / "out", *dry)
        assert status == 1 and says in line and str(path) in line
    assert not (tmp_path / "out").exists() and time.process_time() - start < 20


@pytest.mark.parametrize("text", ["[1]", "3", "{", "null", '{"title": "a", "title": "b"}'])
def test_a_file_that_is_no_study_is_named(text, tmp_path, fails_in):
    path = tmp_path / "small.json"
    path.write_text(text)
    status, line = fails_in(reproduce, path, "--dry_run")
    assert status == 1 and str(path) in line


def test_a_seed_that_is_given_twice_is_refused(tmp_path, fails_in):
    status, line = fails_in(reproduce, write_study(tmp_path), "--seeds", 1, 1, "--dry_run")
    assert status == 1 and "--seeds" in line and "twice" in line
