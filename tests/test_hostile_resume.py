"""Checkpoints whose parts do not fit the run that goes on from them, and images that changed meanwhile."""

import shutil

import pytest
import torch
from conftest import TINY, train, write_images
from PIL import Image
from torch import nn

from utils.files.checkpoint import load_checkpoint, save_checkpoint
from utils.halo import FusedHALO, penalties

HALO = ["--halo", "--xi", "1e-4", "--psi", "1e-4"]
FIRST = "conv1.weight"


@pytest.fixture(scope="module")
def half_done(images, tmp_path_factory):
    """The options of a run of two epochs, and its checkpoint after one."""
    folder = tmp_path_factory.mktemp("half_done") / "run"
    options = ["-d", "folder", "--data", str(images), *TINY, *HALO, "--save_dir", str(folder)]
    train(*options, "--epochs", "1")
    return options, folder / "checkpoint.pth.tar"


def changed(value, *keys):
    """Return what sets a value deep in a checkpoint."""

    def change(state):
        inside = state
        for key in keys[:-1]:
            inside = inside[key]
        inside[keys[-1]] = value

    return change


def lost(*keys):
    """Return what removes a value deep in a checkpoint."""

    def change(state):
        inside = state
        for key in keys[:-1]:
            inside = inside[key]
        del inside[keys[-1]]

    return change


MOMENTUM = ("state", 0, "momentum_buffer")
PARTS = {
    "lam of one element": (changed(torch.ones(1), "lambdas", FIRST), "'lambdas'"),
    "lam that is broadcast": (changed(torch.ones(16, 3, 3, 1), "lambdas", FIRST), "'lambdas'"),
    "lam of whole numbers": (changed(torch.ones(16, 3, 3, 3).long(), "lambdas", FIRST), "'lambdas'"),
    "lam that is NaN": (changed(torch.full((16, 3, 3, 3), torch.nan), "lambdas", FIRST), "'lambdas'"),
    "lam of a layer lost": (lost("lambdas", FIRST), "'lambdas'"),
    "lam as a list": (changed([1], "lambdas"), "'lambdas'"),
    "no lam": (lost("lambdas"), "'lambdas'"),
    "weights of whole numbers": (changed(torch.ones(16, 3, 3, 3).long(), "state_dict", FIRST), "torch.int64"),
    "momentum of one element": (changed(torch.ones(1), "optimizer", *MOMENTUM), "'optimizer'"),
    "momentum that is infinite": (changed(torch.full((16, 3, 3, 3), torch.inf), "optimizer", *MOMENTUM), "'optimizer'"),
    "momentum of one number": (changed(torch.tensor(7.0), "reg_optimizer", *MOMENTUM), "'reg_optimizer'"),
    "momentum as a number": (changed(0.5, "optimizer", *MOMENTUM), "'optimizer'"),
    "another buffer": (changed(torch.ones(1), "optimizer", "state", 0, "step"), "'optimizer'"),
    "momentum that is gone": (changed(None, "optimizer", *MOMENTUM), "'optimizer'"),
    "momentum in words": (changed("fast", "optimizer", *MOMENTUM), "'optimizer'"),
    "momentum of no parameter": (changed({}, "optimizer", "state", 999), "'optimizer'"),
    "a factor of momentum": (changed(0.8, "optimizer", "param_groups", 0, "momentum"), "'optimizer'"),
    "a rate in words": (changed("0.1", "optimizer", "param_groups", 0, "lr"), "'optimizer'"),
    "a rate that is NaN": (changed(float("nan"), "reg_optimizer", "param_groups", 0, "lr"), "'reg_optimizer'"),
    "no groups": (changed([], "optimizer", "param_groups"), "'optimizer'"),
    "an optimizer as a list": (changed([1], "optimizer"), "'optimizer'"),
    "no optimizer of lam": (changed(None, "reg_optimizer"), "'reg_optimizer'"),
    "the optimizer of lam lost": (lost("reg_optimizer"), "'reg_optimizer'"),
    "one schedule of two": (lost("schedulers", 1), "'schedulers'"),
    "a schedule elsewhere": (changed(0, "schedulers", 0, "last_epoch"), "'schedulers'"),
    "a schedule that is replaced": (changed(7, "schedulers", 0, "step"), "'schedulers'"),
    "schedules in words": (changed("two", "schedulers"), "'schedulers'"),
    "a scaler that is none": (changed(1, "scaler"), "'scaler'"),
    "an epoch too many": (changed(2, "epoch"), "'history'"),
    "no epoch": (changed(None, "epoch"), "'epoch'"),
    "an empty history": (changed([], "history"), "'history'"),
    "a history of numbers": (changed([1], "history"), "'history'"),
    "a row in words": (changed("good", "history", 0, "test_top1"), "'history'"),
    "a row that lacks something": (lost("history", 0, "seconds"), "'history'"),
    "no state of the order": (lost("rng", "data"), "'rng'"),
    "a short state of torch": (changed(torch.zeros(3, dtype=torch.uint8), "rng", "torch"), "'rng'"),
    "a wrong state of torch": (changed(torch.zeros(5056, dtype=torch.uint8), "rng", "torch"), "cannot be continued"),
    "generators as a list": (changed([1], "rng"), "'rng'"),
    "the states of no process": (changed([], "rng", "torch"), "'rng'"),
    "a short state of a process": (changed([torch.zeros(3, dtype=torch.uint8)], "rng", "torch"), "'rng'"),
    "a config in words": (changed("halo", "config"), "'config'"),
    "a config with a number as key": (changed(1, "config", 7), "'config'"),
    "a tensor as an option": (changed(torch.ones(2), "config", "lr"), "cannot be continued"),
    "a tensor as a beginning": (changed(torch.ones(1), "config", "start"), "no start"),
    "a tensor as preprocessing": (changed(torch.ones(1), "preprocessing"), "records what cannot be"),
    "preprocessing in words": (changed("none", "preprocessing"), "records what cannot be"),
    "names of other classes": (changed(["x", "y"], "class_names"), "'class_names'"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_does_not_fit_is_one_line(half_done, tmp_path, fails, name):
    options, checkpoint = half_done
    change, words = PARTS[name]
    state = load_checkpoint(checkpoint)
    change(state)
    save_checkpoint(tmp_path / "c.pth.tar", state)
    status, line = fails(*options, "--save_dir", tmp_path / "run", "--resume", tmp_path / "c.pth.tar")
    assert status == 1 and words in line and str(tmp_path / "c.pth.tar") in line
    assert not (tmp_path / "run" / "config.json").exists()


def fewer(root):
    (root / "train" / "class0" / "000.png").unlink()


def renamed(root):
    for split in ("train", "test"):
        (root / split / "class0").rename(root / split / "class3")


def moved(root):
    """As many images in all, of which one has another label."""
    (root / "train" / "class0" / "000.png").rename(root / "train" / "class1" / "999.png")


def repainted(root):
    path = root / "test" / "class1" / "002.png"
    with Image.open(path) as image:
        image.rotate(90).save(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fewer, "36 in train, now 35"),
        (renamed, "'class0' and is 'class1'"),
        (moved, "other labels in train"),
        (repainted, "other pixels in test"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(half_done, tmp_path, fails, change, words):
    options, checkpoint = half_done
    change(write_images(tmp_path / "images"))
    more = ["--data", tmp_path / "images", "--save_dir", tmp_path / "run", "--resume", checkpoint]
    status, line = fails(*options, *more)
    assert status == 1 and words in line and "--data" in line


def test_a_checkpoint_of_an_older_version_goes_on_without_the_look(half_done, tmp_path):
    options, checkpoint = half_done
    state = load_checkpoint(checkpoint)
    for key in ("images", "class_names"):
        del state[key]
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "checkpoint.pth.tar", state)
    write_images(tmp_path / "images")
    repainted(tmp_path / "images")
    resume = ["--save_dir", tmp_path / "run", "--resume", tmp_path / "run" / "checkpoint.pth.tar"]
    train(*options, "--data", tmp_path / "images", *resume)
    assert load_checkpoint(tmp_path / "run" / "final.pth.tar")["epoch"] == 2


def test_the_same_images_elsewhere_go_on(half_done, images, tmp_path):
    options, checkpoint = half_done
    shutil.copytree(images, tmp_path / "copy")
    train(*options, "--data", tmp_path / "copy", "--save_dir", tmp_path / "run", "--resume", checkpoint)
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_momentum_of_another_shape_never_reaches_the_kernel():
    """Its C++ writes as many numbers as the parameter has."""
    w = nn.Parameter(torch.ones(64))
    weights = torch.optim.SGD([w], 0.1, momentum=0.9)
    step = FusedHALO(penalties.HALO({"w": w}, xi=1e-3, psi=1e-3), lr=0.1, momentum=0.9, weights=weights)
    w.grad = torch.ones(64)
    step.step()
    weights.step()
    weights.state[w]["momentum_buffer"] = torch.ones(1)
    step.step()
    with pytest.raises(ValueError, match=r"momentum of shape \(1,\), not \(64,\)"):
        weights.step()


def test_the_one_state_of_torch_that_older_versions_kept_is_taken(half_done, tmp_path):
    options, checkpoint = half_done
    state = load_checkpoint(checkpoint)
    (kept,) = state["rng"]["torch"]
    changed(kept, "rng", "torch")(state)
    save_checkpoint(tmp_path / "old.pth.tar", state)
    for name, path in (("new", checkpoint), ("old", tmp_path / "old.pth.tar")):
        train(*options, "--save_dir", tmp_path / name, "--resume", path)
    new, old = (load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("new", "old"))
    assert all(torch.equal(new["state_dict"][name], value) for name, value in old["state_dict"].items())
    assert torch.equal(*new["rng"]["torch"], *old["rng"]["torch"])
