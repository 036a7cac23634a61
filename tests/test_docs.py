"""README and docs: every relative link leads somewhere, and every option they name exists."""

import importlib
import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted(path.name for path in ROOT.glob("*.py")), "mnist/mnist.py", "benchmarks/sparse.py"]
OF_OTHERS = {"--nproc_per_node", "--target", "--no-deps", "--help"}  # torchrun's and pip's, and argparse's own
OF_OTHERS |= {"--array", "--cpus-per-task", "--time", "--dependency", "--ntasks", "--exact"}  # Slurm's
OF_OTHERS |= {"--port", "--scheduler-file", "--nthreads"}  # Dask's
OF_OTHERS |= {"--minutes", "--kills", "--torchrun"}  # of tests/fuzz.py and tests/kill_often.py


def links(text: str) -> list[str]:
    """Return the relative targets of links and pictures, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


@pytest.fixture(scope="module")
def help_of():
    """The --help of every script, by its name."""
    modules = {name: importlib.import_module(name.removesuffix(".py").replace("/", ".")) for name in SCRIPTS}
    return {name: module.get_parser().format_help() for name, module in modules.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(page):
    missing = [target for target in links(page.read_text()) if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_option_exists(page, help_of):
    known = {option for text in help_of.values() for option in re.findall(r"--[a-z][\w-]*", text)} | OF_OTHERS
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) - known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_option_of_a_command_is_one_of_its_script(page, help_of):
    """A command is a line that starts with python, with its continuations."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^ *(?:python|torchrun .*?) ((?:\w+/)?\w+\.py .*)$", text, re.MULTILINE):
        script, _, rest = line.partition(" ")
        if script in help_of:
            pattern = r"(?<![\w-])--?[a-z][\w-]*"
            assert {*re.findall(pattern, rest.split(" #")[0])} <= {*re.findall(pattern, help_of[script])}, line


def test_the_page_of_pages_names_them_all():
    named = set(links((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= named


def test_no_merge_was_left_half_done():
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "results").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    assert [page.name for page in pages if re.search(r"^(<<<<<<<|=======|>>>>>>>)", page.read_text(), re.M)] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


def test_readme_goes_from_what_one_gets_to_the_licence():
    titles = re.findall(r"^## (.*)$", (ROOT / "README.md").read_text(), flags=re.M)
    first = ["When to use it, and when not", "Two commands", "In a training loop of your own", "The pipeline"]
    last = ["The authors' README, command by command", "How long does it take?", "The tree", "Speed", "Cite", "Licence"]
    assert titles == first + last


def test_no_sentence_of_the_readme_has_more_than_two_numbers():
    """Outside tables, code and links; a number in a name (CIFAR-10, torch 2.14, Zen 4) is none."""
    text = re.sub(
        r"```.*?```|^ {4}.*?$|^[|#].*?$|`[^`]*`|\]\(.*?\)", "", (ROOT / "README.md").read_text(), flags=re.S | re.M
    )
    text = re.sub(r"(torch|Python|Zen|arXiv) [\d.]+", "", text)
    sentences = [s for block in re.split(r"\n\n|\n- ", text) for s in re.split(r"(?<=[.:])\s", block)]
    found = {s: re.findall(r"(?<![\w.-])\d(?:[\d.,]*\d)?", s) for s in sentences}
    assert sum(map(len, found.values())) > 5
    assert [s for s, numbers in found.items() if len(numbers) > 2] == []


def test_the_loop_of_the_readme_runs():
    import torch
    from torch.nn.functional import cross_entropy

    import utils.halo

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    names = {"model": model, "steps": 4, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}
    names |= {"batches": [(torch.randn(8, 1, 8, 8), torch.arange(8) % 2)] * 4, "cross_entropy": cross_entropy}
    exec(code.replace("from halo import", "from utils.halo import"), names)
    assert sum((w == 0).sum().item() for w in utils.halo.prunable_weights(model).values()) == round(0.95 * 36)


def test_the_version_has_its_section_in_the_changelog():
    import utils.halo

    titles = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    versions = [
        re.fullmatch(r"(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)", title) for title in titles if title != "Unreleased"
    ]
    assert all(versions) and versions[0][1] == utils.halo.__version__
    assert f"version: {utils.halo.__version__}\n" in (ROOT / "CITATION.cff").read_text()
