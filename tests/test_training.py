"""The loop: what it measures, what it changes, and how it fails."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cifar
from utils import HALO, L1, make_penalty, penalized_parameters
from utils.halo.lambda_sgd import LambdaSGD
from utils.training.epoch import LossWatch, NonFiniteLossError, evaluate, train_one_epoch
from utils.training.meters import Metrics
from utils.training.optimizers import make_optimizers, milestones

CPU = torch.device("cpu")


def toy(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 7))
    batches = [(torch.randn(n, 3, 8, 8), torch.randint(7, (n,))) for n in (6, 6, 3)]
    return model, batches


def sgd(tensors, lr):
    return torch.optim.SGD(tensors, lr=lr, momentum=0.9)


def test_evaluate_is_exact_over_uneven_batches():
    model, batches = toy()
    result = evaluate(model, batches, device=CPU)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model(images)
    order = logits.argsort(1, descending=True)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert result["top1"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item(), abs=1e-4)
    hits = (order[:, :5] == labels[:, None]).any(1)
    assert result["top5"] == pytest.approx(100 * hits.float().mean().item(), abs=1e-4)


def test_two_classes_have_a_top5():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    batches = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]))]
    assert evaluate(model, batches, device=CPU)["top5"] == 100


def test_zero_learning_rate_changes_nothing():
    model, batches = toy()
    before = [p.clone() for p in model.parameters()]
    penalty = HALO(penalized_parameters(model), xi=1, psi=1)
    train_one_epoch(model, batches, penalty, sgd(model.parameters(), 0), LambdaSGD(penalty, lr=0), device=CPU)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all((lam == 1).all() for lam in penalty.parameters())


@pytest.mark.parametrize("name", ["none", "halo", "l1", "ws", "mcp"])
def test_an_epoch_equals_autograd_of_the_whole_objective(name):
    coefficients = {"none": {}, "l1": {"xi": 0.01}, "mcp": {"xi": 0.01, "psi": 9}}.get(name, {"xi": 0.01, "psi": 0.01})
    (model, batches), (plain, _) = toy(), toy()
    penalty = make_penalty(name, penalized_parameters(model), **coefficients)
    oracle = make_penalty(name, penalized_parameters(plain), **coefficients)
    learned = [LambdaSGD(penalty, lr=0.05, momentum=0.9)] if list(penalty.parameters()) else []
    optimizers = [sgd(m.parameters(), 0.05) for m in (plain, oracle) if list(m.parameters())]
    result = train_one_epoch(model, batches, penalty, sgd(model.parameters(), 0.05), *learned, device=CPU)
    losses = []
    for images, labels in batches:
        loss = F.cross_entropy(plain(images), labels)
        (loss + oracle()).backward()
        losses += [loss.item()] * len(labels)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    ours, theirs = ([*m.parameters(), *p.parameters()] for m, p in ((model, penalty), (plain, oracle)))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    if name != "none":
        start, _ = toy()
        reference = make_penalty("none", penalized_parameters(start))
        train_one_epoch(start, batches, reference, sgd(start.parameters(), 0.05), device=CPU)
        assert not torch.allclose(start[0].weight, model[0].weight, atol=1e-5)  # the penalty had a part in it


def test_a_diverging_cross_entropy_is_blamed():
    model, batches = toy()
    batches[1] = (batches[1][0] * float("inf"), batches[1][1])
    penalty = HALO(penalized_parameters(model), xi=1e-4, psi=1e-4)
    optimizers = [sgd(model.parameters(), 0.1), LambdaSGD(penalty, lr=0.1)]
    with pytest.raises(NonFiniteLossError, match=r"batch 2: .* nan; the cross-entropy did it.*smallest \|lam\| 1"):
        train_one_epoch(model, batches, penalty, *optimizers, device=CPU)


def test_the_penalty_is_blamed_where_a_lam_was_zero():
    model, batches = toy()
    batches[1] = (batches[1][0] * float("inf"), batches[1][1])
    penalty = HALO(penalized_parameters(model), xi=1e-20, psi=0)
    next(penalty.parameters()).data.zero_()
    optimizers = [sgd(model.parameters(), 0.1), LambdaSGD(penalty, lr=0.1)]
    with pytest.raises(NonFiniteLossError, match=r"the penalty did it.*smallest \|lam\| 0 when"):
        train_one_epoch(model, batches, penalty, *optimizers, device=CPU)


@pytest.mark.parametrize("make", [lambda p: HALO(p, xi=100, psi=0, lambda_init=1e-18), lambda p: L1(p, xi=1e38)])
def test_a_diverging_penalty_is_blamed(make):
    model, batches = toy()
    penalty = make(penalized_parameters(model))
    learned = [LambdaSGD(penalty, lr=0.1, momentum=0.9)] if list(penalty.parameters()) else []
    optimizers = [sgd(model.parameters(), 10.0), *learned]
    with pytest.raises(NonFiniteLossError, match="batch [23]: .*the penalty did it"):
        train_one_epoch(model, batches, penalty, *optimizers, device=CPU)


@pytest.mark.parametrize(
    "name, wrong", [*product(("halo", "none"), ("0.weight", "2.bias")), ("halo", "lam of 0.weight")]
)
def test_what_the_last_step_has_spoiled_is_named(name, wrong):
    """No later loss of the epoch shows it, and the checkpoint would be overwritten with it."""
    model, _ = toy()
    coefficients = {"xi": 1e-4, "psi": 1e-4} if name == "halo" else {}
    penalty = make_penalty(name, penalized_parameters(model), **coefficients)
    LossWatch(penalty, every=1).end(model)
    tensors = model.state_dict() | {f"lam of {key}": lam.data for key, lam in penalty.lambdas.items()}
    tensors[wrong].view(-1)[-1] = torch.nan
    with pytest.raises(NonFiniteLossError, match=f"its step made {wrong} infinite or NaN"):
        LossWatch(penalty, every=1).end(model)


@pytest.mark.parametrize("wrong", [50, 51, 87, 100, 113])
def test_the_batch_is_named_where_one_looks_now_and_then(wrong):
    """As on an accelerator, where each look makes the host wait; the last look is at the end of the epoch."""
    model, _ = toy()
    watch, seen = LossWatch(L1(penalized_parameters(model), xi=1e-4), every=50), 0
    with pytest.raises(NonFiniteLossError, match=f"batch {wrong}: the cross-entropy is nan"):
        for batch in range(1, 121):
            watch.see(torch.tensor(torch.nan if batch == wrong else 1.0))
            seen = batch
        watch.end(model)
    assert seen == (120 if wrong > 100 else -(-wrong // 50) * 50 - 1)


def rates(schedule, *, released):
    """Return the learning rates of weights and lam over epochs 1..160, without repetitions."""
    result = []
    for points in milestones(schedule, released=released):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, points, gamma=0.1)
        seen = []
        for _ in range(160):
            seen.append(round(scheduler.get_last_lr()[0], 12))
            optimizer.step()
            scheduler.step()
        result.append(list(dict.fromkeys(seen)))
        assert seen.index(seen[80]) == 80 and seen.index(seen[120]) == 120
    return result


@pytest.mark.parametrize("name", ["halo", "ws"])
def test_every_option_reaches_the_optimizer_it_is_of(name):
    model, _ = toy()
    penalty = make_penalty(name, penalized_parameters(model), xi=0.01, psi=0.01)
    of_weights = ["--lr", "0.3", "--momentum", "0.7", "--wd", "0.02", "--gamma", "0.5", "--schedule", "1", "2"]
    options = [f"--{name}", *of_weights, "--reg_lr", "0.2", "--reg_wd", "0.003", "--released_lr"]
    optimizers, schedulers = make_optimizers(model, penalty, cifar.get_parser().parse_args(options))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in groups] == [(0.3, 0.7, 0.02), (0.2, 0.7, 0.003)]
    for expected in ([0.3, 0.2], [0.15, 0.05], [0.0375, 0.0125]):
        assert [scheduler.get_last_lr()[0] for scheduler in schedulers] == pytest.approx(expected)
        for parameter in model.parameters():  # lam has no gradient outside of its step
            parameter.grad = torch.zeros_like(parameter)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()


def test_learning_rates_decay_once_a_milestone():
    assert rates([80, 120], released=False) == [[0.1, 0.01, 0.001]] * 2


def test_released_learning_rates_decay_twice():
    assert rates([120, 80], released=True) == [[0.1, 0.01, 1e-4], [0.1, 1e-3, 1e-5]]


def test_accuracies_are_exact_on_every_device():
    """Where sums are fp32 too, since they are counts: the quotient is taken on the host."""
    for dtype in (torch.float64, torch.float32):
        metrics = Metrics(CPU)
        metrics.sums = metrics.sums.to(dtype)
        for label in range(3):
            metrics.add(torch.tensor(1.0), torch.eye(3)[:1], torch.tensor([label]))
        assert metrics.means() == {"loss": 1.0, "top1": 100 * (1 / 3), "top5": 100.0}
