"""Your own images and your own network, through all stages."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, start, train, write_images
from PIL import Image
from torch import nn

import check_params
import cifar_prune_iterative
import compute_energy
from models import build_model, check_image_size, check_own_network, find_arch, takes_linear
from utils import SparseNetwork, prunable_weights
from utils.files import load_model
from utils.files.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.files.preprocessing import CIFAR, Preprocessing
from utils.options import OptionError
from utils.training import folder
from utils.training.data import load_dataset

MOBILE = "torchvision.models:mobilenet_v3_small"


def call(script, *options):
    return script.main(script.get_parser().parse_args([str(option) for option in options]))


@pytest.mark.filterwarnings("ignore:halo takes")
def test_a_network_of_your_own_through_all_stages(images, tmp_path):
    options = ["-d", "folder", "--data", images, "-a", MOBILE, "--image_size", 24, "--schedule", "--train_batch", 18]
    options += ["--halo", "--xi", "1e-3", "--psi", "1e-3", "--lr", "0.01"]
    train(*options, "--epochs", 2, "--save_dir", tmp_path / "straight")
    train(*options, "--epochs", 1, "--save_dir", tmp_path / "run")
    resume = ["--resume", tmp_path / "run" / "checkpoint.pth.tar"]
    train(*options, "--epochs", 2, "--save_dir", tmp_path / "run", *resume)
    final = tmp_path / "run" / "final.pth.tar"
    one, other = load_checkpoint(tmp_path / "straight" / "final.pth.tar"), load_checkpoint(final)
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])

    report = call(cifar_prune_iterative, "--data", images, "--percent", 0.9, "--resume", final)
    assert report["results"][0]["sparsity"] == pytest.approx(0.9, abs=1e-5) and report["arch"] == MOBILE
    pruned, small = tmp_path / "run" / "pruned" / "pruned_0.9.pth.tar", tmp_path / "small.halo"
    report = call(check_params, "--data", images, "--checkpoint", pruned, "--compact", small)
    assert report["test"]["top1"] == pytest.approx(report["stored_top1"])
    where = ["--save", tmp_path / "e", "--layers", "features.0.0"]
    energy = call(compute_energy, "--data", images, "--checkpoint", small, *where)
    assert next(iter(energy["checkpoints"].values()))["features.0.0"]["channels"] == 16
    model = load_model(small)
    assert type(model).__name__ == "MobileNetV3" and not model.training
    assert model(model.preprocess(Image.new("RGB", (50, 30)))).shape == (1, 3)


NETWORKS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4 * 12 * 12, count))

    def forward(self, x):
        return self.layers(x)

class Keeps(Small):
    # makes a tensor when it first runs, and keeps it; normalises vectors too
    window = None

    def __init__(self, count):
        super().__init__(count)
        self.layers[2] = nn.LazyLinear(count)
        self.norm = nn.BatchNorm1d(count)

    def forward(self, x):
        if self.window is None:
            self.window = torch.ones(x.shape[-2:], device=x.device)
        return self.norm(self.layers(x * self.window))

def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(num_classes))

class Heads(nn.Module):
    # two Linear layers, and a convolution that could do without them
    def __init__(self, count):
        super().__init__()
        self.head, self.hidden, self.conv = nn.Linear(8, count), nn.Linear(4, 8), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.head(self.hidden(self.conv(x).mean((2, 3))).relu())

class Twice(Heads):
    # one Linear layer by two names
    def __init__(self, count):
        super().__init__(count)
        self.again = self.hidden

class Turns(Heads):
    # a constant that no file may hold
    def __init__(self, count):
        super().__init__(count)
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))

class Small16(Heads):
    def __init__(self, count):
        super().__init__(count)
        self.register_buffer("order", torch.arange(4).to(torch.uint16))

class Extra(Heads):
    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        pass

class Normed(Heads):
    # a convolution whose weight is computed
    def __init__(self, count):
        super().__init__(count)
        torch.nn.utils.parametrizations.weight_norm(self.conv)

class Names(Heads):
    class_names = "abc"

def numbers(num_classes):
    return [num_classes]

def wrong(num_classes):
    return nn.Flatten()

def fails(num_classes):
    raise RuntimeError("out of luck")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory that holds a module of networks; the Python path does not keep it."""
    import sys

    (tmp_path / "my_nets.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_nets", None)


def test_a_network_of_the_current_directory_runs_only_where_it_is_named(here, images):
    options = ["-d", "folder", "--data", images, "--image_size", "16", "--epochs", "1", "--schedule"]
    train(*options, "-a", "my_nets:Small", "--save_dir", "run")

    def check(*more):
        process = start("--checkpoint", "run/final.pth.tar", "--no_data", *more, script="check_params.py", cwd=here)
        output, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, output, errors

    status, _, errors = check()
    assert status == 2 and "not on the Python path" in errors and "-a my_nets:Small" in errors
    status, output, _ = check("-a", "my_nets:Small")
    assert status == 0 and "layers.0.weight" in output
    assert load_model("run/final.pth.tar", arch="my_nets:Small").class_names == ("class0", "class1", "class2")


def test_code_beside_a_file_does_not_run_where_the_script_lies_there_too(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nfrom torch.nn import Conv2d as net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as Python does for the folder of the script
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ValueError, match="is in the current directory"):
        find_arch("beside:net", here=False)
    assert not Path("ran").exists()
    find_arch("torchvision.models:resnet18", here=False)
    monkeypatch.setenv("PYTHONPATH", f"elsewhere{os.pathsep}{tmp_path}")
    find_arch("beside:net", here=False)
    assert Path("ran").exists()
    monkeypatch.delenv("PYTHONPATH")
    find_arch("beside:net", here=False)  # it was named before


@pytest.mark.parametrize("name", ["utils.interrupts:leave", "cifar:run_script", "models.widths:narrow_"])
def test_a_file_cannot_have_functions_of_this_project_called(name):
    with pytest.raises(ValueError, match="is of this project"):
        find_arch(name, here=False)
    find_arch("models.resnet:ResNet")  # who names it may


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_network_that_makes_tensors_when_it_first_runs(here, images):
    options = ["-d", "folder", "--data", images, "--image_size", "16", "--epochs", "1", "--schedule"]
    train(*options, "-a", "my_nets:Keeps", "--save_dir", "run")
    prune = ["--data", images, "-a", "my_nets:Keeps", "--resume", "run/final.pth.tar", "--percent", "0.5"]
    call(cifar_prune_iterative, *prune, "--recalibrate_bn", "36", "--test_batch", "36")
    plain, fresh = (load_checkpoint(f"run/pruned/pruned_0.5{s}.pth.tar")["state_dict"] for s in ("", "_recalibrated"))
    assert fresh["norm.num_batches_tracked"] == 1  # of one batch alone, not mixed with those of training
    assert not torch.equal(plain["norm.running_mean"], fresh["norm.running_mean"])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_loaded_network_of_lazy_layers_is_one_of_ordinary_ones(here, images):
    options = ["-d", "folder", "--data", images, "--image_size", "16", "--epochs", "1", "--schedule"]
    train(*options, "-a", "my_nets:lazy", "--save_dir", "run")
    model = load_model("run/final.pth.tar", arch="my_nets:lazy")
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Flatten, nn.Linear] and model[0].in_channels == 3
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(SparseNetwork(model)(pixels), model(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere:net", "no such network"),
        ("my_nets:nothing", "has no attribute 'nothing'"),
        ("os:_exit", "holds no networks"),
        (":net", "holds no networks"),
        ("my_nets:numbers", "returned list"),
        ("my_nets:fails", "out of luck"),
        ("my_nets:wrong", "must map two 3x16x16 images to logits (2, 3): it gives (2, 768)"),
        ("my_nets:Small", "cannot take 3x17x17 images"),
    ],
)
def test_a_network_that_cannot_be_used_is_one_line(here, images, fails, name, words):
    size = "17" if "17" in words else "16"
    status, line = fails("-d", "folder", "--data", images, "-a", name, "--image_size", size, "--save_dir", "run")
    assert status in (1, 2) and words in line
    assert ("of the sizes tried it takes 16" in line) == (size == "17")


def test_linear_layers_are_taken_where_there_is_no_convolution(here):
    (here / "my_nets.py").write_text("from torch import nn\ndef mlp(n):\n    return nn.Sequential(nn.Linear(12, n))\n")
    assert takes_linear("my_nets:mlp", build_model("my_nets:mlp", 2))
    assert not takes_linear(MOBILE, build_model(MOBILE, 2)) and takes_linear("lenet_5", build_model("lenet_5", 10))
    assert find_arch("my_nets:mlp").depth is None


@pytest.mark.parametrize("arch", ["vgg11_bn", "resnet", "lenet_300_100"])
def test_the_sizes_that_an_architecture_states_are_those_it_takes(arch):
    """Each limit is tried with the network itself, and the size beyond it."""
    model, spec = build_model(arch, 3, 8 if arch == "resnet" else None).eval(), find_arch(arch)
    low, high = spec.sizes
    for size in {low, high or 65} | {low - 1, (high or 65) + 1}:
        takes = low <= size <= (high or size)
        if size < 1:
            continue
        try:
            worked = model(torch.zeros(1, spec.shape[0], size, size)).shape == (1, 3)
        except RuntimeError:
            worked = False
        assert worked == takes, size
        if takes:
            check_image_size(arch, size)
        else:
            with pytest.raises(ValueError, match="--image_size"):
                check_image_size(arch, size)


@pytest.mark.parametrize(
    "options, words",
    [
        (["-a", "vgg11_bn", "--image_size", "64"], "vgg11_bn cannot take 64x64 images: give --image_size 32 to 63"),
        (["-d", "cifar10", "--image_size", "32"], "--image_size is for -d folder"),
        (["-a", "resnet", "--padding", "33"], "--padding 33 exceeds the image: give at most 32"),
        (["-d", "digits", "--no_flip"], "--no_flip does nothing with -d digits"),
        (["-a", "resnet", "--image_size", "0"], "0 is out of range"),
    ],
)
def test_options_that_cannot_be(images, tmp_path, fails, options, words):
    status, line = fails("-d", "folder", "--data", images, *options, "--save_dir", tmp_path / "run")
    assert status == 2 and words in line


def test_shorter_side_resized_and_centre_cropped():
    """Against torchvision's resize; sizes whose longer side needs no rounding."""
    from torchvision.transforms import v2

    random = np.random.default_rng(0)
    for width, height in ((60, 40), (40, 60), (16, 90), (24, 24)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        used = Preprocessing((3, 24, 24), (0.5,) * 3, (0.2,) * 3)
        resized = v2.functional.resize(image, 24, interpolation=v2.InterpolationMode.BILINEAR)
        longer = max(resized.size)
        cut = (longer - 24) // 2
        expected = np.asarray(resized)[cut : cut + 24] if height > width else np.asarray(resized)[:, cut : cut + 24]
        assert np.array_equal(used.pixels(image).permute(1, 2, 0).numpy(), expected)


def test_mean_and_deviation_are_those_of_the_training_images(tmp_path):
    write_images(tmp_path, train=9)
    data = load_dataset("folder", tmp_path, shape=(3, 20, 20), val_split=5)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
    assert data.mean != CIFAR.mean and data.flip and data.padding == 4


def test_an_image_without_spread_can_be_normalised(tmp_path):
    mean, std = folder.pixel_statistics([torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)])
    assert mean == (0.2, 0.2, 0.2) and std == (1 / 255,) * 3


def test_images_that_do_not_fit_into_the_memory_are_refused_before_they_are_read(images, monkeypatch, fails, tmp_path):
    monkeypatch.setattr(folder, "available_memory", lambda: 2**20)
    monkeypatch.setattr(folder, "read_image", lambda *_: pytest.fail("an image was read"))
    options = ["-d", "folder", "--data", images, "-a", "resnet", "--image_size", "2000", "--save_dir", tmp_path / "run"]
    status, line = fails(*options)
    assert status == 1 and "54 images of 3x2000x2000 need 0.60 GiB of memory; 0.00 GiB are available" in line
    assert "50%" in line and "--image_size" in line


@pytest.mark.parametrize("kind, name", [("uint16", "grey.png"), ("uint16", "grey.tif"), ("float32", "grey.tif")])
def test_grey_values_of_more_than_8_bits_are_refused(tmp_path, kind, name):
    """PIL would make white or black squares of them."""
    Image.fromarray(np.linspace(0, 60_000, 32 * 32).reshape(32, 32).astype(kind)).save(tmp_path / name)
    with pytest.raises(ValueError, match="more than 8 bits .*: save it with 8 bits a channel"):
        folder.read_image(tmp_path / name, Preprocessing((1, 32, 32), (0.5,), (0.5,)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_one_can_see_through_is_refused_and_what_one_cannot_is_read(tmp_path, mode):
    """PIL would leave alpha out: black drawings on a transparent ground would be black squares, all the same."""
    image = Image.new("RGBA", (32, 32), (10, 20, 30, 255))
    for clear in (False, True):
        if clear:
            image.putpixel((3, 4), (0, 0, 0, 0))
        saved = image.quantize(8) if mode == "P" else image.convert(mode)
        saved.save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="transparent pixels: flatten it") if clear else contextlib.nullcontext():
            pixels = folder.read_image(tmp_path / "a.png", Preprocessing((1, 32, 32), (0.5,), (0.5,)))
            assert pixels.unique().numel() == 1


def test_the_memory_there_is():
    assert 2**20 < folder.available_memory() < 2**50


@pytest.mark.parametrize("limit, there", [("max", 3000 * 1024), ("5000000", 4_500_000), ("1002000", 502_000)])
def test_a_container_may_have_less(monkeypatch, limit, there):
    """Half of what it uses are files that it read, which the system forgets when memory is short."""
    files = {"/proc/meminfo": ["MemTotal: 9000 kB", "MemAvailable:    3000 kB"]}
    files |= {"/sys/fs/cgroup/memory.stat": ["anon 400000", "inactive_file 500000", "active_file 100000"]}
    files |= {"/sys/fs/cgroup/memory.max": [limit], "/sys/fs/cgroup/memory.current": ["1000000"]}
    monkeypatch.setattr(folder, "_lines", files.__getitem__)
    assert folder.available_memory() == min(there, 3000 * 1024)


def test_augmentation_follows_the_options_and_the_stages_know_them(images, tmp_path):
    options = ["-d", "folder", "--data", images, "-a", "resnet", "--depth", "8", "--epochs", "1", "--schedule"]
    train(*options, "--padding", "0", "--no_flip", "--save_dir", tmp_path / "run")
    seen = []
    from utils.stages import prune

    original = prune.recalibrate_batch_norm

    def watch(model, data, *args, **kwargs):
        seen.append((data.padding, data.flip))
        return original(model, data, *args, **kwargs)

    prune.recalibrate_batch_norm = watch
    try:
        final = tmp_path / "run" / "final.pth.tar"
        call(cifar_prune_iterative, "--data", images, "--percent", 0.5, "--recalibrate_bn", 9, "--resume", final)
    finally:
        prune.recalibrate_batch_norm = original
    assert seen == [(0, False)]
    with pytest.raises(OptionError, match="--padding 40"):
        load_dataset("folder", images, padding=40)


@pytest.mark.parametrize(
    "network, words",
    [("Turns", "turns is complex64"), ("Small16", "order is uint16"), ("Extra", "_extra_state, a dict")],
)
def test_what_no_file_could_hold_is_refused_before_the_training(here, images, fails, network, words):
    status, line = fails("-d", "folder", "--data", images, "-a", f"my_nets:{network}", "--save_dir", "run")
    assert status == 1 and words in line and not (here / "run").exists()


def test_fine_tuning_treats_images_and_layers_as_the_file_says(here, images, capsys):
    """Without the options again: else zeros of Linear layers were lost, and images were of another size."""
    where = ["-d", "folder", "--data", images, "-a", "my_nets:Heads", "--epochs", 1, "--schedule"]
    train(*where, "--linear", "--image_size", 20, "--padding", 2, "--no_flip", "--save_dir", "run")
    prune = ["--data", images, "-a", "my_nets:Heads", "--resume", "run/final.pth.tar", "--save_dir", "pruned"]
    call(cifar_prune_iterative, *prune, "--percent", 0.8)
    capsys.readouterr()
    pruned = "pruned/pruned_0.8.pth.tar"
    train(*where, "--start", pruned, "--mask", pruned, "--save_dir", "tuned")
    assert f"{pruned} was trained without mirror images: --no_flip" in capsys.readouterr().err
    tuned, before = load_checkpoint("tuned/final.pth.tar"), load_checkpoint(pruned)
    for name in ("head.weight", "hidden.weight", "conv.weight"):
        assert torch.equal(tuned["state_dict"][name] == 0, before["state_dict"][name] == 0), name
        assert not torch.equal(tuned["state_dict"][name], before["state_dict"][name])
    config = tuned["config"]
    assert (config["linear"], config["image_size"], config["padding"], config["no_flip"]) == (True, 20, 2, False)
    assert tuned["preprocessing"]["shape"][1:] in ([20, 20], (20, 20))
    train(*where, "--start", pruned, "--mask", pruned, "--image_size", 24, "--padding", 1, "--save_dir", "other")
    assert load_checkpoint("other/final.pth.tar")["config"]["image_size"] == 24
    train(*where, "--mask", pruned, "--save_dir", "masked")
    config = load_checkpoint("masked/final.pth.tar")["config"]
    assert (config["linear"], config["image_size"], config["padding"]) == (True, 20, 2)


def test_energies_of_runs_with_and_without_linear_layers_are_not_compared(here, images, fails_in, capsys):
    where = ["-d", "folder", "--data", images, "-a", "my_nets:Heads", "--epochs", 1, "--schedule"]
    train(*where, "--linear", "--save_dir", "with")
    train(*where, "--save_dir", "without")
    files = ["--data", images, "-a", "my_nets:Heads", "--checkpoint", "with/final.pth.tar", "without/final.pth.tar"]
    for order in (files, [*files[:-2], *files[:-3:-1]]):
        status, line = fails_in(compute_energy, *order, "--save", "e")
        assert status == 2 and "only one was trained with --linear: name --layers" in line
    report = call(compute_energy, *files, "--layers", "conv", "--save", "e")
    assert [list(layers) for layers in report["checkpoints"].values()] == [["conv"]] * 2
    alone = call(compute_energy, *files[:-1], "--save", "alone")
    assert [set(layers) for layers in alone["checkpoints"].values()] == [{"conv", "hidden"}]


def test_check_own_network_leaves_named_ones_alone():
    check_own_network("resnet", nn.Identity(), (3, 1, 1), 5)


def test_linear_layers_take_part_where_they_are_asked_for(here, images, capsys, fails):
    own = ["-a", "my_nets:Small", "--linear", "--halo", "--xi", "1e-3", "--psi", "1e-3"]
    options = ["-d", "folder", "--data", images, "--image_size", "16", "--schedule", *own]
    train(*options, "--epochs", 2, "--save_dir", "straight")
    train(*options, "--epochs", 1, "--save_dir", "run")
    train(*options, "--epochs", 2, "--save_dir", "run", "--resume", "run/checkpoint.pth.tar")
    one, other = (load_checkpoint(f"{folder}/checkpoint.pth.tar") for folder in ("straight", "run"))
    assert all(torch.equal(lam, other["lambdas"][name]) for name, lam in one["lambdas"].items())
    matrices = [name for name, w in one["state_dict"].items() if w.dim() == 2]
    assert matrices and {*matrices} <= {*one["lambdas"]}
    without = [option for option in options if option != "--linear"]
    assert "linear True (now None)" in fails(*without, "--epochs", 2, "--resume", "run/checkpoint.pth.tar")[1]
    prune = ["--data", images, "-a", "my_nets:Small", "--resume", "run/final.pth.tar", "--percent", "0.5"]
    layers = call(cifar_prune_iterative, *prune)["results"][0]["layers"]
    assert {*matrices} <= {layer["name"] for layer in layers} and len(layers) > len(matrices)
    checked = call(check_params, "--no_data", "-a", "my_nets:Small", "--checkpoint", "run/pruned/pruned_0.5.pth.tar")
    assert {layer["name"] for layer in checked["layers"]} == {layer["name"] for layer in layers}


def test_a_network_that_has_what_load_model_gives_is_refused_before_its_training(here, images, fails):
    options = ["-d", "folder", "--data", images, "--epochs", 1, "--schedule", "-a", "my_nets:Names"]
    status, line = fails(*options, "--save_dir", "run")
    assert status == 1 and "-a my_nets:Names has 'class_names', which load_model gives to a network" in line
    assert not Path("run").exists()


def test_a_file_of_others_of_a_network_that_is_named(here, fails_in):
    """Its network is built as it is named, and tried before anything is done with it."""
    model = build_model("my_nets:Small", 7)
    save_checkpoint("theirs.pth", {"state_dict": model.state_dict()})
    loaded = load_model("theirs.pth", arch="my_nets:Small")
    assert loaded.layers[2].out_features == 7 and torch.equal(loaded.layers[0].weight, model.layers[0].weight)
    with pytest.raises(CheckpointError, match="of another network"):
        load_model("theirs.pth", arch="lenet_5")
    save_checkpoint("ten.pth", {"state_dict": build_model("my_nets:Small", 10).state_dict()})
    check = ["-d", "cifar10", "-a", "my_nets:Small", "--no_data", "--checkpoint", "ten.pth"]
    status, line = fails_in(check_params, *check)
    assert status == 1 and "-a my_nets:Small cannot take 3x32x32 images" in line and "it takes 16" in line
    lazy = build_model("my_nets:lazy", 10)
    lazy(torch.zeros(1, 3, 32, 32))
    save_checkpoint("lazy.pth", {"state_dict": lazy.state_dict()})
    report = call(check_params, "-d", "cifar10", "-a", "my_nets:lazy", "--no_data", "--checkpoint", "lazy.pth")
    assert report["parameters"] == sum(p.numel() for p in lazy.parameters())


def test_an_error_names_options_of_the_scripts_too(here, images, fails):
    status, line = fails("-d", "folder", "--data", images, "--schedule", "-a", "my_nets:Normed", "--halo")
    assert status == 1 and "cifar.py --linear takes its Linear layers" in line and "linear=True" not in line


def test_linear_is_for_networks_of_ones_own(tiny, fails):
    status, line = fails(*tiny, "--linear")
    assert status == 2 and "what takes part in resnet is settled: leave it out" in line


def test_the_note_of_what_is_left_out_names_options_of_the_scripts(capsys):
    from utils.logger import show_warnings_as_notes

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show_warnings_as_notes()
        prunable_weights(net)
    said = capsys.readouterr().err
    assert "attention weights (cifar.py --linear takes them): 2 with 24 parameters" in said and "exclude" not in said
