"""Whether another form of a network computes the same, image by image."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from utils.logger import say
from utils.stages.subject import Subject
from utils.training.loading import make_loader

PROOF = 1e-4  # of the largest logit: rounding gives a hundredth of it, a wrong channel ten thousand times as much
RANDOM_IMAGES = 256  # with --no_data

Form = Callable[[Tensor], Tensor]


def images_of(args: argparse.Namespace, subject: Subject) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Return the test images and labels in batches, or random images without labels."""
    if subject.data is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(RANDOM_IMAGES, *subject.preprocessing.shape, generator=generator)
        return [(part.to(subject.device), None) for part in images.split(64)]
    loader = make_loader(subject.data, "test", subject.device, arch=args.arch, batch_size=args.test_batch)
    return ((images, labels) for images, labels, *_ in loader)


class Agreement:
    """How far the logits of one form are from those of the network."""

    def __init__(self) -> None:
        self.difference, self.changed, self.right = 0.0, 0, 0

    def add(self, have: Tensor, wanted: Tensor, labels: Tensor | None) -> float:
        """Compare a batch of logits; return the largest difference in it."""
        difference = float((have - wanted).abs().max())
        self.difference = max(self.difference, difference)
        self.changed += int((have.argmax(1) != wanted.argmax(1)).sum())
        if labels is not None:
            self.right += int((have.argmax(1) == labels).sum())
        return difference

    def top1(self, images: int | None) -> float | None:
        """Return the percentage of this many images that got their label; None without."""
        return 100 * (self.right / images) if images else None

    def report(self, images: int | None) -> dict:
        """Return what `prove` says of a form."""
        return {"difference": self.difference, "changed": self.changed, "top1": self.top1(images)}


@torch.no_grad()
def prove(
    model: nn.Module, forms: dict[str, Form], batches: Iterable[tuple[Tensor, Tensor | None]], *, path: str
) -> dict:
    """Compare the logits and classes of every form with those of the network.

    Args:
        model: the network, in evaluation mode.
        forms: by name.
        batches: images and their labels, None where they are random.
        path: of the checkpoint, for the message.

    Returns:
        `images` (their number), `classes`, `random` (whether they had no labels), `largest_logit`, `top1` (percent;
        None without labels) and `forms`: by name `difference` (the largest of a logit), `changed` (images that get
        another class) and `top1`.

    Raises:
        ValueError: the network gives no finite logits, or a form other ones.
    """
    count, classes, largest, labels = 0, 0, 0.0, None
    dense, found = Agreement(), {name: Agreement() for name in forms}
    for images, labels in batches:
        wanted = model(images)
        if not wanted.isfinite().all():
            raise ValueError(f"{path} gives logits that are NaN or infinite: use another checkpoint")
        count, classes, largest = count + len(images), wanted.shape[1], max(largest, float(wanted.abs().max()))
        dense.add(wanted, wanted, labels)
        for name, form in forms.items():
            difference = found[name].add(form(images), wanted, labels)
            if not difference <= PROOF * largest:  # NaN is not
                text = f"differs from the network by {difference:.3g} in a logit, of {largest:.3g} at most"
                raise ValueError(f"the {name} form of {path} {text}: nothing is written; please report this")
    of = count if labels is not None else None
    report = {"images": count, "classes": classes, "random": of is None, "largest_logit": largest}
    return report | {"top1": dense.top1(of), "forms": {name: form.report(of) for name, form in found.items()}}


def print_proof(report: dict) -> None:
    """Say for each form that it computes the same."""
    proof = report["proof"]
    what = f"{proof['images']} {'random' if proof['random'] else 'test'} images"
    for name, form in proof["forms"].items():
        same = (
            "the same class" if form["changed"] == 0 else f"another class on {form['changed']} (ties within rounding)"
        )
        top1 = "" if form["top1"] is None else f", top-1 {form['top1']:.2f}% (dense {proof['top1']:.2f}%)"
        size = f"{form['difference']:.1e} of {proof['largest_logit']:.3g}"
        say(f"{name:<8} {what}: {same}{top1}, largest difference of a logit {size}")
