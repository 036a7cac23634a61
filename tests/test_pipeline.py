"""Train, prune, check, energy: the stages one after the other, and what is wrong with their input."""

import csv
import importlib
import json
import os
import shutil
from functools import partial
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATIENCE, TINY, start
from forked import Forked
from torch import nn

import check_params
import cifar
import cifar_prune_iterative
import compare_pruning
import compute_energy
import mnist.mnist
from models import build_model
from utils import prunable_weights
from utils.files.archive import write_npz
from utils.files.checkpoint import load_checkpoint, save_checkpoint
from utils.files.preprocessing import CIFAR
from utils.halo.pruning import SCHEMES
from utils.run import write_json
from utils.stages.check import describe_sparsity
from utils.stages.energy import POOLS, components, effective_rank, layer_energies
from utils.stages.prune import _batch_size, recalibrate_batch_norm
from utils.studies.measurements import in_columns
from utils.training.data import load_dataset
from utils.training.loading import make_loader


def call(script, *options):
    return script.main(script.get_parser().parse_args([str(option) for option in options]))


def command_line(script, *options, cwd=None, anew=False):
    """Run a script as a process of its own, one that has imported nothing if `anew`; return what it prints."""
    begin = start if anew else partial(Forked, figures=True)
    process = begin(*options, script=script, cwd=cwd)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def network(images, tmp_path_factory):
    """The options that name images and network, and a trained checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["-d", "folder", "--data", str(images)]
    run = ["--epochs", "8", "--schedule", "6", "--lr", "0.05", "--halo", "--xi", "1e-3", "--psi", "1e-3"]
    call(cifar, *options, *TINY, *run, "--save_dir", folder)
    return [*options, "-a", "resnet", "--depth", "8"], folder / "final.pth.tar"


@pytest.mark.parametrize("dataset", ["digits", "folder"])
def test_the_pipeline(images, tmp_path, dataset, capsys, figures):
    """Of digits from the command line, of a folder in this process."""

    def stage(script, *options):
        if dataset == "digits":
            return command_line(script, *options)
        call(importlib.import_module(script.removesuffix(".py")), *options)
        return capsys.readouterr().out

    where = ["-d", dataset, "--data", images]
    net = ["-a", "resnet", "--depth", "8"]
    run = ["--epochs", "1", "--halo", "--xi", "1e-3", "--psi", "1e-3"]
    stage("cifar.py", *where, *net, *run, "--save_dir", tmp_path / "run")
    model = tmp_path / "run" / "final.pth.tar"
    pruned = tmp_path / "pruned"
    stage("cifar_prune_iterative.py", *where, *net, "--percent", "0.5", "0.9", "--resume", model, "--save_dir", pruned)
    checkpoint = pruned / "pruned_0.9.pth.tar"
    output = stage(
        *("check_params.py", *where, *net, "--checkpoint", checkpoint, "--json", tmp_path / "check.json"),
        *("--plot", tmp_path / "check.png", "--compact", tmp_path / "small.halo"),
    )
    assert "bit-equal" in output and "0.9000" in output
    stage(
        "compute_energy.py", *where, *net, "--checkpoint", model, tmp_path / "small.halo", "--save", tmp_path / "energy"
    )
    report = json.loads((tmp_path / "check.json").read_text())
    prune = json.loads((pruned / "prune.json").read_text())
    assert report["test"]["top1"] == report["stored_top1"] == prune["results"][1]["after"]["top1"]
    for png in (tmp_path / "check.png", tmp_path / "energy.png", pruned / "accuracy_vs_sparsity.png"):
        assert png.read_bytes().startswith(b"\x89PNG")


def test_mnist_from_any_folder(tmp_path):
    run = [
        "-d",
        "digits",
        "-a",
        "LeNet31",
        "--epochs",
        "3",
        "--schedule",
        "2",
        "--halo",
        "--xi",
        "1e-4",
        "--psi",
        "1e-4",
    ]
    command_line("mnist/mnist.py", *run, "--save_dir", "run", cwd=tmp_path, anew=True)
    prune = ["-d", "digits", "-a", "lenet_300_100", "--percent", "0.9", "--resume", "run/final.pth.tar"]
    command_line("mnist/mnist.py", *prune, "--save_dir", "pruned", cwd=tmp_path)
    state = load_checkpoint(tmp_path / "pruned" / "pruned_0.9.pth.tar")
    zeros = sum(int((state["state_dict"][f"fc{i}.weight"] == 0).sum()) for i in (1, 2, 3))
    assert zeros == round(266_200 * 0.9)
    lam = np.load(tmp_path / "run" / "reg_params.npy")
    assert len(lam) == 266_610  # linear weights and biases are penalised
    options = ["-d", "digits", "-a", "lenet_300_100", "--checkpoint", tmp_path / "pruned" / "pruned_0.9.pth.tar"]
    report = call(check_params, *options)
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-5) and report["test"]["top1"] == state["acc"]
    energy = call(compute_energy, *options, "--save", tmp_path / "energy")
    layers = next(iter(energy["checkpoints"].values()))
    assert {name: layer["channels"] for name, layer in layers.items()} == {"fc1": 300, "fc2": 100}


def test_mnist_resumes_bit_for_bit(tmp_path):
    run = ["-d", "digits", "-a", "lenet_5", "--halo", "--xi", "1e-4", "--psi", "1e-4", "--schedule", "2"]
    call(mnist.mnist, *run, "--epochs", 3, "--save_dir", tmp_path / "straight")
    call(mnist.mnist, *run, "--epochs", 1, "--save_dir", tmp_path / "parts")
    resume = ["--resume", tmp_path / "parts" / "checkpoint.pth.tar"]
    call(mnist.mnist, *run, "--epochs", 3, "--save_dir", tmp_path / "parts", *resume)
    one, other = (load_checkpoint(tmp_path / name / "final.pth.tar") for name in ("straight", "parts"))
    for key in ("state_dict", "lambdas"):
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


def test_defaults_of_the_release_for_mnist():
    args = mnist.mnist.get_parser().parse_args([])
    assert (args.epochs, args.train_batch, args.lr, args.momentum) == (250, 100, 0.1, 0.9)
    assert args.schedule == [42, 83, 125, 167, 208] and args.wd == 0  # every 25,000 steps of 600 an epoch


def test_pruning_files_and_numbers(network, tmp_path):
    options, model = network
    report = call(
        cifar_prune_iterative, *options, "--percent", "0", "0.5", "1", "--resume", model, "--save_dir", tmp_path
    )
    dense, half, none = report["results"]
    assert dense["after"] == {k: v for k, v in report["before"].items() if k != "sparsity"}
    assert dense["removed"] == 0 and none["sparsity"] == 1
    assert len(none["empty_layers"]) == len(none["layers"])
    total = sum(layer["total"] for layer in half["layers"])
    assert half["removed"] == round(total / 2)
    before, after = load_checkpoint(model), load_checkpoint(tmp_path / "pruned_0.5.pth.tar")
    assert after["acc"] == half["after"]["top1"] and after["epoch"] == before["epoch"]
    for name in prunable_weights(build_model("resnet", 3, 8)):
        w = before["state_dict"][name]
        assert torch.equal(after["state_dict"][name], torch.where(w.abs() <= half["threshold"], 0.0, w))
    assert torch.equal(after["state_dict"]["fc.weight"], before["state_dict"]["fc.weight"])
    with open(tmp_path / "accuracy_vs_sparsity.csv", newline="") as file:
        assert [float(row["sparsity"]) for row in csv.DictReader(file)] == [0, 0, 0.5, 1]
    assert "EMPTY" in (tmp_path / "prune.txt").read_text()


def test_every_scheme_removes_other_weights(network, tmp_path):
    options, model = network
    masks, counts = {}, {}
    for scheme in SCHEMES:
        folder = tmp_path / scheme
        prune = ["--percent", "0.5", "--scheme", scheme, "--resume", model, "--save_dir", folder]
        report = call(cifar_prune_iterative, *options, *prune)
        state = load_checkpoint(folder / "pruned_0.5.pth.tar")["state_dict"]
        masks[scheme] = torch.cat([(state[layer["name"]] == 0).flatten() for layer in report["results"][0]["layers"]])
        counts[scheme] = [layer["total"] - layer["remaining"] for layer in report["results"][0]["layers"]]
        totals = [layer["total"] for layer in report["results"][0]["layers"]]
    assert all(not torch.equal(masks[a], masks[b]) for a, b in combinations(SCHEMES, 2))
    assert counts["layerwise"] == [total // 2 for total in totals] != counts["global"] == counts["shuffle"]


def test_pruning_on_held_out_images_reads_no_others(network, tmp_path, monkeypatch):
    from utils.stages import prune as prune_run

    seen = []
    original = prune_run.make_loader

    def watch(data, split, *args, **kwargs):
        seen.append((split, len(data.val.labels)))
        return original(data, split, *args, **kwargs)

    monkeypatch.setattr(prune_run, "make_loader", watch)
    options, trained = network
    state, model = load_checkpoint(trained), tmp_path / "model.pth.tar"
    state["config"]["val_split"] = 9  # as if it had been trained without them,
    del state["images"]  # by a version that did not record which they are
    save_checkpoint(model, state)
    pruning = ["--percent", "0.5", "--resume", model, "--save_dir", tmp_path, "--val_split", "9"]
    report = call(cifar_prune_iterative, *options, *pruning)
    assert seen == [("val", 9)] and report["images"] == "val"


def test_every_file_of_pruning_holds_the_numbers_of_the_report(network, tmp_path):
    options, model = network
    ratios = [0.5, 0.7, 0.8, 0.9, 0.95, 0.99]
    prune = ["--recalibrate_bn", 36, "--test_batch", 36, "--percent", *ratios, "--save_dir", tmp_path]
    report = call(cifar_prune_iterative, *options, *prune, "--resume", model)
    with open(tmp_path / "accuracy_vs_sparsity.csv", newline="") as file:
        rows = [{key: float(row[key] or "nan") for key in row} for row in csv.DictReader(file)]
    before, after, fresh = (
        [result[key] for result in results]
        for results, key in (([report], "before"), (report["results"], "after"), (report["results"], "recalibrated"))
    )
    assert [row["top1"] for row in rows] == pytest.approx([one["top1"] for one in before + after])
    assert [row["loss"] for row in rows] == pytest.approx([one["loss"] for one in before + after])
    assert [row["top1_recalibrated"] for row in rows[1:]] == pytest.approx([one["top1"] for one in fresh])
    assert [one["top1"] for one in after] != [one["top1"] for one in fresh]
    for ratio, one, other in zip(ratios, after, fresh, strict=True):
        plain, calibrated = (
            load_checkpoint(tmp_path / f"pruned_{ratio}{end}.pth.tar") for end in ("", "_recalibrated")
        )
        assert (plain["acc"], calibrated["acc"]) == (one["top1"], other["top1"])
        assert plain["best_acc"] == load_checkpoint(model)["best_acc"]
    lines = (tmp_path / "prune.txt").read_text().splitlines()
    for layer in report["results"][0]["layers"]:
        line = next(line for line in lines if line.startswith(f"{layer['name']} "))
        assert line.split()[1:3] == [str(layer["total"]), str(layer["remaining"])]


def test_a_ratio_is_measured_as_if_it_were_the_only_one(network, tmp_path):
    """Recalibrated statistics of one ratio leave no trace in the next, and are those the accuracy is measured with."""
    options, model = network
    prune = ["--recalibrate_bn", 36, "--test_batch", 36, "--resume", model]
    both, alone = (
        call(cifar_prune_iterative, *options, *prune, "--percent", *ratios, "--save_dir", tmp_path / name)["results"]
        for name, ratios in (("both", (0.5, 0.9)), ("alone", (0.9,)))
    )
    assert both[1]["after"] == alone[0]["after"]
    checked = call(check_params, *options, "--checkpoint", tmp_path / "alone" / "pruned_0.9_recalibrated.pth.tar")
    assert checked["test"]["loss"] == pytest.approx(alone[0]["recalibrated"]["loss"], rel=1e-6)


def test_another_seed_removes_other_weights_at_random(network, tmp_path):
    options, model = network
    masks = []
    for seed in (1, 2):
        prune = ["--percent", 0.5, "--scheme", "random", "--seed", seed, "--save_dir", tmp_path / str(seed)]
        call(cifar_prune_iterative, *options, *prune, "--resume", model)
        masks.append(load_checkpoint(tmp_path / str(seed) / "pruned_0.5.pth.tar")["state_dict"]["conv1.weight"] == 0)
    assert not torch.equal(*masks)


def test_pruning_a_pruned_file_composes(network, tmp_path):
    options, model = network
    call(cifar_prune_iterative, *options, "--percent", "0.5", "--resume", model, "--save_dir", tmp_path / "a")
    first = tmp_path / "a" / "pruned_0.5.pth.tar"
    report = call(cifar_prune_iterative, *options, "--percent", "0.5", "--resume", first, "--save_dir", tmp_path / "b")
    assert report["before"]["sparsity"] == 0.5 and report["results"][0]["sparsity"] == pytest.approx(0.75, abs=1e-4)


def test_recalibrated_statistics_are_those_of_the_images(network, images, tmp_path):
    options, model = network
    prune = ["--percent", "0.5", "--recalibrate_bn", "36", "--test_batch", "36"]
    report = call(cifar_prune_iterative, *options, *prune, "--resume", model, "--save_dir", tmp_path)
    assert set(report["results"][0]["recalibrated"]) == {"loss", "top1", "top5"}
    plain, fresh = (load_checkpoint(tmp_path / f"pruned_0.5{s}.pth.tar") for s in ("", "_recalibrated"))
    assert torch.equal(plain["state_dict"]["conv1.weight"], fresh["state_dict"]["conv1.weight"])
    from utils.training.augment import Loader
    from utils.training.data import load_dataset
    from utils.training.dataset import Split

    data = load_dataset("folder", images)
    generator = torch.Generator().manual_seed(1)  # of --seed
    chosen = torch.randperm(36, generator=generator)
    train = Split(data.train.images[chosen], data.train.labels[chosen])
    pixels, *_ = next(iter(Loader(train, data, batch_size=36, generator=generator)))
    output = torch.nn.functional.conv2d(pixels, fresh["state_dict"]["conv1.weight"], padding=1)
    torch.testing.assert_close(fresh["state_dict"]["bn1.running_mean"], output.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        plain["state_dict"]["bn1.running_mean"], fresh["state_dict"]["bn1.running_mean"], atol=1e-3
    )


@pytest.mark.parametrize("dimensions", [1, 2])
def test_every_image_counts_the_same_in_recalibrated_statistics(images, dimensions):
    """9 images, at most 8 a batch: as if they had come at once, and one image alone has no variance."""
    flat = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)]
    data, means = load_dataset("folder", str(images)), []
    for batch in (8, 9):
        model = nn.Sequential(*flat) if dimensions == 1 else nn.Sequential(nn.BatchNorm2d(3))
        share = {"images": 9, "batch": batch, "seed": 1}
        recalibrate_batch_norm(model, data, torch.device("cpu"), arch="resnet", **share)
        assert model[-1].momentum == 0.1
        means.append(model[-1].running_mean)
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)


class Uneven(nn.Module):
    """BatchNorm that is skipped at first, one that is frozen, one that runs twice a batch, one that never runs."""

    def __init__(self):
        super().__init__()
        self.late, self.frozen, self.twice, self.never = (nn.BatchNorm2d(3) for _ in range(4))
        self.batches = []
        for norm in (self.frozen, self.never):
            norm.running_mean.fill_(3)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        self.batches.append(x)
        if len(self.batches) > 2:
            self.late(x)
        self.frozen(x)
        self.twice(x)
        return self.twice(input=x + 1)


def test_every_batch_norm_is_recalibrated_by_the_images_that_it_sees(images):
    model = Uneven()
    share = {"images": 36, "batch": 9, "seed": 1}
    recalibrate_batch_norm(model, load_dataset("folder", str(images)), torch.device("cpu"), arch="resnet", **share)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in model.batches])
    assert len(means) == 4
    torch.testing.assert_close(model.late.running_mean, means[2:].mean(0))
    torch.testing.assert_close(model.twice.running_mean, means.mean(0) + 0.5)
    assert (model.frozen.running_mean == 3).all() and (model.never.running_mean == 3).all()
    assert model.late.momentum == model.twice.momentum == 0.1 and not model.late._forward_pre_hooks


def test_recalibration_draws_the_same_dropout_whatever_came_before(images):
    found = []
    for before in (0, 5):
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
        torch.rand(before)
        share = {"images": 9, "batch": 9, "seed": 1}
        state = torch.get_rng_state()
        recalibrate_batch_norm(model, load_dataset("folder", str(images)), torch.device("cpu"), arch="resnet", **share)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(model[1].running_mean)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "images, batch, sizes", [(7, 3, [4, 3]), (3, 2, [3]), (36, 36, [36]), (9, 8, [5, 4]), (4, 1, [2, 2])]
)
def test_no_batch_of_recalibration_is_of_one_image(images, batch, sizes):
    assert [len(part) for part in torch.arange(images).split(_batch_size(images, batch))] == sizes


@pytest.mark.parametrize("count", [1, 37])
def test_recalibration_takes_two_images_to_all_of_them(network, tmp_path, fails_in, count):
    options, model = network
    prune = ["--percent", 0.5, "--resume", model, "--save_dir", tmp_path / "pruned", "--recalibrate_bn", count]
    status, line = fails_in(cifar_prune_iterative, *options, *prune)
    assert status == 2 and f"--recalibrate_bn {count}: give 2 to 36 training images" in line
    assert not (tmp_path / "pruned").exists()


def test_a_sparsity_that_is_there_already_is_noted(network, tmp_path, capsys):
    options, model = network
    prune = ["--of", "all", "--save_dir", tmp_path / "b", "--percent", 0.5, 0.9, 0.95]
    call(cifar_prune_iterative, *options, "--percent", 0.9, "--resume", model, "--save_dir", tmp_path / "a")
    capsys.readouterr()
    report = call(cifar_prune_iterative, *options, *prune, "--resume", tmp_path / "a" / "pruned_0.9.pth.tar")
    assert [result["sparsity"] for result in report["results"]] == pytest.approx([0.9, 0.9, 0.95], abs=1e-4)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "more zeros already" in line]
    assert line.startswith("note: pruned 0.5:")


def test_a_sparsity_that_is_there_exactly_is_not_noted(network, tmp_path, capsys):
    """Also where the whole number of zeros is a little more than asked, as round(n * 0.955) of this network is."""
    options, model = network
    prune = ["--of", "all", "--percent", 0.955, "--save_dir"]
    report = call(cifar_prune_iterative, *options, *prune, tmp_path / "a", "--resume", model)
    assert report["results"][0]["sparsity"] > 0.955
    again = [tmp_path / "b", "--resume", tmp_path / "a" / "pruned_0.955.pth.tar"]
    report = call(cifar_prune_iterative, *options, *prune, *again)
    assert report["results"][0]["removed"] == 0 and "more zeros" not in capsys.readouterr().err


def test_outputs_that_could_not_be_replaced_are_as_they_were(network, tmp_path, monkeypatch):
    from utils.stages import prune as prune_run

    options, model = network
    pruning = ["--percent", 0.5, 0.9, "--save_dir", tmp_path, "--overwrite"]
    call(cifar_prune_iterative, *options, *pruning[:2], *pruning[3:], "--resume", model)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(prune_run, "write_csv", full)
    with pytest.raises(OSError, match="No space left"):
        call(cifar_prune_iterative, *options, *pruning, "--resume", model.with_name("init.pth.tar"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    call(cifar_prune_iterative, *options, *pruning, "--resume", model.with_name("init.pth.tar"))
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {*before, "pruned_0.9.pth.tar"} and "init" in (tmp_path / "prune.json").read_text()


@pytest.mark.parametrize("key, value", [("config", "configs/resnet.yaml"), ("pruning", 0.5)])
def test_a_file_of_others_may_call_something_else_config(network, images, tmp_path, key, value):
    options, model = network
    torch.save({"state_dict": load_checkpoint(model)["state_dict"], key: value}, tmp_path / "theirs.pth.tar")
    report = call(check_params, *options, "--checkpoint", tmp_path / "theirs.pth.tar")
    assert report["test"]["top1"] == call(check_params, *options, "--checkpoint", model)["test"]["top1"]
    assert load_checkpoint(model)["config"]["arch"] == "resnet"


@pytest.mark.parametrize(
    "points, columns",
    [
        ([0.5, 0.99995001, 0.99997, 0.99998], [0.5, 0.99995, 0.99997, 0.99998]),
        ([0.749987, 0.750012], [0.75, 0.75]),
        ([0.49999, 0.98002], [0.5, 0.98]),
    ],
)
def test_every_point_at_high_sparsity_has_a_column(tmp_path, points, columns):
    results = [{"asked": ratio, "after": {"top1": 50.0}} for ratio in (0.5, 0.98)]
    write_json(tmp_path / "prune.json", {"before": {"top1": 90.0}, "results": results})
    found = [[*in_columns({"a": {point: 50.0}}, [tmp_path / "prune.json"])["a"]] for point in points]
    assert found == [[column] for column in columns]


def test_what_has_no_batch_norm_is_not_recalibrated(tmp_path, fails_in):
    net = ["-d", "digits", "-a", "lenet_300_100"]
    call(mnist.mnist, *net, "--epochs", 1, "--schedule", "--save_dir", tmp_path / "run")
    prune = [*net, "--percent", 0.5, "--resume", tmp_path / "run" / "final.pth.tar"]
    status, line = fails_in(mnist.mnist, *prune, "--recalibrate_bn", 36)
    assert status == 2 and "lenet_300_100 has no BatchNorm: leave it out" in line


def test_images_that_a_network_was_trained_on_are_not_held_out(tiny, tmp_path, fails_in):
    final, prune = tmp_path / "run" / "final.pth.tar", ["--data", tiny[3], "--percent", "0.5", "--overwrite"]
    for held_out, words in ((9, "give at most --val_split 9"), (0, "leave it out")):
        call(cifar, *tiny, "--val_split", held_out, "--overwrite")
        status, line = fails_in(cifar_prune_iterative, *prune, "--resume", final, "--val_split", held_out + 1)
        assert status == 2 and words in line
    call(cifar, *tiny, "--val_split", 9, "--overwrite")
    assert call(cifar_prune_iterative, *prune, "--resume", final, "--val_split", "6")["images"] == "val"


def test_images_in_another_order_are_not_held_out(tiny, tmp_path, fails_in):
    """Which are held out depends on their order, so that the network has seen some of those that are held out now."""
    call(cifar, *tiny, "--val_split", 9)
    other = shutil.copytree(tiny[3], tmp_path / "other")
    for one, two in (("000.png", "011.png"), ("003.png", "007.png")):
        (other / "train/class0" / one).rename(other / "train/class0/moved.png")
        (other / "train/class0" / two).rename(other / "train/class0" / one)
        (other / "train/class0/moved.png").rename(other / "train/class0" / two)
    networks = tmp_path / "run" / "final.pth.tar", tmp_path / "pruned0" / "pruned_0.5.pth.tar", tmp_path / "small.halo"
    for number, network in enumerate(networks):
        prune = ["--percent", "0.5", "--overwrite", "--save_dir", tmp_path / f"pruned{number}", "--data"]
        call(cifar_prune_iterative, *prune, tiny[3], "--resume", network, "--val_split", 9)
        if number == 0:
            call(check_params, "--no_data", "--checkpoint", networks[1], "--compact", networks[2])
        for held_out in (9, 6):
            wrong = [*prune, other, "--resume", network, "--val_split", held_out]
            status, line = fails_in(cifar_prune_iterative, *wrong)
            assert status == 1 and "other images (other pixels in" in line and "--data" in line
        assert call(cifar_prune_iterative, *prune, other, "--resume", network)["images"] == "test"


def test_a_name_that_is_too_long_is_known_before_the_work(network, tmp_path, fails_in, monkeypatch):
    options, model = network
    monkeypatch.setattr("utils.stages.check.load_subject", lambda *_, **__: pytest.fail("it has begun"))
    status, line = fails_in(check_params, *options, "--checkpoint", model, "--json", tmp_path / ("ä" * 101))
    assert status == 1 and "is too long for a name: give one of at most 200 bytes" in line


def test_a_layer_without_weights_has_no_share(network):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 1024, 2))
    network[0].unused = nn.Conv2d(4, 0, 1)
    subject = SimpleNamespace(model=network.eval(), preprocessing=CIFAR, linear=False, device=torch.device("cpu"))
    report = describe_sparsity(subject, tau=1e-3)
    assert [layer["fraction_below_tau"] for layer in report["layers"] if layer["total"] == 0] == [0]


def test_check_counts_what_is_there(network, tmp_path, capsys):
    options, model = network
    state = load_checkpoint(model)
    state["state_dict"]["conv1.weight"][:3] = 0
    save_checkpoint(tmp_path / "m", state)
    report = call(check_params, *options, "--checkpoint", tmp_path / "m", "--no_data", "--tau", "0.01")
    layer = report["layers"][0]
    assert (layer["total"] - layer["remaining"], layer["dead_filters"], layer["filters"]) == (81, 3, 16)
    small = sum(int((state["state_dict"][x["name"]].abs() <= 0.01).sum()) for x in report["layers"])
    assert report["fraction_below_tau"] == pytest.approx(small / report["prunable"])
    assert report["compression_ratio"] == pytest.approx(report["parameters"] / report["parameters_nonzero"])
    assert report["macs_dense"] - report["macs_nonzero"] == 81 * 32 * 32 and "test" not in report
    said = capsys.readouterr().out.splitlines()
    below = f"{layer['fraction_below_tau']:.4f}"
    assert said[0].split() == ["layer", "total", "non-zero", "sparsity", "<=", "0.01", "dead", "filters"]
    assert said[1].split() == ["conv1.weight", "432", "351", "0.1875", below, "3", "of", "16"]
    all_of = [str(report["prunable"]), str(report["prunable"] - 81), f"{report['sparsity']:.4f}"]
    (line,) = [line for line in said if line.startswith("all prunable weights")]
    assert line.split()[3:6] == all_of
    assert f"parameters: {report['parameters']}, {report['parameters'] - 81} of them not zero" in said
    ratio = report["parameters"] / (report["parameters"] - 81)
    assert f"compression ratio {ratio:.2f} (all parameters / non-zero parameters)" in said
    dense = report["macs_dense"]
    assert f"multiply-accumulates an image: {dense} dense, {dense - 81 * 1024} with zeros skipped" in said
    assert f"theoretical speed-up {dense / (dense - 81 * 1024):.2f} (dense / remaining multiply-accumulates)" in said


def test_a_checkpoint_of_the_release(network, tmp_path):
    """Old format, DataParallel prefix, nothing but its four keys, and accuracies as tensors."""
    options, model = network
    state = load_checkpoint(model)
    released = {"epoch": 160, "acc": torch.tensor(state["acc"]), "best_acc": torch.tensor(99.0)}
    released["state_dict"] = {f"module.{name}": t for name, t in state["state_dict"].items()}
    torch.save(released, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    report = call(check_params, *options, "--checkpoint", tmp_path / "old.pth.tar", "--json", tmp_path / "r.json")
    assert report["test"]["top1"] == pytest.approx(report["stored_top1"])
    pruned = call(cifar_prune_iterative, *options, "--percent", "0.5", "--resume", tmp_path / "old.pth.tar")
    assert pruned["results"][0]["sparsity"] == 0.5 and (tmp_path / "pruned" / "pruned_0.5.pth.tar").exists()


def test_energy_files(network, tmp_path, capsys, fails_in):
    options, model = network
    capsys.readouterr()
    call(compute_energy, *options, "--checkpoint", model, "--save", tmp_path / "e.npz", "--split", "test")
    layer = json.loads((tmp_path / "e.json").read_text())["checkpoints"]
    ((_, layers),) = layer.items()
    counts = [f"{count} for {level}" for level, count in layers["conv1"]["components"].items()]
    rank = f"effective rank {layers['conv1']['effective_rank']:.1f}"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "conv1"]
    assert line.split() == " ".join(["conv1 16 channels:", *counts, rank]).split() and len(counts) == 4
    with np.load(tmp_path / "e.npz", allow_pickle=False) as arrays:
        assert list(arrays)[:2] == ["conv1", "layer1.0.conv1"] and len(list(arrays)) == 9
        for name, energy in arrays.items():
            whole = torch.from_numpy(energy)
            assert layers[name]["components"] == components(whole)
            assert layers[name]["effective_rank"] == pytest.approx(effective_rank(whole))
            assert energy.sum() == pytest.approx(1) and (np.diff(energy) <= 0).all()
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["split"] == "test" and report["pool"] == "max"
    images, layer, energies = load_dataset("folder", options[3]), "layer3.0.conv2", {}
    for split, pool in product(("train", "test"), POOLS):
        asked = ["--checkpoint", model, "--split", split, "--pool", pool, "--layers", layer, "--overwrite"]
        asked += ["--device", "cpu"]
        call(compute_energy, *options, *asked, "--save", tmp_path / "e")
        with np.load(tmp_path / "e.npz") as arrays:
            energies[split, pool] = arrays[layer]
        network = build_model("resnet", 3, 8)
        network.load_state_dict(load_checkpoint(model)["state_dict"])
        batches = make_loader(images, split, torch.device("cpu"), arch="resnet", batch_size=500)
        alone = layer_energies(network, {layer: network.get_submodule(layer)}, batches, pool=pool)[layer]
        assert energies[split, pool] == pytest.approx(alone.numpy(), abs=1e-5)
    assert all(np.abs(one - other).max() > 1e-4 for one, other in combinations(energies.values(), 2))
    status, line = fails_in(compute_energy, *options, "--checkpoint", model, "--save", ".")
    assert status == 2 and "--save . is a folder: give a name in it, such as energy" in line
    status, line = fails_in(compute_energy, *options, "--checkpoint", model, "--save", f"{tmp_path}/")
    assert status == 2 and line.endswith(f"is a folder: give a name in it, such as {tmp_path}/energy")
    overlay = ["--checkpoint", model, model, "--labels", "a", "b", "--layers", "conv1", "layer3.0.conv2"]
    call(compute_energy, *options, *overlay, "--save", tmp_path / "two")
    with np.load(tmp_path / "two.npz") as arrays:
        assert list(arrays) == ["a/conv1", "a/layer3.0.conv2", "b/conv1", "b/layer3.0.conv2"]


def test_comparison_of_runs(network, tmp_path, capsys, fails_in):
    options, model = network
    for name, ratios in (("a", ["0.5", "0.9"]), ("b", ["0.9"])):
        prune = ["--percent", *ratios, "--resume", model, "--save_dir", tmp_path / name]
        report = call(cifar_prune_iterative, *options, *prune)
    files = [tmp_path / name / "prune.json" for name in ("a", "b")]
    said, after = capsys.readouterr().out, report["results"][0]["after"]
    for words, numbers in (("before: sparsity 0.0000", report["before"]), ("pruned 0.9: sparsity 0.9000", after)):
        assert said.count(f"{words}  loss {numbers['loss']:.4f}  top-1 {numbers['top1']:.2f}%") == 2
    call(compare_pruning, *files, "--labels", "one", "two", "--save", tmp_path / "c.png", "--sentence")
    *lines, blank, sentence = capsys.readouterr().out.splitlines()
    assert blank == "" and sentence.startswith("With 90% of the weights removed at once and")
    assert lines[0] == "| | dense | 0.5 | 0.9 |"
    before, after = f"{report['before']['top1']:.2f}", f"{report['results'][0]['after']['top1']:.2f}"
    assert lines[3] == f"| two | {before} |  | {after} |"  # empty where it was not pruned
    assert lines[2].startswith(f"| one | {before} | ") and lines[2].endswith(f" | {after} |")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    status, line = fails_in(compare_pruning, tmp_path / "c.png")
    assert status == 1 and "no prune.json" in line and "remove" not in line
    assert "--overwrite" in fails_in(compare_pruning, *files, "--save", tmp_path / "c.png")[1]
    assert f"give a prune.json, such as {files[0]}" in fails_in(compare_pruning, files[0].parent)[1]


def test_a_network_that_had_zeros_goes_by_its_true_sparsity(network, tmp_path, capsys, fails_in):
    options, model = network
    first = ["--percent", "0.5", "--resume", model, "--save_dir", tmp_path / "a"]
    once = call(cifar_prune_iterative, *options, *first)
    pruned = tmp_path / "a" / "pruned_0.5.pth.tar"
    twice = call(cifar_prune_iterative, *options, "--percent", "0.8", "--resume", pruned, "--save_dir", tmp_path / "b")
    files = [tmp_path / name / "prune.json" for name in ("a", "b")]
    capsys.readouterr()
    call(compare_pruning, *files, "--labels", "one", "two")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | dense | 0.5 | 0.9 |"
    kept = f"{once['results'][0]['after']['top1']:.2f}"
    assert lines[2].endswith(f" | {kept} |  |")
    assert lines[3] == f"| two |  | {kept} | {twice['results'][0]['after']['top1']:.2f} |"
    save = ["--save", tmp_path / "c.png"]
    status, line = fails_in(compare_pruning, *files, "--labels", "one", "two", "--sentence", *save)
    assert status == 2 and "two had zeros" in line and not save[1].exists()
    report = json.loads(files[1].read_text())
    report["results"][0]["sparsity"] = "0.9"
    write_json(files[1], report)
    assert "does not say its sparsity" in fails_in(compare_pruning, *files)[1]


def test_the_same_ratio_has_one_column(network, tmp_path, capsys, fails_in):
    """0.96875 of the weights, of all of them or half of them and 0.9375 of the rest: to four digits it is another."""
    options, model = network
    call(cifar_prune_iterative, *options, "--percent", 0.5, "--resume", model, "--save_dir", tmp_path / "half")
    half = tmp_path / "half" / "pruned_0.5.pth.tar"
    cuts = {"a": (model, 0.96875, "all"), "b": (half, 0.96875, "all"), "c": (half, 0.9375, "nonzero")}
    for name, (source, ratio, of) in cuts.items():
        prune = ["--percent", ratio, "--of", of, "--resume", source, "--save_dir", tmp_path / name]
        call(cifar_prune_iterative, *options, *prune)
    files = [tmp_path / name / "prune.json" for name in "abc"]
    capsys.readouterr()
    found = call(compare_pruning, *files)
    assert capsys.readouterr().out.splitlines()[0].startswith("| | dense | 0.5 | ")
    assert [sorted(ratios) for ratios in found.values()] == [[0, 0.96875], [0.5, 0.96875], [0.5, 0.96875]]
    for script, option in ((compare_pruning, []), (compute_energy, ["--save", tmp_path / "e", "--checkpoint"])):
        assert "different --labels" in fails_in(script, *option, *files, "--labels", "w", "x", "y", "y")[1]


def test_pruned_networks_that_are_not_replaced_are_named(network, tmp_path, capfd):
    options, model = network
    prune = ["--resume", model, "--save_dir", tmp_path, "--overwrite"]
    call(cifar_prune_iterative, *options, *prune, "--percent", "0.5", "0.9")
    assert "earlier run" not in "".join(capfd.readouterr())
    call(cifar_prune_iterative, *options, *prune, "--percent", "0.9")
    said = "".join(capfd.readouterr())
    assert "prune.json is not about pruned_0.5.pth.tar, which an earlier run left" in said
    assert (tmp_path / "pruned_0.5.pth.tar").exists()


def test_an_accuracy_of_held_out_images_says_so(tiny, tmp_path, capsys):
    call(cifar, *tiny, "--val_split", 9)
    final = tmp_path / "run" / "final.pth.tar"
    prune = ["--data", tiny[3], "--percent", "0.5", "--resume", final]
    call(cifar_prune_iterative, *prune, "--val_split", 9, "--save_dir", tmp_path / "val")
    call(cifar_prune_iterative, *prune, "--save_dir", tmp_path / "test")
    for path, images in ((final, "val"), *((tmp_path / s / "pruned_0.5.pth.tar", s) for s in ("val", "test"))):
        capsys.readouterr()
        report = call(check_params, "--data", tiny[3], "--checkpoint", path)
        said = capsys.readouterr().out.splitlines()[-1]
        assert report["stored_images"] == images and ("of held-out images)" in said) == (images == "val")


def test_a_layer_may_be_named_as_an_argument_of_numpy(tmp_path):
    with open(tmp_path / "e.npz", "wb") as file:
        write_npz(file, {"file": np.arange(3.0), "a/conv1": np.ones(2)})
    with np.load(tmp_path / "e.npz") as arrays:
        assert list(arrays) == ["file", "a/conv1"] and arrays["file"].tolist() == [0, 1, 2]


def test_evaluate_takes_the_images_that_the_file_is_of(tmp_path, fails_in):
    call(mnist.mnist, "-d", "digits", "--epochs", 1, "--schedule", "--save_dir", tmp_path / "run")
    final = ["-e", "--resume", tmp_path / "run" / "final.pth.tar"]
    status, line = fails_in(mnist.mnist, *final)
    assert (
        status == 2 and "-d mnist -a lenet_300_100 is not what" in line and line.endswith("-d digits -a lenet_300_100")
    )
    assert call(mnist.mnist, "-d", "digits", *final)["top1"] > 20
    status, line = fails_in(mnist.mnist, "-d", "digits", *final, "--no_test", "--val_split", 100)
    assert status == 2 and "--evaluate reads the test images" in line


@pytest.mark.parametrize(
    ("ratio", "lost"),
    [(0.95, {0.5: 0.0, 0.95: 1.0}), (0.5, {0.5: 0.0, 0.95: 1.01}), (0.5, {0.5: 30.0, 0.95: 40.0, 0.99: 50.0})],
)
def test_the_sentence_is_computed_from_the_numbers(ratio, lost):
    """The highest common ratio that costs the last run a point at most; the lowest where each costs more."""
    last = {0.0: 90.0} | {r: 90.0 - points for r, points in lost.items()}
    first = {0.0: 91.0, 0.5: 80.0, 0.95: 20.0, 0.98: 10.0}
    words = f"none has {first[ratio]:.2f}% of 91.00% top-1 left, HALO has {last[ratio]:.2f}% of 90.00% top-1 left."
    sentence = compare_pruning.finding({"none": first, "HALO": last})
    assert sentence == f"With {100 * ratio:g}% of the weights removed at once and no training after it, {words}"


@pytest.mark.parametrize(
    ("key", "value"), [("dataset", "mnist"), ("images", "val"), ("arch", "vgg16_bn"), ("depth", 8)]
)
def test_runs_of_different_networks_or_images_are_compared_only_when_asked(tmp_path, capsys, fails_in, key, value):
    report = {"dataset": "digits", "images": "test", "arch": "resnet", "depth": 20, "before": {"top1": 90.0}}
    report["results"] = [{"asked": 0.9, "after": {"top1": 80.0}}]
    for name, content in (("a", report), ("b", report | {key: value})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    status, line = fails_in(compare_pruning, *files, "--labels", "one", "two")
    assert status == 2 and f"one has {key} {report[key]}, two has {value}" in line and "--mixed" in line
    call(compare_pruning, *files, "--labels", "one", "two", "--mixed", "--save", tmp_path / "c.png")
    assert capsys.readouterr().out.splitlines()[3] == "| two | 90.00 | 80.00 |"


def nan(path):
    state = load_checkpoint(path)
    state["state_dict"]["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_checkpoint(path, state)


BROKEN = {
    "missing": (os.remove, "no checkpoint at"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "truncated"),
    "hostile": (lambda path: torch.save({"state_dict": {}, "extra": os.system}, path), "could run code"),
    "no state_dict": (lambda path: torch.save({"model": {}}, path), "state_dict"),
    "not tensors": (lambda path: torch.save({"state_dict": {"a": 1}}, path), "state_dict"),
    "NaN": (nan, "layer1.0.conv1.weight"),
    "other arch": (
        lambda path: save_checkpoint(path, {"state_dict": build_model("resnet", 3, 14).state_dict()}),
        "layer1.1.conv1.weight (16, 16, 3, 3) instead of absent",
    ),
    "other classes": (
        lambda path: save_checkpoint(path, {"state_dict": build_model("resnet", 10, 8).state_dict()}),
        "fc.weight (10, 64) instead of (3, 64); fc.bias (10,) instead of (3,): it fits -a resnet --depth 8 with 10",
    ),
}
STAGES = {
    cifar_prune_iterative: lambda path: ["--percent", "0.5", "--resume", path],
    check_params: lambda path: ["--checkpoint", path],
    compute_energy: lambda path: ["--checkpoint", path, "--save", path.parent / "energy"],
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_bad_checkpoints_are_one_line(network, tmp_path, fails_in, stage, broken):
    options, model = network
    path = tmp_path / "model.pth.tar"
    shutil.copy(model, path)
    spoil, words = BROKEN[broken]
    spoil(path)
    status, line = fails_in(stage, *options, *STAGES[stage](path))
    assert status == 1 and words in line and str(path) in line
    assert not (tmp_path / "energy.npz").exists() and not (tmp_path / "pruned" / "prune.json").exists()


@pytest.mark.parametrize(
    "stage, extra, status, words",
    [
        (cifar_prune_iterative, ["--percent", "1.5"], 2, "1.5"),
        (cifar_prune_iterative, ["--percent", "-0.1"], 2, "-0.1"),
        (cifar_prune_iterative, ["--percent", "95%"], 2, "95%"),
        (cifar_prune_iterative, ["--percent", "0.5", "0.5"], 2, "twice"),
        (cifar_prune_iterative, ["--percent", "1", "0.99999999"], 2, "twice"),  # both would be pruned_1.pth.tar
        (cifar_prune_iterative, ["--scheme", "smart"], 2, "smart"),
        (cifar_prune_iterative, ["--depth", "9"], 2, "9"),
        (compute_energy, ["--save", "nowhere/energy"], 1, "nowhere"),
        (compute_energy, ["--layers", "conv7"], 2, "conv7"),
        (compute_energy, ["--labels", "a", "b"], 2, "--labels"),
        (check_params, ["--json", "nowhere/x.json"], 1, "nowhere"),
        (check_params, ["-a", "lenet_5", "--depth", "5"], 2, "--depth 5"),
        (check_params, ["-a", "lenet_5"], 2, "-a lenet_5 contradicts"),
        (check_params, ["-d", "mnist"], 2, "-d mnist contradicts"),
    ],
)
def test_bad_options_of_the_stages(network, tmp_path, fails_in, monkeypatch, stage, extra, status, words):
    options, model = network
    monkeypatch.chdir(tmp_path)
    if "-a" in extra:
        options = options[: options.index("-a")]
    path = tmp_path / "model.pth.tar"
    shutil.copy(model, path)
    code, line = fails_in(stage, *options, *STAGES[stage](path), *extra)
    assert code == status and words in line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--percent", "0.5", "--halo", "--resume", "x"], "--halo does nothing with --percent"),
        (["--percent", "0.5", "--epochs", "3", "--resume", "x"], "--epochs does nothing"),
        (["--scheme", "random"], "--scheme does nothing without --percent"),
        (["--percent", "0.5"], "--resume"),
        (["-a", "resnet"], "resnet"),
        (["-d", "cifar10"], "cifar10"),
    ],
)
def test_mnist_refuses_options_that_do_nothing(fails_in, options, words):
    status, line = fails_in(mnist.mnist, *options)
    assert status == 2 and words in line


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_outputs_are_not_replaced_by_accident(network, tmp_path, fails_in, stage):
    options, model = network
    path = tmp_path / "model.pth.tar"
    shutil.copy(model, path)
    options = [*options, *STAGES[stage](path)] + (["--json", tmp_path / "r.json"] if stage is check_params else [])
    call(stage, *options)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    status, line = fails_in(stage, *options)
    assert status == 1 and "--overwrite" in line
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    call(stage, *options, "--overwrite")
