"""Which tensors are penalised and which are pruned: the only answer in the project."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .guard import NamedParameters
from .penalty import Penalty

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LINEAR = (nn.Linear, nn.Bilinear, nn.MultiheadAttention)
WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
BIASES = ("bias", "in_proj_bias")
Exclude = str | nn.Module | Iterable[str | nn.Module]

# Why a matrix is left out, as the note says it. A table is added or looked up, never multiplied with: mentioned only.
NOT_ASKED = "Linear or attention weights (linear=True takes them)"
REPARAMETRISED = "matrices of reparametrised layers (remove the parametrization to have their weight taken)"
UNKNOWN = "matrices of layers of other kinds"
TABLES = "tables, such as embeddings"


def inner_model(model: nn.Module) -> nn.Module:
    """Return the network itself where DistributedDataParallel, DataParallel or torch.compile has wrapped it."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def network_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path to module, without the penalties that were made attributes of the network: lam is no part of it."""
    of_penalties = {part for module in model.modules() if isinstance(module, Penalty) for part in module.modules()}
    return {path: module for path, module in model.named_modules() if module not in of_penalties}


def network_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the network itself, each once."""
    found = [p for module in network_modules(model).values() for p in module.parameters(recurse=False)]
    return [*{id(p): p for p in found}.values()]


def plain_name(name: str) -> str:
    """Return a name as it was before torch.compile wrapped parts of the network."""
    return ".".join(part for part in name.split(".") if part not in ("", "_orig_mod"))


def _refuse_lazy(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet: run one batch through the network before asking for its layers")


def _excluded(model: nn.Module, exclude: Exclude) -> set[int]:
    """Return the ids of the parameters that the caller leaves out; a tied one goes by any of its names."""
    named = [(f"{plain_name(name)}.", p) for name, p in model.named_parameters(remove_duplicate=False)]
    everything, out = {id(p) for _, p in named}, set()
    for item in [exclude] if isinstance(exclude, (str, nn.Module)) else exclude:
        if isinstance(item, nn.Module):
            found = everything & {id(p) for p in item.parameters()}
        else:
            found = {id(p) for name, p in named if name.startswith(f"{plain_name(str(item))}.")}
        if not found:
            said = type(item).__name__ if isinstance(item, nn.Module) else repr(item)
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"exclude: {said} is no part of {type(model).__name__} with parameters: "
                f"give a name that model.named_parameters() begins with ({parts}), or the module itself"
            )
        out |= found
    return out


def _has_weight(layer: nn.Module) -> bool:
    """Return whether a weight of the layer is a parameter of its own, not computed from others."""
    return any(layer._parameters.get(key) is not None for key in WEIGHTS)


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in WEIGHTS


def _select(model: nn.Module, *, linear: bool, exclude: Exclude) -> dict[str, nn.Parameter]:
    """Return weights and biases of all layers in question, frozen ones too, and say which matrices are left out."""
    model = inner_model(model)
    _refuse_lazy(model)
    kinds = CONVOLUTIONS + LINEAR if linear else CONVOLUTIONS
    out = _excluded(model, exclude)
    chosen, done = {}, set(out)
    for path, layer in model.named_modules():
        if not isinstance(layer, kinds) or not _has_weight(layer):
            continue
        for key, p in layer.named_parameters(recurse=False):
            if key in WEIGHTS + BIASES and id(p) not in done:
                chosen[plain_name(f"{path}.{key}")] = p
                done.add(id(p))
    if not any(_is_weight(name) for name in chosen):
        what = "convolution, Linear or attention layer" if linear else "convolution"
        besides = ", besides those excluded," if out else ""
        remedy = "collect the tensors by name yourself" if linear else "pass linear=True to take its Linear layers"
        raise ValueError(f"{type(model).__name__} has no {what}{besides} whose weight is a parameter: {remedy}")
    _say_what_is_left_out(model, chosen, done, linear=linear)
    return chosen


def _why_left_out(layer: nn.Module, p: nn.Parameter, *, linear: bool) -> str | None:
    """Return why no matrix of this layer is taken; None for what is no matrix."""
    if sum(size > 1 for size in p.shape) < 2 or isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return None
    if isinstance(layer, LINEAR) and not linear:
        return NOT_ASKED
    if isinstance(layer, CONVOLUTIONS + LINEAR):
        return UNKNOWN if _has_weight(layer) else REPARAMETRISED
    # A first dimension of 1 is there to be broadcast over a batch: positions, a class token.
    is_table = isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) or (p.dim() > 2 and len(p) == 1)
    return TABLES if is_table else UNKNOWN


def _left_out(model: nn.Module, done: set[int], *, linear: bool) -> dict[str, dict[str, int]]:
    """Return, by the reason, name and size of every trainable matrix whose id is not in `done`."""
    reasons: dict[str, dict[str, int]] = {NOT_ASKED: {}, REPARAMETRISED: {}, UNKNOWN: {}, TABLES: {}}
    done, last_linear = set(done), None
    for path, layer in network_modules(model).items():
        # The parameters that a parametrization made belong to the layer, not to the modules that hold them.
        own = layer.named_parameters(recurse=is_parametrized(layer))
        last_linear = path if isinstance(layer, LINEAR) else last_linear
        for key, p in own:
            reason = _why_left_out(layer, p, linear=linear)
            if p.requires_grad and id(p) not in done and reason:
                reasons[reason][plain_name(f"{path}.{key}")] = p.numel()
            done.add(id(p))
    # One Linear layer at the end is the classifier, which nobody expects among the convolutions.
    if len(reasons[NOT_ASKED]) == 1 and next(iter(reasons[NOT_ASKED])).startswith(f"{plain_name(last_linear)}."):
        reasons[NOT_ASKED] = {}
    return reasons


def _say_what_is_left_out(model: nn.Module, chosen: dict[str, nn.Parameter], done: set[int], *, linear: bool) -> None:
    """Warn in one line if there are trainable matrices that the caller may believe to be among the chosen ones."""
    reasons = _left_out(model, done, linear=linear)
    if not any(names for reason, names in reasons.items() if reason != TABLES):
        return
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            listed = ", ".join([*names][:3]) + more
            parts.append(f"{reason}: {len(names)} with {sum(names.values()):,} parameters ({listed})")
    taken = sum(p.numel() for p in chosen.values() if p.requires_grad)
    total = sum(p.numel() for p in network_parameters(model) if p.requires_grad)
    # Always from this line and in the same words, so that Python shows it once, whichever function is called first.
    warnings.warn(
        f"halo takes {taken:,} of {total:,} trainable parameters of {type(model).__name__}; left out are "
        f"{'; '.join(parts)}. Name in exclude= what is to stay out, and this note ends.",
        stacklevel=1,
    )


def penalized_parameters(model: nn.Module, *, linear: bool = False, exclude: Exclude = ()) -> dict[str, nn.Parameter]:
    """Return every trainable parameter of every convolution by its state_dict name, biases included.

    Args:
        model: any network; where DistributedDataParallel or torch.compile has wrapped it, the one inside is taken.
        linear: also take Linear, Bilinear and MultiheadAttention (MNIST, transformers); on CIFAR the classifier is
            never penalised.
        exclude: what to leave out: names of parameters or modules ("fc", "encoder.layers.0"), or modules themselves.

    Returns:
        Name to parameter, in the order of the network; BatchNorm never takes part. A tied parameter comes once.

    Raises:
        ValueError: the network has no such layer, all their weights are frozen, one is not initialised yet (lazy
            modules), or a part to exclude is not there.

    Warns:
        UserWarning: trainable matrices other than one final Linear layer are left out; it names and counts them.

    Note:
        Frozen parameters (requires_grad is False) take no part: their penalty would be a constant. Layers whose
        weight is computed from other parameters (weight_norm, spectral_norm) take no part either.
    """
    trainable = {name: p for name, p in _select(model, linear=linear, exclude=exclude).items() if p.requires_grad}
    if not any(_is_weight(name) for name in trainable):
        raise ValueError(
            f"all weights of {type(inner_model(model)).__name__} to penalise are frozen (requires_grad is False): "
            "unfreeze them before building the penalty"
        )
    return NamedParameters(trainable, inner_model(model))


def prunable_weights(model: nn.Module, *, linear: bool = False, exclude: Exclude = ()) -> dict[str, nn.Parameter]:
    """Return the weight of every convolution by its state_dict name: never a bias, never BatchNorm.

    Args:
        model: any network; where DistributedDataParallel or torch.compile has wrapped it, the one inside is taken.
        linear: also take Linear, Bilinear and MultiheadAttention (MNIST, transformers); on CIFAR the classifier is
            never pruned.
        exclude: what to leave out, as for `penalized_parameters`.

    Returns:
        Name to weight, in the order of the network; frozen weights too, a tied weight once.

    Raises:
        ValueError: the network has no such layer, one is not initialised yet (lazy modules), or a part to exclude is
            not there.

    Warns:
        UserWarning: as `penalized_parameters`, in the same words.
    """
    chosen = _select(model, linear=linear, exclude=exclude)
    return NamedParameters({name: p for name, p in chosen.items() if _is_weight(name)}, inner_model(model))
