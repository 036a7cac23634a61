"""What a run steps with: SGD of the weights, SGD of lam, and the schedule of each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from utils.halo.lambda_sgd import FusedHALO, LambdaSGD, is_halo
from utils.halo.memory import velocity_of
from utils.halo.penalties import Penalty
from utils.logger import warn


def make_optimizers(
    model: nn.Module, penalty: Penalty, args: argparse.Namespace
) -> tuple[list[SGD], list[MultiStepLR]]:
    """Return the optimizer of the weights and, if something is learned, that of lam; and the schedule of each."""
    weights = SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd, fused=True)
    begin_at_rest_(weights)
    optimizers = [weights, *make_lambda_sgd(penalty, weights, args)]
    both = milestones(args.schedule, released=args.released_lr)
    return optimizers, [MultiStepLR(o, m, gamma=args.gamma) for o, m in zip(optimizers, both, strict=False)]


def begin_at_rest_(optimizer: SGD) -> None:
    """Give an SGD the momenta that it lacks, in place: zeros, which mean the same as none.

    Fused SGD makes missing ones in its first step only, so a block that this step skipped ends a later one, and leaves
    them uninitialised where gradients overflowed, so that a scaler has it leave that step out (torch 2.14).
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.requires_grad:
                velocity_of(optimizer, p)


def milestones(schedule: Sequence[int], *, released: bool) -> tuple[list[int], list[int]]:
    """Return the epochs after which the learning rates of the weights and of lam are multiplied by gamma.

    Args:
        schedule: the epochs asked for.
        released: reproduce the release, which decays one shared variable for the weights and once more for lam:
            weights see 0.1 -> 0.01 -> 1e-4 and lam 0.1 -> 1e-3 -> 1e-5 where both should see 0.1 -> 0.01 -> 1e-3.

    Returns:
        Two lists; an epoch that stands twice decays twice.
    """
    schedule = sorted(schedule)
    if not released:
        return schedule, schedule
    return sorted([*schedule[:1], *schedule[1:] * 2]), sorted(schedule * 2)


def make_lambda_sgd(penalty: Penalty, weights: SGD, args: argparse.Namespace) -> list[LambdaSGD]:
    """Return the optimizer of lam, in the fastest form there is here; none if nothing is learned, or lam is frozen."""
    if not any(lam.requires_grad for lam in penalty.parameters()):
        return []
    factors = {"lr": args.reg_lr, "momentum": args.momentum, "weight_decay": args.reg_wd}
    if not is_halo(penalty):
        return [LambdaSGD(penalty, **factors)]
    on_cpu = next(penalty.parameters()).device.type == "cpu"  # where the kernel is faster
    # With fp16, whether the weights are stepped is decided after lam is.
    weights = None if args.amp == "fp16" else weights
    optimizer = FusedHALO(penalty, **factors, weights=weights, compiled=args.compile and not on_cpu)
    if optimizer.slow_because:
        warn(f"HALO's step goes without its compiled kernel and takes longer: {optimizer.slow_because}")
    return [optimizer]
