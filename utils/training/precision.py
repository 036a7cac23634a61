"""Mixed precision by torch.autocast: the network in bf16 or fp16, weights, penalty and optimizers in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.optim import Optimizer

from utils.options import OptionError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How the forward and backward pass compute.

    fp16 has a small range, so its loss is scaled up before the backward pass and the gradients are scaled down after
    it, before anything else is added to them; a step whose gradients overflowed is left out.

    Args:
        device: where the network is.
        amp: bf16, fp16, or None for fp32 throughout.

    Raises:
        OptionError: this GPU has no bf16.
    """

    def __init__(self, device: torch.device, amp: str | None = None) -> None:
        if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise OptionError(f"--amp bf16 is not available on {torch.cuda.get_device_name(device)}: give --amp fp16")
        self.device, self.dtype = device, DTYPES.get(amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Return the context for the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Leave the gradient of the loss, in its true scale, in `.grad` of the parameters of the optimizer."""
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Step the optimizer, unless the gradients of the loss overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()
