"""The penalty beside an optimizer that rescales gradients, such as AdamW: decoupled from it, as its weight decay is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from .fate import Request, while_alive
from .guard import require_current, require_stepped
from .lambda_sgd import LambdaSGD
from .penalties import Penalty


class DecoupledLambdaSGD(LambdaSGD):
    """`LambdaSGD` whose penalty moves the weights itself, after each step of their optimizer.

    w <- w - lr_w * d penalty / d w, with lr_w the learning rate that the optimizer of the weights has for w; then the
    step of lam as in `LambdaSGD`. Adam divides what is added to a gradient by the root of that gradient's own mean
    square: a weight that the loss needs little is then pulled at nearly the full learning rate however weak the
    penalty, a weight with large gradients hardly at all. Here the pull is what the penalty says.

    Args:
        penalty: its lam are stepped, its gradient moves the weights; L1 and MCP, which learn nothing, do that alone.
        weights: the optimizer of the weights; it has every penalised weight.
        lr: learning rate of lam, >= 0; without lam it makes no difference, nor do the others.
        momentum: of lam, in [0, 1).
        weight_decay: decay of lam, >= 0.

    Raises:
        ValueError: `weights` does not have a penalised weight.

    Note:
        `step()` only asks for it; it takes place at the end of the next `weights.step()`. Where in the loop between two
        of those it is called makes no difference, nor do clipping, accumulation and a GradScaler.
    """

    takes_fixed = True

    def __init__(
        self, penalty: Penalty, *, weights: Optimizer, lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(penalty, lr=lr, momentum=momentum, weight_decay=weight_decay)
        require_stepped(penalty.penalized, weights, remedy="add it there")
        self._follow(weights)

    def _follow(self, weights: Optimizer) -> None:
        self._weights, self._request = weights, Request(next(iter(self.penalty.penalized.values())))
        weights.register_step_post_hook(while_alive(self._after_weights))

    def __getstate__(self) -> dict:
        """Add the optimizer of the weights."""
        return {**super().__getstate__(), "_weights": self._weights}

    def __setstate__(self, state: dict) -> None:
        """Follow the optimizer of the weights again; `load_state_dict` calls this too, with less."""
        super().__setstate__(state)
        if "_weights" in state:
            self._follow(state["_weights"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, scaler: GradScaler | None = None) -> float | None:
        """Ask that the next step of the weights be followed by that of the penalty and of lam.

        Args:
            closure: evaluates the model and returns the loss; called first.
            scaler: makes no difference.

        Returns:
            The loss of the closure, None without one.

        Raises:
            ValueError: this was called by `scaler.step()`, lam is not the penalty's, or another optimizer than
                `weights` has stepped the weights.
        """
        loss = self._begin(closure)
        self._request.make()
        return loss

    @torch.no_grad()
    def _after_weights(self, weights: Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._request.open:
            return
        self._request.take()
        self.penalty.require_absent("the loss", "add_grad_()")
        require_current(self.penalty.penalized)
        of_loss = {w: w.grad for w in self.penalty.penalized.values()}
        for w in of_loss:
            w.grad = None
        try:
            self.penalty.fill_grad_()
            for group in weights.param_groups:
                for w in group["params"]:
                    if w in of_loss and w.grad is not None:
                        w.add_(w.grad, alpha=-group["lr"])
        finally:
            for w, grad in of_loss.items():
                w.grad = grad
        self._step_lam()
