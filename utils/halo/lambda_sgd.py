"""SGD of the learned lam, which also adds the penalty's gradient to the weights: readable, and in one pass.

`LambdaSGD.step()` is `penalty.add_grad_()` followed by SGD. `FusedHALO.step()` does the same for HALO in one pass over
memory (w, its gradient, lam and momentum in; gradient, lam and momentum out) and needs no gradient of lam. It can take
the SGD of the weights into the same pass, which then costs about what that alone costs.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import SGD

from .native import load_native
from .penalties import CHUNK, HALO, Penalty, gradient, is_dense, pieces

OTHER_SGD = ("nesterov", "dampening", "maximize")  # options of SGD that the kernel does not have


class LambdaSGD(SGD):
    """SGD with momentum on the learned coefficients of a penalty.

    v <- momentum * v + (d penalty / d lam + weight_decay * lam), lam <- lam - lr * v.

    Args:
        penalty: its lam are stepped, its gradient is added to the weights.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: decay of lam, >= 0.

    Note:
        Call `step()` after the backward pass and before the step of the weights, instead of `penalty.add_grad_()`.
    """

    def __init__(self, penalty: Penalty, *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(penalty.parameters(), lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.penalty = penalty

    def step(self) -> None:
        """Add the penalty's gradient to that of the weights, step lam, and drop its gradient."""
        self.penalty.add_grad_()
        super().step()
        self.zero_grad()


class FusedHALO(LambdaSGD):
    """`LambdaSGD` for HALO in one pass over memory, without a gradient of lam.

    fp32 on CPU runs halo_step.cpp, anything else `halo_step_` on pieces that stay in cache; benchmarks/ compares them.
    The state is that of `LambdaSGD`, so each continues the checkpoint of the other.

    Args:
        penalty: its lam are stepped, its gradient is added to the weights; none of them may be frozen.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: decay of lam, >= 0.
        weights: the optimizer of the weights. If it is given, the kernel steps the penalised weights in the same pass,
            exactly as it would, and leaves them without a gradient; its own `step()` is then left with the others.
        compiled: run `halo_step_` through torch.compile where the kernel does not apply, as on CUDA.

    Attributes:
        slow_because: why there is no kernel on this CPU, such as a missing compiler; None where there is one.

    Raises:
        ValueError: a weight or a lam does not require a gradient, or `weights` is not plain SGD in one group; use
            `LambdaSGD`.
    """

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
        super().__init__(penalty, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._pairs = [(penalty.penalized[name], lam) for name, lam in penalty.lambdas.items()]
        tensors = [tensor for pair in self._pairs for tensor in pair]
        if not all(t.requires_grad for t in tensors):
            raise ValueError("a penalised weight or its lam is frozen (requires_grad is False): use LambdaSGD")
        if weights and (len(weights.param_groups) > 1 or any(weights.defaults[k] for k in OTHER_SGD)):
            raise ValueError(f"the optimizer of the weights must have one group and none of {', '.join(OTHER_SGD)}")
        self._weights, self._kernel, self.slow_because = weights, None, None
        if all(t.dtype == torch.float32 and t.device.type == "cpu" and is_dense(t) for t in tensors):
            try:
                self._kernel = load_kernel()
            except OSError as error:
                self.slow_because = str(error)
        self._halo_step_ = torch.compile(halo_step_, dynamic=True) if compiled else halo_step_
        # A compiled function takes a tensor whole, as an accelerator does best with few large operations.
        self._chunk = CHUNK if not compiled and tensors[0].device.type == "cpu" else 16 * CHUNK

    @torch.no_grad()
    def step(self) -> None:
        """Add HALO's gradient to that of the weights and step lam, and the weights if told to.

        Raises:
            ValueError: the network was moved to another type or device after this was built.
        """
        sets = [(w, aligned_gradient(w), lam, velocity_of(self, lam)) for w, lam in self._pairs]
        if self._kernel:
            self._run_kernel(sets)
            return
        factors = {"xi": self.penalty.xi, "psi": self.penalty.psi} | factors_of(self)
        for tensors in sets:
            for piece in pieces(*tensors, size=self._chunk):
                self._halo_step_(*piece, **factors)

    def _run_kernel(self, sets: list[tuple[Tensor, ...]]) -> None:
        w = sets[0][0]
        if w.dtype != torch.float32 or w.device.type != "cpu":
            raise ValueError(f"the weights are now {w.dtype} on {w.device}: build FusedHALO after moving the network")
        array = ctypes.c_void_p * len(sets)
        columns = [*zip(*sets, strict=True)]
        sizes = (ctypes.c_int64 * len(sets))(*map(Tensor.numel, columns[0]))
        of_lam, of_w, w_velocities = Factors(**factors_of(self)), Factors(), None
        if self._weights:
            of_w = Factors(**factors_of(self._weights))
            w_velocities = array(*(velocity_of(self._weights, w).data_ptr() for w in columns[0]))
        addresses = [array(*map(Tensor.data_ptr, column)) for column in columns]
        self._kernel(len(sets), sizes, *addresses, w_velocities, self.penalty.xi, self.penalty.psi, of_lam, of_w)
        if self._weights:
            for w in columns[0]:
                w.grad = None


class Factors(ctypes.Structure):
    """The factors of SGD, as the kernel takes them."""

    _fields_ = [(name, ctypes.c_float) for name in ("lr", "momentum", "weight_decay")]


def factors_of(optimizer: SGD) -> dict[str, float]:
    """Return learning rate, momentum and weight decay as they are now."""
    return {name: optimizer.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")}


def velocity_of(optimizer: SGD, parameter: Tensor) -> Tensor:
    """Return the momentum buffer of a parameter, made of zeros if there is none, laid out as the parameter is."""
    state = optimizer.state[parameter]
    buffer = state.get("momentum_buffer")
    if buffer is None or buffer.stride() != parameter.stride():
        state["momentum_buffer"] = torch.zeros_like(parameter) if buffer is None else aligned(buffer, parameter)
    return state["momentum_buffer"]


def halo_step_(
    w: Tensor,
    grad: Tensor,
    lam: Tensor,
    velocity: Tensor,
    *,
    xi: float,
    psi: float,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Change grad, lam and velocity in place as `LambdaSGD` does with `HALO.add_grad_`; all of one shape."""
    inverse = lam.reciprocal()
    strength = inverse.square().mul_(xi)
    grad.add_(w.sign().mul_(strength))
    slope = strength.mul_(inverse).mul_(w.abs()).mul_(-2).add_(lam.sign(), alpha=psi)
    velocity.mul_(momentum).add_(slope.add_(lam, alpha=weight_decay))
    lam.add_(velocity, alpha=-lr)


def aligned(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor itself, or a copy of it, with its elements in the order in memory that `like` has."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def aligned_gradient(w: Tensor) -> Tensor:
    """Return `.grad`, made if it is None, and laid out as the weight is."""
    if w.grad is None or w.grad.stride() != w.stride():
        w.grad = aligned(gradient(w), w)
    return w.grad


@cache
def load_kernel() -> ctypes._CFuncPtr:
    """Return the compiled function halo_step, made once a process.

    Raises:
        OSError: there is no C++ compiler, or it fails.
    """
    function = load_native(Path(__file__).with_name("halo_step.cpp")).halo_step
    function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 6, *[ctypes.c_float] * 2, Factors, Factors]
    function.restype = None
    return function
