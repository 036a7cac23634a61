"""What files say of themselves, the commands that read it, and networks from files in one call."""

import argparse
import re
import shutil

import pytest
import torch
from conftest import ROOT, train
from PIL import Image

import check_params
import cifar
import cifar_prune_iterative
import compute_energy
import deploy
import mnist.mnist
from models import build_model
from utils.files import load_model
from utils.files.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.files.preprocessing import CIFAR, OLDER_FOLDER, PLAIN
from utils.files.record import read_record, take_from_file
from utils.options import OptionError
from utils.training.augment import Loader
from utils.training.data import load_dataset
from utils.training.fingerprint import check_classes


def call(script, *options):
    return script.main(script.get_parser().parse_args([str(option) for option in options]))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The folder of a run on images of 3 classes, pruned, with a compact file; and the folder of the images."""
    folder = tmp_path_factory.mktemp("run")
    options = ["-a", "resnet", "--depth", "8", "--epochs", "2", "--schedule", "--train_batch", "16", "--image_size", 24]
    train("-d", "folder", "--data", images, *options, "--padding", 2, "--save_dir", folder)
    call(cifar_prune_iterative, "--data", images, "--percent", 0.5, "--resume", folder / "final.pth.tar")
    pruned = folder / "pruned" / "pruned_0.5.pth.tar"
    call(check_params, "--data", images, "--checkpoint", pruned, "--compact", folder / "small.halo")
    return folder


FILES = ["final.pth.tar", "checkpoint.pth.tar", "init.pth.tar", "pruned/pruned_0.5.pth.tar", "small.halo"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_holds(run, name):
    state = load_checkpoint(run / name)
    record = read_record(state, name)
    assert (record.dataset, record.arch, record.depth, record.num_classes) == ("folder", "resnet", 8, 3)
    assert record.class_names == ("class0", "class1", "class2") and record.preprocessing.shape == (3, 24, 24)
    assert record.padding == 2 and record.flip


@pytest.mark.parametrize("name", ["final.pth.tar", "pruned/pruned_0.5.pth.tar", "small.halo"])
def test_the_accuracy_can_be_repeated_from_the_file_alone(run, images, name):
    """One call, PIL images, no other part of this project."""
    model = load_model(run / name)
    assert not model.training and model.class_names == ("class0", "class1", "class2")
    hits = []
    for label, text in enumerate(model.class_names):
        for path in sorted((images / "test" / text).iterdir()):
            with Image.open(path) as image, torch.inference_mode():
                hits.append(model(model.preprocess(image)).argmax().item() == label)
    assert 100 * sum(hits) / len(hits) == pytest.approx(load_checkpoint(run / name)["acc"])


def test_preprocessing_is_that_of_the_training(run, images):
    model = load_model(run / "final.pth.tar")
    data = load_dataset("folder", images, shape=(3, 24, 24))
    assert model.preprocess == data.preprocessing
    expected, *_ = next(iter(Loader(data.test, data, batch_size=18)))
    assert torch.equal(model.preprocess(data.test.images), expected)
    with pytest.raises(ValueError, match=r"uint8 pixels \(N, 3, 24, 24\), got torch.float32"):
        model.preprocess(torch.zeros(1, 3, 24, 24))


def test_config_holds_it_too(run):
    import json

    config = json.loads((run / "config.json").read_text())
    assert config["class_names"] == ["class0", "class1", "class2"] and config["preprocessing"]["shape"] == [3, 24, 24]


def test_stages_need_no_options_that_the_file_has(run, images, tmp_path):
    final = run / "final.pth.tar"
    report = call(check_params, "--data", images, "--checkpoint", final)
    assert report["test"]["top1"] == pytest.approx(report["stored_top1"]) and report["arch"] == "resnet"
    energy = call(compute_energy, "--data", images, "--checkpoint", final, run / "small.halo", "--save", tmp_path / "e")
    assert energy["dataset"] == "folder" and len(energy["checkpoints"]) == 2


@pytest.mark.parametrize(
    "part, key, value, words",
    [
        ("config", "dataset", "cifar10", "is of -d cifar10 -a resnet --depth 8, "),
        ("config", "depth", 14, "is of -d folder -a resnet --depth 14, "),
        ("preprocessing", "mean", [0.1, 0.2, 0.3], "was trained on images that were prepared in another way"),
    ],
)
def test_networks_that_cannot_be_overlaid_are_refused(run, images, tmp_path, fails_in, part, key, value, words):
    state = load_checkpoint(run / "final.pth.tar")
    state[part] = {**state[part], key: value}
    save_checkpoint(tmp_path / "other.pth.tar", state)
    files = ["--checkpoint", run / "final.pth.tar", tmp_path / "other.pth.tar"]
    status, error = fails_in(compute_energy, "--data", images, *files, "--save", tmp_path / "e")
    assert status == 2 and words in error and "measure one at a time" in error and not list(tmp_path.glob("e.*"))


@pytest.mark.parametrize(
    "options, words",
    [
        (["-d", "cifar10"], "-d cifar10 contradicts"),
        (["-a", "vgg16_bn"], "-a vgg16_bn contradicts"),
        (["--depth", "14"], "--depth 14 contradicts"),
        (["-a", "resnet", "--depth", "20"], "which records -a resnet --depth 8"),
    ],
)
def test_options_that_contradict_the_file_are_refused(run, images, fails_in, options, words):
    status, line = fails_in(check_params, "--data", images, "--checkpoint", run / "final.pth.tar", *options)
    assert status == 2 and words in line and "leave it out" in line


@pytest.fixture
def foreign(tmp_path):
    """A file with the keys of the authors' and nothing else: ResNet-8 with 10 classes."""
    state = {"epoch": 1, "state_dict": build_model("resnet", 10, 8).state_dict(), "acc": 1.0, "best_acc": 1.0}
    save_checkpoint(tmp_path / "foreign.pth.tar", state)
    return tmp_path / "foreign.pth.tar"


def test_a_file_that_records_nothing_needs_the_options_and_gets_a_proposal(foreign, fails_in):
    status, line = fails_in(check_params, "--checkpoint", foreign, "--no_data")
    assert status == 2 and "give -d and -a" in line and "-a resnet --depth 8 with 10 classes" in line
    status, line = fails_in(check_params, "--checkpoint", foreign, "--no_data", "-a", "resnet", "--depth", "8")
    assert status == 2 and "give -d;" in line
    call(check_params, "--checkpoint", foreign, "--no_data", "-d", "cifar10", "-a", "resnet", "--depth", "8")


def test_a_network_of_the_authors_is_found_by_its_weights(foreign):
    model = load_model(foreign)
    assert model.preprocess == CIFAR and model.class_names is None
    save_checkpoint(foreign, {"state_dict": build_model("lenet_300_100", 10).state_dict()})
    assert load_model(foreign).preprocess == PLAIN
    save_checkpoint(foreign, {"state_dict": {"w": torch.zeros(3)}})
    with pytest.raises(CheckpointError, match="fit none here"):
        load_model(foreign)


def test_a_file_of_mnist_needs_no_data_set(tmp_path):
    args = argparse.Namespace(dataset=None, arch="lenet_5", depth=None)
    take_from_file(args, {"state_dict": {}}, "x", dataset="mnist")
    assert (args.dataset, args.depth) == ("mnist", None)
    args = argparse.Namespace(dataset=None, arch="LeNet31", depth=None)
    config = {"dataset": "digits", "arch": "lenet_300_100", "depth": None, "num_classes": 10}
    take_from_file(args, {"state_dict": {}, "config": config}, "x")  # two names of one network
    assert args.dataset == "digits"


OLD = ("preprocessing", "class_names")
OLD_OPTIONS = ("image_size", "padding", "no_flip")


def as_older_version_wrote(path):
    """Take out of a checkpoint what versions before 0.1.0 did not write."""
    state = load_checkpoint(path)
    state = {key: value for key, value in state.items() if key not in OLD}
    state["config"] = {key: value for key, value in state["config"].items() if key not in OLD_OPTIONS}
    save_checkpoint(path, state)


def test_a_checkpoint_of_an_older_version_resumes_bit_for_bit(tmp_path):
    options = ["-d", "digits", "-a", "lenet_5", "--halo", "--xi", "1e-3", "--psi", "1e-3", "--schedule", "--lr", "0.05"]
    call(mnist.mnist, *options, "--epochs", 2, "--save_dir", tmp_path / "straight")
    call(mnist.mnist, *options, "--epochs", 1, "--save_dir", tmp_path / "halves")
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    as_older_version_wrote(checkpoint)
    call(mnist.mnist, *options, "--epochs", 2, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    one, other = (load_checkpoint(tmp_path / name / "final.pth.tar") for name in ("straight", "halves"))
    for key in ("state_dict", "lambdas"):
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
    assert other["class_names"] == [str(digit) for digit in range(10)]


def test_an_older_folder_run_keeps_its_squashed_images_and_its_mean(tiny, images, tmp_path, fails):
    """Versions before 0.1.0 normalised and resized every folder as CIFAR's."""
    train(*tiny, "--epochs", 1)
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    as_older_version_wrote(checkpoint)
    assert read_record(load_checkpoint(checkpoint), "x").preprocessing == OLDER_FOLDER
    train(*tiny, "--resume", checkpoint)
    assert load_checkpoint(checkpoint)["preprocessing"] == OLDER_FOLDER.record()
    assert load_model(checkpoint).preprocess == OLDER_FOLDER
    wide = Image.new("RGB", (64, 32))
    wide.paste((255, 255, 255), (0, 0, 16, 32))  # a white quarter at the left, which the centre crop leaves out
    squashed = OLDER_FOLDER.pixels(wide)
    assert (squashed[:, :, :7] == 255).all() and (squashed[:, :, 9:] == 0).all()
    assert (CIFAR.pixels(wide) == 0).all()
    status, line = fails(*tiny, "--resume", checkpoint, "--image_size", "48", "--epochs", "3")
    assert status == 2 and "--image_size 48 contradicts" in line


def test_the_size_of_the_images_is_that_of_the_checkpoint(run, images, tmp_path):
    options = ["-d", "folder", "--data", images, "-a", "resnet", "--depth", 8, "--padding", 2]
    assert train(*options, "--evaluate", "--resume", run / "final.pth.tar")["epoch"] == 2
    more = ["--epochs", 3, "--schedule", "--train_batch", 16, "--save_dir", tmp_path / "run"]
    train(*options, *more, "--resume", run / "checkpoint.pth.tar")
    state = load_checkpoint(tmp_path / "run" / "final.pth.tar")
    assert state["config"]["image_size"] == 24 and state["preprocessing"]["shape"] == [3, 24, 24]


def test_classes_of_a_known_data_set_may_have_any_names_but_a_note_says_so(run, images, capsys):
    """Its folders may be called 0 to 9, and torchvision's archive has names. Their order is that of the names."""
    state = load_checkpoint(run / "final.pth.tar")
    data = load_dataset("folder", images)
    state["class_names"] = ["a", "b", "c"]
    with pytest.raises(CheckpointError, match="a class was called 'a' and is 'class0'"):
        check_classes(data, state, "x")
    state["config"]["dataset"] = "cifar10"
    capsys.readouterr()
    check_classes(data, state, "x")
    assert "note: x: a class was called 'a' and is 'class0'; its outputs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["final.pth.tar", "pruned/pruned_0.5.pth.tar", "small.halo"])
@pytest.mark.parametrize("renamed", [("class0", "zebra"), ("class2", None)])
def test_images_of_other_classes_are_refused_by_every_stage(run, images, tmp_path, fails_in, name, renamed):
    """As many or fewer: their labels would mean something else."""
    shutil.copytree(images, tmp_path / "other")
    for split in ("train", "test"):
        folder = tmp_path / "other" / split / renamed[0]
        folder.rename(folder.with_name(renamed[1])) if renamed[1] else shutil.rmtree(folder)
    data, pruned, energy = ["--data", tmp_path / "other"], tmp_path / "pruned", tmp_path / "energy"
    stages = {
        check_params: ["--checkpoint", run / name],
        cifar_prune_iterative: ["--percent", 0.9, "--resume", run / name, "--save_dir", pruned],
        compute_energy: ["--checkpoint", run / name, run / "init.pth.tar", "--save", energy],
        deploy: ["--checkpoint", run / name, "--save", tmp_path / "small"],
    }
    options = ["-d", "folder", "-a", "resnet", "--depth", 8]
    stages |= {cifar: [*options, "--evaluate", "--resume", run / name]} if renamed[1] else {}
    for script, options in stages.items():
        status, line = fails_in(script, *data, *options)
        what = "'class0' and is 'class1'" if renamed[1] else "'class2' and is 'missing'"
        assert status == 1 and f"a class was called {what}" in line, line


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"dataset": 3, "arch": "resnet", "num_classes": 3}},
        {"config": {"dataset": "folder", "arch": "resnet9", "num_classes": 3}},
        {"config": {"dataset": "folder", "arch": "resnet", "num_classes": "3"}},
        {"class_names": ["a"]},
        {"preprocessing": {"shape": [3, 24, 24], "mean": [0, 0, 0], "std": [0, 1, 1], "resize": "crop"}},
        {"preprocessing": {"shape": [3, 24, 24], "mean": [0], "std": [1], "resize": "crop"}},
        {"preprocessing": {"shape": [3, 24, 24]}},
        {"preprocessing": {"shape": [3, float("inf"), 24], "mean": [0, 0, 0], "std": [1, 1, 1], "resize": "crop"}},
        {"preprocessing": 7},
    ],
)
def test_a_record_of_what_cannot_be_is_refused(run, tmp_path, change):
    state = load_checkpoint(run / "final.pth.tar")
    save_checkpoint(tmp_path / "x.pth.tar", state | change)
    with pytest.raises(CheckpointError, match="records what cannot be"):
        load_model(tmp_path / "x.pth.tar")


def test_load_model_refuses_another_network(run):
    with pytest.raises(OptionError, match="of -a resnet --depth 8, not of vgg16_bn"):
        load_model(run / "final.pth.tar", arch="vgg16_bn")


def test_the_code_of_the_page_runs(run, images, tmp_path, monkeypatch, capsys):
    """docs/load_a_network.md, with its paths replaced by those of a run."""
    text = (ROOT / "docs" / "load_a_network.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 2
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "small.halo").write_bytes((run / "small.halo").read_bytes())
    (tmp_path / "cat.png").write_bytes((images / "test" / "class1" / "000.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in blocks:
        exec(compile(block, "load_a_network.md", "exec"), space)
    assert capsys.readouterr().out.split()[0] in ("class0", "class1", "class2")
    assert torch.equal(space["pixels"], space["model"].preprocess(Image.open("cat.png")))


def test_mnist_prunes_by_what_the_file_says(tmp_path):
    call(mnist.mnist, "-d", "digits", "-a", "lenet_5", "--epochs", 1, "--schedule", "--save_dir", tmp_path / "run")
    report = call(mnist.mnist, "--percent", 0.5, "--resume", tmp_path / "run" / "final.pth.tar")
    assert (report["dataset"], report["arch"]) == ("digits", "lenet_5")
