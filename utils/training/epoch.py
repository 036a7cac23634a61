"""One epoch of training, and evaluation. No files, no printing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.halo.lambda_sgd import LambdaSGD
from utils.halo.masks import FixedZeros
from utils.halo.penalties import Penalty
from utils.training.dataset import Batch
from utils.training.meters import Metrics
from utils.training.precision import Precision
from utils.training.recorded import RecordedStep

# Reading a loss makes the host wait for an accelerator, so there only every CHECK_EVERY-th batch is looked at.
CHECK_EVERY = 50


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or NaN; the message says where and why."""


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    penalty: Penalty,
    optimizer: Optimizer,
    lam_optimizer: LambdaSGD | None = None,
    *,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
    precision: Precision | None = None,
    zeros: FixedZeros | None = None,
    recorded: RecordedStep | None = None,
    on_batch: Callable[[int, Metrics], None] | None = None,
) -> dict[str, float]:
    """Train for one pass over the batches: cross-entropy by autograd, the penalty's gradient in closed form.

    Args:
        model: the network, trained in place.
        batches: images (N, *shape) and labels (N,) on the device, perhaps with a weight (`Batch`).
        penalty: its gradient is added to that of the weights after each backward pass, in fp32.
        optimizer: of the weights.
        lam_optimizer: of lam, if something is learned; it adds the penalty's gradient too.
        device: where all of them are.
        forward: runs the network, compiled or distributed; None for the network itself.
        precision: of the forward and backward pass; None for fp32.
        zeros: holds weights at zero; None for none.
        recorded: records the steps as a CUDA graph; None to take each of them. Not where a batch has a weight.
        on_batch: called with the number of batches done and the metrics so far, where the host waits anyway.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` in percent, over the epoch as it was trained.

    Raises:
        NonFiniteLossError: naming the batch and whether the cross-entropy or the penalty did it.
    """
    model.train()
    forward, precision = forward or model, precision or Precision(device)
    step_penalty = lam_optimizer.step if lam_optimizer else penalty.add_grad_
    metrics, losses = Metrics(device), []
    before = smallest_lambda(penalty)
    stride = 1 if device.type == "cpu" else CHECK_EVERY

    def run_network(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with precision.autocast():
            logits = forward(images)
        logits = logits.float()
        return F.cross_entropy(logits, labels), logits

    def learn(loss: Tensor) -> None:
        precision.backward(loss, optimizer)
        update_(optimizer, step_penalty, precision, zeros)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = run_network(images, labels)
        learn(loss)
        return loss.detach(), logits.detach()

    for index, batch in enumerate(batches, start=1):
        images, labels, weight = Batch(*batch)
        if recorded:
            loss, logits = recorded.run(step, images, labels, also=bool(zeros and zeros.zeros))
        else:
            loss, logits = run_network(images, labels)
        losses.append(loss.detach().clone())  # what is recorded overwrites it
        if index % stride == 0:
            check_finite(losses, index, penalty, before)
            losses.clear()
            if on_batch:
                on_batch(index, metrics)
        if not recorded:
            learn(loss if weight == 1 else loss * weight)
        if zeros:
            zeros.advance_()
        if weight:
            metrics.add(loss, logits, labels)
    if losses:
        check_finite(losses, index, penalty, before)
    check_state(model, index, penalty, before)
    metrics.reduce()
    return metrics.means()


def update_(
    optimizer: Optimizer, step_penalty: Callable[[], object], precision: Precision, zeros: FixedZeros | None
) -> None:
    """Add the penalty's gradient to that of the cross-entropy, and step lam and the weights; fixed zeros stay zero."""
    if zeros:
        zeros.clear_grad_()
    step_penalty()
    precision.step(optimizer)
    optimizer.zero_grad()


def smallest_lambda(penalty: Penalty) -> float | None:
    """Return the smallest |lam| of a penalty, None where nothing is learned."""
    return min((lam.detach().abs().min().item() for lam in penalty.lambdas.values()), default=None)


def check_finite(losses: list[Tensor], last: int, penalty: Penalty, smallest_before: float | None) -> None:
    """Raise if one of the last batches' cross-entropies is not finite.

    Args:
        losses: the cross-entropies since the last look.
        last: number of the batch that the last of them belongs to, from 1.
        penalty: the penalty in use.
        smallest_before: the smallest |lam| when the epoch began.

    Raises:
        NonFiniteLossError: naming the batch, the culprit and the smallest |lam|.
    """
    values = torch.stack(losses)
    if values.isfinite().all():
        return
    first = int((~values.isfinite()).nonzero()[0])
    what = f"batch {last - len(losses) + 1 + first}: the cross-entropy is {values[first].item()}"
    raise NonFiniteLossError(f"{what}; {culprit(penalty, smallest_before)}")


def check_state(model: nn.Module, last: int, penalty: Penalty, smallest_before: float | None) -> None:
    """Raise if the last step of an epoch left something infinite or NaN, which no later loss of it would show.

    Raises:
        NonFiniteLossError: naming the batch, the tensor, the culprit and the smallest |lam|.
    """
    for name, tensor in {**model.state_dict(), **penalty.lambdas}.items():
        if not tensor.isfinite().all():
            what = f"batch {last}: its step made {name} infinite or NaN"
            raise NonFiniteLossError(f"{what}; {culprit(penalty, smallest_before)}")


@torch.no_grad()
def culprit(penalty: Penalty, smallest_before: float | None) -> str:
    """Say whether the cross-entropy or the penalty diverged, the remedy, and the smallest |lam|.

    The penalty is blamed where a lam is no longer finite, or where at the start of the epoch its slope at the
    smallest |lam| exceeded any that a cross-entropy has; the cross-entropy otherwise.
    """
    lambdas_finite = all(lam.isfinite().all() for lam in penalty.lambdas.values())
    steep = penalty.strength(torch.tensor(smallest_before or 1.0)) > 10
    if not lambdas_finite or steep:
        cause = "the penalty did it: raise --lambda_init, lower --xi or --reg_lr"
    else:
        cause = "the cross-entropy did it: lower --lr"
    if smallest_before is None:
        return cause
    return f"{cause}; smallest |lam| {smallest_before:.3g} when the epoch began, {smallest_lambda(penalty):.3g} now"


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device) -> dict[str, float]:
    """Evaluate a network.

    Args:
        model: the network, left in evaluation mode.
        batches: images (N, 3, H, W) and labels (N,) on the device.
        device: where both are.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` in percent.
    """
    model.eval()
    metrics = Metrics(device)
    for images, labels, *_ in batches:
        logits = model(images)
        metrics.add(F.cross_entropy(logits, labels), logits, labels)
    metrics.reduce()
    return metrics.means()
