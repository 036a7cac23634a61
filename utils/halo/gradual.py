"""Gradual magnitude pruning: the sparsity rises during the one training run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from .masks import FixedZeros, and_, state_of
from .pruning import smallest


def cubic_sparsity(step: int, *, begin: int, end: int, final: float) -> float:
    """Return the sparsity after a step: final * (1 - (1 - (step - begin) / (end - begin))^3) between begin and end."""
    if step >= end:
        return final
    return final * (1 - (1 - max(step - begin, 0) / (end - begin)) ** 3)


class GradualPruning(FixedZeros):
    """Gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878), over all weights together.

    From step `begin` to step `end` the mask is made anew every `every` steps: of the n weights the
    round(n * s) of smallest magnitude are zero, with s of `cubic_sparsity`. A masked weight keeps its value aside
    and takes part in the next choice with it, so it returns when kept ones have become smaller; after `end` the mask
    is fixed and these values are forgotten. Call `clear_grad_()` as of `FixedZeros`, and `advance_()` after each step.

    Args:
        weights: name to tensor of any shape (`prunable_weights`).
        optimizer: of the weights; the momentum of a masked weight is cleared.
        sparsity: the fraction of zeros at the end, in (0, 1].
        begin, end: in steps, 0 <= begin < end.
        every: steps between two masks.
        lambdas: lam of the weights by their names (`penalty.lambdas`), where a penalty learns one for each of them.
        lam_optimizer: of lam.

    Raises:
        ValueError: a number is out of range.

    Note:
        As in the paper, a masked weight is not trained, nor is its lam: a lam that psi took on to zero meanwhile would
        be a strength xi / lam^2 without bounds for the weight that returns. Ties go in order of position, as in
        `prune_by_magnitude_`. Until `end` this takes 4 bytes a weight more, 8 with lam, and 20 to 30 while it makes
        a mask.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        optimizer: Optimizer,
        sparsity: float,
        begin: int,
        end: int,
        every: int = 100,
        lambdas: Mapping[str, Tensor] | None = None,
        lam_optimizer: Optimizer | None = None,
    ) -> None:
        if not 0 < sparsity <= 1:
            raise ValueError(f"sparsity must be in (0, 1], got {sparsity}")
        if not 0 <= begin < end or every < 1:
            raise ValueError(f"need 0 <= begin < end and every >= 1, got begin {begin}, end {end}, every {every}")
        super().__init__(weights, {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()})
        self.optimizer, self.sparsity = optimizer, sparsity
        self.begin, self.end, self.every = begin, end, every
        self.steps = 0
        self._aside: dict[str, Tensor] = {}  # the values of the masked weights, 0 elsewhere
        known = {name: lam for name, lam in (lambdas or {}).items() if name in self.weights}
        self.lambdas = {name: lam for name, lam in known.items() if lam.shape == self.weights[name].shape}
        self.lam_optimizer = lam_optimizer
        self._lambdas_before: dict[str, Tensor] = {}  # lam when the last mask was made

    @torch.no_grad()
    def advance_(self) -> None:
        """Count a step of the optimizer, and make the mask anew where it is time.

        Raises:
            ValueError: see `FixedZeros.advance_`.
        """
        super().advance_()
        self.steps += 1
        due = self.begin <= self.steps < self.end and (self.steps - self.begin) % self.every == 0
        if not due and self.steps != self.end:
            return
        for name, aside in self._aside.items():
            self.weights[name].add_(aside)
        self._put_lambdas_back()
        target = cubic_sparsity(self.steps, begin=self.begin, end=self.end, final=self.sparsity)
        masks = self._smallest(round(self.total * target))
        self._aside = {} if self.steps == self.end else self._aside or self._zeros_like_weights()
        for name, aside in self._aside.items():
            aside.copy_(self.weights[name])
            and_(aside, masks[name].to(torch.int8).neg_())
        self._lambdas_before = {} if self.steps == self.end else self._lambdas_now()
        self.set_masks_(masks, self.optimizer)

    def _put_lambdas_back(self) -> None:
        """Give lam of the masked weights the value that it had when they were masked, and no momentum."""
        for name, before in self._lambdas_before.items():
            lam, keep = self.lambdas[name], self._keep[name]
            lam.copy_(torch.where(keep == 0, before, lam))
            for momentum in state_of(self.lam_optimizer, lam):
                and_(momentum, keep)

    def _lambdas_now(self) -> dict[str, Tensor]:
        return {name: lam.detach().clone() for name, lam in self.lambdas.items()}

    def _zeros_like_weights(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def _smallest(self, count: int) -> dict[str, Tensor]:
        """Return the masks of this many weights of smallest magnitude (a NaN, which the next loss shows, is none)."""
        magnitudes = torch.cat([w.detach().abs().reshape(-1) for w in self.weights.values()])
        parts = smallest(magnitudes, count).split([w.numel() for w in self.weights.values()])
        return {name: part.reshape(w.shape) for (name, w), part in zip(self.weights.items(), parts, strict=True)}

    def state_dict(self) -> dict:
        """Return all that a checkpoint needs to go on: copies of tensors, which later steps leave, and plain types."""
        aside, lambdas = ({k: t.clone() for k, t in part.items()} for part in (self._aside, self._lambdas_before))
        state = {"steps": self.steps, "aside": aside, "lambdas": lambdas}
        return super().state_dict() | state | {"schedule": self._schedule()}

    def _schedule(self) -> list[float]:
        return [self.sparsity, self.begin, self.end, self.every]

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: its masks, or the values that it has aside, are of another network, or its schedule is another.
        """
        if state.get("schedule", self._schedule()) != self._schedule():  # one saved without it has none
            was, now = (
                f"sparsity {s:g}, begin {b}, end {e}, every {n}" for s, b, e, n in (state["schedule"], self._schedule())
            )
            raise ValueError(f"the checkpoint prunes by {was}, this by {now}: give the same")
        if not {"steps", "aside"} <= state.keys():
            raise ValueError("the state is none of gradual pruning: give one, or hold its zeros by FixedZeros")
        lambdas = state.get("lambdas", {})  # one saved without them has none
        self._require_same_shapes(state["aside"], lambdas)
        super().load_state_dict(state)
        self.steps = state["steps"]
        self._aside = self._zeros_like_weights() if state["aside"] else {}
        self._lambdas_before = self._lambdas_now() if state["aside"] else {}
        for saved, ours in ((state["aside"], self._aside), (lambdas, self._lambdas_before)):
            for name in saved.keys() & ours.keys():
                ours[name].copy_(saved[name])

    def _require_same_shapes(self, aside: Mapping[str, Tensor], lambdas: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless what a state has aside fits the weights and their lam."""
        wanted = [(aside.get(name), name, w) for name, w in self.weights.items() if aside]
        wanted += [(lambdas[name], name, lam) for name, lam in self.lambdas.items() if name in lambdas]
        for saved, name, tensor in wanted:
            if saved is None or saved.shape != tensor.shape:
                raise ValueError(f"no values aside of the shape of {name}: use the state of the same network")
