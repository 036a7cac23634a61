"""Coefficients with which lam comes to rest within a run, however short."""

from __future__ import annotations

import math

RESTS_WITHIN = 0.25  # share of the run in which psi alone would take lam from its start to zero


def suggest(
    *, steps: int, lr: float, momentum: float = 0.0, typical_weight: float = 0.05, pulled_within: float = 0.25
) -> dict[str, float]:
    """Return xi, psi and lambda_init for HALO in a run of this length: `HALO(params, **suggest(...))`.

    At rest under psi the strength is c * |w|^(-2/3), c = (xi * psi^2 / 4)^(1/3), so that a weight w0 that the loss
    does not hold reaches zero after a path of 3/5 * w0^(5/3) / c, of the T = steps * lr / (1 - momentum) that the run
    has. c is such that this takes the share `pulled_within` of T; psi such that lam, which moves by psi per unit of T,
    goes from its start to zero in a quarter; and the start, (2 * xi * w0 / psi)^(1/3), is at rest for w0. Solved for
    the three: lambda_init = w0 * sqrt(1.2 * 0.25 / pulled_within), psi = lambda_init / (0.25 * T),
    xi = lambda_init^3 * psi / (2 * w0).

    Args:
        steps: optimizer steps of the whole run, not epochs, >= 1.
        lr: learning rate of the weights and of lam, > 0; its mean over the run where it follows a schedule.
        momentum: of the SGD of both, in [0, 1); 0 where lam has none and the weights have Adam (`DecoupledLambdaSGD`).
        typical_weight: w0, the size of a weight at the start, > 0.
        pulled_within: share of the run in which an unneeded weight of that size goes to zero, > 0;
            the smaller, the stronger.

    Returns:
        `xi`, `psi` and `lambda_init`.

    Raises:
        ValueError: an argument is out of range.

    Note:
        A start, not an optimum: halve `pulled_within` for more zeros, double it where the unpruned accuracy suffers.
    """
    given = {"steps": steps, "lr": lr, "typical_weight": typical_weight, "pulled_within": pulled_within}
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    path = steps * lr / (1 - momentum)
    lambda_init = typical_weight * math.sqrt(1.2 * RESTS_WITHIN / pulled_within)
    psi = lambda_init / (RESTS_WITHIN * path)
    return {"xi": lambda_init**3 * psi / (2 * typical_weight), "psi": psi, "lambda_init": lambda_init}
