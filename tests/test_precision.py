"""Mixed precision: what is computed in which type, and that the penalty never meets the scale of the loss."""

import argparse
import copy

import pytest
import torch
from conftest import train
from test_cifar import HALO as HALO_OPTIONS
from test_cifar import assert_equal_runs, rows
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from utils import HALO, make_penalty, penalized_parameters
from utils.files.checkpoint import load_checkpoint
from utils.halo.lambda_sgd import FusedHALO
from utils.training.compiled import CompiledNetwork
from utils.training.epoch import train_one_epoch
from utils.training.optimizers import make_optimizers
from utils.training.precision import DTYPES, Precision, ProductsInFp32, computes_quickly

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


def near_integers(*shape, amp):
    """Return values of 1 and 2 in size that this type rounds to integers; up to 256 all sums of those are exact."""
    below_half = 0.45 * torch.finfo(DTYPES[amp]).eps
    return (torch.randint(1, 3, shape) + below_half * torch.rand(shape)) * (2 * torch.randint(2, shape) - 1)


class Products(nn.Module):
    """Convolutions and matrix products of 5x5 images, written as networks write them."""

    def __init__(self, amp):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(50, 4)
        self.same, self.mixing = nn.Parameter(torch.empty(3, 2, 3, 3)), nn.Parameter(torch.empty(50, 4))
        for p in self.parameters():
            p.data = near_integers(*p.shape, amp=amp)

    def forward(self, x):
        row = x.flatten(1)
        maps = self.conv(x), F.conv2d(x, weight=self.same, bias=None, padding="same")
        return torch.cat([y.flatten(1) for y in (*maps, self.linear(row), row @ self.mixing, row.mm(self.mixing))], 1)


def one_pass(amp, *, in_fp32, dtype=torch.float32, compiled=False, enabled=True):
    """Return the output for four images and all gradients."""
    torch.manual_seed(0)
    model, images = Products(amp).to(dtype), near_integers(4, 2, 5, 5, amp=amp).to(dtype).requires_grad_()
    precision = Precision(CPU, amp if enabled else None)
    precision.in_fp32 = in_fp32
    forward = CompiledNetwork(model, batch_size=4, round_casts=in_fp32) if compiled else model
    with precision.autocast():
        output = forward(images)
    (output.float() * near_integers(*output.shape, amp=amp)).sum().backward()
    return output, images.grad, *(p.grad for p in model.parameters())


COMPILED = pytest.param(True, marks=pytest.mark.skipif(torch.__version__ < "2.14", reason="casts left out"))


@pytest.mark.parametrize("compiled", [False, COMPILED])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_products_in_fp32_are_those_of_the_type_bit_for_bit(amp, compiled):
    """Of values whose sums are exact; else they differ by the order of summation."""
    of_torch, in_fp32 = one_pass(amp, in_fp32=False), one_pass(amp, in_fp32=True, compiled=compiled)
    exact = one_pass(amp, in_fp32=False, enabled=False)
    for a, b, c in zip(of_torch, in_fp32, exact, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
        assert not torch.equal(a.float(), c)  # else rounding would not show


def test_no_product_is_left_in_the_slow_type():
    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "conv" in func.__name__ or "mm" in func.__name__:
                seen.append(args[1].dtype)
            return func(*args, **(kwargs or {}))

    seen = []
    with Types():
        one_pass("bf16", in_fp32=True)
    assert len(seen) >= 12 and set(seen) == {torch.float32}  # five products, and the gradients of their factors


def test_products_in_fp32_leave_fp64_and_what_is_outside_autocast_alone():
    for options in ({"dtype": torch.float64}, {"enabled": False}):
        for a, b in zip(*(one_pass("bf16", in_fp32=way, **options) for way in (True, False)), strict=True):
            assert a.dtype == b.dtype == options.get("dtype", torch.float32) and torch.equal(a, b)


@pytest.mark.parametrize("quick", [True, False])
def test_a_cpu_without_bf16_trains_in_fp32_products_and_says_so(quick, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.training.precision.computes_quickly", lambda device, amp: quick)
    monkeypatch.setattr("utils.training.announce.computes_quickly", lambda device, amp: quick)
    calls = []
    monkeypatch.setattr(ProductsInFp32, "__enter__", lambda self: calls.append(1) or TorchFunctionMode.__enter__(self))
    train(*tiny, "--amp", "--device", "cpu")
    assert bool(calls) != quick
    assert ("bf16 by products in fp32 (this CPU has none in bf16" in capsys.readouterr().out) != quick


def test_which_products_are_quick_is_asked_of_torch(monkeypatch):
    class Operators:
        @staticmethod
        def _is_mkldnn_bf16_supported():
            return True

    monkeypatch.setattr(torch.ops, "mkldnn", Operators)  # without the other, as where torch has no oneDNN
    assert computes_quickly(CPU, "bf16") and not computes_quickly(CPU, "fp16")
    assert computes_quickly(torch.device("cuda"), "fp16")
