"""The networks in pretrained_models/ are what models.json and the README there say."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import check_params
from utils.files import load_model

FOLDER = ROOT / "pretrained_models"
MODELS = json.loads((FOLDER / "models.json").read_text())
DATA = Path(os.environ.get("HALO_DATA", ROOT / "data"))
each_model = pytest.mark.parametrize("model", MODELS, ids=[model["file"] for model in MODELS])


def check(model, *options):
    depth = ["--depth", str(model["depth"])] if model["depth"] else []
    network = ["-d", model["dataset"], "-a", model["arch"], *depth]
    arguments = [*network, "--checkpoint", str(FOLDER / model["file"]), *options]
    return check_params.main(check_params.get_parser().parse_args(arguments))


def test_every_file_is_listed():
    assert {path.name for path in FOLDER.glob("*.halo")} == {model["file"] for model in MODELS}


@each_model
def test_the_file_is_the_one_that_was_measured(model):
    assert hashlib.sha256((FOLDER / model["file"]).read_bytes()).hexdigest() == model["sha256"]


@each_model
def test_zeros(model):
    report = check(model, "--no_data")
    assert report["prunable"] - report["prunable_nonzero"] == model["zeros"]
    assert report["prunable"] == model["prunable"] and report["stored_top1"] == pytest.approx(model["top1"], abs=0.005)


@each_model
def test_it_is_ready_in_one_call_and_names_its_outputs(model):
    network = load_model(FOLDER / model["file"])
    images = torch.zeros(1, *network.preprocess.shape)
    assert network(images).shape == (1, len(network.class_names))


@each_model
def test_accuracy(model):
    places = {"digits": [], "mnist": ["MNIST/raw"], "cifar10": ["cifar10", "cifar-10-batches-py"]}
    places = (places | {"cifar100": ["cifar100", "cifar-100-python"]})[model["dataset"]]
    if model["dataset"] != "digits" and not any((DATA / place).exists() for place in places):
        pytest.skip(f"no {model['dataset']} under {DATA}: set HALO_DATA to the folder that holds it")
    report = check(model, "--data", str(DATA))
    # another processor may sum in another order, which moves an image or two
    images = 360 if model["dataset"] == "digits" else 10_000
    assert report["test"]["top1"] == pytest.approx(model["top1"], abs=100 * 2.5 / images)


@each_model
def test_the_readme_says_the_same(model):
    percent = f"{100 * model['zeros'] / model['prunable']:.1f}%"
    row = f"| `{model['file']}` | {model['zeros']} of {model['prunable']} ({percent}) | {model['top1']:.2f} |"
    assert row in (FOLDER / "README.md").read_text()
