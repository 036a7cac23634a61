"""README and docs: every relative link leads somewhere, and every option they name exists."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted(path.name for path in ROOT.glob("*.py")), "mnist/mnist.py", "benchmarks/sparse.py"]
OF_OTHERS = {"--nproc_per_node", "--target", "--no-deps", "--help"}  # torchrun's and pip's, and argparse's own
OF_OTHERS |= {"--array", "--cpus-per-task", "--time", "--dependency", "--ntasks", "--exact"}  # Slurm's
OF_OTHERS |= {"--port", "--scheduler-file", "--nthreads", "--memory-limit"}  # Dask's
OF_OTHERS |= {"--logsum"}  # of the penalty that docs/add_a_penalty.md adds
OF_OTHERS |= {"--minutes", "--kills", "--torchrun"}  # of tests/fuzz.py and tests/kill_often.py


def links(text: str) -> list[str]:
    """Return the relative targets of links and pictures, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


HELP = """
import runpy, sys
for number, name in enumerate(sys.argv[1:]):
    if number:
        print("\\0", end="")
    sys.argv, sys.path[0] = [name, "--help"], name.rpartition("/")[0]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        assert not end.code, name
"""


@pytest.fixture(scope="module")
def help_of():
    """The --help of every script, by its name, run as a script; one process, so that torch is imported once."""
    process = subprocess.run([sys.executable, "-c", HELP, *SCRIPTS], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.returncode == 0
    texts = dict(zip(SCRIPTS, process.stdout.split("\0"), strict=True))
    assert all("usage" in text for text in texts.values())
    return texts


def module_of(script):
    """Import a script of this project, given by its path."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(page):
    missing = [target for target in links(page.read_text()) if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_option_exists(page, help_of):
    known = {option for text in help_of.values() for option in re.findall(r"--[a-z][\w-]*", text)} | OF_OTHERS
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) - known) == []


UNPARSED = {"tests/kill_often.py"}  # has no function that makes its parser


def commands(text):
    """Yield script and options of every line that starts with python or torchrun, with its continuations."""
    for line in re.findall(r"^ *\t?(?:python|torchrun|srun .*?python) (.*)$", text.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(line, comments=True)
        scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
        if scripts and "..." not in words:
            yield words[scripts[0]], words[scripts[0] + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_is_one_that_its_script_takes(page, capsys):
    for script, options in commands(page.read_text()):
        parse(script, options)


def test_the_commands_of_the_makefile_are_ones_that_their_scripts_take():
    text = (ROOT / "Makefile").read_text()
    for name, value in re.findall(r"^(\w+) :?= (.*)$", text, re.MULTILINE)[::-1]:
        text = text.replace(f"$({name})", value)
    text = re.sub(r"^\t@?\.venv/bin/python", "python", text, flags=re.MULTILINE)
    found = [*commands(text)]
    assert {script for script, _ in found} >= {"cifar.py", "compare_pruning.py", "deploy.py", "benchmarks/run.py"}
    for script, options in found:
        if script not in UNPARSED:
            parse(script, options)


def parse(script, options):
    """Parse a command line, or fail with what the parser says."""
    try:
        module_of(script).get_parser().parse_args(options)
    except SystemExit:
        pytest.fail(f"{script} does not take: {shlex.join(options)}")


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
