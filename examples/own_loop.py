"""HALO in a loop of your own: torchvision's ResNet-18, AdamW with weight decay, clipping, a schedule.

    python examples/own_loop.py                          # handwritten digits, under a minute on one core
    python examples/own_loop.py --data DIR --epochs 30   # DIR/train/CLASS/*.png and DIR/test/CLASS/*.png

needs torch, torchvision, scikit-learn for the digits alone, and the package halo (in this repository as it stands,
elsewhere after `pip install .`). The lines marked 1 to 6 are all that HALO adds. On the digits it prints:

    top-1 (%)       dense     80%     90%     95%  of the weights of all convolutions removed
    no penalty       98.0    27.6    10.4    10.4
    HALO             96.8    96.8    96.8    84.6

One seed; batch, epochs and typical_weight were chosen by looking at these 500 test images.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

# The folder utils/halo of this repository is the package. Last on the path: an installed one comes first.
sys.path.append(str(Path(__file__).resolve().parent.parent / "utils"))
import halo  # noqa: E402

BATCH, LR, WEIGHT_DECAY, CLIP = 32, 2e-3, 1e-2, 1.0
FRACTIONS = (0.0, 0.8, 0.9, 0.95)


def load_data(folder: str | None) -> tuple[Dataset, Dataset]:
    """Return training and test images (3, H, W) in [0, 1] with labels: of a folder at 32x32, or 1,797 digits at 8x8."""
    if folder:
        plain = [v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)]
        augmented = [*plain, v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        return (
            ImageFolder(Path(folder) / "train", v2.Compose(augmented)),
            ImageFolder(Path(folder) / "test", v2.Compose(plain)),
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order].div(16).unsqueeze(1).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)[order]
    return TensorDataset(images[500:], labels[500:]), TensorDataset(images[:500], labels[:500])


def network(classes: int) -> nn.Module:
    """Return ResNet-18 with a stem for small images: 3x3, no stride, no pooling."""
    model = resnet18(num_classes=classes)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def train(model: nn.Module, images: Dataset, *, epochs: int, penalised: bool) -> None:
    """Train a network in place, with HALO or without."""
    batches = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    optimizers = [optimizer]
    if penalised:
        # The mean learning rate of the schedule, and the size that most weights of this network have at the start.
        coefficients = halo.suggest(steps=steps, lr=LR / 2, typical_weight=0.02)  # 1: xi, psi, lambda_init
        params = halo.penalized_parameters(model)  # 2: every convolution, not the classifier
        penalty = halo.HALO(params, **coefficients)  # 3
        lam_optimizer = halo.DecoupledLambdaSGD(penalty, weights=optimizer, lr=LR)  # 4: decoupled, as AdamW's decay is
        optimizers.append(lam_optimizer)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 - step / steps) for each in optimizers]
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            if penalised:
                lam_optimizer.step()  # 5: the next step of the weights is followed by that of penalty and lam
            optimizer.step()
            optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()


@torch.inference_mode()
def top1(model: nn.Module, images: Dataset) -> float:
    """Return the percentage of images that are classified as labelled."""
    model.eval()
    hits = [(model(x).argmax(dim=1) == y) for x, y in DataLoader(images, 500)]
    return 100 * torch.cat(hits).double().mean().item()


def main(args: argparse.Namespace) -> None:
    """Train without and with HALO, prune once, and print a row each."""
    try:
        train_images, test_images = load_data(args.data)
    except FileNotFoundError as error:
        sys.exit(f"{error}: --data takes a folder of train/CLASS and test/CLASS")
    if len(train_images) < BATCH:
        sys.exit(f"{len(train_images)} training images are less than one batch: give {BATCH} or more")
    if args.data and train_images.classes != test_images.classes:  # a label is a position in this list
        sys.exit(f"the classes of {args.data}/train and /test differ: give both the same folders")
    classes = len(train_images.classes) if args.data else 10
    shares = "".join(f"{fraction:8.0%}" for fraction in FRACTIONS[1:])
    print(f"top-1 (%)       dense{shares}  of the weights of all convolutions removed")
    for penalised in (False, True):
        torch.manual_seed(0)
        model = network(classes)
        train(model, train_images, epochs=args.epochs, penalised=penalised)
        tops = []
        for fraction in FRACTIONS:
            pruned = copy.deepcopy(model)
            halo.prune_by_magnitude_(halo.prunable_weights(pruned), fraction)  # 6: once, nothing is trained after it
            tops.append(top1(pruned, test_images))
        print(f"{'HALO' if penalised else 'no penalty':13}" + "".join(f"{value:8.1f}" for value in tops), flush=True)


def whole(text: str) -> int:
    """Return a whole number of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give 1 or more")
    return value


def get_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="folder of train/CLASS and test/CLASS; default: digits")
    parser.add_argument("--epochs", type=whole, default=2, metavar="N", help="1 or more")
    return parser


if __name__ == "__main__":
    main(get_parser().parse_args())
