"""Files that survive a full disk, and files that must not be believed."""

import contextlib
import errno
import io
import os
import pickle
import resource
import stat
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT

from models import build_model
from utils.files.atomic import atomic_write
from utils.files.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint

STATE = {"epoch": 3, "state_dict": {"w": torch.arange(4.0)}, "acc": 70.7, "best_acc": 71.0}


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "a.pth.tar", STATE)
    loaded = load_checkpoint(tmp_path / "a.pth.tar")
    assert (loaded["epoch"], loaded["acc"], loaded["best_acc"]) == (3, 70.7, 71.0)
    assert torch.equal(loaded["state_dict"]["w"], STATE["state_dict"]["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth.tar"]


def test_the_prefix_of_dataparallel_goes_once_and_only_where_all_have_it(tmp_path):
    """A network may have a part called `module`."""
    for names, expected in (
        (["module.a", "module.module.b"], ["a", "module.b"]),
        (["module.a", "b"], ["module.a", "b"]),
    ):
        save_checkpoint(tmp_path / "a.pth.tar", {"state_dict": dict.fromkeys(names, torch.zeros(1))})
        assert list(load_checkpoint(tmp_path / "a.pth.tar")["state_dict"]) == expected
    ours = {"state_dict": {"module.b": torch.zeros(1)}, "pruning": {"asked": 0.5}}
    save_checkpoint(tmp_path / "a.pth.tar", ours)
    assert list(load_checkpoint(tmp_path / "a.pth.tar")["state_dict"]) == ["module.b"]


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_flushed_is_no_failure_to_write(tmp_path, monkeypatch, number, raises):
    """Some file systems flush files only; a disk that fails is named."""
    flush, opened = os.fsync, len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with pytest.raises(OSError, match="cannot write") if raises else contextlib.nullcontext():
        save_checkpoint(tmp_path / "a.pth.tar", STATE)
    assert load_checkpoint(tmp_path / "a.pth.tar")["epoch"] == 3 and len(list(tmp_path.iterdir())) == 1
    assert not opened or len(os.listdir("/proc/self/fd")) == opened


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The limit on the size of a file stands for a disk that fills while the checkpoint is written."""
    path = tmp_path / "a.pth.tar"
    save_checkpoint(path, STATE)
    code = (
        "import signal, torch; from utils.files.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"try: save_checkpoint({str(path)!r}, {{'state_dict': {{'w': torch.rand(1000000)}}}})\n"
        "except OSError as error: print(error)"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert f"cannot write {path}" in done.stdout and done.stderr == ""
    assert load_checkpoint(path)["epoch"] == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_release_format(tmp_path, monkeypatch, device):
    """The old, non-zip format with a DataParallel prefix, and tensors that say they were on a GPU."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: device)
    state = STATE | {"state_dict": {"module.w": torch.arange(4.0)}}
    torch.save(state, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    if device == "cuda:0" and not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "old.pth.tar", weights_only=True)
    assert list(load_checkpoint(tmp_path / "old.pth.tar")["state_dict"]) == ["w"]


class Hostile:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('hacked').write_text('')",)


def zipped_hostile(path):
    torch.save(STATE | {"extra": Hostile()}, path)


def plain_hostile(path):
    path.write_bytes(pickle.dumps(STATE["acc"]) + pickle.dumps(Hostile()))
    path.write_bytes(pickle.dumps(Hostile()))


@pytest.mark.parametrize("write", [zipped_hostile, plain_hostile])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.pth.tar")
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint("bad.pth.tar")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_files_are_named(tmp_path, zipped, kept):
    buffer = io.BytesIO()
    torch.save(STATE | {"more": torch.rand(2000)}, buffer, _use_new_zipfile_serialization=zipped)
    whole = buffer.getvalue()
    path = tmp_path / "cut.pth.tar"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match="cut.pth.tar"):
        load_checkpoint(path)


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: None, "no checkpoint at"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text("hello, I am a text file\n"), "another copy"),
        (other_zip, "another copy"),
        (lambda path: torch.save([1, 2], path), "state_dict"),
        (lambda path: torch.save({"epoch": 1}, path), "state_dict"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, write, words):
    write(tmp_path / "x.pth.tar")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "x.pth.tar")


def test_another_network_is_described(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"fc.weight \(100, 64\) instead of \(10, 64\).*fits -a resnet --depth 8 with 100"
    ):
        load_weights(build_model("resnet", 10, 8), build_model("resnet", 100, 8).state_dict(), path="x")
    with pytest.raises(CheckpointError, match="absent"):
        load_weights(build_model("vgg11", 10), build_model("vgg11_bn", 10).state_dict(), path="x")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    save_checkpoint(tmp_path / "c.pth.tar", {"state_dict": {"w": torch.ones(2)}})
    monkeypatch.setattr("utils.files.checkpoint.inspect", forbidden)  # chmod does not stop root, as whom CI runs
    with pytest.raises(CheckpointError, match="cannot read .*c.pth.tar: change its permissions"):
        load_checkpoint(tmp_path / "c.pth.tar")
