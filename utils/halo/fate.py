"""What becomes of a penalty's gradient: it reaches a step of the weights, or it is zeroed before one."""

from __future__ import annotations

import weakref
from functools import cache

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

FOLLOWED: weakref.WeakSet[Fate] = weakref.WeakSet()


class Fate:
    """Follows the gradient of one weight from the moment that a penalty was added to it, until `end()`.

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

        self._handle = w.register_post_accumulate_grad_hook(after_backward)
        FOLLOWED.add(self)

    def end(self) -> None:
        """Follow it no longer."""
        self._handle.remove()
        FOLLOWED.discard(self)

    def look(self, optimizer: Optimizer) -> None:
        """Look at what this optimizer has just stepped with."""
        if not any(p is self.w for group in optimizer.param_groups for p in group["params"]):
            return
        if self.w.grad is self.grad:
            self._stepped = True
        elif self._renewed and not self._stepped:
            self.lost = True


@cache
def follow_steps() -> None:
    """Have every optimizer tell the gradients that are followed of its steps, from now on.

    Called before there is anything to follow: no hook may come or go while an optimizer goes through them.
    """

    def after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for fate in [*FOLLOWED]:
            fate.look(optimizer)

    register_optimizer_step_post_hook(after_step)
