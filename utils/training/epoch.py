"""One epoch of training, and evaluation. No files, no printing."""

from __future__ import annotations

import math
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
from utils.training.statistics import without_held
from utils.training.step import TrainingStep

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
    step = TrainingStep(
        forward or model, penalty, optimizer, lam_optimizer, precision=precision or Precision(device), zeros=zeros
    )
    metrics, watch = Metrics(device), LossWatch(penalty, every=1 if device.type == "cpu" else CHECK_EVERY, zeros=zeros)
    for batch in batches:
        images, labels, weight = Batch(*batch)
        if recorded:
            loss, logits = recorded.run(step, images, labels, also=step.holds_zeros)
        else:
            loss, logits = step.run_network(images, labels)
        if watch.see(loss) and on_batch:
            on_batch(watch.batches, metrics)
        if not recorded:
            step.learn(loss if weight == 1 else loss * weight)
        if zeros:
            zeros.advance_()
        if weight:
            metrics.add(loss, logits, labels)
    watch.end(model)
    metrics.reduce()
    return metrics.means()


class LossWatch:
    """Looks at the cross-entropies of an epoch for one that is not finite, and says who made it so.

    Args:
        penalty: the penalty in use.
        every: batches from look to look.
        zeros: holds weights at zero, whose lam may be anything.

    Attributes:
        batches: how many were seen.
    """

    def __init__(self, penalty: Penalty, *, every: int, zeros: FixedZeros | None = None) -> None:
        self.penalty, self.every, self.zeros, self.batches = penalty, every, zeros, 0
        self.losses: list[Tensor] = []  # since the last look
        self.smallest_before = smallest_lambda(penalty, zeros)

    def see(self, loss: Tensor) -> bool:
        """Take the cross-entropy of a batch; return whether this was a time to look.

        Raises:
            NonFiniteLossError: naming the batch, the culprit and the smallest |lam|.
        """
        self.batches += 1
        self.losses.append(loss.detach().clone())  # what is recorded overwrites it
        if self.batches % self.every:
            return False
        self._look()
        return True

    def end(self, model: nn.Module) -> None:
        """Look once more, and at what the last step left, which no later loss of the epoch would show.

        Raises:
            NonFiniteLossError: naming the batch, what is not finite, the culprit and the smallest |lam|.
        """
        if self.losses:
            self._look()
        lambdas = {f"lam of {name}": lam for name, lam in self.penalty.lambdas.items()}
        for name, tensor in {**model.state_dict(), **lambdas}.items():
            if not tensor.isfinite().all():
                what = f"batch {self.batches}: its step made {name} infinite or NaN"
                raise NonFiniteLossError(f"{what}; {self._culprit()}")

    def _look(self) -> None:
        values = torch.stack(self.losses)
        if not values.isfinite().all():
            first = int((~values.isfinite()).nonzero()[0])
            what = f"batch {self.batches - len(values) + 1 + first}: the cross-entropy is {values[first].item()}"
            raise NonFiniteLossError(f"{what}; {self._culprit()}")
        self.losses.clear()

    @torch.no_grad()
    def _culprit(self) -> str:
        """Say whether the cross-entropy or the penalty diverged, the remedy, and the smallest |lam|.

        The penalty is blamed where a lam is no longer finite, or where at the start of the epoch its slope at the
        smallest |lam| exceeded any that a cross-entropy has; the cross-entropy otherwise.
        """
        before, penalty = self.smallest_before, self.penalty
        lambdas_finite = all(lam.isfinite().all() for lam in penalty.lambdas.values())
        steep = penalty.strength(torch.tensor(1.0 if before is None else before)) > 10
        if not lambdas_finite or steep:
            cause = "the penalty did it: raise --lambda_init, lower --xi or --reg_lr"
        else:
            cause = "the cross-entropy did it: lower --lr"
        if before is None:
            return cause
        now = smallest_lambda(penalty, self.zeros)
        return f"{cause}; smallest |lam| {before:.3g} when the epoch began, {now:.3g} now"


def smallest_lambda(penalty: Penalty, zeros: FixedZeros | None = None) -> float | None:
    """Return the smallest |lam| of the weights that are not held at zero; None where nothing is learned."""
    free = without_held(penalty.lambdas, zeros.masks if zeros else {})
    smallest = min((lam.detach().abs().min().item() for lam in free.values() if lam.numel()), default=math.inf)
    return smallest if free else None


@torch.no_grad()  # inference_mode would make what a network keeps useless for training
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device) -> dict[str, float]:
    """Evaluate a network.

    Args:
        model: the network, left in evaluation mode.
        batches: images (N, *shape) and labels (N,) on the device.
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
