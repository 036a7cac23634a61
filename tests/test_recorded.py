"""Recorded steps: what is replayed is the step itself, and only where it is allowed. On CUDA: test_cuda.py."""

import argparse

import pytest
import torch
from conftest import train
from test_cifar import HALO, assert_equal_runs

from models import build_model
from utils.halo.lambda_sgd import FusedHALO
from utils.halo.parameters import penalized_parameters
from utils.halo.penalties import HALO as Halo
from utils.training import experiment, recorded
from utils.training.epoch import train_one_epoch
from utils.training.recorded import RecordedStep, can_record

CPU = torch.device("cpu")
PLAIN_STEPS = 3


@pytest.fixture(autouse=True)
def few_plain_steps(monkeypatch):
    monkeypatch.setattr(recorded, "PLAIN_STEPS", PLAIN_STEPS)


def pretend(function):
    """Record on a CPU: what is recorded is run again, and was not run while it was recorded, as on CUDA."""
    return function


def setup():
    torch.manual_seed(0)
    model = build_model("resnet", 3, 8)
    penalty = Halo(penalized_parameters(model), xi=1e-3, psi=1e-3)
    weights = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=True)
    return model, penalty, [weights, FusedHALO(penalty, lr=0.1, momentum=0.9, weights=weights)]


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 32, 32, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes
    ]


def test_training_is_the_same_recorded_and_recorded_anew_where_a_factor_changes():
    epochs = [batches([8] * 5 + [3]), batches([8] * 6), batches([8] * 6)]
    results = []
    for record in (False, True):
        model, penalty, optimizers = setup()
        steps = RecordedStep(optimizers, penalty, batch_size=8, record=pretend) if record else None
        rows = []
        for epoch, data in enumerate(epochs):
            rows.append(train_one_epoch(model, data, penalty, *optimizers, device=CPU, recorded=steps))
            if epoch == 1:
                optimizers[0].param_groups[0]["lr"] *= 0.1
        results.append((rows, model.state_dict(), penalty.lambdas))
    (plain, weights, lams), (replayed, same_weights, same_lams) = results
    assert plain == replayed and steps.recordings == 2  # not a third time for the second epoch
    assert all(torch.equal(value, same_weights[name]) for name, value in weights.items())
    assert all(torch.equal(value, same_lams[name]) for name, value in lams.items())


@pytest.mark.parametrize("what", ["reg_lr", "xi"])
def test_a_number_that_never_rests_is_never_recorded(what):
    model, penalty, optimizers = setup()
    steps = RecordedStep(optimizers, penalty, batch_size=8, record=pretend)
    seen = []

    def step(images, labels):
        seen.append(penalty.xi if what == "xi" else optimizers[1].param_groups[0]["lr"])
        return images, labels

    for index in range(2 * PLAIN_STEPS + 2):
        if what == "xi":
            penalty.xi = 1e-3 * (index + 1)
        else:
            optimizers[1].param_groups[0]["lr"] = 0.1 / (index + 1)
        steps.run(step, *batches([8])[0])
    assert steps.recordings == 0 and len(set(seen)) == len(seen) == 2 * PLAIN_STEPS + 2


def test_what_else_decides_is_compared_too():
    _, penalty, optimizers = setup()
    steps, taken = RecordedStep(optimizers, penalty, batch_size=8, record=pretend), []

    def step(images, labels):
        taken.append(steps.recordings)
        return images, labels

    for also in [False] * (PLAIN_STEPS + 2) + [True] * (PLAIN_STEPS + 2):
        steps.run(step, *batches([8])[0], also=also)
    assert taken == [0] * PLAIN_STEPS + [1] * 2 + [1] * PLAIN_STEPS + [2] * 2


def test_where_recording_fails_it_says_so_once_and_goes_on_without(capsys):
    def fail(function):
        function()  # as far as it came, something was left behind
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("the recording is void")

    model, penalty, optimizers = setup()
    steps = RecordedStep(optimizers, penalty, batch_size=8, record=fail)
    taken = []

    def step(images, labels):
        taken.append(len(images))
        return images, labels

    for images, labels in batches([8] * (PLAIN_STEPS + 3)):
        assert steps.run(step, images, labels)[0] is images
    assert len(taken) == PLAIN_STEPS + 4 and steps.recordings == 0
    notes = capsys.readouterr().err
    assert notes.count("could not be recorded") == 1 and "not permitted when stream is capturing" in notes


def test_what_failed_leaves_no_gradient_behind():
    model, penalty, optimizers = setup()

    def fail(function):
        function()
        raise RuntimeError("no")

    def step(images, labels):
        assert next(model.parameters()).grad is None
        if steps.works:
            next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        return images, labels

    steps = RecordedStep(optimizers, penalty, batch_size=8, record=fail)
    for images, labels in batches([8] * (PLAIN_STEPS + 2)):
        steps.run(step, images, labels)
        optimizers[0].zero_grad()
    assert not steps.works


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, True),
        ({"amp": "bf16"}, True),
        ({"amp": "fp16"}, False),
        ({"gmp": 0.9}, True),
        ({"arch": "own:net"}, False),
    ],
)
def test_where_steps_are_recorded(changed, expected):
    args = argparse.Namespace(**({"arch": "resnet", "amp": None, "gmp": None} | changed))
    assert can_record(args, torch.device("cuda")) == expected
    assert not can_record(args, CPU)


@pytest.mark.parametrize("zeros", [[], ["--gmp", 0.9, "--gmp_epochs", 0.5, 1.5]])
def test_a_recorded_run_is_the_same_run(tiny, tmp_path, monkeypatch, zeros):
    options = [*tiny, *HALO, *zeros, "--train_batch", 8, "--epochs", 3]
    train(*options, "--save_dir", tmp_path / "plain")
    made = []

    def record(*args, **options):
        made.append(RecordedStep(*args, **options, record=pretend))
        return made[-1]

    monkeypatch.setattr(experiment, "can_record", lambda args, device: True)
    monkeypatch.setattr(experiment, "RecordedStep", record)
    train(*options, "--save_dir", tmp_path / "recorded")
    assert made[0].recordings == 2  # of 4 full batches an epoch the last; again after the lr has fallen
    assert_equal_runs(tmp_path / "plain", tmp_path / "recorded")
