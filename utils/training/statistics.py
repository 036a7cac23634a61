"""What the weights and their lam look like after an epoch: the numbers of log.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from utils.halo.penalties import Penalty

THRESHOLDS = ("1e-5", "1e-4", "1e-3", "1e-2")
QUANTILES = (0, 5, 50, 95, 100)  # percent
RANKED_AT_MOST = 1 << 20  # elements; a rank correlation of a million values is exact to about 0.001


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Concatenate tensors into one vector, in order; on the host, but for those on CUDA, which sorts far faster."""
    vector = torch.cat([t.detach().reshape(-1) for t in tensors.values()])
    return vector if vector.is_cuda else vector.cpu()


def near_zero(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of weights with |w| <= t for each threshold t, as `fraction_<t>`, in [0, 1]."""
    total = sum(w.numel() for w in weights.values())
    counts = {t: sum((w.detach().abs() <= float(t)).sum() for w in weights.values()) for t in THRESHOLDS}
    return {f"fraction_{t}": count.item() / total for t, count in counts.items()}


def quantiles(values: Tensor) -> list[float]:
    """Return the 0, 5, 50, 95 and 100% quantiles of a vector: the element of the nearest rank, never interpolated.

    Note:
        torch.quantile refuses more than 2^24 values; VGG-19 has more weights.
    """
    ordered = values.sort().values
    return [ordered[round(q / 100 * (len(ordered) - 1))].item() for q in QUANTILES]


def average_ranks(values: Tensor) -> Tensor:
    """Return the rank of every element from 1; equal elements share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors, NaN where one is constant.

    Beyond RANKED_AT_MOST elements, of evenly spaced ones.
    """
    step = -(-len(x) // RANKED_AT_MOST)
    ranks = torch.stack([average_ranks(x[::step]), average_ranks(y[::step])])
    return torch.corrcoef(ranks.cpu().double())[0, 1].item()


def without_held(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the elements of tensors that are not held at zero, where a mask says so; the others' lam may be anything.

    Args:
        tensors: weights, or their lam, by name.
        held: name to bool tensor, True where the weight is held at zero (`FixedZeros.masks`).
    """
    fits = {name for name, t in tensors.items() if name in held and held[name].shape == t.shape}
    return {name: t.detach()[~held[name]] if name in fits else t for name, t in tensors.items()}


def penalty_statistics(penalty: Penalty, held: Mapping[str, Tensor] | None = None) -> dict[str, float | str]:
    """Return the quantiles of |lam| and of the effective strength, and the rank correlation of |lam| with |w|.

    Args:
        penalty: the penalty.
        held: where weights are held at zero, as in `without_held`: they and their lam do not count.

    Returns:
        `lambda_q<q>`, `strength_q<q>` and `rank_correlation`; an empty text where there is no such number.
    """
    lam = flatten(without_held(penalty.lambdas, held or {})).abs() if penalty.lambdas else None
    lam_quantiles = quantiles(lam) if lam is not None and len(lam) else [""] * len(QUANTILES)
    strengths: list[float | str] = [""] * len(QUANTILES)
    if lam is None or len(lam):  # all of them may be held
        # The strength falls as |lam| grows, so its quantiles are those of |lam| read from the other end.
        at = torch.ones(len(QUANTILES)) if lam is None else torch.tensor(lam_quantiles[::-1])
        strengths = penalty.strength(at).expand(len(QUANTILES)).tolist()
    correlation: float | str = ""
    if lam is not None and len(lam) > 1:
        correlation = rank_correlation(lam, flatten(without_held(penalty.penalized, held or {})).abs())
        correlation = "" if math.isnan(correlation) else correlation
    return {
        **{f"lambda_q{q}": value for q, value in zip(QUANTILES, lam_quantiles, strict=True)},
        **{f"strength_q{q}": value for q, value in zip(QUANTILES, strengths, strict=True)},
        "rank_correlation": correlation,
    }
