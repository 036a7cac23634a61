"""Sparse inference against the same network in torch (eager, channels_last, fp32), interleaved in one process.

    python benchmarks/sparse.py        # half a minute; run it with nothing else on the machine

Each line: medians of milliseconds a batch over 15 pairs, and the median of their ratios with the quartiles.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.files import load_model  # noqa: E402
from utils.halo import SparseNetwork  # noqa: E402

NETWORKS = {
    "cifar10_resnet20_halo_0.95": (3, 32, 32),
    "cifar10_resnet20_halo_0.98": (3, 32, 32),
    "mnist_lenet300_halo_0.99": (1, 28, 28),
}
PAIRS, WARM_UP = 15, 3


def seconds(call, images: torch.Tensor) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call(images)
    return time.perf_counter() - start


def measure(dense, sparse, images: torch.Tensor) -> str:
    """Return a line of medians and ratios, after a look whether both compute the same."""
    expected = dense(images)
    if (sparse(images) - expected).abs().max() > 1e-4 * expected.abs().max():
        raise ArithmeticError("sparse inference differs from the network")
    pairs = [(seconds(dense, images), seconds(sparse, images)) for _ in range(WARM_UP + PAIRS)][WARM_UP:]
    low, middle, high = statistics.quantiles((a / b for a, b in pairs), n=4)
    one, other = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return f"torch {one:.2f} ms, sparse {other:.2f} ms: {middle:.1f} times faster ({low:.1f} to {high:.1f})"


@torch.inference_mode()
def main() -> None:
    """Measure every network at three batch sizes."""
    torch.manual_seed(0)
    for name, shape in NETWORKS.items():
        dense = load_model(ROOT / "pretrained_models" / f"{name}.halo").to(memory_format=torch.channels_last)
        sparse = SparseNetwork(dense)
        for batch in (1, 64, 256):
            images = torch.randn(batch, *shape).to(memory_format=torch.channels_last)
            print(f"{name}, batch {batch}: {measure(dense, sparse, images)}", flush=True)


if __name__ == "__main__":
    main()
