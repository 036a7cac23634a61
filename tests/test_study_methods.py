"""Methods of a study that prune before the end of training: one run a ratio, as many epochs as the others."""

import csv
import json
import re
import shutil

import pytest
import torch
from test_cifar import assert_equal_runs
from test_cifar import rows as log_rows
from test_gmp import stop_after
from test_reproduce import STUDY, run

import reproduce
from utils.files.checkpoint import load_checkpoint
from utils.studies.jobs import final_jobs, jobs_before, require_same_study, run_job, tuning_jobs
from utils.studies.progress import Progress, to_come
from utils.studies.report import tried, write_report
from utils.studies.study import choose, held_out_accuracy, load_study, on_edge, training_arguments

TOTAL = 266_200
METHODS = {
    "L1": {"penalty": "l1", "grid": {"xi": [1e-4]}},
    "GMP": {"gmp": True, "grid": {"lr": [0.05], "A": [0.5], "B": [2, 3]}},
    "HALO+GMP": {"gmp": True, "penalty": "halo", "grid": {"xi": [1e-4], "psi": [1e-3]}},
    "HALO+finetune": {
        "penalty": "halo",
        "grid": {"xi": [1e-4], "psi": [1e-3]},
        "finetune": {"share": [0.45], "lr": [0.05, 0.01]},
    },
    "L1+finetune": {"penalty": "l1", "grid": {"xi": [1e30]}, "finetune": {"share": [0.25, 0.5]}},
}
OPTIONS = STUDY["options"] | {"epochs": 4, "schedule": [1, 3], "val_split": 1000}
PART = "HALO+finetune/xi0.0001_psi0.001_share0.45"

pytestmark = pytest.mark.usefixtures("jobs_here")


def write_study(folder, **changes):
    path = folder / "small.json"
    path.write_text(json.dumps(STUDY | {"options": OPTIONS, "methods": METHODS, "controls": []} | changes))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, jobs_here):
    """A finished study, its file and folder, and what was promised before it began."""
    folder = tmp_path_factory.mktemp("study")
    path, out = write_study(folder), folder / "out"
    promised = run(path, "--out", out, "--dry_run")["tuning"], to_come(load_study(path), out)
    run(path, "--out", out, "--jobs", 1)
    return path, out, promised


def trained(out):
    return [f for f in out.glob("*/*/seed*") if (f / "run/summary.json").exists() or (f / "failed.json").exists()]


def test_as_many_runs_are_trained_as_was_said(done):
    """L1 1; GMP 2 and with HALO 1 choices at 2 ratios; fine-tuning 1 network and 2 choices at 2 ratios, or 2 and 2."""
    path, out, (tuning, (fewest, most)) = done
    assert tuning == 1 + 2 * 2 + 1 * 2 + (1 + 2 * 2) + (2 + 2 * 2)
    assert (fewest, most) == (1 + 2 + 2 + (1 + 2) + (1 + 2), 1 + 2 + 2 + (1 + 2) + (2 + 2))
    chosen = sum(job.seed == 2 for job in final_jobs(load_study(path), out, ""))
    assert len(trained(out)) == tuning + chosen + 1  # the other network to go on from; what diverged is never chosen
    assert to_come(load_study(path), out) == (0, 0)
    assert run(path, "--out", out, "--dry_run") == {"tuning": 0, "final": 0}


def test_the_networks_before_a_cut_may_be_deleted_at_the_end(done, tmp_path):
    """As results/studies/README.md says; the table lacks their seconds then, and nothing else."""
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    for folder in [*(tmp_path / "out").glob("HALO+finetune/*_share*")]:
        if not list(folder.glob("*/val")):
            shutil.rmtree(folder)
    study, folders = load_study(path), (out, tmp_path / "out")
    before, after = (write_report(study, folder, command="c")["global"] for folder in folders)
    for was, now in zip(before, after, strict=True):
        lost = was["method"] == "HALO+finetune"
        assert now == was | ({"seconds": ""} if lost else {}) and (was["seconds"] > 0)


def test_the_last_run_before_a_cut_is_not_said_to_be_the_last(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.studies.progress.duration", str)  # not rounded
    finetune = {"cut": {"finetune": {"share": [0.5], "lr": [0.01]}, "percent": [0.5]}}
    path = write_study(tmp_path, methods=finetune)
    run(path, "--out", tmp_path / "out", "--jobs", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines[0].startswith("[1/2]") and not lines[0].endswith("; about 0.0 left of this phase")
    assert lines[1].startswith("[2/2]") and lines[1].endswith("; about 0.0 left of this phase")


def test_once_tuned_a_method_is_counted_exactly(done, tmp_path):
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/L1/xi0.0001/seed2")
    for folder in (tmp_path / "out/HALO+finetune").glob("*/seed2"):
        shutil.rmtree(folder)
    study, out = load_study(path), tmp_path / "out"
    assert to_come(study, out) == (1 + 3, 1 + 3)
    jobs = final_jobs(study, out, "")
    assert len(Progress([*jobs_before(jobs), *jobs], out, processes=1).untrained) == 4


def test_gradual_pruning_reaches_each_ratio_in_a_run_of_its_own(done):
    path, out, _ = done
    for name, penalty in (("GMP/lr0.05_A0.5_B2", "none"), ("HALO+GMP/xi0.0001_psi0.001", "halo")):
        for ratio in (0.5, 0.95):
            folder = out / f"{name}_at{ratio}" / "seed1"
            config = load_checkpoint(folder / "run" / "final.pth.tar")["config"]
            assert (config["gmp"], config["penalty"], config["epochs"]) == (ratio, penalty, 4)
            assert config["gmp_epochs"] == ([0.5, 2] if penalty == "none" else [4 / 12, 8 / 3])
            assert_pruned_already(folder, ratio)


def assert_pruned_already(folder, ratio):
    report = json.loads((folder / "val" / "prune.json").read_text())
    (result,) = report["results"]
    zeros = sum(layer["total"] - layer["remaining"] for layer in result["layers"])
    assert (result["asked"], result["removed"], zeros) == (ratio, 0, round(TOTAL * ratio))
    assert result["after"] == {key: report["before"][key] for key in result["after"]}


def test_a_run_before_the_cut_that_lost_its_summary_is_named(done, tmp_path):
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / PART / "seed1" / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{PART}/seed1 was trained, but its run/summary.json")):
        write_report(load_study(path), tmp_path / "out", command="")


def test_fine_tuning_goes_on_from_one_network_with_its_smallest_weights_at_zero(done):
    """1.8 of 4 epochs round to 2; the study decays after 1 and 3, so each part decays after its first."""
    path, out, _ = done
    first = load_checkpoint(out / PART / "seed1" / "run" / "final.pth.tar")
    assert (first["config"]["epochs"], first["config"]["schedule"], first["config"]["penalty"]) == (2, [1], "halo")
    for rate in (0.05, 0.01):
        folder = out / f"{PART}_then_lr{rate}_at0.95" / "seed1"
        start, final = (load_checkpoint(folder / "run" / f"{name}.pth.tar") for name in ("init", "final"))
        assert (final["config"]["epochs"], final["config"]["schedule"], final["config"]["penalty"]) == (2, [1], "none")
        assert [float(row["lr"]) for row in log_rows(folder / "run")] == pytest.approx([rate, rate / 10])
        magnitudes = torch.cat([w.abs().flatten() for w in first["state_dict"].values() if w.dim() > 1])
        least = magnitudes.sort().values[round(TOTAL * 0.95)]
        for name, weight in first["state_dict"].items():
            kept = weight * (weight.abs() >= least) if weight.dim() > 1 else weight
            assert torch.equal(start["state_dict"][name], kept)
            assert weight.dim() == 1 or torch.equal(final["state_dict"][name] == 0, kept == 0)
        assert_pruned_already(folder, 0.95)
        assert not (folder / "cut").exists()


def test_what_diverges_before_the_cut_is_never_chosen(done):
    path, out, _ = done
    study = load_study(path)
    reason = json.loads((out / "L1+finetune/xi1e+30_share0.5_at0.95/seed1/failed.json").read_text())["reason"]
    assert "before the cut" in reason and "L1+finetune" not in choose(study, out)
    assert "| L1+finetune | xi1e+30_share0.5 | diverged" in (out / "table.md").read_text()


def test_what_failed_before_the_cut_is_tried_again_once_that_is_removed(done, tmp_path):
    """As where a worker had died: one file is to be removed, however many runs go on from the same network."""
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    jobs = [job for job in tuning_jobs(load_study(path), tmp_path / "out", "") if "share0.5" in job.config.name]
    assert len(jobs) == 2 and all(job.done for job in jobs) and jobs_before(jobs) == []
    (jobs[0].before.folder / "failed.json").unlink()
    assert not any(job.done for job in jobs) and jobs_before(jobs) == [jobs[0].before]


def test_a_gradual_run_that_diverged_is_of_this_study_without_its_checkpoint_too(tmp_path):
    """--gmp_epochs has a default, which a run that goes on from a checkpoint takes from there."""
    only = {"GMP": {"gmp": True, "penalty": "l1", "grid": {"xi": [1e30]}, "percent": [0.95]}}
    path = write_study(tmp_path, methods=only)
    for _ in range(2):
        run(path, "--out", tmp_path / "out", "--jobs", 1)
        for file in (tmp_path / "out").rglob("*.pth.tar"):
            file.unlink()
    assert len([*(tmp_path / "out").rglob("failed.json")]) == 1


def test_another_penalty_before_the_cut_is_refused(done, tmp_path, fails_in):
    _, out, _ = done
    other = METHODS["HALO+finetune"] | {"penalty": "ws"}
    path = write_study(tmp_path, methods=METHODS | {"HALO+finetune": other})
    shutil.copytree(out, tmp_path / "out")
    status, line = fails_in(reproduce, path, "--out", tmp_path / "out", "--jobs", 1)
    assert status == 1 and "penalty halo, the study now says ws" in line


def test_the_choice_is_made_for_each_ratio(done, tmp_path):
    path, out, _ = done
    study = load_study(path)
    for method, of_ratio in choose(study, out).items():
        for ratio, config in of_ratio.items():
            best = max(held_out_accuracy(study, out, other)[ratio] for other in study.of_method(method))
            assert config.ratio == (None if method == "L1" else ratio)
            report = json.loads((out / method / config.name / "seed1/val/prune.json").read_text())
            assert next(r for r in report["results"] if r["asked"] == ratio)["after"]["top1"] == best
    chosen = choose(study, out)["GMP"][0.95]
    assert on_edge(study, chosen) == on_edge(study, chosen, out) == ["B"]
    wider = METHODS | {"GMP": {"gmp": True, "grid": {"lr": [0.05], "A": [0.5], "B": [1, 2, 3, 4]}}}
    wider = load_study(write_study(tmp_path, methods=wider))
    assert on_edge(wider, chosen) == [] and on_edge(wider, chosen, out) == ["B"]  # what is not run is no neighbour


def test_the_table_has_them_beside_the_others_and_counts_configurations(done):
    path, out, _ = done
    text = (out / "table.md").read_text()
    assert "Configurations tried for each ratio: L1 1, GMP 2, HALO+GMP 1, HALO+finetune 2, L1+finetune 2." in text
    assert "\nGMP, HALO+GMP, HALO+finetune, L1+finetune have their zeros before training ends" in text
    with open(out / "table.csv", newline="") as file:
        found = {(row["method"], row["ratio"]): row for row in csv.DictReader(file)}
    assert set(found) == {(m, r) for m in METHODS if m != "L1+finetune" for r in ("0.5", "0.95")}
    assert found["GMP", "0.95"]["dense_mean"] == "" and float(found["L1", "0.95"]["dense_mean"]) > 0
    row = found["HALO+finetune", "0.95"]
    assert row["n"] == "2" and "share=0.45 then_lr=" in row["coefficients"] and float(row["compression"]) > 15
    seconds = [
        json.loads((out / folder / f"seed{seed}/run/summary.json").read_text())["seconds"]
        for seed in (1, 2)
        for folder in (PART, f"{PART}_then_lr{row['coefficients'].split('=')[-1]}_at0.95")
    ]
    assert float(row["seconds"]) == pytest.approx(sum(seconds) / 2)


def test_part_of_a_grid_is_said_to_be_one(done, tmp_path):
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/GMP/lr0.05_A0.5_B3_at0.95")
    assert tried(load_study(path), tmp_path / "out")["GMP"] == [2, 1]
    write_report(load_study(path), tmp_path / "out", command="a command")
    assert "GMP 1 to 2, HALO+GMP 1," in (tmp_path / "out" / "table.md").read_text()


def test_a_method_may_be_trained_for_some_of_the_ratios(done, tmp_path):
    _, out, _ = done
    methods = METHODS | {"GMP": METHODS["GMP"] | {"percent": [0.95]}}
    study = load_study(write_study(tmp_path, methods={key: methods[key] for key in ("L1", "GMP")}))
    jobs = [job for job in tuning_jobs(study, out, "data") if job.config.method == "GMP"]
    assert [job.percent for job in jobs] == [(0.95,), (0.95,)]
    assert tried(study, out)["GMP"] == [2] and list(choose(study, out)["GMP"]) == [0.95]
    assert to_come(study, tmp_path / "nothing") == (2, 2)  # seed 2 of L1 and of GMP


@pytest.mark.parametrize(("method", "epoch"), [("GMP", 1), ("HALO+finetune", 0), ("HALO+finetune", 1)])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(done, tmp_path, monkeypatch, method, epoch):
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    study = load_study(path)
    (job,) = [job for job in tuning_jobs(study, tmp_path / "out", "data") if job.config.method == method][3:]
    shutil.rmtree(job.folder)
    stop_after(monkeypatch, epoch, lambda: run_job(job))
    if job.before:  # the rest does not need it
        shutil.rmtree(job.before.folder)
        shutil.rmtree(job.folder / "cut")
    run_job(job)
    mine = out / job.folder.relative_to(tmp_path / "out")
    assert_equal_runs(mine / "run", job.folder / "run")
    ours, theirs = (json.loads((f / "val" / "prune.json").read_text())["results"] for f in (mine, job.folder))
    assert ours == theirs


def test_a_run_that_stands_in_the_middle_does_not_go_on_with_other_epochs(tmp_path, monkeypatch):
    """--gmp_epochs, which follow from them, would stay those of its checkpoint."""
    only = {"methods": {"GMP": {"gmp": True, "percent": [0.95]}}}
    (job,) = tuning_jobs(load_study(write_study(tmp_path, **only)), tmp_path / "out", "data")
    stop_after(monkeypatch, 1, lambda: run_job(job))
    require_same_study([job])
    other = load_study(write_study(tmp_path, **only, options=OPTIONS | {"epochs": 8}))
    with pytest.raises(ValueError, match="was trained with epochs 4, the study now says 8: give another --out"):
        require_same_study(tuning_jobs(other, tmp_path / "out", "data"))


def test_measured_runs_of_another_study_are_refused_and_of_this_one_taken_without_networks(done, tmp_path, fails_in):
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.pth.tar"):
        file.unlink()
    assert run(path, "--out", tmp_path / "out", "--dry_run") == {"tuning": 0, "final": 0}
    run(path, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.pth.tar"))
    other = write_study(tmp_path, options=OPTIONS | {"schedule": [1, 2]})
    status, line = fails_in(reproduce, other, "--out", tmp_path / "out")
    assert status == 1 and "schedule [1, 3]" in line and "--out" in line


def test_the_network_before_the_cut_is_trained_again_only_where_a_run_needs_it(done, tmp_path):
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.pth.tar"):
        file.unlink()
    folder = tmp_path / "out" / f"{PART}_then_lr0.01_at0.5" / "seed1"
    before = json.loads((folder / "val" / "prune.json").read_text())["results"]
    shutil.rmtree(folder)
    run(path, "--out", tmp_path / "out")
    assert {f.parent.parent for f in (tmp_path / "out").rglob("final.pth.tar")} == {
        folder,
        tmp_path / "out" / PART / "seed1",
    }
    assert json.loads((folder / "val" / "prune.json").read_text())["results"] == before


@pytest.mark.parametrize(
    ("share", "first", "second"),
    [(0.25, (1, []), (3, [2])), (0.5, (2, [1]), (2, [1])), (0.7, (3, [1]), (1, [])), (0.75, (3, [1]), (1, []))],
)
def test_both_parts_decay_where_the_study_does(tmp_path, share, first, second):
    methods = {"cut": {"finetune": {"share": [share]}}}
    study = load_study(write_study(tmp_path, methods=methods))
    (config,) = study.configs
    for part, (epochs, schedule) in ((config.before, first), (config.at(0.5), second)):
        args = training_arguments(study, part, seed=1, folder=tmp_path, data="data")
        assert (args.epochs, args.schedule, args.lr) == (epochs, schedule, 0.05)


def method(**choice):
    return {"methods": {"new": choice}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (method(gmp=False), "'gmp' of new is False"),
        (method(gmp=0.9), "0.9"),
        (method(gmp=True, finetune={"share": [0.5]}), "give one of them"),
        (method(gmp=True, grids={"A": [1]}), "grids"),
        (method(gmp=True, penalty=1), "penalty"),
        (method(gmp=True, grid={"A": [1]}), '"A" and "B" together'),
        (method(penalty="l1", grid={"A": [1], "B": [2]}), 'with "gmp"'),
        (method(gmp=True, grid={"A": [2], "B": [1]}), "must be A < B"),
        (method(gmp=True, grid={"A": [1], "B": [5]}), "--epochs 4"),
        (method(gmp=True, grid={"gmp_epochs": [1]}), "gmp_epochs"),
        (method(gmp=True, penalty="lasso"), "none, halo, l1, ws, mcp"),
        (method(gmp=True) | {"percent": [0, 0.5]}, "'percent' is 0"),
        (method(gmp=True) | {"controls": ["new"]}, "'controls' is 'new'"),
        (method(penalty="l1", percent=[0.5]), 'with "gmp"'),
        (method(gmp=True, percent=[0.6]), "'percent' of new is [0.6]"),
        (method(gmp=True, percent=[]), "'percent' of new"),
        (method(finetune={}), "share"),
        (method(finetune=True), "share"),
        (method(finetune=[]), "'finetune' of new"),
        (method(penalty="l1", grid=[]), "'grid' of new"),
        (method(finetune={"lr": [0.1]}), "share"),
        (method(finetune={"share": [0.5, 2]}), "2"),
        (method(finetune={"share": [0.1]}), "0.1 of 4 epochs leaves none"),
        (method(finetune={"share": [1]}), "leaves none"),
        (method(finetune={"share": [0.5, 0.51]}), "same epoch"),
        (method(finetune={"share": [0.5], "xi": [1e-4]}), "--xi does nothing"),
        (method(finetune={"share": [0.5], "epochs": [2]}), "epochs"),
        (method(finetune={"share": [0.5]}, grid={"share": [0.5]}), "belongs to"),
        (
            method(finetune={"share": [0.5], "lr": [k / 1e4 for k in range(1, 201)]}, grid={"wd": [*range(100)]}),
            "20000",
        ),
        ({"options": OPTIONS | {"gmp": 0.5}}, "gmp"),
        ({"options": OPTIONS | {"mask": "x"}}, "mask"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_the_first_run(changes, says, tmp_path, fails_in):
    path = write_study(tmp_path, **changes)
    status, line = fails_in(reproduce, path, "--out", tmp_path / "out", "--dry_run")
    assert status == 1 and says in line and str(path) in line and not (tmp_path / "out").exists()


def test_a_method_of_which_nothing_was_run_is_said_to_be_so_and_counted_nowhere(done, tmp_path):
    path, out, _ = done
    shutil.copytree(out, tmp_path / "out")
    for method in ("GMP", "HALO+finetune"):
        shutil.rmtree(tmp_path / "out" / method)
    write_report(load_study(path), tmp_path / "out", command="a command")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Configurations tried for each ratio: L1 1, HALO+GMP 1, L1+finetune 2." in text
    assert "\nHALO+GMP, L1+finetune have their zeros before training ends" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.endswith("not run |")}
    assert set(rows) == {"GMP", "HALO+finetune"}
    assert "| L1+finetune | xi1e+30_share0.5 | diverged or failed |" in text
    shutil.rmtree(tmp_path / "out" / "L1+finetune")
    write_report(load_study(path), tmp_path / "out", command="a command")
    assert "\nHALO+GMP has its zeros before training ends" in (tmp_path / "out" / "table.md").read_text()


def test_a_whole_number_stays_one(tmp_path):
    """--train_batch 64.0 would be refused."""
    methods = {"L1": {"penalty": "l1", "grid": {"xi": [1e-4, 1], "train_batch": [32, 64]}}}
    study = load_study(write_study(tmp_path, methods=methods))
    found = [training_arguments(study, config, seed=1, folder=tmp_path, data="data") for config in study.configs]
    assert [(args.xi, args.train_batch) for args in found] == [(1e-4, 32), (1e-4, 64), (1.0, 32), (1.0, 64)]
