"""ResNet for 32x32 images (He et al., arXiv 1512.03385, section 4.2). Layers only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BOTTLENECK_FROM_DEPTH = 54


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the map's size at stride 1."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, width, H/stride, W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the output is four times as wide as the middle."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, 4 * width, H/stride, W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + shortcut, inplace=True)


def blocks_per_stage(depth: int) -> int | None:
    """Return n, the blocks in each of the three stages, None where there is no such network.

    The depth is 6n + 2, or from BOTTLENECK_FROM_DEPTH on 9n + 2 with Bottleneck blocks.
    """
    n, rest = divmod(depth - 2, 9 if depth >= BOTTLENECK_FROM_DEPTH else 6)
    return n if n >= 1 and rest == 0 else None


class ResNet(nn.Module):
    """Three stages of widths 16, 32, 64 and strides 1, 2, 2, after a 3x3 stem of 16 channels.

    Args:
        depth: 6n + 2 (8, 14, 20, 26, 32, 38, 44, 50: BasicBlock), or from 54 on 9n + 2 (Bottleneck).
        num_classes: number of outputs.

    Raises:
        ValueError: depth fits neither rule.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        n = blocks_per_stage(depth)
        if n is None:
            raise ValueError(f"no ResNet has depth {depth}: it is 6n + 2, or 9n + 2 from {BOTTLENECK_FROM_DEPTH} on")
        block = Bottleneck if depth >= BOTTLENECK_FROM_DEPTH else BasicBlock
        self.channels = 16
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_stage(block, 16, n, stride=1)
        self.layer2 = self._make_stage(block, 32, n, stride=2)
        self.layer3 = self._make_stage(block, 64, n, stride=2)
        self.fc = nn.Linear(self.channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_stage(self, block: type, width: int, n: int, *, stride: int) -> nn.Sequential:
        """Stack n blocks; the first changes the shape and then needs a projection shortcut."""
        channels_out = width * block.expansion
        downsample = None
        if stride != 1 or self.channels != channels_out:
            projection = nn.Conv2d(self.channels, channels_out, 1, stride=stride, bias=False)
            downsample = nn.Sequential(projection, nn.BatchNorm2d(channels_out))
        first = block(self.channels, width, stride, downsample)
        self.channels = channels_out
        return nn.Sequential(first, *(block(channels_out, width, 1, None) for _ in range(n - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
