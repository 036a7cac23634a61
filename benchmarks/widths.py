"""Does it pay to round the widths of a shrunk network up to the vector size? Run it with nothing else on the machine.

    python benchmarks/widths.py        # half a minute, networks of pretrained_models/

For each network and batch, milliseconds of torch (eager, channels_last) for the full, the shrunk, and the shrunk
network with widths rounded up to multiples of 8 and 16; medians of interleaved runs and quartiles of their ratios.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import build_model  # noqa: E402
from models.widths import widths_of  # noqa: E402
from utils import shrink  # noqa: E402
from utils.files import load_model  # noqa: E402
from utils.stages.timing import interleave_enough  # noqa: E402

NETWORKS = {  # file: arguments of build_model
    "cifar10_resnet20_halo_0.95": ("resnet", 10, 20),
    "cifar10_resnet20_halo_0.98": ("resnet", 10, 20),
    "mnist_lenet300_halo_0.99": ("lenet_300_100", 10, None),
}


def round_up(widths: dict[str, list[int]], full: dict[str, list[int]], multiple: int) -> dict[str, list[int]]:
    """Return widths rounded up to a multiple, to the full width at most."""
    return {
        name: [min(-(-n // multiple) * multiple, most) for n, most in zip(sizes, full[name], strict=True)]
        for name, sizes in widths.items()
    }


def variants(name: str) -> dict[str, nn.Module]:
    """Return a network, its shrunk form, and networks of rounded widths, whose weights do not matter for the time."""
    model = load_model(ROOT / "pretrained_models" / f"{name}.halo")
    found = {"full": model, "shrunk": shrink(model)}
    widths, full = widths_of(found["shrunk"]), widths_of(model)
    for multiple in (8, 16):
        rounded = round_up(widths, full, multiple)
        found[f"to {multiple}"] = build_model(*NETWORKS[name], widths=rounded).eval()
    return {key: network.to(memory_format=torch.channels_last) for key, network in found.items()}


def report(times: dict[str, list[float]]) -> str:
    """Return medians, and how many times faster than the shrunk network each is."""
    parts = []
    for key, values in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times["shrunk"], values, strict=True)], n=4)
        ratio = "" if key == "shrunk" else f" ({middle:.2f} times as fast, {low:.2f} to {high:.2f})"
        parts.append(f"{key} {1e3 * statistics.median(values):.2f} ms{ratio}")
    return ", ".join(parts) + f"; n = {len(times['shrunk'])}"


@torch.no_grad()
def main() -> None:
    """Measure every network at three batch sizes."""
    torch.manual_seed(0)
    for name in NETWORKS:
        networks = variants(name)
        for batch in (1, 64, 256):
            shape = load_model(ROOT / "pretrained_models" / f"{name}.halo").preprocess.shape
            images = torch.randn(batch, *shape).to(memory_format=torch.channels_last)
            times = interleave_enough({key: partial(network, images) for key, network in networks.items()})
            print(f"{name}, batch {batch}: {report(times)}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
