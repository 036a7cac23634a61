"""What halo_step.cpp does, in torch: for other types and devices, and where there is no compiler."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .floor import LAMBDA_FLOOR
from .memory import pieces_together


class HaloStep:
    """Adds HALO's gradient to that of the weights and steps lam.

    Args:
        size: elements that go through an operation at once: on a CPU a piece and its intermediate results should stay
            in the cache; an accelerator does best with few large operations.
        compiled: run `halo_step_` through torch.compile, on all tensors at once; where that fails, go on without.
    """

    def __init__(self, *, size: int, compiled: bool) -> None:
        self.size, self.compiled, self._ran = size, compiled, False
        self._step_ = torch.compile(halo_step_) if compiled else halo_step_

    def run(
        self,
        sets: Sequence[tuple[Tensor, ...]],
        *,
        xi: float,
        psi: float,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """Take a step, in place.

        Args:
            sets: weight, its gradient, lam and the momentum of lam, for each weight; all of one shape and layout.
            xi, psi: of the penalty.
            lr, momentum, weight_decay: of SGD of lam.
        """
        # Compiled, there are no intermediate results.
        parts = [zip(*sets, strict=True)] if self.compiled else pieces_together(sets, size=self.size)
        for w, grad, lam, velocity in parts:
            if momentum == 0:  # what is kept stays as it is, as in torch, for a momentum that is set later
                velocity = [torch.zeros_like(v) for v in velocity]
            try:
                self._step_(w, grad, lam, velocity, xi=xi, psi=psi, momentum=momentum, weight_decay=weight_decay)
            except RuntimeError as error:
                if self._ran or not self.compiled or isinstance(error, torch.OutOfMemoryError):
                    raise
                self._leave_uncompiled(error)
                self.run(sets, xi=xi, psi=psi, lr=lr, momentum=momentum, weight_decay=weight_decay)
                return
            self._ran = True
            torch._foreach_add_(lam, velocity, alpha=-lr)  # not compiled, which would be done anew for every lr

    def _leave_uncompiled(self, error: RuntimeError) -> None:
        """Go on without torch.compile, which failed before the first step; say so."""
        self.compiled, self._step_ = False, halo_step_
        reason = f"{error}".strip().partition("\n")[0] or type(error).__name__
        warnings.warn(f"HALO's step could not be compiled, and takes longer: {reason}", stacklevel=2)


def halo_step_(
    w: Sequence[Tensor],
    grad: Sequence[Tensor],
    lam: Sequence[Tensor],
    velocity: Sequence[Tensor],
    *,
    xi: float,
    psi: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Change grad and velocity in place as `LambdaSGD` does with `HALO.add_grad_`; lam then goes by -lr * velocity.

    Sequences of tensors, the k-th of each of one shape: an accelerator runs an operation on all of them as one.
    """
    inverse = torch._foreach_reciprocal(lam)
    torch._foreach_clamp_max_(inverse, 1 / LAMBDA_FLOOR)
    torch._foreach_clamp_min_(inverse, -1 / LAMBDA_FLOOR)
    strength = torch._foreach_mul(inverse, inverse)
    torch._foreach_mul_(strength, xi)
    pull = torch._foreach_mul(strength, torch._foreach_sign(w))  # in the type of lam: only the gradient is rounded
    torch._foreach_add_(grad, pull)
    slope = strength  # becomes xi |w| / lam^3
    torch._foreach_mul_(slope, inverse)
    torch._foreach_mul_(slope, torch._foreach_abs(w))
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_add_(velocity, slope, alpha=-2)
    torch._foreach_add_(velocity, torch._foreach_sign(lam), alpha=psi)
    torch._foreach_add_(velocity, lam, alpha=weight_decay)
