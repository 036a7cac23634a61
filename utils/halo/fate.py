"""What becomes of a penalty's gradient: it reaches a step of the weights, or it is zeroed before one."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Fate:
    """Follows the gradient of one weight from the moment that a penalty was added to it.

    Its hooks see the backward passes that reach the weight and the steps of every torch optimizer; they end with it.

    Args:
        w: the weight; it has its gradient.

    Attributes:
        lost: a backward pass made another gradient before any step, and then a step took that one.
    """

    def __init__(self, w: Tensor) -> None:
        self.w, self.grad = w, w.grad
        self.lost = self._stepped = self._renewed = False
        seen = weakref.ref(self)

        def after_backward(_: Tensor) -> None:
            fate = seen()
            if fate:
                fate._renewed |= not fate._stepped

        def after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            fate = seen()
            if fate and any(p is fate.w for group in optimizer.param_groups for p in group["params"]):
                fate._look()

        for handle in (
            w.register_post_accumulate_grad_hook(after_backward),
            register_optimizer_step_post_hook(after_step),
        ):
            weakref.finalize(self, handle.remove)

    def _look(self) -> None:
        if self.w.grad is self.grad:
            self._stepped = True
        elif self._renewed and not self._stepped:
            self.lost = True
