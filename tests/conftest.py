"""Helpers shared by the tests: small images, and the scripts called as a user calls them."""

import pkgutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from forked import FIGURES, ROOT
from PIL import Image

import cifar
from utils.halo.native import find_compiler
from utils.run import run_script
from utils.studies import phases
from utils.studies.jobs import run_job

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
PATIENCE = 600  # seconds after which a process hangs: beside trainings that go first, an epoch took two minutes
DRAWN = {name: pkgutil.resolve_name(name) for name in FIGURES}
TINY = ["-a", "resnet", "--depth", "8", "--epochs", "2", "--schedule", "1", "--train_batch", "16"]


def write_images(root: Path, *, classes: int = 3, train: int = 12, test: int = 6) -> Path:
    """Write a folder of images whose brightness tells their class."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(20 * label, 20 * label + 75, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder for `-d folder`: 3 classes of 12 training and 6 test images."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def tiny(images, tmp_path):
    """The options of a training run of about half a second, writing to tmp_path / "run"."""
    return ["-d", "folder", "--data", str(images), *TINY, "--save_dir", str(tmp_path / "run")]


def train(*options: str) -> dict:
    """Run cifar.py's main in this process."""
    return cifar.main(cifar.get_parser().parse_args([str(option) for option in options]))


@pytest.fixture(autouse=True)
def seeded():
    """Begin every test with the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Leave out the figures of training and pruning in this process: they take longer than a short run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(name, lambda *_, **__: None)
        yield


@pytest.fixture
def figures(monkeypatch):
    """Draw them all the same, in this test."""
    for name, draw in DRAWN.items():
        monkeypatch.setattr(name, draw)


@contextmanager
def jobs_in_this_process():
    """Do the jobs of a study in this process for the block: starting others takes longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "run_jobs", lambda jobs, workers: ((job, run_job(job)) for job in jobs))
        yield


@pytest.fixture(scope="module")
def jobs_here():
    """Do the jobs of a study in this process, in all tests of a file."""
    with jobs_in_this_process():
        yield


@pytest.fixture
def fails_in(monkeypatch, capsys):
    """Call a script with wrong input; return its exit status and the one line it says."""

    def call(script: ModuleType, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *(str(option) for option in options)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(script.main, script.get_parser())
        lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("note:")]
        assert len(lines) == 1, lines
        return stopped.value.code, lines[0]

    return call


@pytest.fixture
def fails(fails_in):
    """Call cifar.py with wrong input; return its exit status and the one line it says."""
    return partial(fails_in, cifar)


@pytest.fixture
def heeded():
    """Have Ctrl-C raise, as in a terminal: a shell that runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*options: str, script: str = "cifar.py", **popen) -> subprocess.Popen:
    """Start a script as a process of its own."""
    command = [sys.executable, str(ROOT / script), *(str(option) for option in options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **(pipes | popen))
