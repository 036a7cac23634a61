"""The floor under |lam|: how HALO and SWS act where lam is 0, or nearly."""

from __future__ import annotations

import torch
from torch import Tensor

# The penalty acts as if |lam| were never below this: lam itself may be 0, and 1 / lam^3 stays within fp32.
LAMBDA_FLOOR = 1e-12


def inverse_of(lam: Tensor) -> Tensor:
    """Return 1 / lam, in magnitude at most 1 / LAMBDA_FLOOR; NaN stays."""
    return lam.reciprocal().clamp_(-1 / LAMBDA_FLOOR, 1 / LAMBDA_FLOOR)


def floored_square(lam: Tensor) -> Tensor:
    """Return lam^2, at least LAMBDA_FLOOR^2; NaN stays."""
    return lam.square().clamp_(min=LAMBDA_FLOOR**2)


def floored(lam: Tensor) -> Tensor:
    """Return lam with |lam| raised to LAMBDA_FLOOR; its gradient is that of the floor, so that lam can come back."""
    floor = torch.full_like(lam, LAMBDA_FLOOR).copysign(lam)
    return lam + (torch.where(lam.abs() < LAMBDA_FLOOR, floor, lam) - lam).detach()
