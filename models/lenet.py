"""LeNet-300-100 and LeNet-5 for 28x28 grey images (LeCun et al., Proc. IEEE 86:2278, 1998). Layers only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet300(nn.Module):
    """Two hidden linear layers of 300 and 100 units with ReLU: 266,610 parameters at 10 classes.

    Args:
        num_classes: number of outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, num_classes)."""
        x = F.relu(self.fc1(images.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class LeNet5(nn.Module):
    """Two 5x5 convolutions of 6 and 16 channels, linear layers of 120 and 84: 61,706 parameters at 10 classes.

    The first convolution pads by 2, which gives the original's 32x32 input; ReLU and max-pooling throughout.

    Args:
        num_classes: number of outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))
