"""Gradual magnitude pruning: the paper's schedule and algorithm, exact counts, and runs that are stopped and shared."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import train
from test_cifar import assert_equal_runs, rows
from test_distributed import run_together
from test_masks import LENET, assert_positive_zeros, assert_zeros_kept, lenet, masks_of, momenta

import mnist.mnist
from utils import HALO, L1, FixedZeros, GradualPruning, LambdaSGD, prune_by_magnitude_
from utils.files.checkpoint import load_checkpoint, save_checkpoint
from utils.halo.gradual import cubic_sparsity
from utils.halo.lambda_sgd import FusedHALO
from utils.training import experiment as experiment_module
from utils.training import state as state_module
from utils.training import zeros as zeros_module
from utils.training.epoch import smallest_lambda

GMP, EPOCHS = ["--gmp", 0.9, "--schedule", 3, "--train_batch", 24], ["--gmp_epochs", 0.1, 3]
TOTAL = 266_200


def test_the_schedule_is_cubic():
    at = [cubic_sparsity(step, begin=10, end=30, final=0.8) for step in (0, 10, 20, 25, 30, 99)]
    assert at == pytest.approx([0, 0, 0.7, 0.7875, 0.8, 0.8]) and at[-1] == 0.8
    assert cubic_sparsity(0, begin=0, end=1, final=0.5) == 0


def test_it_is_the_algorithm_of_the_paper():
    """Against weights that are multiplied by a mask in the forward pass: masked ones keep their value, untrained."""
    torch.manual_seed(0)
    sizes = {"a": (8, 10), "b": (5, 8)}
    start = {n: torch.randn(s) / 3 for n, s in sizes.items()}
    inputs, labels = torch.randn(64, 10), torch.randint(5, (64,))
    ours = {n: w.clone().requires_grad_() for n, w in start.items()}
    full, mask = {n: w.clone().requires_grad_() for n, w in start.items()}, {n: torch.ones(s) for n, s in sizes.items()}
    optimizer = torch.optim.SGD(ours.values(), 1.0)
    zeros = GradualPruning(ours, optimizer=optimizer, sparsity=0.8, begin=3, end=33, every=5)
    returned = 0

    def loss(w):
        return F.cross_entropy(torch.tanh(inputs @ w["a"].T) @ w["b"].T, labels)

    for step in range(1, 41):
        loss(ours).backward()
        zeros.clear_grad_()
        optimizer.step()
        optimizer.zero_grad()
        zeros.advance_()

        grads = torch.autograd.grad(loss({n: full[n] * mask[n] for n in full}), [*full.values()])
        with torch.no_grad():
            for w, grad in zip(full.values(), grads, strict=True):
                w -= grad
        if step in (8, 13, 18, 23, 28, 33):
            magnitudes = torch.cat([w.detach().abs().flatten() for w in full.values()])
            count = round(120 * 0.8 * (1 - (1 - (step - 3) / 30) ** 3))
            keep = torch.ones(120)
            keep[magnitudes.argsort(stable=True)[:count]] = 0
            for (n, before), after in zip(mask.items(), keep.split([80, 40]), strict=True):
                returned += int(((before == 0) & (after.reshape(before.shape) == 1)).sum())
                mask[n] = after.reshape(before.shape)
            assert zeros.zeros == count
        for n in full:
            torch.testing.assert_close(ours[n], full[n] * mask[n], rtol=1e-4, atol=1e-6)
            assert ((ours[n] == 0) == (mask[n] == 0)).all()
    assert returned > 0 and zeros.zeros == 96


def test_masked_weights_have_no_momentum():
    torch.manual_seed(0)
    w = torch.randn(50).requires_grad_()
    optimizer = torch.optim.SGD([w], 0.1, momentum=0.9)
    zeros = GradualPruning({"w": w}, optimizer=optimizer, sparsity=0.5, begin=0, end=10, every=1)
    for step in range(1, 20):
        (w - 1).square().sum().backward()
        zeros.clear_grad_()
        optimizer.step()
        optimizer.zero_grad()
        zeros.advance_()
        expected = cubic_sparsity(step, begin=0, end=10, final=0.5)
        assert zeros.zeros == round(50 * expected) == int((w == 0).sum())
        assert_positive_zeros({"w": w.detach()}, zeros.masks)
        assert_positive_zeros({"w": optimizer.state[w]["momentum_buffer"]}, zeros.masks)
        assert set(zeros.state_dict()["aside"]) == (set() if step >= 10 else {"w"})


def test_a_weight_returns_with_the_lam_that_it_was_masked_with():
    """psi takes lam of a masked weight to 0, where xi / lam^2 would throw the weight out as soon as it returned."""
    w = torch.tensor([0.2, 0.5, 0.6, 0.7, 0.8]).requires_grad_()
    optimizer = torch.optim.SGD([w], 0.1, momentum=0.9)
    penalty = HALO({"w": w}, xi=1e-5, psi=1e-3, lambda_init=0.3)
    lam_optimizer = LambdaSGD(penalty, lr=0.1, momentum=0.9)
    lam = {"lambdas": penalty.lambdas, "lam_optimizer": lam_optimizer}
    zeros = GradualPruning({"w": w}, optimizer=optimizer, sparsity=0.2, begin=1, end=40, every=9, **lam)

    def step(loss):
        loss.backward()
        zeros.clear_grad_()
        lam_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        zeros.advance_()

    for _ in range(19):
        step(0 * w.sum())
    assert zeros.masks["w"].tolist() == [True, False, False, False, False]
    masked_with, (lam,) = zeros.state_dict()["lambdas"]["w"].clone(), penalty.lambdas.values()
    with torch.no_grad():
        lam[0] = 1e-6  # as psi would have it in the end
        w[1] = 0.01  # smaller than what is aside: the first weight returns for it
    for _ in range(9):
        step(0 * w.sum())
    assert zeros.masks["w"].tolist() == [False, True, False, False, False]
    assert w[0].item() == pytest.approx(0.2, abs=1e-2) and lam[0] == masked_with[0] > 0.01
    assert lam_optimizer.state[lam]["momentum_buffer"][0] == 0
    step(0 * w.sum())
    assert w[0].item() == pytest.approx(0.2, abs=1e-2)


def test_a_state_without_lam_is_taken_too():
    """As of a loop that gave none then: lam is what it is now."""
    w = torch.randn(20).requires_grad_()
    penalty, optimizer = HALO({"w": w}, xi=1e-5, psi=1e-3), torch.optim.SGD([w], 0.1)
    options = {"optimizer": optimizer, "sparsity": 0.5, "begin": 0, "end": 100, "every": 10}
    without = GradualPruning({"w": w}, **options)
    for _ in range(20):
        without.advance_()
    zeros = GradualPruning({"w": w}, **options, lambdas=penalty.lambdas)
    zeros.load_state_dict(without.state_dict())
    assert torch.equal(zeros.state_dict()["lambdas"]["w"], torch.ones(20)) and zeros.zeros == without.zeros > 0


def test_the_smallest_lam_is_that_of_a_weight_that_is_trained():
    w = torch.tensor([0.0, 0.5])
    penalty = HALO({"w": w}, xi=1e-5, psi=1.0)
    with torch.no_grad():
        penalty.lambdas["w"].copy_(torch.tensor([1e-9, 0.3]))
    assert smallest_lambda(penalty) == pytest.approx(1e-9)
    assert smallest_lambda(penalty, FixedZeros({"w": w})) == pytest.approx(0.3)
    assert smallest_lambda(penalty, FixedZeros({"w": torch.zeros(2)})) == float("inf")
    assert smallest_lambda(L1({"w": w}, xi=1e-5)) is None


def test_a_state_is_a_copy_that_later_masks_leave_alone():
    """As for going back to it: masks of then with values aside of now would be another network."""
    torch.manual_seed(0)
    w = torch.randn(20).requires_grad_()
    penalty, optimizer = HALO({"w": w}, xi=1e-5, psi=1e-3), torch.optim.SGD([w], 0.1)
    options = {"sparsity": 0.8, "begin": 0, "end": 30, "every": 10, "lambdas": penalty.lambdas}
    zeros = GradualPruning({"w": w}, optimizer=optimizer, **options)
    for _ in range(10):
        zeros.advance_()
    state = zeros.state_dict()
    before = copy.deepcopy(state)
    with torch.no_grad():
        w.add_(torch.randn(20) * (w != 0))
        penalty.lambdas["w"].mul_(0.5)
    for _ in range(10):
        zeros.advance_()
    assert not torch.equal(zeros.state_dict()["aside"]["w"], before["aside"]["w"])
    assert not torch.equal(zeros.state_dict()["lambdas"]["w"], before["lambdas"]["w"])
    for part in ("masks", "aside", "lambdas"):
        assert torch.equal(state[part]["w"], before[part]["w"]), part


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sparsity": 0}, r"sparsity must be in \(0, 1\], got 0"),
        ({"sparsity": 1.1}, r"sparsity must be in \(0, 1\], got 1.1"),
        ({"begin": 5, "end": 5}, "got begin 5, end 5, every 100"),
        ({"begin": -1}, "got begin -1, end 9, every 100"),
        ({"every": 0}, "got begin 0, end 9, every 0"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, words):
    w = torch.randn(5).requires_grad_()
    with pytest.raises(ValueError, match=words):
        GradualPruning({"w": w}, optimizer=torch.optim.SGD([w], 1), **({"sparsity": 0.5, "begin": 0, "end": 9} | wrong))


def stop_after(monkeypatch, epochs, train):
    """Call what trains, and press Ctrl-C in the epoch after."""
    original = experiment_module.run_epoch

    def until(run):
        if run.epoch == epochs:
            raise KeyboardInterrupt
        return original(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment_module, "run_epoch", until)
        train()


@pytest.mark.parametrize("penalty", [[], ["--halo", "--xi", 1e-4, "--psi", 1e-4]])
def test_a_stopped_run_is_the_same_and_ends_with_the_exact_count(tmp_path, monkeypatch, penalty):
    """Stopped between the first mask and the last; --gmp_epochs need not be given again."""
    options = [*GMP, *penalty, "--epochs", 4]
    lenet(*options, *EPOCHS, "--save_dir", tmp_path / "straight")
    stop_after(monkeypatch, 2, partial(lenet, *options, *EPOCHS, "--save_dir", tmp_path / "halves"))
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    assert load_checkpoint(checkpoint)["zeros"]["aside"]
    lenet(*options, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")

    # 60 steps an epoch: masks after 106 and 180 steps
    expected = [round(TOTAL * cubic_sparsity(s, begin=6, end=180, final=0.9)) for s in (6, 106, 180, 180)]
    assert [round(TOTAL * float(row["sparsity"])) for row in rows(tmp_path / "halves")] == expected
    state = load_checkpoint(checkpoint)
    masks = masks_of(checkpoint)
    assert sum(int(m.sum()) for m in masks.values()) == round(TOTAL * 0.9)
    assert_positive_zeros(state["state_dict"], masks)
    assert_positive_zeros(momenta(state), masks)
    assert all(torch.equal(state["zeros"]["masks"][n], m) for n, m in masks.items()) and not state["zeros"]["aside"]


def test_a_run_with_halo_tells_it_of_lam(tmp_path, monkeypatch):
    """Else a weight that returns meets a lam that fell meanwhile, and a strength without bound."""
    made = []
    monkeypatch.setattr(zeros_module, "GradualPruning", lambda *a, **k: made.append(k) or GradualPruning(*a, **k))
    lenet(*GMP, *EPOCHS, "--halo", "--epochs", 3, "--save_dir", tmp_path / "run")
    assert {"fc1.weight", "fc2.weight", "fc3.weight"} <= {*made[0]["lambdas"]}
    assert isinstance(made[0]["lam_optimizer"], FusedHALO)


@pytest.mark.parametrize("epochs", [(1.995, 2), (0.001, 0.002)])
def test_a_schedule_within_one_step_prunes_too(tmp_path, epochs):
    """At 60 steps an epoch A and B round to the same step, which is the last one or none at all."""
    lenet("--gmp", 0.9, "--gmp_epochs", *epochs, "--epochs", 2, "--schedule", "--save_dir", tmp_path / "run")
    masks = masks_of(tmp_path / "run" / "final.pth.tar")
    assert sum(int(m.sum()) for m in masks.values()) == round(TOTAL * 0.9)


def test_pruning_to_the_same_sparsity_removes_nothing_more(tmp_path):
    options = ["--gmp", 0.95, "--epochs", 6, "--schedule", 5, "--save_dir", tmp_path / "run"]
    top1 = lenet(*options)["final"]["test_top1"]
    assert top1 > 90
    config = load_checkpoint(tmp_path / "run" / "final.pth.tar")["config"]
    assert config["gmp_epochs"] == [0.5, 4]  # 1/12 and 2/3
    prune = ["-d", "digits", "-a", "lenet_300_100", "--percent", "0.95", "--of", "all"]
    prune += ["--resume", str(tmp_path / "run" / "final.pth.tar"), "--save_dir", str(tmp_path / "pruned")]
    (result,) = mnist.mnist.main(mnist.mnist.get_parser().parse_args(prune))["results"]
    assert result["removed"] == 0 and result["after"]["top1"] == top1
    assert sum(layer["total"] - layer["remaining"] for layer in result["layers"]) == round(TOTAL * 0.95)


def test_the_best_epoch_is_one_with_the_final_mask(tmp_path):
    """Denser epochs are better; what is kept as the best must be as sparse as was asked."""
    summary = lenet("--gmp", 0.995, "--gmp_epochs", 1, 3, "--epochs", 4, "--lr", 0.05, "--save_dir", tmp_path / "run")
    log = rows(tmp_path / "run")
    assert max(log, key=lambda row: float(row["test_top1"]))["epoch"] in ("1", "2")
    assert summary["best"]["epoch"] in (3, 4)
    best = masks_of(tmp_path / "run" / "model_best.pth.tar")
    assert sum(int(m.sum()) for m in best.values()) == round(TOTAL * 0.995)


def test_two_processes_hold_the_same_zeros_as_one(tmp_path):
    """A run with --gmp, then one with --mask; both in the same two processes, which start slowly."""
    options = ["--gmp", 0.9, "--gmp_epochs", 0.5, 2, "--epochs", 2, "--train_batch", 16, "--halo", "--lr", 0.01]
    options += ["--device", "cpu"]
    lenet(*options, "--save_dir", tmp_path / "one")
    file = tmp_path / "one" / "final.pth.tar"
    run_together(*LENET, *options, "--save_dir", tmp_path / "two")
    fixed = ["--halo", "--mask", file, "--epochs", 1, "--device", "cpu"]
    run_together(*LENET, *fixed, "--save_dir", tmp_path / "fixed")
    ours, theirs = (masks_of(tmp_path / name / "final.pth.tar") for name in ("one", "two"))
    differing = sum(int((ours[n] != theirs[n]).sum()) for n in ours)
    assert differing <= 0.001 * TOTAL  # the order of sums differs, and with it what lies at the threshold
    assert sum(int(m.sum()) for m in theirs.values()) == round(TOTAL * 0.9)
    assert_zeros_kept(tmp_path / "fixed", file)


def test_processes_compare_lam_network_and_masks_at_every_checkpoint(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(state_module, "require_equal", lambda tensors, what: compared.append((what, set(tensors))))
    lenet("--gmp", 0.5, "--halo", "--epochs", 1, "--save_dir", tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "final.pth.tar")
    masks = set(masks_of(tmp_path / "run" / "final.pth.tar"))
    once = [("lam", set(state["lambdas"])), ("the network", set(state["state_dict"])), ("the mask", masks)]
    assert compared == once * 2  # before the first epoch and after it


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gmp", "1.5"], "1.5"),
        (["--gmp", "0"], "0"),
        (["--gmp_epochs", "0", "1"], "does nothing without --gmp"),
        (["--gmp", "0.9", "--gmp_epochs", "1", "1"], "must be A < B"),
        (["--gmp", "0.9", "--gmp_epochs", "1", "3"], "<= --epochs 2"),
        (["--gmp", "0.9", "--mask", "x"], "give one of them"),
        (["--gmp", "0.9", "--evaluate", "--resume", "x"], "does nothing with --evaluate"),
    ],
)
def test_wrong_options_are_one_line(tiny, fails, options, words):
    status, line = fails(*tiny, *options)
    assert status == 2 and words in line


def test_a_resumed_run_keeps_its_schedule(tiny, tmp_path, fails):
    train(*tiny, "--gmp", "0.9")
    more = [*tiny, "--gmp", "0.9", "--resume", tmp_path / "run" / "checkpoint.pth.tar", "--epochs", "3"]
    status, line = fails(*more, "--gmp_epochs", "0", "1")
    assert status == 1 and "gmp_epochs" in line
    status, line = fails(*tiny, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert status == 1 and "gmp 0.9 (now None)" in line
    train(*more)  # the default of three epochs would be another schedule
    config = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["config"]
    assert config["gmp_epochs"] == pytest.approx([1 / 6, 4 / 3])


def test_zeros_that_gradual_pruning_does_not_keep_are_noted(pruned, tmp_path, capsys):
    lenet("--start", pruned, "--gmp", 0.98, "--epochs", 1, "--save_dir", tmp_path / "run")
    note = "90% of the weights of " + str(pruned) + " are zero; --gmp begins from none, so that they come back"
    assert note in capsys.readouterr().err


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A trained LeNet-300-100 without 90% of its weights."""
    folder = tmp_path_factory.mktemp("pruned")
    lenet("--epochs", 1, "--save_dir", folder / "run")
    state = load_checkpoint(folder / "run" / "final.pth.tar")
    weights = {name: w for name, w in state["state_dict"].items() if name.endswith("weight")}
    prune_by_magnitude_(weights, 0.9)
    save_checkpoint(folder / "pruned.pth.tar", state)
    return folder / "pruned.pth.tar"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {"masks": state["masks"]}, "none of gradual pruning"),
        (lambda state: state | {"aside": {"v": state["aside"]["w"]}}, "no values aside of the shape of w"),
        (lambda state: state | {"lambdas": {"w": torch.ones(3)}}, "no values aside of the shape of w"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, words):
    w = torch.randn(20).requires_grad_()
    penalty = HALO({"w": w}, xi=1e-5, psi=1e-3)
    options = {"sparsity": 0.5, "begin": 0, "end": 100, "every": 10, "lambdas": penalty.lambdas}
    zeros = GradualPruning({"w": w}, optimizer=torch.optim.SGD([w], 0.1), **options)
    for _ in range(20):
        zeros.advance_()
    other = w.detach().clone().requires_grad_()
    with torch.no_grad():
        other.normal_()
    before = other.detach().clone()
    fresh = GradualPruning({"w": other}, optimizer=torch.optim.SGD([other], 0.1), **options)
    with pytest.raises(ValueError, match=words):
        fresh.load_state_dict(change(zeros.state_dict()))
    assert torch.equal(other, before) and fresh.zeros == 0


@pytest.mark.parametrize("name", ["sparsity", "begin", "end", "every"])
def test_a_state_of_another_schedule_is_refused(name):
    """Resumed past its end it would stay at the sparsity that it has."""
    w = torch.randn(20).requires_grad_()
    options = {"optimizer": torch.optim.SGD([w], 0.1), "sparsity": 0.5, "begin": 0, "end": 100, "every": 10}
    state = GradualPruning({"w": w}, **options).state_dict()
    other = GradualPruning({"w": w}, **options | {name: 0.9 if name == "sparsity" else 20})
    with pytest.raises(ValueError, match="the checkpoint prunes by sparsity 0.5, begin 0, end 100, every 10, this by"):
        other.load_state_dict(state)
    state.pop("schedule")  # of an older version
    other.load_state_dict(state)
