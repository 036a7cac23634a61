"""The examples: the equations of minimal.py are HALO's, it prints what its docstring says, and own_loop.py runs."""

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from torch import nn

from utils.halo import HALO, prunable_weights


def load(name: str) -> ModuleType:
    """Import an example without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(text: str) -> dict[str, list[float]]:
    """Return the numbers of the lines that begin with the name of a method and hold at least three numbers."""
    found = re.findall(r"^ *(no penalty|HALO) +(\d+\.\d(?: +\d+\.\d){2,})", text, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


def output_of(*command: str, **options) -> str:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, **options).stdout


def test_minimal_has_the_gradients_of_halo():
    minimal = load("minimal")
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(40, generator=generator, dtype=torch.float64))
    penalty = HALO({"w": w}, xi=minimal.XI, psi=minimal.PSI)
    lam = penalty.lambdas["w"]
    signs = torch.where(torch.rand(40, generator=generator) < 0.3, -1.0, 1.0)
    lam.data.copy_((torch.rand(40, generator=generator) * 0.1 + 0.05) * signs)
    by_w, by_lam = torch.autograd.grad(penalty(), [w, lam])
    torch.testing.assert_close(minimal.grad_w(w, lam), by_w, rtol=1e-12, atol=0)
    torch.testing.assert_close(minimal.grad_lam(w, lam), by_lam, rtol=1e-12, atol=0)


def test_minimal_starts_lam_at_rest():
    minimal = load("minimal")
    first, start = torch.tensor([minimal.FIRST], dtype=torch.float64), torch.tensor([minimal.LAM_START]).double()
    assert abs(minimal.grad_lam(first, start)) < 1e-6 * minimal.PSI
    rest = (2 * minimal.XI * minimal.KEPT / minimal.PSI) ** (1 / 3)
    assert minimal.XI / rest**2 == pytest.approx(minimal.PULL)


def test_minimal_prints_what_its_docstring_says(tmp_path):
    # From an empty folder and isolated (-I), so that nothing of this project can be imported.
    printed = output_of("-I", str(ROOT / "examples" / "minimal.py"), cwd=tmp_path)
    said, seen = rows_of(load("minimal").__doc__), rows_of(printed)
    assert list(said) == list(seen) == ["no penalty", "HALO"]
    # In float64 the first weights times 1 + 1e-12 * noise, one thread, and other instruction sets (ATEN_CPU_CAPABILITY
    # default and avx2) left every digit as it was. 2 points are for releases of torch that sum in yet another order.
    for name, numbers in said.items():
        assert seen[name] == pytest.approx(numbers, abs=2), printed
    dense, at_90, at_95, _ = seen["HALO"]
    none_dense, none_90, none_95, _ = seen["no penalty"]
    assert dense > none_dense - 2.5
    assert at_90 > none_90 + 5
    assert at_95 > none_95 + 25
    first, small, large, correlation = map(float, re.findall(r"\d+\.\d{2,}", printed[printed.index("median") :]))
    assert small < first / 3 < first < large and correlation > 0.2  # lam parted: it adapted to the weights


@pytest.fixture
def own_loop(monkeypatch) -> ModuleType:
    """examples/own_loop.py with a network of 185,000 weights instead of 11 million, which learns digits in a second."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    example = load("own_loop")

    def small(classes: int) -> nn.Module:
        sizes = [(3, 32), (32, 128), (128, 128)]
        blocks = [(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o in sizes]
        return nn.Sequential(*itertools.chain(*blocks), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, classes))

    monkeypatch.setattr(example, "full_network", example.network, raising=False)
    monkeypatch.setattr(example, "network", small)
    return example


def test_own_loop_finds_the_package_and_keeps_more_than_no_penalty(own_loop, capsys):
    assert Path(own_loop.halo.__file__) == ROOT / "utils" / "halo" / "__init__.py"
    own_loop.main(own_loop.get_parser().parse_args([]))
    said, seen = rows_of(own_loop.__doc__), rows_of(capsys.readouterr().out)
    assert list(said) == list(seen) == ["no penalty", "HALO"]
    for halo, none in ((said["HALO"], said["no penalty"]), (seen["HALO"], seen["no penalty"])):
        assert min(halo[0], none[0]) > 90
        assert halo[2] > 90 > none[2] + 10  # at 0.9, where chance is 10


@pytest.mark.parametrize(
    "options, words", [(["--data", "/nope"], "--data takes a folder"), (["--epochs", "0"], "give 1 or more")]
)
def test_own_loop_says_what_is_wrong(own_loop, options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        own_loop.main(own_loop.get_parser().parse_args(options))
    assert words in f"{stopped.value}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("gone", "count", "words"), [("test/*", 1, "the classes of"), ("train/*/*", 10, "less than one batch")]
)
def test_own_loop_refuses_folders_that_do_not_fit(own_loop, images, tmp_path, gone, count, words):
    folder = shutil.copytree(images, tmp_path / "images")
    for path in sorted(folder.glob(gone))[-count:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SystemExit, match=words):
        own_loop.main(own_loop.get_parser().parse_args(["--data", str(folder), "--epochs", "1"]))


def test_own_loop_takes_folders(own_loop, images, capsys):
    own_loop.main(own_loop.get_parser().parse_args(["--data", str(images), "--epochs", "1"]))
    assert len(rows_of(capsys.readouterr().out)["HALO"]) == len(own_loop.FRACTIONS)


def test_own_loop_trains_a_resnet18_for_small_images(own_loop):
    model = own_loop.full_network(7)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert (
        sum(w.numel() for w in prunable_weights(model).values()) == 11_159_232
    )  # all convolutions, not the classifier
