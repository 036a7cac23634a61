"""What is kept or committed names no folder of a machine."""

import json
import re
import subprocess

import pytest
from conftest import ROOT

from utils.paths import REPOSITORY, labels_of, portable_arguments, portable_path
from utils.run import read_json, write_json

# In pieces, so that this file does not name one itself.
MACHINE = re.compile(r"(?<![\w.])/(?:" + "|".join(["work", "tmp", "root", "home", "farm"]) + r")/\w")
AWAY = "/".join(["", "home", "me", "runs", "halo", "final.pth.tar"])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (REPOSITORY / "results" / "study" / "prune.json", "results/study/prune.json"),
        (REPOSITORY, "."),
        (AWAY, "halo/final.pth.tar"),
        ("/data", "data"),
        ("runs/halo/final.pth.tar", "runs/halo/final.pth.tar"),
        ("1e-4", "1e-4"),
    ],
)
def test_a_path_is_named_from_the_repository_or_by_its_last_two_parts(path, name):
    assert portable_path(path) == name


def test_paths_in_a_command_line():
    line = ["--resume", AWAY, f"--data={AWAY}", "--xi", "1e-4", "a=b"]
    assert portable_arguments(line) == [
        *("--resume", "halo/final.pth.tar", "--data=halo/final.pth.tar"),
        *("--xi", "1e-4", "a=b"),
    ]


def test_json_that_is_kept_names_no_folder_of_the_machine(tmp_path):
    content = {
        AWAY: {"save_dir": tmp_path / "run", "command": ["x.py", f"--data={tmp_path}"], "numbers": [1.5, 2, None]}
    }
    write_json(tmp_path / "kept.json", content)
    text = (tmp_path / "kept.json").read_text()
    assert not MACHINE.search(text) and str(tmp_path) not in text
    kept = read_json(tmp_path / "kept.json")["halo/final.pth.tar"]
    assert kept["save_dir"] == f"{tmp_path.name}/run" and kept["numbers"] == [1.5, 2, None]


def test_no_committed_text_names_a_folder_of_a_machine():
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what is committed cannot be listed")
    found, read = [], 0
    for path in (ROOT / name for name in listed.stdout.splitlines()):
        content = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" in content:
            continue  # no text, or deleted
        read += 1
        found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in MACHINE.finditer(content.decode("utf-8", "ignore"))]
    assert found == []
    assert read > 1000


def test_every_committed_report_has_its_checksum():
    paths = [path for folder in ("results", "benchmarks") for path in (ROOT / folder).rglob("*.json")]
    assert len(paths) > 100
    for path in paths:
        read_json(path)


def test_what_was_read_can_be_written_again(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content) == 2  # its checksum beside it
    write_json(tmp_path / "a.json", content | {"b": 2})
    assert read_json(tmp_path / "a.json") == {"a": 1, "b": 2}


def test_labels_are_as_long_as_it_takes_to_tell_files_apart():
    one, other = (f"{AWAY}/{name}/pruned/prune.json" for name in ("a", "b"))
    assert labels_of([one, AWAY]) == ["pruned/prune.json", "halo/final.pth.tar"]
    assert labels_of([one, other]) == ["a/pruned/prune.json", "b/pruned/prune.json"]
    assert labels_of(["x/prune.json", "y/prune.json"]) == ["x/prune.json", "y/prune.json"]
    assert len({*labels_of([one, one])}) == 1
    assert labels_of([]) == []


def test_two_keys_stay_two(tmp_path):
    write_json(tmp_path / "a.json", {f"{AWAY}/{name}/b/c": name for name in ("x", "y")})
    assert {"x/b/c": "x", "y/b/c": "y"}.items() <= read_json(tmp_path / "a.json").items()
