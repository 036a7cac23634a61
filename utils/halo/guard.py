"""What a training loop of somebody else's can get wrong about a penalty, noticed before it does harm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState


class NamedParameters(dict):
    """Name to parameter, with the model that they are of, so that a penalty notices when it has others instead."""

    def __init__(self, named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], model: nn.Module) -> None:
        super().__init__(named)
        self.model = model


def distinct(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return named tensors of floating point, tied ones once, under the first of their names.

    Raises:
        ValueError: it is no mapping of names to such tensors, or it is empty.
    """
    if not hasattr(params, "items"):
        raise ValueError(
            f"got a {type(params).__name__} where names and tensors belong: pass penalized_parameters(model)"
        )
    first: dict[int, tuple[str, Tensor]] = {}
    for name, w in params.items():
        if not isinstance(w, Tensor):
            raise ValueError(f"cannot penalise {name!r}, a {type(w).__name__}: pass penalized_parameters(model)")
        if not w.is_floating_point():
            raise ValueError(f"cannot penalise {name!r}: its type is {w.dtype}, not a floating point type")
        first.setdefault(id(w), (name, w))
    if not first:
        raise ValueError("no parameters to penalise: the mapping is empty")
    named = dict(first.values())
    return NamedParameters(named, params.model) if isinstance(params, NamedParameters) else named


def require_current(params: dict[str, Tensor]) -> None:
    """Raise unless every tensor is still a parameter of the model that it was taken from, where that is known.

    Raises:
        ValueError: a layer was replaced, or its tensor was.
    """
    model = getattr(params, "model", None)
    if model is None or all(_at(model, name) is w for name, w in params.items()):
        return
    ids = {id(p) for p in model.parameters()}  # one may have moved to another name
    for name, w in params.items():
        if id(w) not in ids:
            raise ValueError(
                f"{name!r} is no longer a parameter of {type(model).__name__}: a layer was replaced, or .to() or "
                "load_state_dict(assign=True) put another tensor there. Build the optimizer, the penalty and its "
                "optimizer anew; new_penalty.load_state_dict(penalty.state_dict()) keeps lam"
            )


def _at(model: nn.Module, name: str) -> Tensor | None:
    """Return the parameter of this dotted name, None if there is none."""
    *path, key = name.split(".")
    for part in path:
        model = model._modules.get(part)
        if model is None:
            return None
    return model._parameters.get(key)


def require_beside(name: str, w: Tensor, lam: Tensor) -> None:
    """Raise unless a lam is where its weight is, and of its shape.

    Raises:
        ValueError: the weight was moved or changed after the penalty was built.
    """
    if w.device != lam.device:
        raise ValueError(
            f"{name!r} is on {w.device}, its lam on {lam.device}: call penalty.to({str(w.device)!r}) and build the "
            "optimizer of lam after that, or move the network before building the penalty"
        )
    if w.shape != lam.shape:
        raise ValueError(f"{name!r} is now {tuple(w.shape)}, its lam {tuple(lam.shape)}: build the penalty anew")


class GradientGuard:
    """Sees to it that the penalty enters the gradients of a step once, and in their scale.

    Args:
        params: name to tensor, the penalised parameters.
    """

    def __init__(self, params: dict[str, Tensor]) -> None:
        self._params = params
        self._last: tuple | None = None

    def __getstate__(self) -> dict:
        """Leave out the gradients, which copies and files do not have."""
        return {"_params": self._params, "_last": None}

    @contextmanager
    def adding(self, scaler: GradScaler | None) -> Iterator[None]:
        """Let the block add to the gradients, which are unscaled for its length if they are scaled.

        Raises:
            ValueError: a tensor left the model, or a backward pass was added to gradients that hold the penalty.
        """
        require_current(self._params)
        self._require_new_gradients()
        trained = [w for w in self._params.values() if w.requires_grad]
        scale = scale_of(scaler, trained)
        if scale is not None:
            multiply_(trained, 1 / scale)
        yield
        if scale is not None:
            multiply_(trained, scale)
        self._remember(trained)

    def _remember(self, trained: list[Tensor]) -> None:
        """Keep what tells the next call whether a step, or zero_grad(), came between: of one tensor, the smallest."""
        w = min(trained, key=Tensor.numel, default=None)
        if w is not None and w.grad is not None:
            versions = [tensor._version for tensor in trained]
            self._last = w, w.detach().clone(), w.grad, w.grad._version, trained, versions

    def _require_new_gradients(self) -> None:
        if self._last is None:
            return
        w, value, grad, version, trained, versions = self._last
        self._last = None
        if w.grad is not grad or grad._version == version:
            return  # they were set to None, or nothing was added to them
        # A fused step leaves the version as it is, hence the look at the value.
        if [tensor._version for tensor in trained] == versions and torch.equal(w, value):
            raise ValueError(
                "these gradients hold the penalty already, and a backward pass was added to them: call add_grad_() or "
                "the step of lam once a step, after the last backward pass and before optimizer.step(); then "
                "optimizer.zero_grad() with set_to_none=True, its default"
            )


def scale_of(scaler: GradScaler | None, tensors: list[Tensor]) -> Tensor | None:
    """Return the factor that the gradients have from `scaler.scale(loss)`; None for 1."""
    if scaler is None or not scaler.is_enabled() or not tensors:
        return None
    # Nothing public says whether unscale_() was called since the last update().
    if any(state["stage"] is OptState.UNSCALED for state in scaler._per_optimizer_states.values()):
        return None
    return scaler.scale(torch.ones((), device=tensors[0].device))


def multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply the gradients, where there are any, in place."""
    for tensor in tensors:
        if tensor.grad is not None:
            tensor.grad.mul_(factor)
