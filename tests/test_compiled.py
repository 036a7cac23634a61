"""--compile: the same results within rounding, one compilation, and a network that runs without it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import train
from test_cifar import HALO, assert_equal_runs
from test_lambda_sgd import BOUND
from torch import nn

from utils.training import compiled, experiment
from utils.training.compiled import CompiledNetwork

CPU = torch.device("cpu")


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_200_steps_agree_within_the_stated_bound(capsys):
    torch.manual_seed(1)
    images, labels = torch.randn(4, 9, 3, 8, 8), torch.randint(5, (4, 9))
    results = []
    for compile_it in (False, True):
        model = small_network()
        forward = CompiledNetwork(model, batch_size=8) if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for step in range(200):
            size = 8 if step % 5 else 9  # now and then a batch of another size
            F.cross_entropy(forward(images[step % 4, :size]), labels[step % 4, :size]).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    assert forward.compiled is not None and forward.batches == 160
    for name, value in results[0].items():
        assert (results[1][name] - value).abs().max() <= BOUND * value.abs().max(), name
    assert not torch.equal(results[0]["0.weight"], small_network().state_dict()["0.weight"])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]  # torch warns too
    assert [line.split()[1] for line in notes] == ["compiling", "compiled"]


def test_resume_is_bit_exact(tiny, tmp_path):
    options = [*tiny, *HALO, "--compile", "--amp"]
    train(*options, "--save_dir", tmp_path / "straight")
    train(*options, "--epochs", 1, "--save_dir", tmp_path / "halves")
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    train(*options, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")


def test_a_batch_of_all_images_is_compiled_too(tiny, monkeypatch):
    """36 images in batches of 50: the only one of an epoch has 36."""
    sizes = []
    monkeypatch.setattr(
        experiment, "CompiledNetwork", lambda forward, *, batch_size, **_: sizes.append(batch_size) or forward
    )
    for batch in (16, 36, 50):
        train(*tiny, "--compile", "--train_batch", batch, "--epochs", 1, "--device", "cpu", "--overwrite")
    assert sizes == [16, 36, 36]


def test_where_compiling_fails_the_network_runs_as_it_is(monkeypatch, capsys):
    def broken(network, **options):
        def run(images):
            raise RuntimeError("CppCompileError:\nC++ compile error")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model, images = small_network().eval(), torch.randn(2, 3, 8, 8)
    forward = CompiledNetwork(model, batch_size=2)
    for _ in range(3):
        assert torch.equal(forward(images), model(images))
    notes = capsys.readouterr().err
    assert notes.count("runs uncompiled: CppCompileError: C++ compile error") == 1


@pytest.mark.parametrize(
    "text, status, said",
    [
        ("CppCompileError:\nC++ compile error", 2, "backward pass: CppCompileError: C++ compile error: leave it out"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", 1, "can't allocate memory"),
    ],
)
def test_where_the_backward_pass_fails_to_compile_it_is_one_line(monkeypatch, tiny, fails, text, status, said):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, logits):
            return logits.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError(text)

    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda images: Broken.apply(network(images)))
    ended, line = fails(*tiny, "--compile")
    assert ended == status and said in line and ("backward pass" in line) == (status == 2)


@pytest.mark.parametrize("cache", ["file/inductor", "~nobody-here/inductor"])  # no folder; nobody's home
def test_a_cache_that_cannot_be_made_is_no_obstacle(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiled, "CACHE", Path(cache))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compiled.use_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in compiled.os.environ


@pytest.mark.parametrize("given", [None, "/elsewhere"])
def test_the_cache_outlives_the_temporary_folder_unless_one_is_named(monkeypatch, tmp_path, given):
    monkeypatch.setattr(compiled, "CACHE", tmp_path / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if given:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    compiled.use_cache()
    assert compiled.os.environ["TORCHINDUCTOR_CACHE_DIR"] == (given or str(tmp_path / "inductor"))
