"""VGG for 32x32 images, with or without BatchNorm. Layers only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Output channels of the 3x3 convolutions; "M" is a 2x2 max-pool. There is no fifth pool: the forward pass
# ends in a 2x2 average pool instead, as in the authors' release.
VGG_LAYERS = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    16: (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512),
    19: (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512),
}


def make_features(layers: tuple[int | str, ...], *, batch_norm: bool) -> nn.Sequential:
    """Stack the convolutional part: convolution with bias, optional BatchNorm, ReLU, and the max-pools."""
    modules: list[nn.Module] = []
    channels = 3
    for width in layers:
        if width == "M":
            modules.append(nn.MaxPool2d(2))
            continue
        modules.append(nn.Conv2d(channels, width, 3, padding=1))
        if batch_norm:
            modules.append(nn.BatchNorm2d(width))
        modules.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*modules)


class VGG(nn.Module):
    """VGG with one linear classifier on 512 features (Simonyan and Zisserman, arXiv 1409.1556).

    Args:
        depth: 11, 13, 16 or 19: the number of weight layers of the original network.
        num_classes: number of outputs.
        batch_norm: whether a BatchNorm follows every convolution.
    """

    def __init__(self, depth: int, num_classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.features = make_features(VGG_LAYERS[depth], batch_norm=batch_norm)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        features = F.avg_pool2d(self.features(images), 2)
        return self.classifier(features.flatten(1))
