"""Weights that stay zero while the others are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from .guard import WATCHED_STEPS, NamedParameters, require_current
from .memory import pieces

# The integers in which a number's bits are masked: an "and" is as fast as memory and leaves 0.0, where a product
# would leave -0.0 and NaN, and masked_fill_ takes ten times as long on CPU.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FixedZeros:
    """Holds weights at exactly zero, from now on, with any optimizer that works element by element (Muon does not).

    A weight that is zero stays zero as long as its gradient and its momentum are: every penalty here has the slope
    sign(0) = 0 there, and weight decay takes a share of nothing. So it is enough to call `clear_grad_()` after each
    backward pass, before clipping, penalty and step, which costs one pass over the gradients.

    Args:
        weights: name to tensor of any shape (`prunable_weights`).
        masks: name to bool tensor of the same shape, True where the weight is to be zero; None for where it is now.

    Attributes:
        zeros: how many weights are held at zero.
        total: how many weights there are.

    Raises:
        ValueError: a mask is missing or of another shape.

    Note:
        Takes one byte a weight. Build it before the first step, or call `clear_(optimizer)` once: it clears the
        momentum too. Under DistributedDataParallel and GradScaler: after the gradients are summed and unscaled.
    """

    def __init__(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> None:
        named = isinstance(weights, NamedParameters)  # which know the model that they are of
        self.weights = NamedParameters(weights, weights.model) if named else dict(weights)
        if masks is None:
            masks = {name: w.detach() == 0 for name, w in self.weights.items()}
        self._keep = {name: torch.empty_like(w, dtype=torch.int8) for name, w in self.weights.items()}
        self.total = sum(w.numel() for w in self.weights.values())
        self.set_masks_(masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name to bool tensor, True where the weight is held at zero."""
        return {name: keep == 0 for name, keep in self._keep.items()}

    @torch.no_grad()
    def set_masks_(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Hold other weights at zero, and clear them, as `clear_` does.

        Raises:
            ValueError: a mask is missing or of another shape.
        """
        wrong = [name for name, w in self.weights.items() if name not in masks or masks[name].shape != w.shape]
        if wrong:
            raise ValueError(f"no mask of the shape of {wrong[0]}: make the masks from the same network")
        for name, keep in self._keep.items():
            keep.copy_(masks[name]).sub_(1)  # every bit set where the weight is kept, none where it is not
        self.zeros = self.total - sum(int(keep.count_nonzero()) for keep in self._keep.values())
        self.clear_(optimizer)
        self._looks = 0  # how often it was seen since that the weights are zero after a step
        self._before = self._corners()

    def _corners(self) -> list[Tensor]:
        """Return a copy of a few elements of every weight, by which it is known whether a step has moved any."""
        return [w.detach()[(slice(4),) * w.dim()].clone() for w in self.weights.values()]

    @torch.no_grad()
    def clear_(self, optimizer: Optimizer | None = None) -> None:
        """Set the weights, and in an optimizer all that has their shape, such as their momentum, to 0.0."""
        for name, w in self.weights.items():
            for tensor in (w, *state_of(optimizer, w)):
                and_(tensor, self._keep[name])

    @torch.no_grad()
    def clear_grad_(self) -> None:
        """Set the gradients of the weights that are held at zero to 0.0.

        Raises:
            ValueError: a layer of the model, or its weight, was replaced.
        """
        require_current(self.weights)
        if not self.zeros:
            return
        for name, w in self.weights.items():
            if w.grad is not None:
                and_(w.grad, self._keep[name])

    def advance_(self) -> None:
        """Count a step of the optimizer, and see after the first that moved a weight whether those held are zero.

        A step with a learning rate of 0, or one that a GradScaler left out, moves none; after WATCHED_STEPS nobody
        looks any more, since each look makes the host wait for an accelerator.

        Raises:
            ValueError: some are not.
        """
        if self._looks == WATCHED_STEPS:
            return
        for name, w in self.weights.items():
            moved = int((w.detach() != 0).logical_and_(self._keep[name] == 0).count_nonzero())
            if moved:
                raise ValueError(
                    f"{moved} weights of {name} that are held at zero have moved: their momentum was not cleared (call "
                    "clear_(optimizer)), or clear_grad_() was left out, or the optimizer mixes weights, as Muon does"
                )
        stepped = any(not torch.equal(one, other) for one, other in zip(self._before, self._corners(), strict=True))
        self._looks = WATCHED_STEPS if stepped else self._looks + 1

    def state_dict(self) -> dict:
        """Return all that a checkpoint needs to go on: tensors and plain types."""
        return {"masks": self.masks}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: its masks are of another network.
        """
        self.set_masks_(state["masks"])


def state_of(optimizer: Optimizer | None, parameter: Tensor) -> list[Tensor]:
    """Return what an optimizer keeps for a parameter that has its shape, such as its momentum."""
    state = optimizer.state.get(parameter, {}).values() if optimizer else ()
    return [tensor for tensor in state if isinstance(tensor, Tensor) and tensor.shape == parameter.shape]


def and_(tensor: Tensor, keep: Tensor) -> None:
    """Set a floating point tensor to 0.0 in place where `keep` (int8, of its shape) is 0; it is -1 elsewhere."""
    words = tensor.detach().view(WORDS[tensor.element_size()])
    size = None if tensor.device.type == "cpu" else tensor.numel()  # an accelerator converts without a copy
    for piece, kept in pieces(words, keep, size=size):
        piece.bitwise_and_(kept)
