"""Mixed precision: what is computed in which type, and that the penalty never meets the scale of the loss."""

import argparse
import copy

import pytest
import torch
from conftest import train
from test_cifar import HALO as HALO_OPTIONS
from test_cifar import assert_equal_runs, rows
from torch import nn

from utils import HALO, make_penalty, penalized_parameters
from utils.files.checkpoint import load_checkpoint
from utils.halo.lambda_sgd import FusedHALO
from utils.training.epoch import train_one_epoch
from utils.training.optimizers import make_optimizers
from utils.training.precision import Precision

CPU = torch.device("cpu")


def one_step(amp, *, xi=1e-3, scale=None, blow_up=False):
    """Train a small network for one step; return it, its penalty and its Precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    penalty = HALO(penalized_parameters(model), xi=xi, psi=xi)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    precision = Precision(CPU, amp)
    if scale:
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(6, 3, 8, 8) * (3e3 if blow_up else 1)
    batch = [(images, torch.arange(6) % 5)]
    train_one_epoch(
        model, batch, penalty, optimizer, FusedHALO(penalty, lr=0.1, momentum=0.9), device=CPU, precision=precision
    )
    return model, penalty, precision, before


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_is_near_that_of_fp32_and_keeps_fp32_weights(amp):
    exact, penalty, _, before = one_step(None)
    model, low_penalty, _, _ = one_step(amp)
    for name, w in exact.state_dict().items():
        moved = (w - before[name]).norm()
        assert model.state_dict()[name].dtype == torch.float32
        assert 0 < (model.state_dict()[name] - w).norm() < 0.05 * moved  # another rounding, the same step
    for name, lam in penalty.lambdas.items():
        assert torch.equal(low_penalty.lambdas[name], lam)  # it does not depend on the data


@pytest.mark.parametrize("scale", [2.0**4, 2.0**14])
def test_the_penalty_is_added_after_unscaling(scale):
    """With a strong penalty the step of a weight is the penalty's alone to a few percent, whatever the scale."""
    model, penalty, precision, before = one_step("fp16", xi=100.0, scale=scale)
    assert precision.scaler.get_scale() == scale
    for name, w in penalty.penalized.items():
        step = (w - before[name]) / -0.1
        torch.testing.assert_close(step, 100 * before[name].sign(), rtol=0.05, atol=0.5)


def test_a_step_that_overflows_is_left_out_and_the_scale_falls():
    model, penalty, precision, before = one_step("fp16", scale=2.0**30, blow_up=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert precision.scaler.get_scale() == 2.0**29
    assert not (penalty.lambdas["0.weight"] == 1).any()  # lam does not wait for the data


def test_a_first_step_that_overflows_leaves_momenta_of_zero():
    """torch's fused SGD makes them in that step, from whatever the memory holds."""
    model = nn.Linear(30, 40)
    args = argparse.Namespace(lr=0.1, momentum=0.9, wd=0.0, amp="fp16", schedule=[], gamma=0.1, released_lr=False)
    (weights,), _ = make_optimizers(model, make_penalty("none", penalized_parameters(model, linear=True)), args)
    slow = copy.deepcopy(model)
    unfused = torch.optim.SGD(slow.parameters(), 0.1, momentum=0.9)
    scalers = torch.amp.GradScaler("cpu", init_scale=2.0), torch.amp.GradScaler("cpu", init_scale=2.0)
    for images in (torch.full((2, 30), float("inf")), torch.ones(2, 30)):
        for network, optimizer, scaler in zip((model, slow), (weights, unfused), scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(network(images).sum()).backward()
            holes = [torch.full_like(p, 1e30) for p in network.parameters() for _ in range(64)]
            del holes  # what is allocated next, and not written, holds this
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(model.parameters(), slow.parameters(), strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_resume_is_bit_exact(tiny, tmp_path, amp):
    options = [*tiny, *HALO_OPTIONS, "--amp", amp, "--image_size", 16]  # fp16 is slow on a CPU
    train(*options, "--save_dir", tmp_path / "straight")
    train(*options, "--epochs", 1, "--save_dir", tmp_path / "halves")
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    train(*options, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")
    scales = [load_checkpoint(tmp_path / run / "checkpoint.pth.tar")["scaler"] for run in ("straight", "halves")]
    assert scales[0] == scales[1] and bool(scales[0]) == (amp == "fp16")


def test_amp_alone_is_bf16_and_is_part_of_the_run(tiny, tmp_path, fails):
    train(*tiny, "--amp")
    train(*tiny, "--amp", "bf16", "--save_dir", tmp_path / "named")
    train(*tiny, "--save_dir", tmp_path / "fp32")
    assert rows(tmp_path / "run") == rows(tmp_path / "named") != rows(tmp_path / "fp32")
    status, line = fails(*tiny, "--epochs", 3, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert status == 1 and "amp bf16 (now None)" in line


def test_a_gpu_without_bf16_is_told_to_take_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(ValueError, match="Old GPU.*--amp fp16"):
        Precision(torch.device("cuda", 0), "bf16")
