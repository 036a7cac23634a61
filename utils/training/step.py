"""One training step: the network, the penalty and the optimizers, on one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from utils.halo.lambda_sgd import LambdaSGD
from utils.halo.masks import FixedZeros
from utils.halo.penalties import Penalty
from utils.training.precision import Precision


class TrainingStep:
    """Cross-entropy by autograd, the penalty's gradient in closed form, then lam and the weights.

    Args:
        forward: runs the network.
        penalty: its gradient is added to that of the weights after the backward pass, in fp32.
        optimizer: of the weights.
        lam_optimizer: of lam, if something is learned; it adds the penalty's gradient too.
        precision: of the forward and backward pass.
        zeros: holds weights at zero; None for none.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        penalty: Penalty,
        optimizer: Optimizer,
        lam_optimizer: LambdaSGD | None = None,
        *,
        precision: Precision,
        zeros: FixedZeros | None = None,
    ) -> None:
        self.forward, self.optimizer, self.precision, self.zeros = forward, optimizer, precision, zeros
        self.step_penalty = lam_optimizer.step if lam_optimizer else penalty.add_grad_

    @property
    def holds_zeros(self) -> bool:
        """Whether any weight is held at zero now."""
        return bool(self.zeros and self.zeros.zeros)

    def run_network(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy of a batch and its logits (N, classes), in fp32."""
        with self.precision.autocast():
            logits = self.forward(images)
        logits = logits.float()
        return F.cross_entropy(logits, labels), logits

    def learn(self, loss: Tensor) -> None:
        """Add the penalty's gradient to that of the loss, and step lam and the weights; held zeros stay zero."""
        self.precision.backward(loss, self.optimizer)
        if self.zeros:
            self.zeros.clear_grad_()
        self.step_penalty()
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do both; return the cross-entropy and the logits, without their history."""
        loss, logits = self.run_network(images, labels)
        self.learn(loss)
        return loss.detach(), logits.detach()
