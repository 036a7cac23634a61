"""The benchmarks: what they make of their times, and wrong options. They themselves are run by hand (`make bench`)."""

import importlib
from types import SimpleNamespace

import pytest

from benchmarks.report import cell, markdown, overtaking
from benchmarks.timing import interleave, rows
from utils.stages import timing


def test_ratios_are_of_neighbours_and_not_of_medians():
    """In the second repetition the machine is half as fast: it is for both."""
    times = {"plain": [1.0, 2.0, 1.0], "fast": [0.5, 1.0, 0.25]}
    (_, fast), (_, slower) = (rows(times, reference="plain", faster=faster) for faster in (True, False))
    assert (fast["n"], fast["ms"], fast["ratio"]) == (3, 500, 2) and slower["ratio"] == 0.5
    assert fast["ms_quartiles"] == [250, 1000]


def test_a_time_is_that_of_one_call(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(timing, "time", clock)
    assert interleave({"slow": lambda: setattr(clock, "now", clock.now + 3)}, repeats=2, inner=5) == {"slow": [3, 3]}


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(0, 1.5), (0.5, 2)], "faster throughout"),
        ([(0, 0.5), (0.5, 0.75), (0.9, 1.75)], "faster from 60% on"),
        ([(0, 1.5), (0.5, 0.5), (0.9, 1.5)], "faster from 70% on"),  # the last crossing counts
        ([(0, 0.5), (0.99, 0.9)], "slower at 99% too"),
    ],
)
def test_where_sparse_inference_overtakes(points, words):
    assert overtaking(points) == words


def test_a_table_has_a_column_for_every_key_of_any_row():
    lines = markdown("Title", [{"what": "a", "ms": 12345.6}, {"what": "b", "range": [0.12345, 2]}]).splitlines()
    assert lines == ["### Title", "", "| what | ms | range |", "| --- | --- | --- |"] + [
        "| a | 12,346 |  |",
        "| b |  | 0.1235 to 2 |",
    ]
    assert cell(1000) == "1,000"


def test_a_benchmark_that_a_machine_cannot_do_leaves_the_others(tmp_path, monkeypatch, capsys, fails_in):
    run = importlib.import_module("benchmarks.run")

    def refuse():
        raise FileNotFoundError("/proc/self/status")

    tables = {"memory": refuse, "loader": lambda: {"Loader": [{"what": "a", "ms": 1}]}}
    monkeypatch.setattr(run, "BENCHMARKS", tables)
    results = run.main(run.get_parser().parse_args(["--save", str(tmp_path)]))
    assert [*results["tables"]] == ["Loader"] and "Loader" in (tmp_path / "tables.md").read_text()
    assert "memory was left out: /proc/self/status" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("sparse", [], "nothing to measure: name a --network, or ask for the --figure"),
        ("sparse", ["--network", "VGG-16", "--repeats", 1], "--repeats: 1 is out of range"),
        ("sparse", ["--network", "VGG-16", "--sparsity", 95], "--sparsity: 95 is out of range"),
        ("sparse", ["--network", "VGG-16", "--batch", 0], "--batch: 0 is out of range"),
        ("sparse", ["--network", "ResNet-50 (6n+2)", "--sparsity", 0.5], "cifar10_resnet20_halo_0.5.halo"),
        ("run", ["--only", "speed"], "invalid choice: 'speed'"),
        ("profile_step", ["--top", 0], "--top: 0 is out of range"),
    ],
)
def test_wrong_options_are_one_line(fails_in, tmp_path, script, options, words):
    save = [] if script == "profile_step" else ["--save", tmp_path]
    status, line = fails_in(importlib.import_module(f"benchmarks.{script}"), *options, *save)
    assert status == 2 and words in line


def test_without_a_gpu_its_benchmark_names_the_other(fails_in, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, line = fails_in(importlib.import_module("benchmarks.gpu"), "--save", tmp_path)
    assert status == 2 and "on a CPU use benchmarks/run.py" in line
