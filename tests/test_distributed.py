"""Several processes: the same training as one, replicas that are compared, and a job that ends well when one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from conftest import PATIENCE, ROOT, train
from forked import CONTEXT, Forked

import cifar_prune_iterative
import mnist.mnist
from utils import distributed
from utils.files.checkpoint import load_checkpoint
from utils.options import OptionError
from utils.seeds import seed_process
from utils.training.augment import Loader
from utils.training.dataset import Dataset, Split
from utils.training.stops import way_to_go_on

LENET = ["-d", "digits", "-a", "lenet_300_100", "--halo", "--xi", "1e-4", "--psi", "1e-4", "--lr", "0.05"]
LENET += ["--device", "cpu"]
LENET += ["--schedule", "1", "--train_batch", "64"]  # 1437 images: the last batch has 29, which two cannot halve


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def environment(rank, processes, port):
    """Return what torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()} | {"OMP_NUM_THREADS": "1"}


def run_together(*options, script="mnist/mnist.py", processes=2, cwd=None, figures=False):
    """Run a script in several processes; return what each printed, after a good end."""
    port = free_port()
    environments = [environment(rank, processes, port) for rank in range(processes)]
    jobs = [Forked(*options, script=script, env=own, cwd=cwd, figures=figures) for own in environments]
    outputs = [job.communicate(timeout=PATIENCE) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * processes, outputs
    return [out for out, _ in outputs]


def run_alone(*options):
    return mnist.mnist.main(mnist.mnist.get_parser().parse_args([str(option) for option in options]))


def assert_close(one, other):
    """Compare weights and lam of two runs within fp32 rounding."""
    a, b = (load_checkpoint(folder / "final.pth.tar") for folder in (one, other))
    for key in ("state_dict", "lambdas"):
        for name, value in a[key].items():
            torch.testing.assert_close(b[key][name], value, rtol=1e-5, atol=1e-6)


def test_two_processes_equal_one_and_another_number_continues(tmp_path, figures):
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    summary = run_alone(*LENET, "--epochs", 2, "--save_dir", one)
    first, second = run_together(*LENET, "--epochs", 2, "--save_dir", two, figures=True)
    assert first.count("epoch") >= 2 and second == ""  # only rank 0 prints
    assert_close(one, two)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    theirs = json.loads((two / "summary.json").read_text())
    for key in ("train_top1", "train_loss", "test_top1", "test_loss"):  # summed over the processes
        assert theirs["final"][key] == pytest.approx(summary["final"][key], rel=1e-5)
    assert json.loads((two / "config.json").read_text())["processes"] == 2

    run_together(*LENET, "--epochs", 1, "--save_dir", mixed, processes=3)
    run_alone(*LENET, "--epochs", 2, "--save_dir", mixed, "--resume", mixed / "checkpoint.pth.tar")
    assert_close(one, mixed)


def test_all_processes_test_the_best_network_that_the_first_has_written(tmp_path):
    """After a single epoch nobody but the first has anything to do before it: the file is not there yet."""
    options = [*LENET, "--epochs", 1, "--val_split", 100, "--save_dir"]
    run_together(*options, tmp_path / "two")
    alone = run_alone(*options, tmp_path / "one")["test_of_best"]
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["test_of_best"] == pytest.approx(alone, rel=1e-5)


# nn.Dropout of some versions of torch (2.6) draws one number, however many activations there are.
DROPOUT = """
import torch
from torch import nn

class Dropout(nn.Module):
    def forward(self, x):
        return x * (torch.rand_like(x) < 0.5) if self.training else x

def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), Dropout(), nn.Linear(4 * 32 * 32, num_classes))
"""


def test_dropout_in_several_processes_goes_on_bit_for_bit(images, tmp_path):
    """Their shares of the last batch differ, so that each has drawn another number of masks."""
    (tmp_path / "dropout.py").write_text(DROPOUT)
    options = ["-d", "folder", "--data", images, "-a", "dropout:net", "--schedule", "--train_batch", 11, "--lr", 0.01]
    options += ["--device", "cpu"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    resume = ["--resume", stopped / "checkpoint.pth.tar"]
    run_together(*options, "--epochs", 2, "--save_dir", straight, script="cifar.py", cwd=tmp_path)
    run_together(*options, "--epochs", 1, "--save_dir", stopped, script="cifar.py", cwd=tmp_path)
    states = load_checkpoint(stopped / "checkpoint.pth.tar")["rng"]["torch"]
    assert len(states) == 2 and not torch.equal(*states)
    run_together(*options, "--epochs", 2, "--save_dir", stopped, *resume, script="cifar.py", cwd=tmp_path)
    one, other = (load_checkpoint(folder / "final.pth.tar")["state_dict"] for folder in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "text, gone",
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9407", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("Expected to have finished reduction in the prior iteration before starting a new one.", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("mat1 and mat2 shapes cannot be multiplied (64x10 and 12x10)", False),
    ],
)
def test_only_a_broken_connection_is_called_one(text, gone, monkeypatch, tmp_path):
    for name, value in environment(1, 2, "1").items():
        monkeypatch.setenv(name, value)
    run = SimpleNamespace(folder=tmp_path, args=SimpleNamespace(compile=False))
    expected = (ConnectionError, "rank 1: another process") if gone else (RuntimeError, "^")
    with pytest.raises(expected[0], match=expected[1]), way_to_go_on(run):
        raise RuntimeError(text)
    assert distributed.is_lost(distributed.dist.DistNetworkError("timed out"))


def kill_one(job, victim):
    """Kill the process of one rank with SIGKILL."""
    for path in (pid for pid in os.listdir("/proc") if pid.isdigit()):
        try:
            with open(f"/proc/{path}/stat") as stat, open(f"/proc/{path}/environ") as env:
                parent, variables = int(stat.read().rsplit(")", 1)[1].split()[1]), env.read().split("\0")
        except OSError:
            continue
        if parent == job.pid and f"RANK={victim}" in variables:
            os.kill(int(path), signal.SIGKILL)
            return
    raise AssertionError("no such process")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes of torchrun in /proc")
def test_a_killed_rank_ends_the_job_with_a_way_to_go_on(tiny, tmp_path):
    """With BatchNorm and augmentation, through torchrun itself; rank 0, which alone writes, is the worse to lose."""
    folder = tmp_path / "run"
    script = [*tiny, "--halo", "--epochs", "1000", "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "cifar.py"), *script]
    job = subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not (folder / "model_best.pth.tar").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    kill_one(job, 0)
    _, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    done = load_checkpoint(folder / "checkpoint.pth.tar")["epoch"]
    message = r"cifar.py: (error: rank 1: another process of the job ended|stopped).* holds the last finished epoch; "
    assert re.search(message + "continue with: torchrun --nproc_per_node 2 .*cifar.py", errors), errors
    summary = train(*tiny, "--halo", "--epochs", done + 1, "--resume", folder / "checkpoint.pth.tar")
    assert summary["final"]["epoch"] == done + 1


def in_each_process(rank, port, folder):
    """What the processes check of each other; an assertion that fails ends the test."""
    os.environ.update(environment(rank, 2, port))
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        assert distributed.sum_(torch.tensor([1.0 + rank])).item() == 3

        norm = torch.nn.BatchNorm2d(2)
        norm.running_mean.fill_(rank)
        distributed.average_buffers_(norm)
        assert norm.running_mean.tolist() == [0.5, 0.5] and norm.num_batches_tracked == 0

        norm.num_batches_tracked.fill_(3 + rank)
        for name, whole in (("ids", torch.arange(3).expand(2, 3)), ("small", torch.ones(2, dtype=torch.uint16))):
            norm.register_buffer(name, whole)  # of a network of one's own: the rows of the first are one memory
        norm.register_buffer("on", torch.tensor(rank == 0))
        distributed.average_buffers_(norm)
        assert norm.num_batches_tracked == 3 and norm.on and norm.ids.tolist() == [[0, 1, 2]] * 2

        lam = {"w": torch.ones(1000)}
        distributed.require_equal(lam, "lam")
        lam["w"][7] += 1e-7 * rank  # the smallest difference there is
        try:
            distributed.require_equal(lam, "lam")
        except distributed.ReplicasDifferError as error:
            (folder / f"differ{rank}").write_text(str(error))

        order = folder / "order"
        with distributed.main_first():
            time.sleep(0.2 * (1 - rank))
            with open(order, "a") as file:
                file.write(str(rank))


def test_processes_compare_and_average(tmp_path):
    mp.start_processes(in_each_process, (free_port(), tmp_path), nprocs=2, start_method=CONTEXT.get_start_method())
    assert (tmp_path / "order").read_text() == "01"
    for rank in range(2):
        assert re.match(r"lam differs .*\(checksums (\w+), (?!\1)", (tmp_path / f"differ{rank}").read_text())


@pytest.mark.parametrize("count", [12, 13, 9])
def test_shares_of_a_batch_make_up_the_batch(count):
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    split = Split(images, torch.arange(count))
    whole = Dataset(split, split, ("a", "b"), (0.0,), (1.0,), padding=0, flip=False)

    def batches(rank, processes):
        generator = torch.Generator().manual_seed(5)
        return [
            *Loader(split, whole, batch_size=4, generator=generator, rank=rank, processes=processes),
        ]

    alone, shared = batches(0, 1), [batches(rank, 3) for rank in range(3)]
    for index, (_, labels, weight) in enumerate(alone):
        shares = [one[index] for one in shared]
        assert weight == 1 and sum(share.weight for share in shares) == pytest.approx(3)
        assert sorted(label for s in shares if s.weight for label in s.labels.tolist()) == sorted(labels.tolist())
        # the mean of the weighted means of the processes is the mean of the batch
        mean = sum(share.labels.double().mean() * share.weight for share in shares) / 3
        assert mean.item() == pytest.approx(labels.double().mean().item())


def test_evaluation_shares_whole_batches_in_order():
    split = Split(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10))
    whole = Dataset(split, split, ("a", "b"), (0.0,), (1.0,), padding=0, flip=False)
    shares = [[b.labels.tolist() for b in Loader(split, whole, batch_size=4, rank=r, processes=2)] for r in range(2)]
    assert shares == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]]


def test_what_cannot_be_shared_is_refused(fails_in, monkeypatch, tmp_path):
    for name, value in environment(0, 2, "1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="--train_batch 1 is shared by 2 processes"):
        train("--train_batch", 1, "--save_dir", tmp_path / "run")
    for script, options in ((cifar_prune_iterative, []), (mnist.mnist, ["--percent", "0.5", "--resume", "x"])):
        status, line = fails_in(script, *options)
        assert status == 2 and "torchrun" in line


@pytest.mark.parametrize(("processes", "main"), [(None, True), ("1", True), ("2", False)])
def test_a_rank_alone_silences_nobody(monkeypatch, processes, main):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert distributed.is_main() is main


def test_each_process_draws_other_numbers_and_the_first_those_of_one_alone():
    drawn = []
    for rank in (None, 0, 1, 2):
        torch.manual_seed(1)
        if rank is not None:
            seed_process(1, rank)
        drawn.append(tuple(torch.rand(4).tolist()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


@pytest.mark.parametrize("device", ["auto", "mps"])
def test_several_processes_on_an_apple_gpu_are_one_line(monkeypatch, tiny, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, value in environment(0, 2, "1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="--device mps is one process"):
        train(*tiny, "--device", device)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("set_by_torchrun", [{"LOCAL_RANK": "1"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}])
def test_more_processes_than_gpus_is_one_line_in_each(monkeypatch, fails, tiny, device, set_by_torchrun):
    """In each: else one would wait for the others, which ended."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in set_by_torchrun.items():
        monkeypatch.setenv(name, value)
    status, line = fails(*tiny, "--device", device)
    assert status == 2 and "2 processes need a GPU each, only 1 seen: start 1, or --device cpu" in line
