"""What every penalty is: named tensors, an equation, and its gradient added to theirs without autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from .fate import Entry
from .guard import GradientGuard, distinct
from .memory import gradient


class Penalty(nn.Module):
    """A penalty on named tensors; this base class is the penalty zero (training without one).

    Args:
        params: name to tensor of any shape, the penalised parameters w. They are read and their `.grad` is added
            to, but they do not become parameters of the penalty: `penalty.parameters()` are the learned lam only.
            A tensor that stands in it twice (tied weights) is penalised once.

    Raises:
        ValueError: it is no mapping, there is no tensor, or one is not floating point.

    Note:
        Computed in fp32 whatever the type of w (fp64 for fp64), also after `penalty.half()`: xi = 1e-8 underflows in
        fp16, 1/lam^2 overflows. `model.penalty = HALO(...)` makes lam a part of the model's parameters and state_dict:
        docs/own_loop.md. A penalty of your own needs `forward()`, and `__init__` for what it learns.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.penalized = distinct(params)
        self._dtype = torch.promote_types(self._first.dtype, torch.float32)
        self.guard = GradientGuard(self.penalized)
        self._entered: set[str] = set()  # the ways on which gradients that are in use got the penalty
        self._entry: Entry | None = None  # where nothing is learned, what tells whether it did so by the loss

    def __call__(self) -> Tensor:
        """Return `forward()`, and notice it if a backward pass goes through that."""
        total = super().__call__()
        if total.requires_grad and not torch.compiler.is_compiling():
            total.register_hook(lambda _: self._enter("the loss", made=False))
        return total

    def _enter(self, way: str, *, made: bool) -> None:
        """Know on which way the penalty enters the gradients, and whether it has or a backward pass is to tell."""
        self._entered.add(way)
        self._forget_entry()
        w = next((w for w in self.penalized.values() if w.requires_grad and w.is_leaf), None)
        self._entry = None if w is None or self.lambdas else Entry(w, made=made)

    def _forget_entry(self) -> None:
        if self._entry:
            self._entry.end()
        self._entry = None

    def __getstate__(self) -> dict:
        """Leave out what became of gradients, which copies and files do not have."""
        return {**self.__dict__, "_entered": set(), "_entry": None}

    def require_absent(self, *ways: str) -> None:
        """Raise if the gradients hold the penalty already.

        Args:
            ways: on which it may have entered: "the loss", "add_grad_()".

        Raises:
            ValueError: it entered on one of these, and lam, or where nothing is learned w, has the gradient of it.
        """
        if self._entered and self._is_gone():
            self._entered.clear()
            self._forget_entry()
        for way in self._entered.intersection(ways):
            raise ValueError(
                f"these gradients hold the penalty already, by {way}: add it in one way alone, by the step of a "
                "LambdaSGD, or by add_grad_() and an optimizer of your own for lam, or in the loss and by that"
            )

    def leave(self, way: str) -> None:
        """Know that what entered on a way is used up, the gradients of lam dropped."""
        self._entered.discard(way)

    def _is_gone(self) -> bool:
        """Return whether the gradients hold the penalty no longer: those of lam, where there is one, tell."""
        if self.lambdas:
            return all(lam.grad is None for lam in self.lambdas.values())
        return not self._entry or not self._entry.made or self._entry.taken or self._entry.w.grad is None

    @property
    def _first(self) -> Tensor:
        return next(iter(self.penalized.values()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Penalty:
        """Move lam as `nn.Module.to` does, but never to another type."""

        def keep_type(lam: Tensor) -> Tensor:
            moved = fn(lam)
            return moved if moved.dtype == lam.dtype else lam.to(moved.device)

        return super()._apply(keep_type, recurse)

    @property
    def lambdas(self) -> dict[str, Tensor]:
        """The learned coefficients by the name of their weight; empty if nothing is learned."""
        return {}

    def strength(self, lam: Tensor | None = None) -> Tensor:
        """Return the slope of the penalty in |w| at w = 0 for this lam (ignored where nothing is learned)."""
        return torch.zeros(())

    def forward(self) -> Tensor:
        """Return the penalty as a differentiable scalar."""
        return torch.zeros((), dtype=self._dtype, device=self._first.device)

    @torch.no_grad()
    def add_grad_(self, *, scaler: GradScaler | None = None) -> None:
        """Add the gradient of `forward()` to `.grad` of the weights and of lam, in closed form where there is one.

        Call it once a step, after the last backward pass. A `.grad` that is None counts as zero. Tensors that do not
        require a gradient are left alone.

        Args:
            scaler: the one that scaled the loss, if one did: unless `scaler.unscale_(optimizer)` was called since, the
                penalty's gradient gets the same scale. Without it, unscaling would divide the penalty away.

        Raises:
            ValueError: a tensor left the model or was moved; the gradients hold the penalty already, be it from the
                loss or from before a further backward pass; or that of the last step never reached the weights.
        """
        self.require_absent("the loss")
        with self.guard.adding(scaler):
            self.fill_grad_()
        self._enter("add_grad_()", made=True)

    @torch.no_grad()
    def fill_grad_(self) -> None:
        """Do the work of `add_grad_`, whatever the gradients hold: for who takes them out again at once."""
        if has_closed_form(type(self)):
            self._add_grad_()
        else:
            self._add_autograd_()

    @torch.enable_grad()
    def _add_autograd_(self) -> None:
        total = self.forward()
        trained = [p for p in (*self.penalized.values(), *self.parameters()) if p.requires_grad]
        if not total.requires_grad:  # all is frozen
            return
        for p, grad in zip(trained, torch.autograd.grad(total, trained, allow_unused=True), strict=True):
            if grad is not None:
                gradient(p).add_(grad)

    def _add_grad_(self) -> None:
        for w in self.penalized.values():
            if w.requires_grad:
                self._add_weight_grad_(w, gradient(w))

    def _add_weight_grad_(self, w: Tensor, grad: Tensor) -> None:
        """Add d/dw for one tensor."""

    def _elements(self, w: Tensor) -> Tensor:
        return w.to(self._dtype)


def has_closed_form(penalty: type[Penalty]) -> bool:
    """Return whether the closed form is that of `forward()`, not of a class whose `forward()` was replaced."""

    def depth(method: str) -> int:
        return next(index for index, owner in enumerate(penalty.__mro__) if method in vars(owner))

    return min(depth("_add_grad_"), depth("_add_weight_grad_")) <= depth("forward")
