"""The recipe of results/replication/short_runs: xi grows by whole epochs, and a stopped run goes on the same."""

import csv
import runpy
import sys

import pytest
import torch
from conftest import ROOT, train

from utils.files.checkpoint import CheckpointError, load_checkpoint
from utils.options import OptionError

HALO = ["--halo", "--xi", "1e-3", "--psi", "1e-3", "--schedule", "--grow", "2"]


@pytest.fixture(scope="module")
def script():
    """What the script defines."""
    return runpy.run_path(str(ROOT / "results/replication/short_runs/growing_xi.py"))


def run(script, *options):
    return script["main"](script["get_parser"]().parse_args([str(option) for option in options]))


def test_xi_is_a_share_of_the_asked_one_until_it_has_grown(script, tiny, tmp_path):
    run(script, *tiny, *HALO, "--epochs", "3")
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    found = [float(row["strength_q50"]) * float(row["lambda_q50"]) ** 2 for row in rows]
    assert found == pytest.approx([0.5e-3, 1e-3, 1e-3], rel=1e-4)


def test_resumed_while_xi_grows_it_ends_the_same(script, tiny, tmp_path):
    run(script, *tiny, *HALO, "--epochs", "2")
    run(script, *tiny, *HALO, "--epochs", "1", "--save_dir", tmp_path / "stopped")
    at = ["--save_dir", tmp_path / "stopped", "--resume", tmp_path / "stopped" / "checkpoint.pth.tar"]
    run(script, *tiny, *HALO, "--epochs", "2", *at)
    whole, stopped = (load_checkpoint(tmp_path / name / "final.pth.tar") for name in ("run", "stopped"))
    for part in ("state_dict", "lambdas"):
        assert all(torch.equal(whole[part][name], tensor) for name, tensor in stopped[part].items())


def test_other_penalties_are_refused(script, tiny):
    with pytest.raises(OptionError, match="--grow is of HALO's xi: add --halo"):
        run(script, *tiny, "--l1", "--grow", "2")


def test_a_stopped_run_names_the_command_that_continues_it(script, tiny, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["results/replication/short_runs/growing_xi.py", *tiny, *HALO, "--overwrite"])
    monkeypatch.setattr(script["GrowingHALO"], "run_epoch", stop)
    with pytest.raises(KeyboardInterrupt, match=r"continue with: python .*growing_xi.py .*--grow 2 --resume .*"):
        run(script, *tiny, *HALO)


def test_a_run_without_growth_is_not_continued_with_it(script, tiny, tmp_path):
    train(*tiny, *HALO[:-2], "--epochs", "1")
    at = ["--resume", tmp_path / "run" / "checkpoint.pth.tar"]
    with pytest.raises(CheckpointError, match=r"of another run: grow None \(now 2\)"):
        run(script, *tiny, *HALO, "--epochs", "2", *at)
