"""The suggested coefficients: by the equations they come from, and in a short run on digits."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from sklearn.datasets import load_digits
from torch import nn

from utils import HALO, FusedHALO, Penalty, penalized_parameters, prunable_weights, prune_by_magnitude_, suggest

EPOCHS, BATCH = 16, 50


def test_an_unneeded_weight_reaches_zero_when_it_should():
    """Integrate dw = -c * w^(-2/3) dT and dlam = -psi dT, without the loss."""
    given = suggest(steps=500, lr=0.02, momentum=0.8, typical_weight=0.07, pulled_within=0.4)
    path = 500 * 0.02 / (1 - 0.8)
    c = (given["xi"] * given["psi"] ** 2 / 4) ** (1 / 3)
    assert 0.6 * 0.07 ** (5 / 3) / c == pytest.approx(0.4 * path)
    assert given["lambda_init"] / given["psi"] == pytest.approx(0.25 * path)
    assert given["lambda_init"] ** 3 == pytest.approx(2 * given["xi"] * 0.07 / given["psi"])  # at rest for 0.07


@pytest.mark.parametrize("steps", [300, 3000])
def test_in_the_real_dynamics_too(steps):
    """A weight without a loss is gone by about a quarter of the run; one that the loss holds rests at its lam."""
    free, held = nn.Parameter(torch.tensor([0.05, -0.05])), torch.tensor([0.3, 1.0])
    given = suggest(steps=steps, lr=0.1, momentum=0.9)
    penalty = HALO({"free": free, "held": held}, **given)
    both = [torch.optim.SGD(p, 0.1, momentum=0.9) for p in ([free], penalty.parameters())]
    gone = None
    for step in range(steps):
        penalty.add_grad_()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        if gone is None and free.abs().max() < 0.01:
            gone = step / steps
    assert 0.1 < gone < 0.35
    rest = (2 * given["xi"] * held / given["psi"]) ** (1 / 3)
    torch.testing.assert_close(penalty.lambdas["held"].detach(), rest, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": -0.1}, {"momentum": 1.0}, {"typical_weight": 0}, {"pulled_within": math.inf}]
)
def test_what_is_out_of_range_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        suggest(**({"steps": 100, "lr": 0.1} | wrong))


def train_on_digits(*, penalised):
    """Train a small network; return it, its penalty, and its top-1 on 597 digits before and after pruning 0.9."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(data.target)
    torch.manual_seed(0)
    block = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*block, nn.Flatten(), nn.Linear(256, 10))
    params = penalized_parameters(model, linear=True)
    coefficients = suggest(steps=EPOCHS * 1200 // BATCH, lr=0.05, momentum=0.9)
    penalty = HALO(params, **coefficients) if penalised else Penalty(params)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    lam_optimizer = FusedHALO(penalty, lr=0.05, momentum=0.9, weights=optimizer) if penalised else None
    for _ in range(EPOCHS):
        for chosen in torch.randperm(1200).split(BATCH):
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            if lam_optimizer:
                lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()

    def top1():
        return 100 * (model(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()

    weights = {name: w.detach().clone() for name, w in params.items()}
    dense = top1()
    prune_by_magnitude_(prunable_weights(model, linear=True), 0.9)
    return penalty, weights, dense, top1()


def test_on_digits_it_keeps_more_and_lam_comes_to_rest():
    _, _, dense, pruned = train_on_digits(penalised=False)
    penalty, weights, dense_halo, pruned_halo = train_on_digits(penalised=True)
    assert pruned_halo > pruned + 8 and dense_halo > dense - 4
    lam = torch.cat([lam.detach().abs().flatten() for lam in penalty.lambdas.values()])
    w = torch.cat([w.abs().flatten() for w in weights.values()])
    kept = w > w.quantile(0.9)
    ratio = (lam / (2 * penalty.xi * w / penalty.psi) ** (1 / 3))[kept]
    assert 0.95 < ratio.median() < 1.05 and ratio.quantile(0.1) > 0.9 and ratio.quantile(0.9) < 1.1
    assert penalty.strength(lam[~kept]).median() > 5 * penalty.strength(lam[kept]).median()


def test_the_page_on_loops_of_ones_own_runs_as_it_stands(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loop.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    blocks = [block for block in blocks if "accelerate" not in block and "lightning" not in block]  # test_frameworks.py
    for block in blocks:
        exec(compile(block.replace("import halo", "import utils.halo as halo"), "own_loop.md", "exec"), names)
    assert len(blocks) >= 4 and (tmp_path / "checkpoint.pt").is_file()
    assert names["accuracy_after"] > 60 and names["resumed_lam_equal"]
    assert names["sparsity_after"] == pytest.approx(0.9, abs=1e-3) and names["zeros"].end == 20
    assert all(w.grad.abs().sum() > 0 for w in names["log_penalty"].penalized.values())
