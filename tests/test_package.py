"""`pip install .` gives the package `halo` with torch alone, beside somebody else's folders `utils` and `models`."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import ROOT

import utils
from utils.halo.native import find_compiler

# One thread: the networks are small and the machine may be busy.
QUIET = {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: str, cwd: Path, **variables: str) -> str:
    """Run Python somewhere else, without this repository on its path; return what it prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=clean | QUIET | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tree where importing torch fails: building must not need it."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "utils", source / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    without = tmp_path_factory.mktemp("without_torch")
    (without / "torch.py").write_text("raise ImportError('torch was imported to build the wheel')\n")
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(made)]
    run("-m", "pip", "wheel", *options, ".", cwd=source, PYTHONPATH=str(without))
    (found,) = made.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An empty folder into which the wheel was installed, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The folder of a project with a `utils` and a `models` of its own."""
    for name in ("utils", "models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    return tmp_path


def test_the_wheel_holds_the_room_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (about,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = Parser().parsestr(archive.read(about).decode())
    room = [path for path in (ROOT / "utils" / "halo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sorted(names) == sorted(f"halo/{path.relative_to(ROOT / 'utils' / 'halo').as_posix()}" for path in room)
    assert {"halo/halo_step.cpp", "halo/py.typed"} < set(names)
    assert (metadata["Name"], metadata["Version"]) == ("halo-lasso", utils.halo.__version__)
    assert f"\nversion: {metadata['Version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert metadata["License-Expression"] == "MIT" and metadata.get_all("License-File") == ["LICENSE"]
    assert metadata.get_all("Requires-Dist") == ["torch>=2.6"] and metadata["Requires-Python"] == ">=3.10"


def test_the_lines_of_the_docs_train_in_a_project_with_its_own_utils(installed, elsewhere):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "install.md").read_text(), re.DOTALL)
    script = f"import halo, models, utils\nassert utils.MINE and models.MINE\nprint(halo.__file__)\n{lines}"
    script += "print(optimizer_of_lam.slow_because)\nprint(loss.item() < first_loss)\n"
    script += "print(sum(int((w == 0).sum()) for w in halo.prunable_weights(model).values()))\n"
    script += "print(float(min(lam.min() for lam in penalty.lambdas.values())) < 1)\n"
    (elsewhere / "train.py").write_text(script)
    where, slow, *results = run("train.py", cwd=elsewhere, PYTHONPATH=str(installed)).split("\n")[-6:-1]
    assert Path(where) == installed / "halo" / "__init__.py"
    assert (slow == "None") == (find_compiler() is not None)
    assert results == ["True", str(round(0.9 * 8 * 9)), "True"]


def test_public_names_have_docstrings_and_utils_hands_them_on():
    halo = utils.halo
    wanted = {
        *("HALO", "L1", "SWS", "MCP", "make_penalty", "LambdaSGD", "FusedHALO", "penalized_parameters"),
        *("prunable_weights", "prune_by_magnitude_", "prune_layerwise_", "prune_random_", "prune_shuffled_"),
        *("sparsity_per_layer", "count_macs", "savings"),
    }
    assert wanted <= set(halo.__all__) and len(set(halo.__all__)) == len(halo.__all__)
    for name in halo.__all__:
        assert getattr(utils, name) is getattr(halo, name), name
        assert getattr(halo, name).__doc__, name
