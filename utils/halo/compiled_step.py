"""The call of the compiled step: its addresses are kept from step to step for as long as no tensor moves."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from operator import is_

from torch import Tensor
from torch.optim import SGD

from .floor import LAMBDA_FLOOR


class Factors(ctypes.Structure):
    """The factors of SGD, as the kernel takes them."""

    _fields_ = [(name, ctypes.c_float) for name in ("lr", "momentum", "weight_decay")]


def factors_of(optimizer: SGD) -> dict[str, float]:
    """Return learning rate, momentum and weight decay as they are now."""
    return {name: optimizer.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")}


def _seen(tensor: Tensor) -> tuple:
    """Return all of a tensor that the checks of a step look at; an address is of one device."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


class CompiledStep:
    """Arrays of addresses of weights, gradients, lam and momenta, and what they were made of.

    A small network is stepped in less time than Python takes to look at every tensor in full. So all checks are made
    where this is built, and `refresh()` only finds out, strictly, whether anything that they depend on is another.

    Args:
        sets: weight, gradient, lam and momentum of lam, tensor by tensor, as the checks left them.
        lam_optimizer: has the momenta of lam.
        weights: the optimizer that has those of the weights, if the kernel steps these too; its buffers are made.
    """

    def __init__(self, sets: Sequence[tuple[Tensor, ...]], lam_optimizer: SGD, weights: SGD | None) -> None:
        array = ctypes.c_void_p * len(sets)
        columns = [*zip(*sets, strict=True)]
        self._weights, self._lams = columns[0], columns[2]
        self._sizes = (ctypes.c_int64 * len(sets))(*map(Tensor.numel, columns[0]))
        self._columns = [array(*map(Tensor.data_ptr, column)) for column in columns]
        self._optimizers = [lam_optimizer, weights] if weights else [lam_optimizer]
        self._momenta = [*map(Momenta, self._optimizers, (self._lams, self._weights))]
        self._w_velocities = array(*(b.data_ptr() for b in self._momenta[1].buffers)) if weights else None
        self._seen = [*map(_seen, self._weights), *map(_seen, self._lams)]
        self._strides = [w.stride() for w in self._weights]

    def refresh(self) -> bool:
        """Take the gradients of this step, and return whether all else is as it was; if not, build this anew."""
        if not all(momenta.stand() for momenta in self._momenta):
            return False
        if [*map(_seen, self._weights), *map(_seen, self._lams)] != self._seen:
            return False
        for index, (w, strides) in enumerate(zip(self._weights, self._strides, strict=True)):
            grad = w.grad
            if grad is None or grad.stride() != strides or grad.dtype != w.dtype:
                return False
            self._columns[1][index] = grad.data_ptr()
        return True

    def run(self, kernel: Callable, *, xi: float, psi: float) -> None:
        """Call the kernel; where it steps the weights too, they have no gradient afterwards."""
        factors = [Factors(**factors_of(optimizer)) for optimizer in self._optimizers]
        of_lam, of_w = factors if self._w_velocities else (*factors, Factors())
        strengths = xi, psi, 1 / LAMBDA_FLOOR
        kernel(len(self._sizes), self._sizes, *self._columns, self._w_velocities, *strengths, of_lam, of_w)
        if self._w_velocities:
            for w in self._weights:
                w.grad = None


class Momenta:
    """The momentum buffers of some parameters of an optimizer, and whether it still has these."""

    def __init__(self, optimizer: SGD, parameters: Sequence[Tensor]) -> None:
        self._optimizer, self._states = optimizer, [*optimizer.state.values()]
        self._of = [optimizer.state[parameter] for parameter in parameters]
        self.buffers = [state["momentum_buffer"] for state in self._of]
        self._seen = self._where()

    def stand(self) -> bool:
        """Return whether no buffer, and nothing that leads to one, was exchanged."""
        states = self._optimizer.state
        return (
            len(states) == len(self._states)
            and all(map(is_, states.values(), self._states))
            and all(
                state.get("momentum_buffer") is buffer for state, buffer in zip(self._of, self.buffers, strict=True)
            )
            and self._where() == self._seen
        )

    def _where(self) -> list[tuple]:
        return [(buffer.data_ptr(), buffer.stride()) for buffer in self.buffers]
