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
        `images`, `classes`, `largest_logit`, `top1` (percent; None without labels), and by form `top1`, `difference`
        (the largest of a logit) and `changed` (images that get another class).

    Raises:
        ValueError: the network gives no finite logits, or a form other ones.
    """
    count, largest, right, known, classes = 0, 0.0, 0, False, 0
    found = {name: {"right": 0, "difference": 0.0, "changed": 0} for name in forms}
    for images, labels in batches:
        wanted = model(images)
        if not wanted.isfinite().all():
            raise ValueError(f"{path} gives logits that are NaN or infinite: use another checkpoint")
        count, largest, classes = count + len(images), max(largest, float(wanted.abs().max())), wanted.shape[1]
        known = labels is not None
        right += int((wanted.argmax(1) == labels).sum()) if known else 0
        for name, form in forms.items():
            have, result = form(images), found[name]
            difference = float((have - wanted).abs().max())
            if not difference <= PROOF * largest:
                text = f"differs from the network by {difference:.3g} in a logit, of {largest:.3g} at most"
                raise ValueError(f"the {name} form of {path} {text}: nothing is written; please report this")
            result["difference"] = max(result["difference"], difference)
            result["changed"] += int((have.argmax(1) != wanted.argmax(1)).sum())
            result["right"] += int((have.argmax(1) == labels).sum()) if known else 0
    for result in found.values():
        hits = result.pop("right")
        result["top1"] = 100 * (hits / count) if known else None
    top1 = 100 * (right / count) if known else None
    return {
        "images": count,
        "classes": classes,
        "random": not known,
        "largest_logit": largest,
        "top1": top1,
        "forms": found,
    }


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
