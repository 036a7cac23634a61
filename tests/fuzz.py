"""Change valid files of every kind at random and see what the programs make of them.

    python tests/fuzz.py --minutes 10        # states its counts; docs/robustness.md has those of one run

Never a traceback, never more than 10 s or 1 GB more, always exit status 0, 1 or 2; and where bytes of a file that has
a checksum were changed, either the same numbers or status 1. tests/test_fuzz.py runs a few examples of each kind.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis
import torch
from conftest import TINY, train, write_images
from hypothesis import strategies as st

import adaptivity
import check_params
import cifar
import cifar_prune_iterative
import compare_pruning
import reproduce
from utils.files.checkpoint import load_checkpoint, save_checkpoint
from utils.run import read_json, run_script
from utils.training.data import load_dataset


def peak() -> int:
    """Return the most memory that this process held since `forget_peak`, in kB; where that fails, ever."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> int:
    """Let `peak` begin with what this process holds now, where the system can; return that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


STUDY = {
    **{"title": "small", "percent": [0.5, 0.9], "tune_seeds": [1], "seeds": [1, 2], "controls": ["L1"]},
    "options": {"arch": "lenet_300_100", "dataset": "digits", "epochs": 2, "val_split": 200, "schedule": [1]},
    "methods": {"none": {"penalty": "none"}, "L1": {"penalty": "l1", "grid": {"xi": [1e-4, 1e-3]}}},
}
ODD = [None, True, -1, 0, 1.5, 1e308, 10**30, float("nan"), float("inf"), "", "text", "../..", [], [1], {}, {"a": 1}]
TENSORS = [torch.ones(1), torch.ones(2, 2).long(), torch.zeros(0, 5), torch.full((3,), torch.nan), torch.tensor(7)]


def wrapped(main: Callable[[str], object]) -> SimpleNamespace:
    """Return what run_script takes of a script, for a part of one that reads a file."""

    def get_parser() -> argparse.ArgumentParser:
        parser = cifar.options.Parser("Read a file.")
        parser.add_argument("path")
        return parser

    return SimpleNamespace(main=lambda args: main(args.path), get_parser=get_parser, __name__="part")


def log_of(path: str) -> None:
    """Print what adaptivity.py reads of a run."""
    print(adaptivity.load_run(Path(path).parent).medians)


def images_of(path: str) -> None:
    """Print the size of a folder of images, read."""
    print(load_dataset("folder", Path(path).parents[2]).train.images.shape)


class Kinds:
    """Valid files, each with what reads it; `changed` returns what is wrong with the reading of a changed one."""

    def __init__(self, folder: Path) -> None:
        images = write_images(folder / "images", train=4, test=2)
        run = folder / "run"
        options = ["-d", "folder", "--data", images, *TINY, "--halo", "--val_split", "4", "--no_test"]
        with contextlib.redirect_stdout(io.StringIO()):
            train(*options, "--save_dir", run)
            prune = ["--resume", run / "final.pth.tar", "--percent", "0.5", "--data", images]
            self._call(cifar_prune_iterative, prune)
            compact = ["--checkpoint", run / "final.pth.tar", "--no_data", "--compact", folder / "compact"]
            self._call(check_params, compact)
        (folder / "study.json").write_text(json.dumps(STUDY))
        again = ["--save_dir", folder / "again", "--overwrite", "--epochs", "3"]
        self.folder = folder
        self.kinds: dict[str, tuple[Path, object, Callable[[Path], list]]] = {
            "checkpoint": (run / "final.pth.tar", check_params, lambda p: ["--no_data", "--checkpoint", p]),
            "resumed": (run / "checkpoint.pth.tar", cifar, lambda p: [*options, *again, "--resume", p]),
            "compact": (folder / "compact", check_params, lambda p: ["--no_data", "--checkpoint", p]),
            "pruned": (run / "final.pth.tar", check_params, lambda p: ["--data", images, "--checkpoint", p]),
            "prune.json": (run / "pruned" / "prune.json", compare_pruning, lambda p: [p]),
            "study": (folder / "study.json", reproduce, lambda p: [p, "--dry_run", "--out", folder / "none"]),
            "config.json": (run / "config.json", wrapped(lambda p: print(read_json(p))), lambda p: [p]),
            "summary.json": (run / "summary.json", wrapped(log_of), lambda p: [p]),
            "log.csv": (run / "log.csv", wrapped(log_of), lambda p: [p]),
            "image": (images / "train" / "class0" / "000.png", wrapped(images_of), lambda p: [p]),
        }
        self.whole = {name: path.read_bytes() for name, (path, _, _) in self.kinds.items()}
        self.says = {name: self._read(name) for name in self.kinds}
        wrong = {name: said for name, said in self.says.items() if said[0] != 0}
        assert not wrong, wrong

    @staticmethod
    def _call(script: object, options: list) -> None:
        script.main(script.get_parser().parse_args([*map(str, options)]))

    def _read(self, name: str) -> tuple[int, str, str]:
        path, script, options = self.kinds[name]
        before, out, err = sys.argv, io.StringIO(), io.StringIO()
        sys.argv = [f"{script.__name__}.py", *map(str, options(path))]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run_script(script.main, script.get_parser())
        except SystemExit as stopped:
            return stopped.code, out.getvalue(), err.getvalue()
        finally:
            sys.argv = before

    def changed(self, name: str, content: bytes, *, exact: bool) -> int:
        """Read a changed file and put the whole one back; return the exit status.

        Args:
            name: of the kind.
            content: what the file holds now.
            exact: whether status 0 must come with the numbers of the whole file.

        Raises:
            AssertionError: something that must never happen did.
            Exception: whatever the program raised, which it must not.
        """
        path = self.kinds[name][0]
        path.write_bytes(content)
        start, memory = time.process_time(), forget_peak()
        try:
            status, out, err = self._read(name)
            more = peak() - memory
            lines = [line for line in err.splitlines() if line and not line.startswith("note:")]
            assert status in (0, 1, 2) and len(lines) == (status != 0), (status, err)
            seconds = time.process_time() - start  # of this process, however busy the machine is
            assert more < 1 << 20 and seconds < 10, f"{more} kB, {seconds:.1f} s"
            if status == 0 and exact:
                assert out == self.says[name][1], out
                if name in ("checkpoint", "compact", "pruned"):
                    self._compare(path, name)
            return status
        finally:
            path.write_bytes(self.whole[name])

    def _compare(self, path: Path, name: str) -> None:
        """Compare the tensors and accuracies of a file that was read with those of the whole one, bit by bit."""
        found = load_checkpoint(path)
        path.write_bytes(self.whole[name])
        whole = load_checkpoint(path)
        assert all(torch.equal(found["state_dict"][n], t) for n, t in whole["state_dict"].items())
        assert {key: found.get(key) for key in ("acc", "epoch", "config")} == {
            key: whole.get(key) for key in ("acc", "epoch", "config")
        }


HAVE_CHECKSUMS = ("checkpoint", "compact", "pruned", "prune.json", "config.json", "log.csv")
STRUCTURED = ("checkpoint", "resumed", "prune.json", "study", "summary.json", "config.json")
EDITS = st.lists(
    st.tuples(st.sampled_from("flip cut insert double zero end".split()), st.floats(0, 1), st.binary(max_size=8)),
    min_size=1,
    max_size=3,
)


def edit(content: bytes, edits: list) -> bytes:
    """Change bytes: flip a bit, cut, insert, double or clear some, or end early."""
    changed = bytearray(content)
    for what, where, some in edits:
        at, length = int(where * max(len(changed) - 1, 0)), len(some) + 1
        if what == "flip" and changed:
            changed[at] ^= 1 << len(some) % 8
        elif what == "cut":
            del changed[at : at + length]
        elif what == "insert":
            changed[at:at] = some
        elif what == "double":
            changed[at:at] = changed[at : at + length]
        elif what == "zero":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif what == "end":
            del changed[at:]
    return bytes(changed)


def replace_deep(content: object, value: object, draw: Callable[[st.SearchStrategy], object]) -> object:
    """Return a copy in which one value somewhere inside is another, or is gone."""
    changed = copy.deepcopy(content)
    inside = changed
    while True:
        keys = [*inside] if isinstance(inside, dict) else [*range(len(inside))]
        key = draw(st.sampled_from(keys))
        deeper = isinstance(inside[key], (dict, list)) and inside[key]
        if not deeper or draw(st.integers(0, 3)) == 0:
            break
        inside = inside[key]
    if draw(st.integers(0, 4)) == 0:
        del inside[key]
    else:
        inside[key] = value
    return changed


def one_example(kinds: Kinds, name: str, draw: Callable[[st.SearchStrategy], object]) -> int:
    """Change one file of a kind as hypothesis draws it, and read it; return the exit status."""
    whole = kinds.whole[name]
    if name in STRUCTURED and draw(st.booleans()):
        if name in ("checkpoint", "resumed"):
            place = kinds.folder / "changed"
            place.write_bytes(whole)
            value = draw(st.sampled_from([*ODD, *TENSORS]))
            save_checkpoint(place, replace_deep(load_checkpoint(place), value, draw))
            return kinds.changed(name, place.read_bytes(), exact=False)
        content = {key: value for key, value in json.loads(whole).items() if key != "checksum"}
        changed = replace_deep(content, draw(st.sampled_from(ODD)), draw)
        return kinds.changed(name, json.dumps(changed).encode(), exact=False)
    return kinds.changed(name, edit(whole, draw(EDITS)), exact=name in HAVE_CHECKSUMS)


def examples(kinds: Kinds, name: str, counts: collections.Counter) -> Callable[[], None]:
    """Return the test that hypothesis runs on one kind, which counts the exit statuses."""

    @hypothesis.given(data=st.data())
    def example(data):
        counts[one_example(kinds, name, data.draw)] += 1

    return example


def main() -> int:
    """Go through the kinds until the time is up; state the counts, and the first thing that must never happen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long")
    minutes = parser.parse_args().minutes
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    settings = hypothesis.settings(
        max_examples=20,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate],  # shrinking could take all the time
    )
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        kinds, end, number = Kinds(Path(place)), time.monotonic() + 60 * minutes, 0
        while time.monotonic() < end and failed < 20:
            for name in kinds.kinds:
                try:
                    hypothesis.seed(number)(settings(examples(kinds, name, counts[name])))()
                except Exception as error:
                    failed += 1
                    print(f"{name}, seed {number}: {type(error).__name__}: {str(error)[:1000]}", flush=True)
            number += 1
    for name, statuses in counts.items():
        print(f"{name}: " + ", ".join(f"{n} status {status}" for status, n in sorted(statuses.items())))
    total = sum(sum(statuses.values()) for statuses in counts.values())
    print(f"{total} changed files in {minutes:g} minutes, {failed} of them with what must never happen")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
