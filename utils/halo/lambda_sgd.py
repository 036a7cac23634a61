"""SGD of the learned lam, which also adds the penalty's gradient to the weights: readable, and in one pass.

`LambdaSGD.step()` is `penalty.add_grad_()` followed by SGD. `FusedHALO.step()` does the same for HALO in one pass over
memory (w, its gradient, lam and momentum in; gradient, lam and momentum out) and needs no gradient of lam. It can take
the SGD of the weights into the same pass, which then costs about what that alone costs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

from .compiled_step import CompiledStep, Factors, factors_of
from .fate import Request, while_alive
from .guard import require_beside, require_current, require_stepped
from .halo_step import HaloStep
from .memory import CHUNK, align_momenta_, aligned, aligned_gradient, is_dense, velocity_of
from .native import load_native
from .penalties import HALO, Penalty

OTHER_SGD = ("nesterov", "dampening", "maximize")  # options of SGD that the kernel does not have
ALONE = "leave out weights=, and FusedHALO steps lam alone"


class LambdaSGD(SGD):
    """SGD with momentum on the learned coefficients of a penalty.

    v <- momentum * v + (d penalty / d lam + weight_decay * lam), lam <- lam - lr * v.

    Args:
        penalty: its lam are stepped, its gradient is added to the weights.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: decay of lam, >= 0.

    Raises:
        ValueError: the penalty learns nothing.

    Note:
        Call `step()` once a step: after the backward pass (the last one, where gradients are accumulated) and before
        `optimizer.step()`, instead of `penalty.add_grad_()`. After `clip_grad_norm_` the penalty acts in full; before
        it, the penalty counts in the norm and is shrunk with the rest.
    """

    takes_fixed = False  # whether a penalty without lam makes sense
    lacks = ()  # options of SGD that a state may not have

    def __init__(self, penalty: Penalty, *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        if not (penalty.lambdas or self.takes_fixed):
            name = type(penalty).__name__
            raise ValueError(f"{name} learns no lam: call penalty.add_grad_() before optimizer.step() instead")
        group = {"params": [*penalty.parameters()]}
        super().__init__([group], lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.penalty = penalty

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, scaler: GradScaler | None = None) -> float | None:
        """Add the penalty's gradient to that of the weights, step lam, and drop its gradient.

        Args:
            closure: evaluates the model and returns the loss; called first.
            scaler: the one that scaled the loss, if one did; see `Penalty.add_grad_`. lam does not depend on the
                data: it is stepped also where the scaler then leaves out the step of the weights.

        Returns:
            The loss of the closure, None without one.

        Raises:
            ValueError: see `Penalty.add_grad_`; or this was called by `scaler.step()`, or lam is not the penalty's.
        """
        loss = self._begin(closure)
        self.penalty.add_grad_(scaler=scaler)
        self._step_lam()
        return loss

    def _step_lam(self) -> None:
        align_momenta_(self)  # lam may have another layout now, as an attribute of a model that was given one
        SGD.step(self)
        self.zero_grad()
        self.penalty.leave("add_grad_()")

    def _begin(self, closure: Callable[[], float] | None) -> float | None:
        """Refuse what cannot go well, and return the loss of the closure."""
        if hasattr(self, "found_inf"):  # how a scaler tells an optimizer what to do
            raise ValueError(
                "scaler.step() is for the optimizer of the weights: call step(scaler=scaler) of this one itself"
            )
        lams = self.param_groups[0]["params"]
        if lams and lams[0] is not next(self.penalty.parameters()):
            raise ValueError("lam was exchanged, as by load_state_dict(assign=True): build the optimizer of lam anew")
        with torch.enable_grad():
            loss = closure() if closure else None
        self.penalty.require_absent("the loss", "add_grad_()")
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state, its momenta laid out as lam is: SGD walks over both as they lie in memory.

        Args:
            state_dict: of an optimizer of the same lam.

        Raises:
            ValueError: a momentum has not the shape of its lam, the state has an option that FusedHALO has not, or see
                `torch.optim.Optimizer.load_state_dict`.
        """
        for option in self.lacks:
            if any(group.get(option) for group in state_dict["param_groups"]):
                name = type(self).__name__
                raise ValueError(f"the state is of an SGD with {option}, which {name} does not have: use LambdaSGD")
        super().load_state_dict(state_dict)
        align_momenta_(self)

    def __getstate__(self) -> dict:
        """Add to the state of an optimizer what it works on, for copies and pickles."""
        return {**super().__getstate__(), "penalty": self.penalty}


class FusedHALO(LambdaSGD):
    """`LambdaSGD` for HALO in one pass over memory, without a gradient of lam.

    fp32 on CPU runs halo_step.cpp, anything else halo_step.py; benchmarks/ compares them.
    The state is that of `LambdaSGD`, so each continues the checkpoint of the other.

    Args:
        penalty: its lam are stepped, its gradient is added to the weights; none of them may be frozen.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: decay of lam, >= 0.
        weights: the optimizer of the weights. If it is given, `step()` only asks for the pass, which takes place at the
            beginning of the next `weights.step()`: whatever clips or unscales the gradients, before or after, sees
            those of the loss. The kernel steps the penalised weights in the same pass, exactly as `weights` would, and
            leaves them without a gradient; `weights` then steps the others.
        compiled: run the step through torch.compile where the kernel does not apply, as on CUDA.

    Attributes:
        slow_because: why this CPU has no kernel, such as a missing compiler; None where it has one, and where none is
            for the weights, which are not in fp32, not dense, or elsewhere.

    Raises:
        ValueError: the penalty is not HALO, a weight or a lam does not require a gradient, or `weights` is not plain
            SGD in one group that has all penalised weights; use `LambdaSGD`, or leave out `weights`.

    Note:
        Copy or pickle it together with model, penalty and `weights`, as any optimizer with its model.
    """

    lacks = OTHER_SGD

    def __init__(
        self,
        penalty: HALO,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        weights: SGD | None = None,
        compiled: bool = False,
    ) -> None:
        if not is_halo(penalty):
            raise ValueError(f"FusedHALO is the step of HALO alone, not of {type(penalty).__name__}: use LambdaSGD")
        super().__init__(penalty, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if weights is not None:
            require_plain_sgd(weights, penalty)
        self._compiled = compiled
        self._prepare(weights)
        self._require_trained()

    def _prepare(self, weights: SGD | None) -> None:
        """Find the form of the pass, and have it run by the optimizer of the weights if there is one."""
        self._weights, self._kernel, self.slow_because = weights, None, None
        self._request = Request(next(iter(self.penalty.penalized.values())))
        self._call: CompiledStep | None = None
        self._pairs = [(name, self.penalty.penalized[name], lam) for name, lam in self.penalty.lambdas.items()]
        tensors = [tensor for _, *pair in self._pairs for tensor in pair]
        if all(t.dtype == torch.float32 and t.device.type == "cpu" and is_dense(t) for t in tensors):
            try:
                self._kernel = load_kernel()
            except OSError as error:
                self.slow_because = str(error)
        self._pieces = HaloStep(size=CHUNK if tensors[0].device.type == "cpu" else 16 * CHUNK, compiled=self._compiled)
        if weights is not None:
            weights.register_step_pre_hook(while_alive(self._before_weights))

    def __getstate__(self) -> dict:
        """Leave out the kernel, which cannot be pickled."""
        return {**super().__getstate__(), "_compiled": self._compiled, "_weights": self._weights}

    def __setstate__(self, state: dict) -> None:
        """Find the kernel again; `load_state_dict` calls this too, with less."""
        super().__setstate__(state)
        if "_weights" in state:
            self._prepare(state["_weights"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, scaler: GradScaler | None = None) -> float | None:
        """Add HALO's gradient to that of the weights and step lam; with `weights`, when these are stepped.

        Args:
            closure: evaluates the model and returns the loss; called first.
            scaler: the one that scaled the loss, if one did; see `Penalty.add_grad_`. With `weights` it makes no
                difference, and where it leaves out the step of the weights, lam stays too.

        Returns:
            The loss of the closure, None without one.

        Raises:
            ValueError: see `LambdaSGD.step`; or the network was moved to another type after this was built, lam has a
                gradient, or another optimizer than `weights` has stepped the weights.
        """
        loss = self._begin(closure)
        if self._pairs[0][2].grad is not None:
            raise ValueError("lam has a gradient of its own, which FusedHALO does not read: use LambdaSGD")
        if self._weights is not None:
            self._request.make()
            return loss
        with self.penalty.guard.adding(scaler):
            self._pass()
        return loss

    @torch.no_grad()
    def _before_weights(self, weights: SGD, args: tuple, kwargs: dict) -> None:
        if not self._request.open:
            return
        require_known_options(weights.param_groups[0])  # load_state_dict brings those of the saved optimizer
        if hasattr(weights, "found_inf"):  # a fused SGD, which a scaler leaves to unscale or not to step
            raise ValueError("SGD(fused=True) and a GradScaler: build FusedHALO without weights=, or SGD without fused")
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise ValueError("optimizer.step(closure) and FusedHALO(weights=optimizer): call the closure before step()")
        self._request.take()
        require_current(self.penalty.penalized)
        self._pass()

    def _require_trained(self) -> None:
        if not all(w.requires_grad and lam.requires_grad for _, w, lam in self._pairs):
            raise ValueError("a penalised weight or its lam is frozen (requires_grad is False): use LambdaSGD")

    def _pass(self) -> None:
        if not (self._kernel and self._call and self._call.refresh()):
            sets = self._checked()
            if not self._kernel:
                self._pieces.run(sets, xi=self.penalty.xi, psi=self.penalty.psi, **factors_of(self))
                return
            self._call = CompiledStep(sets, self, self._weights)
        self._call.run(self._kernel, xi=self.penalty.xi, psi=self.penalty.psi)

    def _checked(self) -> list[tuple[Tensor, ...]]:
        """Return weight, gradient, lam and momentum of lam, tensor by tensor, fit for the pass."""
        self._call = None
        self._require_trained()
        for name, w, lam in self._pairs:
            require_beside(name, w, lam)
            if self._kernel and (w.dtype != torch.float32 or w.device.type != "cpu"):
                raise ValueError(
                    f"the weights are now {w.dtype} on {w.device}: build FusedHALO after moving the network"
                )
            if self._kernel and w.grad is not None and w.grad.dtype != w.dtype:  # the kernel would read beyond it
                raise ValueError(f"the gradient of {name!r} is {w.grad.dtype}, the weight {w.dtype}: use LambdaSGD")
            if lam.stride() != w.stride():  # the network got another layout
                lam.data = aligned(lam.data, w)
                self._kernel = self._kernel if is_dense(w) else None
            if self._kernel and self._weights is not None:
                velocity_of(self._weights, w)
        return [(w, aligned_gradient(w), lam, velocity_of(self, lam)) for _, w, lam in self._pairs]


def is_halo(penalty: Penalty) -> bool:
    """Return whether a penalty is HALO, with the equation and the gradients that the kernel has."""
    same = ("forward", "_add_grad_", "lambdas")
    return isinstance(penalty, HALO) and all(getattr(type(penalty), name) is getattr(HALO, name) for name in same)


def require_plain_sgd(weights: Optimizer, penalty: HALO) -> None:
    """Raise unless the kernel can do the work of this optimizer on the penalised weights.

    Raises:
        ValueError: it is none, is no SGD, has several groups, an option that the kernel lacks, or not all weights.
    """
    if type(weights) is not SGD:
        raise ValueError(f"weights= takes a torch.optim.SGD, got {type(weights).__name__}: {ALONE}")
    if len(weights.param_groups) > 1:
        raise ValueError(f"weights= takes an SGD of one parameter group, this has {len(weights.param_groups)}: {ALONE}")
    (group,) = weights.param_groups
    require_known_options(group)
    require_stepped(penalty.penalized, weights, remedy=ALONE)


def require_known_options(group: dict) -> None:
    """Raise unless the kernel has all that a group of an SGD asks for.

    Raises:
        ValueError: it does not; with a maximizing optimizer nobody may add the penalty to the gradients.
    """
    for option in OTHER_SGD:
        if group[option]:
            remedy = "minimise the negative, or use DecoupledLambdaSGD" if option == "maximize" else ALONE
            raise ValueError(f"weights= takes an SGD without {option}, this has {option}={group[option]}: {remedy}")


@cache
def load_kernel() -> ctypes._CFuncPtr:
    """Return the compiled function halo_step, made once a process.

    Raises:
        OSError: there is no C++ compiler, or it fails.
    """
    function = load_native(Path(__file__).with_name("halo_step.cpp")).halo_step
    function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 6, *[ctypes.c_float] * 3, Factors, Factors]
    function.restype = None
    return function
