"""The seeds of a run: torch's, and those of Python and numpy, which a network of your own may draw from."""

from __future__ import annotations

import random

import numpy as np
import torch


def set_seed(seed: int) -> torch.Generator:
    """Seed torch, and what a network of your own may draw from, and make torch's algorithms repeatable.

    Returns:
        The generator of the data order and augmentation, which is separate from that of the initial weights.
    """
    torch.manual_seed(seed)
    seed_others(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return torch.Generator().manual_seed(seed)


def seed_process(seed: int, rank: int) -> None:
    """Seed torch anew in all processes but the first, so that Dropout draws other masks in each for its own images."""
    if rank:
        torch.manual_seed(random.Random(f"{seed} {rank}").getrandbits(63))


def seed_others(*numbers: int) -> None:
    """Seed the generators of Python and numpy by whole numbers: the seed, and in training the epoch and the process.

    Seeded anew for every epoch, they need no place in the checkpoint.
    """
    random.seed(" ".join(map(str, numbers)))
    np.random.seed(random.getrandbits(32))
