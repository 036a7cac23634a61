"""What only a CUDA device can show; skipped without one."""

import pytest
import torch
import torch.nn.functional as F
from conftest import train
from test_cifar import HALO, assert_equal_runs

import cifar_prune_iterative
from models import build_model
from utils.files.checkpoint import load_checkpoint
from utils.halo.lambda_sgd import FusedHALO, LambdaSGD
from utils.halo.parameters import penalized_parameters
from utils.halo.penalties import HALO as Halo
from utils.training import experiment
from utils.training.augment import Loader
from utils.training.compiled import CompiledNetwork
from utils.training.dataset import Dataset, Split
from utils.training.loading import memory_format
from utils.training.meters import Metrics
from utils.training.precision import Precision
from utils.training.recorded import RecordedStep
from utils.training.statistics import near_zero, penalty_statistics
from utils.training.step import TrainingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FACTORS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
DIGITS = ["-d", "digits", "-a", "resnet", "--depth", "8", *HALO, "--schedule", "1", "--device", "cuda"]


def network(device, depth=8):
    torch.manual_seed(0)
    return build_model("resnet", 10, depth).to(device, memory_format=memory_format("resnet", device))


@pytest.mark.parametrize("form", ["pieces", "compiled", "with the weights"])
def test_the_step_on_cuda_equals_the_readable_one_on_a_cpu(form):
    states = []
    for device in (CPU, CUDA):
        params = penalized_parameters(network(device))
        penalty = Halo(params, xi=1e-2, psi=1e-2, lambda_init=0.7)
        weights = torch.optim.SGD(params.values(), 0.1, momentum=0.9, fused=True)
        options = {"weights": weights} if form == "with the weights" else {"compiled": form == "compiled"}
        optimizer = LambdaSGD(penalty, **FACTORS) if device == CPU else FusedHALO(penalty, **options, **FACTORS)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for w in params.values():
                w.grad = torch.empty_like(w).copy_(torch.randn(w.shape, generator=generator))
            optimizer.step()
            weights.step()
        momenta = [optimizer.state[lam]["momentum_buffer"] for lam in penalty.lambdas.values()]
        states.append([*params.values(), *penalty.lambdas.values(), *momenta])
    for slow, fast in zip(*states, strict=True):
        torch.testing.assert_close(fast.cpu(), slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", [[], ["--amp"], ["--amp", "--compile"], ["--gmp", "0.9", "--gmp_epochs", "0", "1"]])
def test_resume_is_bit_exact(tmp_path, extra):
    train(*DIGITS, *extra, "--epochs", 3, "--save_dir", tmp_path / "straight")
    train(*DIGITS, *extra, "--epochs", 1, "--save_dir", tmp_path / "halves")
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    train(*DIGITS, *extra, "--epochs", 3, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")


def test_a_run_goes_on_on_a_cpu_and_its_zeros_stay(tmp_path):
    run = ["--save_dir", tmp_path, "--gmp", "0.9", "--gmp_epochs", "0", "1"]
    train(*DIGITS, *run, "--epochs", 2)
    checkpoint = tmp_path / "checkpoint.pth.tar"
    before = load_checkpoint(checkpoint)["state_dict"]
    train(*DIGITS, *run, "--epochs", 3, "--resume", checkpoint, "--device", "cpu")
    after = load_checkpoint(checkpoint)["state_dict"]
    prunable = [name for name, value in after.items() if value.dim() == 4]
    zeros = sum((after[name] == 0).sum().item() for name in prunable)
    assert zeros == round(0.9 * sum(after[name].numel() for name in prunable))
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in prunable)
    assert not all(torch.equal(before[name], after[name]) for name in prunable)


def test_the_numbers_of_an_epoch_are_those_of_a_cpu():
    generator = torch.Generator().manual_seed(0)
    w, lam = (torch.randn(20, 30, 3, 3, generator=generator).mul(50).round().div(5e3) for _ in range(2))  # with ties
    rows = []
    for device in (CPU, CUDA):
        weights = {"w": w.to(device, memory_format=memory_format("resnet", device))}
        penalty = Halo(weights, xi=1e-4, psi=1e-3)
        penalty.lambdas["w"].data.copy_(lam + w)
        rows.append(near_zero(weights) | penalty_statistics(penalty))
    assert rows[0] == rows[1] and rows[0]["rank_correlation"] > 0


def test_pruning_says_the_same_on_cuda_and_on_a_cpu(tmp_path):
    train(*DIGITS, "--epochs", 4, "--save_dir", tmp_path)
    results = []
    for device in ("cuda", "cpu"):
        options = ["--resume", tmp_path / "final.pth.tar", "--percent", "0.5", "0.9", "--device", device]
        options = [*options, "--save_dir", tmp_path / device]
        parser = cifar_prune_iterative.get_parser()
        results.append(cifar_prune_iterative.main(parser.parse_args([str(option) for option in options]))["results"])
        assert (tmp_path / device / "pruned_0.9.pth.tar").exists()
    for one, other in zip(*results, strict=True):
        assert one["asked"] == other["asked"] and abs(one["after"]["top1"] - other["after"]["top1"]) < 1


def test_the_compiled_network_has_the_gradients_of_the_plain_one(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(1)
    images, labels = torch.randn(6, 16, 3, 32, 32, device=CUDA), torch.randint(10, (6, 16), device=CUDA)
    plain, compiled = network(CUDA), network(CUDA)
    forward = CompiledNetwork(compiled, batch_size=16)
    for step in range(6):
        size = 9 if step == 4 else 16
        for model, run in ((plain, plain), (compiled, forward)):
            model.zero_grad()
            F.cross_entropy(run(images[step, :size]), labels[step, :size]).backward()
        for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert (other.grad - one.grad).norm() <= 0.05 * one.grad.norm(), (step, name)  # rounding turns some ReLU
    assert forward.compiled is not None and forward.batches == 5
    for (name, one), other in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_the_host_never_waits_within_a_step(amp):
    images, labels = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (64,))
    split = Split(images, labels)
    statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    data = Dataset(split, split, tuple("0123456789"), **statistics, padding=4, flip=True)
    layout = {"memory_format": memory_format("resnet", CUDA)}
    loader = Loader(split.to(CUDA), data, batch_size=16, generator=torch.Generator(), **layout)
    model = network(CUDA)
    penalty = Halo(penalized_parameters(model), xi=1e-3, psi=1e-3)
    precision, metrics = Precision(CUDA, amp), Metrics(CUDA)
    weights = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    optimizer = FusedHALO(penalty, weights=weights, **FACTORS)
    step = TrainingStep(model, penalty, weights, optimizer, precision=precision)
    before = {name: w.clone() for name, w in penalty.penalized.items()}
    try:
        for index, batch in enumerate(loader):
            if index == 1:  # the first makes buffers, and the epoch's random numbers were copied before it
                torch.cuda.set_sync_debug_mode("error")
            loss, logits = step(batch.images, batch.labels)
            metrics.add(loss, logits, batch.labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.count == 64 and not any(torch.equal(w, before[name]) for name, w in penalty.penalized.items())


@pytest.mark.parametrize("penalty", [HALO, ["--l1", "--xi", "1e-4"], [], ["--gmp", "0.9", "--gmp_epochs", "0.5", "2"]])
@pytest.mark.parametrize("extra", [[], ["--amp"]])
def test_recorded_steps_are_the_plain_ones_bit_for_bit(tmp_path, monkeypatch, penalty, extra):
    made = []

    def record(*args, **options):
        made.append(RecordedStep(*args, **options))
        return made[-1]

    options = ["-d", "digits", "-a", "resnet", "--depth", "8", *penalty, *extra, "--device", "cuda"]
    options += ["--epochs", 3, "--schedule", 2]
    monkeypatch.setattr(experiment, "RecordedStep", record)
    train(*options, "--save_dir", tmp_path / "recorded")
    assert made[0].works and made[0].recordings == 2  # anew when the learning rate falls
    monkeypatch.setattr(experiment, "can_record", lambda *_: False)
    train(*options, "--save_dir", tmp_path / "plain")
    assert_equal_runs(tmp_path / "plain", tmp_path / "recorded")


def test_a_mask_holds_in_recorded_steps(tmp_path):
    train(*DIGITS, "--epochs", 2, "--gmp", "0.9", "--gmp_epochs", "0", "1", "--save_dir", tmp_path / "first")
    first = tmp_path / "first" / "final.pth.tar"
    train(*DIGITS, "--epochs", 2, "--start", first, "--mask", first, "--save_dir", tmp_path / "second")
    before, after = (load_checkpoint(path)["state_dict"] for path in (first, tmp_path / "second" / "final.pth.tar"))
    prunable = [name for name, value in after.items() if value.dim() == 4]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in prunable)
    assert not any(torch.equal(before[name], after[name]) for name in prunable)
