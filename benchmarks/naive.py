"""What the fast path is compared with: the same training, written plainly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from utils.halo.penalties import HALO
from utils.training.dataset import Dataset, Split


class PILImages(TorchDataset):
    """Training images through torchvision's transforms, one at a time, as a DataLoader's worker does it."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        steps = [transforms.ToPILImage()]
        if data.padding:
            steps += [transforms.RandomCrop(data.train.images.shape[-1], padding=data.padding)]
        if data.flip:
            steps += [transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data.train.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one augmented image and its label."""
        return self.transform(self.data.train.images[index]), int(self.data.train.labels[index])


def pil_loader(data: Dataset, *, batch_size: int) -> DataLoader:
    """Return shuffled batches from two worker processes."""
    return DataLoader(PILImages(data), batch_size=batch_size, shuffle=True, num_workers=2)


class NaiveTraining:
    """Cross-entropy plus penalty by autograd, SGD for weights and lam as torch offers it without options."""

    def __init__(self, model: nn.Module, penalty: HALO, *, lr: float = 0.1, wd: float = 1e-4) -> None:
        self.model, self.penalty = model, penalty
        self.optimizers = [
            SGD(p, lr, momentum=0.9, weight_decay=wd) for p in (model.parameters(), penalty.parameters())
        ]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""
        loss = F.cross_entropy(self.model(images), labels) + self.penalty()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def penalty_step(self) -> None:
        """Only the penalty, its backward pass, and the step of lam."""
        self.penalty().backward()
        self.optimizers[1].step()
        self.optimizers[1].zero_grad()
        for p in self.model.parameters():
            p.grad = p.grad.detach()  # to the other forms, which step these weights in turn, another step's gradient

    def epoch(self, loader: DataLoader) -> None:
        """Train on all batches."""
        self.model.train()
        for images, labels in loader:
            self.step(images, labels)


def random_dataset(shape: tuple[int, int, int], *, images: int, augment: bool) -> Dataset:
    """Return images of noise in the shape of CIFAR or MNIST: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, *shape), generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.randint(10, (images,), generator=generator))
    channels = (0.5,) * shape[0]
    return Dataset(split, split, tuple("0123456789"), channels, channels, padding=4 * augment, flip=augment)
