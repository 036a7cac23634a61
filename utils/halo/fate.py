"""What becomes of a penalty's gradient: it reaches a step of the weights, or it is zeroed before one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache

from torch import Tensor
from torch._C import _current_graph_task_id
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

FOLLOWED: weakref.WeakSet[Steps] = weakref.WeakSet()


class Steps:
    """Notices whether an optimizer steps a weight, from the moment that this is made.

    Args:
        w: the weight.

    Attributes:
        taken: one did, with whatever gradient.
    """

    def __init__(self, w: Tensor) -> None:
        self.w, self.taken, self._handle = w, False, None
        FOLLOWED.add(self)

    def _watch_backward(self) -> None:
        """Have `_after_backward` called whenever a backward pass has added to the gradient, as long as this lives."""
        seen = weakref.ref(self)

        def after_backward(_: Tensor) -> None:
            if steps := seen():
                steps._after_backward()

        self._handle = self.w.register_post_accumulate_grad_hook(after_backward)

    def _after_backward(self) -> None:
        """Look at what a backward pass has done."""

    def end(self) -> None:
        """Follow it no longer."""
        if self._handle:
            self._handle.remove()
        FOLLOWED.discard(self)

    def look(self, optimizer: Optimizer) -> None:
        """Look at what this optimizer has just stepped."""
        if any(p is self.w for group in optimizer.param_groups for p in group["params"]):
            self.taken = True
            self._look_closely()

    def _look_closely(self) -> None:
        """Look at more than that there was a step."""


class Entry(Steps):
    """Notices whether the backward pass that this is made in adds to the gradient of a weight: autograd.grad does not.

    Args:
        w: the weight, a leaf.
        made: something else has added to it already.

    Attributes:
        made: it was added to.
    """

    def __init__(self, w: Tensor, *, made: bool) -> None:
        super().__init__(w)
        self.made, self._task = made, _current_graph_task_id()
        self._watch_backward()

    def _after_backward(self) -> None:
        self.made |= _current_graph_task_id() == self._task


class Fate(Steps):
    """Follows the gradient of one weight too, from the moment that a penalty was added to it, until `end()`.

    Args:
        w: the weight, a leaf; it has its gradient.

    Attributes:
        lost: a backward pass made another gradient before any step, and then a step took that one.
    """

    def __init__(self, w: Tensor) -> None:
        super().__init__(w)
        self.grad = w.grad
        self.lost = self._settled = self._renewed = False
        self._watch_backward()

    def _after_backward(self) -> None:
        self._renewed |= not self._settled

    def _look_closely(self) -> None:
        if not self._settled and self.w.grad is not None:
            self.lost = self._renewed and self.w.grad is not self.grad
            self._settled = True  # whatever later steps take, as where the penalty acts in every other one


def while_alive(method: Callable) -> Callable:
    """Return a hook that calls a method as long as its object lives, and does not keep it alive."""
    found = weakref.WeakMethod(method)

    def hook(*arguments: object) -> None:
        if method := found():
            method(*arguments)

    return hook


class Request:
    """What is asked of the next step of one optimizer, and not of any other's.

    Args:
        w: a weight that this optimizer steps.

    Attributes:
        open: it was asked for, and not done yet.
    """

    def __init__(self, w: Tensor) -> None:
        self.w, self.open = w, False
        self._steps: Steps | None = None

    def make(self) -> None:
        """Ask; to ask twice is to ask once.

        Raises:
            ValueError: since it was asked for, another optimizer has stepped the weight.
        """
        if self.open and self._steps.taken:
            raise ValueError(
                "the weights were stepped by another optimizer than weights=, so that the penalty did not act: build "
                "the optimizer of lam anew with the one that steps them (of SAM, its base_optimizer)"
            )
        if not self.open:
            self.open, self._steps = True, Steps(self.w)

    def take(self) -> None:
        """Do what was asked for."""
        self._steps.end()
        self.open, self._steps = False, None


@cache
def follow_steps() -> None:
    """Have every optimizer tell the gradients that are followed of its steps, from now on.

    Called before there is anything to follow: no hook may come or go while an optimizer goes through them.
    """

    def after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for fate in [*FOLLOWED]:
            fate.look(optimizer)

    register_optimizer_step_post_hook(after_step)
