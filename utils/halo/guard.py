"""What a training loop of somebody else's can get wrong about a penalty, noticed before it does harm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from .fate import Fate, Steps, follow_steps

NOWHERE = nn.Module()  # where a name leads that the model no longer has


class NamedParameters(dict):
    """Name to parameter, with the model that they are of, so that a penalty notices when it has others instead."""

    def __init__(self, named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], model: nn.Module) -> None:
        super().__init__(named)
        self.model = model
        self._path: tuple[list, list] | None = None

    def __getstate__(self) -> dict:
        """Leave out what leads to the tensors, which a copy finds again."""
        return {"model": self.model, "_path": None}

    def stand(self) -> bool:
        """Return whether every tensor is where its name leads; the way is found once, then only compared."""
        modules, tensors = self._path = self._path or self._find()
        if all(module._modules.get(key) is child for module, key, child in modules) and all(
            module._parameters.get(key) is w for module, key, w in tensors
        ):
            return True
        self._path = None
        return False

    def _find(self) -> tuple[list, list]:
        """Return the steps from module to module, each once, and from the last module to the tensor."""
        modules, tensors = {}, []
        for name, w in self.items():
            module, (*path, key) = self.model, name.split(".")
            for part in path:
                child = module._modules.get(part, NOWHERE)
                modules[id(module), part] = module, part, child
                module = child
            tensors.append((module, key, w))
        return [*modules.values()], tensors


def require_stepped(params: Mapping[str, Tensor], weights: Optimizer, *, remedy: str) -> None:
    """Raise unless the optimizer of the weights has every penalised parameter.

    Raises:
        ValueError: it lacks one; the message ends with the remedy.
    """
    stepped = {id(p) for group in weights.param_groups for p in group["params"]}
    for name, w in params.items():
        if id(w) not in stepped:
            raise ValueError(f"{name!r} is penalised, but the optimizer of weights= does not have it: {remedy}")


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
        if not w.is_leaf:
            raise ValueError(f"cannot penalise {name!r}: it is computed from other tensors, such as weight_norm's")
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
    if model is None or params.stand():
        return
    ids = {id(p) for p in model.parameters()}  # one may have moved to another name
    for name, w in params.items():
        if id(w) not in ids:
            raise ValueError(
                f"{name!r} is no longer a parameter of {type(model).__name__}: a layer was replaced, or .to() or "
                "load_state_dict(assign=True) put another tensor there. Build the optimizer, the penalty and its "
                "optimizer anew; new_penalty.load_state_dict(penalty.state_dict()) keeps lam"
            )


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


# How many steps are watched closely: a look at the gradients makes the host wait for an accelerator.
WATCHED_STEPS = 10


class GradientGuard:
    """Sees to it that the penalty enters the gradients of a step once, and in their scale.

    Args:
        params: name to tensor, the penalised parameters.
    """

    def __init__(self, params: dict[str, Tensor]) -> None:
        follow_steps()
        self._params = params
        self._last: LastStep | None = None
        self._watched = 0

    def __getstate__(self) -> dict:
        """Leave out the gradients, which copies and files do not have."""
        return {"_params": self._params, "_last": None, "_watched": 0}

    def __setstate__(self, state: dict) -> None:
        """Follow steps also where a file brought this here."""
        follow_steps()
        self.__dict__.update(state)

    @contextmanager
    def adding(self, scaler: GradScaler | None) -> Iterator[None]:
        """Let the block add to the gradients, which are unscaled for its length if they are scaled.

        Raises:
            ValueError: a tensor left the model, a backward pass was added to gradients that hold the penalty, or
                those of the last step were divided after it was added, or zeroed before optimizer.step() saw them.
        """
        require_current(self._params)
        if self._last:
            self._look_back(self._last)
            self._watched += 1
        trained = [w for w in self._params.values() if w.requires_grad]
        scale = scale_of(scaler, trained)
        if scale is not None:
            multiply_(trained, 1 / scale)
        yield
        if scale is not None:
            multiply_(trained, scale)
        has_gradient = any(w.grad is not None for w in trained)
        watched = self._watched < WATCHED_STEPS
        self._last = LastStep(trained, scaled=scale is not None, watched=watched) if has_gradient else None

    def _look_back(self, last: LastStep) -> None:
        self._last = None
        if last.fate:
            last.fate.end()
        if last.was_added_to():
            raise ValueError(
                "these gradients hold the penalty already, and a backward pass was added to them: call add_grad_() or "
                "the step of lam once a step, after the last backward pass and before optimizer.step(); then "
                "optimizer.zero_grad() with set_to_none=True, its default"
            )
        if last.fate and last.fate.lost:
            raise ValueError(
                "the penalty did not reach the weights: optimizer.step() came before it was added, or the gradients "
                "were zeroed in between. Call add_grad_() or the step of lam between the last backward pass and "
                "optimizer.step(); with optimizer.step(closure), at the end of the closure"
            )
        if last.fate and not last.scaled:
            divisor = last.divisor()
            if divisor:
                raise ValueError(
                    f"the gradients, and with them the penalty, were divided by {divisor:g} after it was added: with a "
                    "GradScaler call step(scaler=scaler) or add_grad_(scaler=scaler), and scaler.unscale_() of all "
                    "optimizers before it or of none; else divide before adding it"
                )


class LastStep:
    """What tells the next step what happened in between: the smallest of the tensors, and the versions of all."""

    def __init__(self, trained: list[Tensor], *, scaled: bool, watched: bool) -> None:
        self.scaled = scaled
        self.w = min((w for w in trained if w.grad is not None), key=Tensor.numel)
        self.grad, self.version = self.w.grad, self.w.grad._version
        corner = (slice(8),) * self.w.dim()
        self.views = self.w.detach()[corner], self.grad[corner]
        self.values = [view.clone() for view in self.views]
        self.trained, self.versions = trained, [tensor._version for tensor in trained]
        self.fate = Fate(self.w) if watched and self.w.is_leaf else None
        self.steps = self.fate or Steps(self.w)

    def was_added_to(self) -> bool:
        """Return whether the gradients are still these, have changed, and no step was taken.

        A view, as into a bucket of DistributedDataParallel, may be the same tensor in every step: nobody can tell.
        """
        if self.w.grad is not self.grad or self.grad._version == self.version or self.grad._is_view():
            return False
        stepped = self.steps.taken or [tensor._version for tensor in self.trained] != self.versions
        # Whoever is no torch.optim.Optimizer may step without a new version, hence the look at the value.
        return not stepped and torch.equal(self.views[0], self.values[0])

    def divisor(self) -> float | None:
        """Return the power of two by which gradients that are now gone were divided; None for anything else.

        Of a few numbers in 16 bits a clipped norm may have such a ratio too.
        """
        if self.grad.dtype not in (torch.float32, torch.float64):
            return None
        now, then = self.views[1].float(), self.values[1].float()
        if self.w.grad is self.grad or not now.any():
            return None
        ratios = (then / now)[now != 0].unique()
        if len(ratios) != 1 or not 1 < ratios.item() < math.inf or math.frexp(ratios.item())[0] != 0.5:
            return None
        return ratios.item()


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
