"""BatchNorm folded into the convolutions before it: the same network with fewer steps, for export."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .shrink_steps import Steps, factor_of, normalize


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode in which convolutions do what the BatchNorm behind them did.

    Args:
        model: a network that `torch.fx` can trace; it is not changed.

    Returns:
        A network of the same kind, with Identity where a BatchNorm was. One that does not alone read a plain
        convolution stays.

    Raises:
        ValueError: the steps of the network cannot be found.
    """
    folded = copy.deepcopy(model).eval()
    steps = Steps(folded)
    for node in steps.readers:
        behind = steps.norm_after(node)
        if behind is None:
            continue
        layer, norm = steps.layer(node), steps.layer(behind)
        before = torch.zeros(len(layer.weight)).to(layer.weight) if layer.bias is None else layer.bias
        bias = normalize(norm, before.double())
        layer.weight.copy_(layer.weight.double() * factor_of(norm)[:, None, None, None])
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        folded.set_submodule(behind.target, nn.Identity())
    return folded
