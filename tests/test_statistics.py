"""The numbers of log.csv, against scipy and by hand."""

import numpy as np
import pytest
import scipy.stats
import torch

from utils import HALO, L1, MCP, SWS
from utils.training import statistics
from utils.training.statistics import near_zero, penalty_statistics, quantiles, rank_correlation


def test_rank_correlation_equals_scipy_with_ties():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(20, (500,), generator=generator).float()
    y = x + torch.randint(30, (500,), generator=generator)
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)
    assert np.isnan(rank_correlation(torch.ones(5), torch.arange(5.0)))


def test_of_many_values_evenly_spaced_ones_are_ranked(monkeypatch):
    x, y = torch.randn(2, 35, generator=torch.Generator().manual_seed(0))
    expected = scipy.stats.spearmanr(x[::4], y[::4]).statistic
    monkeypatch.setattr(statistics, "RANKED_AT_MOST", 10)
    assert rank_correlation(x, y) == pytest.approx(expected, abs=1e-9)


def test_lam_that_are_all_the_same_have_no_rank():
    row = penalty_statistics(HALO({"w": torch.linspace(0.1, 1, 101)}, xi=0.5, psi=1))
    assert row["rank_correlation"] == "" and row["lambda_q0"] == row["lambda_q100"] == 1


def test_quantiles_are_elements():
    values = torch.randperm(101, generator=torch.Generator().manual_seed(0)).float()
    assert quantiles(values) == [0, 5, 50, 95, 100]
    assert quantiles(torch.tensor([3.0])) == [3.0] * 5


def test_near_zero_counts_signs_and_borders():
    fractions = near_zero({"a": torch.tensor([0.0, -1e-3, 5e-3]), "b": torch.tensor([1.0])})
    assert fractions == {"fraction_1e-5": 0.25, "fraction_1e-4": 0.25, "fraction_1e-3": 0.5, "fraction_1e-2": 0.75}


def test_strengths_run_against_lam():
    w = {"w": torch.linspace(0.1, 1, 101)}
    penalty = HALO(w, xi=0.5, psi=1)
    penalty.lambdas["w"].data.copy_(-torch.linspace(1, 2, 101))
    row = penalty_statistics(penalty)
    assert (row["lambda_q0"], row["lambda_q100"], row["lambda_q50"]) == (1.0, 2.0, 1.5)
    assert (row["strength_q0"], row["strength_q100"]) == (0.125, 0.5)
    assert row["rank_correlation"] == pytest.approx(1.0)


def test_penalties_without_a_lam_per_weight():
    w = {"w": torch.ones(4)}
    assert penalty_statistics(L1(w, xi=0.5, lambda_init=2))["strength_q50"] == 0.125
    assert penalty_statistics(MCP(w, xi=0.5, psi=2))["lambda_q50"] == ""
    sws = penalty_statistics(SWS(w, xi=0.5, psi=1, lambda_init=2))
    assert (sws["lambda_q0"], sws["strength_q95"], sws["rank_correlation"]) == (2.0, 0.125, "")


def test_lam_of_weights_that_are_held_at_zero_do_not_count():
    w = {"w": torch.cat([torch.zeros(50), torch.linspace(0.1, 1, 51)]), "bias": torch.full((2,), 0.05)}
    penalty = HALO(w, xi=0.5, psi=1)
    penalty.lambdas["w"].data.copy_(torch.cat([torch.full((50,), 1e-6), torch.linspace(1, 2, 51)]))
    row = penalty_statistics(penalty, {"w": w["w"] == 0})
    assert (row["lambda_q0"], row["lambda_q50"], row["lambda_q100"]) == (1.0, pytest.approx(1.48), 2.0)
    assert row["strength_q100"] == 0.5 and penalty_statistics(penalty)["strength_q100"] > 1e10
    everything = {name: torch.ones_like(t, dtype=torch.bool) for name, t in w.items()}
    nothing = penalty_statistics(penalty, everything)
    assert nothing["lambda_q50"] == nothing["strength_q50"] == nothing["rank_correlation"] == ""
