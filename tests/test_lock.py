"""One writer a folder, whoever dies."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, TINY, train

from utils.files import lock
from utils.files.lock import LockedError, folder_lock
from utils.training import experiment


def write_lock(folder, **changes):
    """Leave a lock of this process, or with other contents, as somebody else's."""
    (folder / ".lock").write_text(json.dumps(lock.myself() | changes))


def test_a_second_holder_is_refused_and_the_folder_is_free_afterwards(tmp_path):
    says = rf"process {os.getpid()} on .* works in .*: wait for it, or"
    with folder_lock(tmp_path), pytest.raises(LockedError, match=says), folder_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path):
        pass


def test_of_many_threads_one_at_a_time_holds_it(tmp_path):
    inside, most, refused = 0, 0, 0
    count = threading.Lock()

    def work():
        nonlocal inside, most, refused
        for _ in range(20):
            try:
                with folder_lock(tmp_path):
                    with count:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with count:
                        inside -= 1
            except LockedError:
                with count:
                    refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and refused > 0


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        f"from utils.files.lock import folder_lock as f; c = f({str(tmp_path)!r}); c.__enter__(); print(1, flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", f"{code}; input()"], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert holder.stdout.readline() == "1\n"
    with pytest.raises(LockedError, match=str(holder.pid)), folder_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with folder_lock(tmp_path):
        pass


def test_a_process_number_that_is_used_again_does_not_count(tmp_path):
    write_lock(tmp_path, started="1")
    with folder_lock(tmp_path):
        pass


def test_a_holder_that_ended_and_whose_status_nobody_asked_for_does_not_count(tmp_path):
    ended = subprocess.Popen(["sleep", "60"])
    write_lock(tmp_path, process=ended.pid, started=lock.started(ended.pid))
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    with folder_lock(tmp_path):
        assert lock.started(ended.pid) is None
    ended.wait()


@pytest.mark.parametrize(
    ("error", "age", "held"),
    [(PermissionError, 0, True), (PermissionError, lock.STALE + 1, False), (ProcessLookupError, 0, False)],
)
def test_a_holder_that_proc_hides_counts_while_it_shows_life(tmp_path, monkeypatch, error, age, held):
    """As of another user, where /proc is mounted with hidepid; after a loss of power another may have its number."""
    read_text = lock.Path.read_text

    def hide(path):
        if str(path) == "/proc/1/stat":
            raise FileNotFoundError
        return read_text(path)

    def kill(process, signal):
        raise error

    monkeypatch.setattr(lock.Path, "read_text", hide)
    monkeypatch.setattr(lock.os, "kill", kill)
    write_lock(tmp_path, process=1, started="1")
    os.utime(tmp_path / ".lock", (time.time() - age,) * 2)
    assert (lock.holder_of(tmp_path / ".lock") is not None) == held


@pytest.mark.parametrize(("age", "held"), [(0, True), (lock.STALE + 1, False)])
def test_a_holder_on_another_machine_counts_while_it_shows_life(tmp_path, age, held):
    write_lock(tmp_path, host="elsewhere", machine="another")
    os.utime(tmp_path / ".lock", (time.time() - age,) * 2)
    if held:
        with pytest.raises(LockedError, match="elsewhere"), folder_lock(tmp_path):
            pass
    else:
        with folder_lock(tmp_path):
            pass


def test_a_holder_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with folder_lock(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / ".lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / ".lock").stat().st_mtime > 0


def test_who_was_taken_over_notices_and_leaves_the_other_lock(tmp_path):
    with folder_lock(tmp_path) as mine:
        mine.require()
        write_lock(tmp_path, taken="by another")
        with pytest.raises(LockedError, match="taken over"):
            mine.require()
    assert json.loads((tmp_path / ".lock").read_text())["taken"] == "by another"


def test_a_run_that_was_taken_over_writes_nothing_more(images, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def epoch(run):
        write_lock(folder, taken="by another")
        return {}

    monkeypatch.setattr("utils.training.experiment.run_epoch", epoch)
    with pytest.raises(LockedError, match="taken over"):
        train("-d", "folder", "--data", images, *TINY, "--save_dir", folder)
    assert not (folder / "final.pth.tar").exists() and not (folder / "log.csv").read_text()


@pytest.mark.parametrize("step", ["begin", "begin_folder", "write_outputs"])
def test_a_run_that_was_taken_over_before_a_step_leaves_the_files_of_the_other(images, tmp_path, monkeypatch, step):
    folder = tmp_path / "run"
    original = getattr(experiment, step)

    def stand_still(run):
        write_lock(folder, taken="by another")
        (folder / "checkpoint.pth.tar").write_text("of another")
        return original(run)

    monkeypatch.setattr(experiment, step, stand_still)
    with pytest.raises(LockedError, match="taken over"):
        train("-d", "folder", "--data", images, *TINY, "--epochs", "1", "--schedule", "--save_dir", folder)
    assert (folder / "checkpoint.pth.tar").read_text() == "of another"
    assert not (folder / "final.pth.tar").exists()


def test_the_age_of_a_lock_does_not_go_by_the_clock_of_this_machine(tmp_path, monkeypatch):
    write_lock(tmp_path, host="elsewhere", machine="another")
    monkeypatch.setattr(lock.time, "time", lambda: 1e12)
    assert lock.holder_of(tmp_path / ".lock")["host"] == "elsewhere"


@pytest.mark.parametrize(("age", "held"), [(0, True), (lock.BEAT + 1, False)])
def test_a_lock_that_was_cut_short_counts_for_a_moment(tmp_path, age, held):
    (tmp_path / ".lock").write_text("{")
    os.utime(tmp_path / ".lock", (time.time() - age,) * 2)
    if held:
        with pytest.raises(LockedError), folder_lock(tmp_path):
            pass
    else:
        with folder_lock(tmp_path):
            pass


def test_a_second_run_into_one_folder_ends_in_one_line(images, tmp_path, fails):
    folder = tmp_path / "run"
    folder.mkdir()
    write_lock(folder)
    status, line = fails("-d", "folder", "--data", images, *TINY, "--save_dir", folder)
    assert status == 1 and f"process {os.getpid()}" in line and "--save_dir" in line
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["config.json", "final.pth.tar", "summary.json"])
def test_any_file_of_a_run_guards_its_folder(name, images, tmp_path, fails):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("mine")
    arguments = ("-d", "folder", "--data", images, *TINY, "--save_dir", folder)
    status, line = fails(*arguments)
    assert status == 1 and name in line and "--overwrite" in line
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "mine"}


def test_what_a_killed_process_left_half_written_goes(images, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".checkpoint.pth.tar.1.2.tmp").write_text("half")
    (folder / ".mine.tmp").write_text("keep")
    train("-d", "folder", "--data", images, *TINY, "--epochs", "1", "--save_dir", folder)
    assert [path.name for path in folder.glob(".*")] == [".mine.tmp"]
