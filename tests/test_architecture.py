"""Imports run one way, halo stands on torch alone, and no file or class outgrows its room."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# From the lowest to the highest; a file may import its own tier and those below it.
TIERS = ["halo", "models", "shared", "training", "stages", "studies", "scripts"]
SHARED = {"files", "interrupts", "logger", "run", "options", "command_line", "distributed"}
SHARED |= {"plots", "plot_deploy", "plot_lambda", "plot_methods", "plot_style", "verdict"}
HALO_MAY_IMPORT = {"torch", "__future__"} | set(sys.stdlib_module_names)


def tier_of(module: str) -> str | None:
    """Return the tier of a dotted module name of this project; None for anything else."""
    top, *rest = module.split(".")
    if top == "models":
        return "models"
    if top == "utils":
        room = rest[0] if rest else "halo"  # utils/__init__.py hands on halo's names
        return "shared" if room in SHARED else room
    return "scripts" if module in {path.stem for path in ROOT.glob("*.py")} | {"mnist.mnist"} else None


def imported(path: Path, package: str) -> list[tuple[str, int]]:
    """Return the modules that a file imports, with absolute names, and their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # "from utils import plots" names a module, "from utils import HALO" a class
            found += [(f"{module}.{a.name}" if module == "utils" else module, node.lineno) for a in node.names]
    return found


def arrows_up(root: Path) -> list[str]:
    """Return every import that points upwards, as "file:line imports module"."""
    wrong = []
    for path in sorted(
        [*root.glob("*.py"), *root.glob("mnist/*.py"), *root.glob("models/*.py"), *(root / "utils").rglob("*.py")]
    ):
        name = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        own = tier_of(name) if name != "utils" else "scripts"
        for module, line in imported(path, package):
            tier = tier_of(module)
            if tier not in TIERS and module.startswith("utils."):
                tier = "halo"  # one of halo's names
            if tier is None:
                continue
            up = TIERS.index(tier) > TIERS.index(own)
            between_scripts = own == tier == "scripts"
            halo_to_models = {own, tier} == {"halo", "models"}
            if up or between_scripts or halo_to_models:
                wrong.append(f"{path.relative_to(root)}:{line} imports {module}")
    return wrong


def test_imports_run_one_way():
    assert arrows_up(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("utils/files/atomic.py", "from utils.training.data import Dataset"),
        ("utils/run.py", "import utils.studies.study"),
        ("utils/training/data.py", "from utils.stages import prune"),
        ("utils/halo/penalties.py", "from utils import options"),
        ("utils/halo/penalties.py", "from ..run import describe"),
        ("models/vgg.py", "from utils import HALO"),
        ("cifar.py", "import reproduce"),
    ],
)
def test_an_arrow_back_up_is_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"'''Doc.'''\n{line}\n")
    (found,) = arrows_up(tmp_path)
    assert found.startswith(f"{file}:2 imports")


def test_halo_imports_torch_and_itself_only():
    for path in (ROOT / "utils" / "halo").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in HALO_MAY_IMPORT), path
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in HALO_MAY_IMPORT for alias in node.names), path


def test_every_room_says_what_may_enter():
    for path in (ROOT / "utils").glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert "May enter:" in text and "May not:" in text, path


def test_no_file_or_class_outgrows_its_room():
    for path in [*(ROOT / "utils").rglob("*.py"), *(ROOT / "models").glob("*.py")]:
        source = path.read_text()
        assert len(source.splitlines()) <= 330, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 150, f"{path}: {node.name}"
