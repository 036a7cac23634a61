"""A training process keeps the memory that a step frees, and nothing else changes."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, train

from utils.training.memory import keep_freed_memory

PROGRAM = """
import json, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from utils.training.memory import keep_freed_memory

torch.manual_seed(0)
torch.set_num_threads(1)
w = torch.randn(16, 16, 3, 3, requires_grad=True)
images = torch.randn(32, 16, 32, 32)

def step():  # the backward pass is in autograd's thread, which has memory of its own
    x = images
    for _ in range(8):
        x = torch.nn.functional.conv2d(x, w, padding=1).relu() / 8
    x.sum().backward()

kept = keep_freed_memory()
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([kept, pages, w.grad.flatten().tolist()]))
"""
RETURNED = {"MALLOC_TRIM_THRESHOLD_": "131072"}  # where glibc starts from, and without this adapts to what is freed
glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is not glibc's"
)


def steps(**environment: str) -> tuple[bool, int, list[float]]:
    """Return whether a new process keeps its memory, the pages that it was given in five steps, and its gradient."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


@glibc
def test_steps_take_no_new_pages_and_compute_the_same():
    kept, pages, gradient = steps()
    left_alone, more, same = steps(**RETURNED)
    assert kept and not left_alone
    assert more > 100_000 and pages < 20_000  # here 200,000 and mostly 0
    assert gradient == same


@glibc
@pytest.mark.parametrize(
    ("variable", "value", "kept"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", False),
        ("MALLOC_MMAP_THRESHOLD_", "131072", False),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072", False),
        ("MALLOC_ARENA_MAX", "2", True),
    ],
)
def test_thresholds_of_the_environment_stay(variable, value, kept, monkeypatch):
    for name in (*os.environ, "GLIBC_TUNABLES"):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert keep_freed_memory() == kept


def test_training_on_a_cpu_keeps_its_memory(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr("utils.training.experiment.keep_freed_memory", lambda: calls.append("kept"))
    train(*tiny, "--epochs", "1", "--schedule", "--device", "cpu")
    assert calls == ["kept"]
