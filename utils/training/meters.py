"""Running sums of loss and accuracy that stay on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from utils import distributed


class Metrics:
    """Sum the loss, top-1 and top-5 hits over batches without waiting for the device.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.count = 0

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its mean loss, logits (N, C) and labels (N,). With C < 5, top-5 counts every image."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.sums += torch.stack([loss.detach() * len(labels), ranked[:, 0].sum(), ranked.sum()])
        self.count += len(labels)

    def reduce(self) -> None:
        """Sum over the processes: call it in all of them, once, after the last batch."""
        total = distributed.sum_(torch.cat([self.sums, self.sums.new_tensor([self.count])]))
        self.sums, self.count = total[:3], total[3].item()

    def means(self) -> dict[str, float]:
        """Return mean loss, and top-1 and top-5 in percent. Waits for the device."""
        loss, top1, top5 = (total / max(self.count, 1) for total in self.sums.tolist())
        return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}
