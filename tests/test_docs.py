"""README and docs: every relative link leads somewhere, and every option they name exists."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted(path.name for path in ROOT.glob("*.py")), "mnist/mnist.py"]
OF_OTHERS = {"--nproc_per_node", "--target", "--no-deps", "--help"}  # torchrun's and pip's, and argparse's own
OF_OTHERS |= {"--minutes", "--kills", "--torchrun"}  # of tests/fuzz.py and tests/kill_often.py


def links(text: str) -> list[str]:
    """Return the relative targets of links and pictures, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


@pytest.fixture(scope="module")
def help_of():
    """The --help of every script, by its name; all of them at once, to share the time that importing torch takes."""
    running = {
        name: subprocess.Popen([sys.executable, ROOT / name, "--help"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for name in SCRIPTS
    }
    texts = {name: process.communicate()[0] for name, process in running.items()}
    assert all(process.returncode == 0 for process in running.values())
    return texts


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
    for line in re.findall(r"^ *(?:python|torchrun .*?) ((?:mnist/)?\w+\.py .*)$", text, re.MULTILINE):
        script, _, rest = line.partition(" ")
        if script in help_of:
            used = re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest.split(" #")[0])
            assert [option for option in used if option not in help_of[script]] == [], line


def test_the_page_of_pages_names_them_all():
    named = set(links((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= named


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024
