"""A study on a Dask cluster and in shards: what comes out is what one machine computes, whoever dies."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, jobs_in_this_process
from test_reproduce import STUDY, run, wait_until, write_study

import reproduce
from utils.files import lock
from utils.files.lock import LockedError, folder_lock, holder_of
from utils.run import read_json
from utils.studies import cluster, executors, phases
from utils.studies.cluster import Command, CommandEndedError, Followed, at_worker, connect, look, look_at_workers
from utils.studies.executors import AGAIN, Workers, count_start, run_jobs, threads_each
from utils.studies.jobs import run_job, tuning_jobs
from utils.studies.shards import Shard, parse_shard, study_lock
from utils.studies.study import load_study

LONG = {
    "options": STUDY["options"] | {"epochs": 12, "schedule": [6]},
    "methods": {"none": {"penalty": "none"}, "L1": {"penalty": "l1", "grid": {"xi": [1e-3]}}},
    "seeds": [1],
    "controls": [],
}


def table(out) -> list[dict]:
    """The rows of table.csv without what the clock says."""
    with open(out / "table.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def holders(out) -> dict:
    """The process numbers of those that train, by the folder of the run."""
    return {path.parent: holder["process"] for path in out.glob("*/*/*/run/.lock") if (holder := holder_of(path))}


class Cluster:
    """A scheduler and two worker processes, on ports that the system chooses: several of them may run at a time."""

    def __init__(self, folder):
        self.file, self.folder = folder / "scheduler.json", folder
        self.scheduler = self.dask("scheduler", "--port", "0")
        wait_until(self.file.exists)
        self.workers = self.dask("worker", "--nworkers", "2", "--nthreads", "1", "--local-directory", str(folder))
        self.address = json.loads(self.file.read_text())["address"]

    def dask(self, *arguments):
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard", "--scheduler-file", str(self.file)]
        with open(self.folder / f"{arguments[0]}.log", "w") as log:
            # from another folder, without our modules on the path
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def end(self):
        for process in (self.workers, self.scheduler):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    """A running cluster; that of the last test may be killed."""
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.end()


@contextmanager
def threads_of_two_workers():
    """Compute with as many threads as one of two workers has: sums are the same to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_each(2))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The folder of the study LONG, run in this process."""
    folder = tmp_path_factory.mktemp("local")
    with jobs_in_this_process(), threads_of_two_workers():
        run(write_study(folder, **LONG), "--out", folder / "out", "--jobs", 2)
    return folder / "out"


@pytest.fixture
def inline(monkeypatch):
    """Run the jobs of `local_workers` in this process."""

    class Pool:
        def __init__(self, *_, **__):
            pass

        def submit(self, function, job):
            future = Future()
            try:
                future.set_result(function(job))
            except Exception as error:
                future.set_exception(error)
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(executors, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr("utils.studies.report.plot_pareto", lambda *_, **__: None)
    monkeypatch.setattr("utils.studies.report.plot_study", lambda *_, **__: None)
    with threads_of_two_workers():
        yield


def test_a_cluster_computes_what_one_machine_does_though_a_worker_is_killed_in_mid_run(dask, local, tmp_path, capsys):
    out = tmp_path / "out"
    killed, begun = [], []

    def kill_one():
        wait_until(lambda: any(len((f / "log.csv").read_text().splitlines()) > 2 for f in busy(out)))
        folder = next(f for f in busy(out) if len((f / "log.csv").read_text().splitlines()) > 2)
        os.kill(holders(out)[folder], signal.SIGKILL)
        killed.append(folder)
        begun.append((folder.parent / "log.txt").read_text())

    killer = threading.Thread(target=kill_one)
    killer.start()
    run(write_study(tmp_path, **LONG), "--out", out, "--scheduler", dask.address)
    killer.join()
    assert table(out) == table(local) and len(table(out)) == 4
    log = (killed[0].parent / "log.txt").read_text()
    assert log.startswith(begun[0]) and re.search(r"epoch +1/12 ", begun[0]), "it had an epoch when it was killed"
    assert len(re.findall(r"epoch +1/12 ", log)) == len(re.findall(r"epoch +12/12 ", log)) == 1, "and went on from it"
    assert not [*out.rglob("starts.json"), *out.rglob(".lock"), *out.rglob("failed.json")]
    config = read_json(killed[0] / "config.json")
    assert "dask" not in config["command"][0] and config["threads"] == threads_each(2)
    capsys.readouterr()
    run(tmp_path / "small.json", "--out", out, "--scheduler", dask.address)
    assert "[" not in capsys.readouterr().out


def busy(out) -> list:
    """The folders of runs that train and have a log."""
    return [folder for folder in holders(out) if (folder / "log.csv").exists()]


def test_a_worker_that_sees_other_folders_is_named(dask, tmp_path):
    """The worker looks for what the command sends, which here is not there, as if nothing were shared."""
    client = connect(dask.address)
    try:
        with folder_lock(tmp_path) as held:
            right = Command(held, str(tmp_path), frozenset(), ())
            (sharing,) = look_at_workers(client, right).values()
            assert sharing == 2
            data = str(tmp_path / "images")
            with pytest.raises(OSError, match=rf"worker tcp://\S+ does not see MNIST in --data {data}"):
                look_at_workers(client, Command(held, data, frozenset(["MNIST"]), ()))
        with pytest.raises(OSError, match=rf"worker tcp://\S+ does not see --out {tmp_path} as this machine does"):
            look_at_workers(client, right)
    finally:
        client.close()


def test_the_scheduler_lost_ends_in_the_line_that_continues(dask, local, tmp_path, fails_in):
    """The last with this cluster: its scheduler is killed. What was begun goes on without one."""
    options = LONG | {"options": LONG["options"] | {"epochs": 10**6}}
    path, out = write_study(tmp_path, **options), tmp_path / "out"

    def kill():
        wait_until(lambda: busy(out))
        os.killpg(dask.scheduler.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    status, line = fails_in(reproduce, path, "--out", out, "--scheduler", dask.address)
    killer.join()
    assert status == 1 and f"{dask.address} was lost" in line and "the same command continues" in line
    wait_until(lambda: not holders(out))  # the workers end too
    assert not (out / ".lock").exists()
    dask.workers.terminate()


def test_no_scheduler_is_one_line(tmp_path, fails_in, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    for address in ("tcp://127.0.0.1:1", "nonsense", "http://127.0.0.1:1"):
        start = time.monotonic()
        status, line = fails_in(reproduce, write_study(tmp_path), "--out", tmp_path / "out", "--scheduler", address)
        assert status == 1 and address in line and "dask scheduler" in line
        assert time.monotonic() - start < 30
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_is_said_what_to_install(tmp_path, fails_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    status, line = fails_in(reproduce, write_study(tmp_path), "--out", tmp_path / "out", "--scheduler", "a:1")
    assert status == 2 and "pip install -r requirements-cluster.txt" in line
    assert (ROOT / "requirements-cluster.txt").read_text().startswith("distributed")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scheduler", "a:1", "--shard", "1/2"], "--shard"),
        (["--scheduler", "a:1", "--jobs", "2"], "--jobs"),
        (["--scheduler", "a:1", "--dry_run"], "--dry_run"),
        (["--shard", "0/4"], "1/4 to 4/4"),
        (["--shard", "5/4"], "1/4 to 4/4"),
        (["--shard", "1/0"], "from 1"),
        (["--shard", "x"], "I/N"),
        (["--shard", "1/2/3"], "I/N"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says, tmp_path, fails_in):
    status, line = fails_in(reproduce, write_study(tmp_path), "--out", tmp_path / "out", *options)
    assert status == 2 and says in line and not (tmp_path / "out").exists()


def test_a_worker_with_several_threads_is_refused(tmp_path):
    class Client:
        def run(self, *_, **__):
            return {"tcp://b:2": "b"}

        def nthreads(self):
            return {"tcp://b:2": 4}

    with folder_lock(tmp_path) as held, pytest.raises(OSError, match=r"worker tcp://b:2 does 4 jobs .*--nthreads 1"):
        look_at_workers(Client(), Command.here(held, "data"))


def test_a_worker_that_began_before_the_code_changed_is_refused(tmp_path, monkeypatch):
    with folder_lock(tmp_path) as held:
        sent = at_worker(look, Command.here(held, str(tmp_path)))
        assert sent().startswith(lock.socket.gethostname())
        monkeypatch.setattr(cluster, "CODE", "of a process that began earlier")
        with pytest.raises(OSError, match="another version of this repository than the command: restart"):
            sent()


def test_what_a_worker_is_sent_needs_none_of_our_modules(tmp_path):
    cloudpickle = pytest.importorskip("cloudpickle")
    with folder_lock(tmp_path) as held:
        sent = cloudpickle.dumps(at_worker(look, Command.here(held, str(tmp_path))))
        code = "import sys, pickle; print(pickle.loads(sys.stdin.buffer.read())())"
        done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, cwd=tmp_path)
    assert lock.socket.gethostname() in done.stdout.decode(), done.stderr.decode()


def test_a_run_ends_when_nobody_waits_for_it(tmp_path):
    study = load_study(write_study(tmp_path, options=STUDY["options"] | {"epochs": 10**6}))
    (tmp_path / "out").mkdir()
    job = tuning_jobs(study, tmp_path / "out", "data")[0]
    with folder_lock(tmp_path / "out") as held:
        command = Command.here(held, "data")

    def kind(*arguments, **options):
        return Followed(*arguments, command=command, **options)

    with pytest.raises(CommandEndedError, match="after epoch 0"):
        run_job(job, kind=kind)
    assert not job.done


class Gone(Exception):
    """Stands for what a pool raises when it gives a job up."""


def fake_workers(result, **options) -> Workers:
    """Workers whose futures hold what `result` returns or raises."""

    def submit(job):
        future = Future()
        try:
            future.set_result(result(job))
        except CancelledError:
            future.cancel()
            future.set_running_or_notify_cancel()
        except Exception as error:
            future.set_exception(error)
        return future

    return Workers(submit, 1, "all were lost", (Gone,), **options)


@pytest.mark.parametrize(("deaths", "given_up"), [(AGAIN, False), (AGAIN + 1, True)])
def test_a_job_is_run_again_three_times_then_recorded_and_the_rest_goes_on(deaths, given_up, tmp_path, capsys):
    jobs = tuning_jobs(load_study(write_study(tmp_path)), tmp_path / "out", "data")
    left = {jobs[1]: deaths}

    def result(job):
        starts = count_start(job, "this")
        if left.get(job, 0):
            left[job] -= 1
            raise Gone
        return float(starts)

    found = dict(run_jobs(jobs, fake_workers(result)))
    assert set(found) == set(jobs) and found[jobs[0]] == 1.0
    assert found[jobs[1]] == (None if given_up else AGAIN + 1.0)
    assert jobs[1].done == given_up
    if given_up:
        assert "died 4 times" in read_json(jobs[1].folder / "failed.json")["reason"]
        phases.run_phase(jobs[1:2], tmp_path / "out", fake_workers(result), guess=None)  # done: not tried again
        assert left[jobs[1]] == 0


def test_a_job_given_up_for_the_deaths_of_its_neighbours_is_run_again(tmp_path):
    jobs = tuning_jobs(load_study(write_study(tmp_path)), tmp_path / "out", "data")[:1]
    tries = []

    def result(job):
        tries.append(job)
        if len(tries) == 1:
            raise Gone  # it never started
        return 1.0

    assert list(run_jobs(jobs, fake_workers(result))) == [(jobs[0], 1.0)]


def test_starts_are_counted_for_one_command(tmp_path):
    job = tuning_jobs(load_study(write_study(tmp_path)), tmp_path / "out", "data")[0]
    assert [count_start(job, "a"), count_start(job, "a"), count_start(job, "b")] == [1, 2, 1]


def test_cancelled_futures_mean_that_all_were_lost(tmp_path):
    def result(job):
        raise CancelledError

    jobs = tuning_jobs(load_study(write_study(tmp_path)), tmp_path / "out", "data")
    with pytest.raises(OSError, match="all were lost"):
        list(run_jobs(jobs, fake_workers(result)))


def test_a_lost_pool_names_the_jobs_that_have_begun(tmp_path):
    jobs = tuning_jobs(load_study(write_study(tmp_path)), tmp_path / "out", "data")
    jobs[1].folder.mkdir(parents=True)
    (jobs[1].folder / ".lock").touch()

    def result(job):
        raise BrokenProcessPool

    with pytest.raises(OSError, match=rf"all were lost; begun and not ended: {re.escape(str(jobs[1].folder))}$"):
        list(run_jobs(jobs, fake_workers(result)))


def test_workers_that_come_one_after_another_are_all_counted(monkeypatch):
    there, asked = [], []
    monkeypatch.setattr(cluster.time, "sleep", lambda _: there.append(len(there)) if len(there) < 3 else None)
    client = SimpleNamespace(wait_for_workers=asked.append, nthreads=lambda: dict.fromkeys(there, 1))
    there.append(0)
    cluster.wait_for_workers(client)
    assert asked == [1] and len(there) == 3


@pytest.mark.parametrize(("value", "kept"), [("65536", False), ("1000", True)])
def test_the_threshold_of_dasks_nanny_is_not_ours(monkeypatch, value, kept):
    pytest.importorskip("distributed")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", value)
    cluster._forget_malloc()
    assert ("MALLOC_TRIM_THRESHOLD_" in os.environ) == kept


def test_shards_compute_what_one_command_does(local, tmp_path, inline, capsys, fails_in):
    path, out = write_study(tmp_path, **LONG), tmp_path / "out"
    run(path, "--out", out, "--shard", "1/2")
    assert "part 1/2 of tuning is done; when the other parts are (1 of 2 runs are missing" in capsys.readouterr().out
    assert not (out / "chosen.json").exists()
    status, line = fails_in(reproduce, path, "--out", out, "--shard", "1/2")
    assert status == 1 and "nothing can be chosen yet" in line and "L1 xi0.001 seed 1, val, of --shard 2/2" in line
    run(path, "--out", out, "--shard", "2/2")
    assert "part 2/2 of tuning is done; now, the same commands train what is chosen" in capsys.readouterr().out
    assert not list(out.rglob("test"))  # one phase a command
    counts = run(path, "--out", out, "--shard", "2/2", "--dry_run")
    assert counts == {"tuning": 0, "final": 1}
    run(path, "--out", out, "--shard", "2/2")
    assert "of what was chosen 1 of 2 runs are missing" in capsys.readouterr().out
    run(path, "--out", out, "--shard", "1/2")
    assert "and so is the study" in capsys.readouterr().out
    assert table(out) == table(local)
    assert {p.name for p in out.glob("seconds*")} == {"seconds_1of2.json", "seconds_2of2.json"}
    assert run(path, "--out", out, "--dry_run") == {"tuning": 0, "final": 0}


def test_parts_are_disjoint_complete_and_stay_when_others_finish(tmp_path):
    jobs = tuning_jobs(load_study(write_study(tmp_path)), tmp_path / "out", "data")
    parts = [Shard(index, 3).part(jobs) for index in (1, 2, 3)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, jobs)) and parse_shard("3/3") == Shard(3, 3)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "failed.json").write_text("{}")
    assert jobs[0].done and [Shard(index, 3).part(jobs) for index in (1, 2, 3)] == parts


def test_parts_share_a_folder_and_the_whole_has_it_alone(tmp_path):
    with study_lock(tmp_path, Shard(1, 2)), study_lock(tmp_path, Shard(2, 2)), study_lock(tmp_path, Shard(1, 4)):
        for other, says in ((None, "a part of the study"), (Shard(1, 2), "works in")):
            with pytest.raises(LockedError, match=says), study_lock(tmp_path, other):
                pass
    with study_lock(tmp_path, None), pytest.raises(LockedError, match="all of the study"):  # noqa: SIM117
        with study_lock(tmp_path, Shard(1, 2)):
            pass
    assert list(tmp_path.iterdir()) == []
    with study_lock(tmp_path, Shard(1, 1)):
        pass


def test_a_job_that_another_process_does_is_waited_for_and_not_done_again(tmp_path, inline, monkeypatch):
    monkeypatch.setattr(lock, "LOOK", 0.01)
    study = load_study(write_study(tmp_path, methods={"none": {"penalty": "none"}}, controls=[]))
    (job,) = tuning_jobs(study, tmp_path / "out", "data")
    job.folder.mkdir(parents=True)
    (job.folder / "log.txt").touch()  # the thread may not have come so far
    seconds = []
    with folder_lock(job.folder):
        second = threading.Thread(target=lambda: seconds.append(run_job(job)))
        second.start()
        wait_until(lambda: "waiting for it" in (job.folder / "log.txt").read_text())
        (job.folder / "failed.json").write_text('{"reason": "it diverged"}')
    second.join()
    assert seconds == [None] and not (job.folder / "run").exists()


def test_the_run_of_a_lost_machine_is_waited_for_until_its_lock_is_stale(tmp_path, inline, monkeypatch):
    monkeypatch.setattr(lock, "LOOK", 0.01)
    study = load_study(write_study(tmp_path, methods={"none": {"penalty": "none"}}, controls=[]))
    (job,) = tuning_jobs(study, tmp_path / "out", "data")
    (job.folder / "run").mkdir(parents=True)
    left = job.folder / "run" / ".lock"
    left.write_text(json.dumps(lock.myself() | {"machine": "lost", "host": "lost"}))
    seconds, log = [], job.folder / "log.txt"
    waiting = threading.Thread(target=lambda: seconds.append(run_job(job)))
    waiting.start()
    wait_until(lambda: log.exists() and "on lost works in" in log.read_text())
    os.utime(left, (time.time() - lock.STALE - 1,) * 2)
    waiting.join()
    assert seconds[0] > 0 and job.done


def test_a_part_without_a_run_ends_well(tmp_path, capsys):
    """So that a batch array may have more parts than there are runs."""
    rows = run(write_study(tmp_path), "--out", tmp_path / "out", "--jobs", 1, "--shard", "9/9")
    assert not any(rows.values()) and "part 9/9 of tuning is done; when the other parts are" in capsys.readouterr().out


def test_a_failed_job_is_said_to_have_failed(tmp_path, capsys):
    jobs = tuning_jobs(load_study(write_study(tmp_path)), tmp_path / "out", "data")
    jobs[0].folder.mkdir(parents=True)
    progress = phases.Progress(jobs, tmp_path / "out", processes=1)
    (jobs[0].folder / "failed.json").write_text('{"reason": "its worker died"}')
    for seconds in (None, 0.1):  # of a whole run
        progress.untrained[jobs[0]] = 1.0
        progress.add(jobs[0], seconds)
        assert "failed (its worker died)" in (said := capsys.readouterr().out) and "unknown time" in said
    assert not list((tmp_path / "out").glob("seconds*"))
