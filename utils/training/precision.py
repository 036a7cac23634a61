"""Mixed precision by torch.autocast: the network in bf16 or fp16, weights, penalty and optimizers in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from utils.options import OptionError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

PRODUCTS = (  # @ is Tensor.matmul here; no set, which torch.compile cannot read in torch 2.6
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
    *(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
)


def computes_quickly(device: torch.device, amp: str) -> bool:
    """Return whether torch has quick products of bf16 or fp16: on a CPU, where oneDNN has instructions for them."""
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{amp}_supported", lambda: False)
    return supported()


class ProductsInFp32(TorchFunctionMode):
    """Computes, under autocast, convolutions and matrix products of rounded values in fp32, and rounds the result.

    y = round(round(x) * round(w)), the sum in fp32: what a CPU with instructions for bf16 or fp16 computes, up to the
    order of summation, and with the same rounding of the gradients. On a CPU without them torch's own products of
    these types take ten times as long as in fp32.

    Note:
        Products inside a function of torch that is one call here (an einsum, multi-head attention) stay torch's own,
        and slow. Not in the release, which computes in fp32 only.
    """

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Call a function of torch; see the class."""
        kwargs = kwargs or {}
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        low = torch.get_autocast_dtype("cpu")

        def rounded(value: object) -> object:
            cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(low).float() if cast else value

        with torch.autocast("cpu", enabled=False):
            result = func(*map(rounded, args), **{name: rounded(value) for name, value in kwargs.items()})
        return result.to(low) if result.dtype == torch.float32 else result


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
        self.in_fp32 = amp is not None and not computes_quickly(device, amp)  # products of this type

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute the forward pass in this type."""
        products = ProductsInFp32() if self.in_fp32 else nullcontext()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None), products:
            yield

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Leave the gradient of the loss, in its true scale, in `.grad` of the parameters of the optimizer."""
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Step the optimizer, unless the gradients of the loss overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()
