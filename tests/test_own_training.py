"""Networks of your own that do in training what they do not do in evaluation."""

import importlib
import random
import shlex
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import PATIENCE, train
from forked import Forked
from test_distributed import environment, free_port

from models import check_own_network
from utils.distributed import checksum
from utils.files.checkpoint import load_checkpoint, save_checkpoint

NETWORKS = """
import random
import numpy as np
import torch
from torch import nn

class Skips(nn.Module):
    # stochastic depth, drawn by Python and by numpy; no step before the third uses the second block
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(2))
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += self.training
        if not self.training or random.random() < 0.5:
            x = x + self.first(x)
        if not self.training or (self.seen > 2 and np.random.rand() < 0.5):
            x = x + self.second(x)
        return self.last(x)

class InBf16(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 3).bfloat16(), nn.Linear(3 * 14 * 14, num_classes)

    def forward(self, x):
        return self.last(self.first(x.bfloat16()).flatten(1).float())

class Auxiliary(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.last = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))

    def forward(self, x):
        return (self.last(x), self.last(x)) if self.training else self.last(x)

class Masked(Auxiliary):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")))

    def forward(self, x):
        return self.last(x)

class Wrapped(nn.Module):
    # a table that is kept from batch to batch, and a part of the name that DataParallel gives
    def __init__(self, num_classes):
        super().__init__()
        self.module, self.table = nn.Conv2d(3, 3, 3, padding=1), torch.zeros(0)
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = torch.linspace(1, 2, 16).repeat(len(x), 3, 16, 1)
        return self.last(self.module(x) * self.table[: len(x)])

def normalised(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4), nn.BatchNorm1d(4), nn.Linear(4, num_classes))

def drops(num_classes):
    return nn.Sequential(nn.Dropout(), normalised(num_classes))
"""


@pytest.fixture
def options(images, tmp_path, monkeypatch):
    (tmp_path / "odd_nets.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield ["-d", "folder", "--data", images, "--image_size", 16, "--schedule", "--lr", 0.01, "--train_batch", 6]
    sys.modules.pop("odd_nets", None)


@pytest.mark.parametrize("penalty", [[], ["--halo", "--xi", "1e-3", "--psi", "1e-3"]])
def test_blocks_skipped_at_random_resume_bit_for_bit(options, tmp_path, penalty):
    options += ["-a", "odd_nets:Skips", *penalty]
    train(*options, "--epochs", 3, "--save_dir", tmp_path / "straight")
    train(*options, "--epochs", 1, "--save_dir", tmp_path / "run")
    random.seed(99)  # whatever happened in between does not matter
    train(*options, "--epochs", 3, "--save_dir", tmp_path / "run", "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    one, other = (load_checkpoint(tmp_path / name / "final.pth.tar") for name in ("straight", "run"))
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])


def test_processes_may_skip_other_blocks(options, tmp_path):
    port = free_port()
    options += ["-a", "odd_nets:Skips", "--epochs", 2, "--device", "cpu", "--save_dir", tmp_path / "run"]
    jobs = [Forked(*options, env=environment(rank, 2, port)) for rank in range(2)]
    outputs = [job.communicate(timeout=PATIENCE) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert load_checkpoint(tmp_path / "run" / "final.pth.tar")["epoch"] == 2


def test_a_network_in_bf16_has_its_files(options, tmp_path):
    options += ["-a", "odd_nets:InBf16", "--epochs", 1, "--save_dir", tmp_path / "run"]
    train(*options)
    assert np.load(tmp_path / "run" / "conv_params.npy").dtype == np.float32
    state = load_checkpoint(tmp_path / "run" / "final.pth.tar")["state_dict"]
    assert len(checksum(state)) == 64 and checksum(state) != checksum({n: w + 1 for n, w in state.items()})


def test_a_checkpoint_without_the_momenta_of_a_skipped_block_goes_on(options, tmp_path):
    """Older versions made them in the first step, and only for what it had used."""
    options += ["-a", "odd_nets:Skips"]
    train(*options, "--epochs", 1, "--save_dir", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pth.tar"
    state = load_checkpoint(path)
    names = [name for name, _ in odd_network("Skips").named_parameters()]
    for name in ("second.0.weight", "second.1.bias"):
        del state["optimizer"]["state"][names.index(name)]
    save_checkpoint(path, state)
    train(*options, "--epochs", 2, "--save_dir", tmp_path / "run", "--resume", path)
    assert len(load_checkpoint(path)["optimizer"]["state"]) == len(names)


def test_a_network_with_a_table_and_a_part_called_module_trains_and_goes_on(options, tmp_path):
    """It is evaluated with larger batches than it is trained with, so that the table is made there."""
    options += ["-a", "odd_nets:Wrapped", "--train_batch", 3, "--val_split", 6, "--save_dir", tmp_path / "run"]
    train(*options, "--epochs", 2)
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    assert "module.weight" in load_checkpoint(checkpoint)["state_dict"]
    assert train(*options, "--epochs", 3, "--resume", checkpoint)["final"]["epoch"] == 3


def test_the_command_to_go_on_after_start_is_one_that_works(heeded, options, tmp_path, fails, monkeypatch):
    options += ["-a", "odd_nets:Skips", "--save_dir"]
    train(*options, tmp_path / "first", "--linear", "--padding", 2, "--epochs", 1)
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.experiment.run_epoch", lambda run: signal.raise_signal(signal.SIGINT))
        start = ["--epochs", 1, "--start", tmp_path / "first" / "final.pth.tar"]
        line = fails(*options, tmp_path / "second", *start)[1]
    command = shlex.split(line.split("continue with: ")[1])[2:]
    assert "--linear" not in command and "--start" not in command
    config = train(*command)["arguments"]
    assert (config["linear"], config["padding"], config["image_size"]) == (True, 2, 16)


def odd_network(name):
    return getattr(importlib.import_module("odd_nets"), name)(num_classes=3)


@pytest.mark.parametrize(
    ("name", "words"),
    [("Auxiliary", "(2, 3) in training too, it gives tuple"), ("Masked", "mask holds infinity or NaN before")],
)
def test_what_no_run_could_train_or_keep_is_one_line_before_it(options, tmp_path, fails, name, words):
    status, line = fails(*options, "-a", f"odd_nets:{name}", "--epochs", 1, "--save_dir", tmp_path / "run")
    assert status == 1 and words in line and not (tmp_path / "run").exists()


def test_the_look_before_the_training_moves_nothing(options):
    network = odd_network("drops")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_own_network("odd_nets:drops", network, (3, 16, 16), 3)
    assert torch.equal(torch.get_rng_state(), state) and network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_last_batch_of_one_image_says_what_to_change(options, tmp_path, fails):
    options += ["-a", "odd_nets:normalised", "--epochs", 1, "--save_dir", tmp_path / "run"]
    status, line = fails(*options, "--train_batch", 35)  # of 36 images
    assert status == 1 and "36 training images" in line and "another --train_batch than 35" in line
    train(*options, "--train_batch", 34, "--overwrite")


def test_in_one_of_several_processes_it_is_said_too(options, tmp_path):
    """36 images in batches of 33: the last leaves two to the first process and one to the other, which says so."""
    options += ["-a", "odd_nets:normalised", "--epochs", 1, "--device", "cpu", "--save_dir", tmp_path / "run"]
    port = free_port()
    jobs = [Forked(*options, "--train_batch", 33, env=environment(rank, 2, port)) for rank in range(2)]
    outputs = [job.communicate(timeout=PATIENCE) for job in jobs]
    assert all(job.returncode for job in jobs)
    assert "one of the 36 training images to a process" in outputs[1][1] and "Traceback" not in outputs[1][1]


def test_a_mask_of_linear_layers_needs_linear(options, tmp_path, fails):
    options += ["-a", "odd_nets:Wrapped", "--epochs", 1, "--save_dir"]
    train(*options, tmp_path / "plain")
    train(*options, tmp_path / "linear", "--linear")
    state = load_checkpoint(tmp_path / "linear" / "final.pth.tar")
    state["state_dict"]["last.1.weight"][:, ::2] = 0
    save_checkpoint(tmp_path / "cut.pth.tar", state)
    begin = ["--start", tmp_path / "plain" / "final.pth.tar", "--mask", tmp_path / "cut.pth.tar"]
    status, line = fails(*options, tmp_path / "third", *begin)
    assert status == 2 and "cut.pth.tar was pruned with Linear layers" in line and "add --linear" in line
    train(*options, tmp_path / "third", *begin, "--linear")
    left = load_checkpoint(tmp_path / "third" / "final.pth.tar")["state_dict"]["last.1.weight"]
    assert not left[:, ::2].any() and left[:, 1::2].all()
