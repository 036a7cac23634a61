"""Sparse inference against the same network dense, in torch and in engines for deployment, interleaved.

    python benchmarks/sparse.py --network ResNet-20 --sparsity 0.95 0.98
    python benchmarks/sparse.py --figure       # time against sparsity, for three families

Run it with nothing else on the machine. Leaves sparse.json (which it adds to) and with --figure sparse.png in --save.
`pip install -r requirements-bench.txt` brings the engines other than torch.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import markdown, plot_sparsity
from benchmarks.sparse_engines import ENGINES, missing
from benchmarks.sparse_networks import NETWORKS, pruned_network, shape_of
from benchmarks.timing import interleave, rows
from utils import options
from utils.halo.sparse_program import Shape
from utils.halo.sparse_terms import live_network
from utils.halo.sparse_trace import trace
from utils.run import describe, read_json, run_script, write_json

FAMILIES = {"VGG-16": 3, "ResNet-20": 9, "LeNet-300-100": 41}  # repetitions of a time in the figure
SPARSITIES = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


def multiply_adds(model: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of one image that sparse inference does."""
    network = live_network(trace(model), Shape(*shape))
    return sum(
        len(terms.output) * network.shapes[value].height * network.shapes[value].width
        for value, terms in network.terms.items()
    )


def measure(name: str, sparsity: float, batch: int, *, repeats: int, engines: list[str]) -> tuple[str, list[dict]]:
    """Return a title and the rows of one network at one batch size, with the roofline."""
    model, origin = pruned_network(name, sparsity)
    images = torch.randn(batch, *shape_of(name))
    functions = {engine: ENGINES[engine](model, images) for engine in engines}
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    functions["matrix product"] = lambda: torch.mm(a, b)
    small = batch * multiply_adds(model, shape_of(name)) < 1e7
    times = interleave(functions, repeats=repeats, inner=50 if small or batch == 1 else 1, warm_up=5)
    table = rows(times, reference="torch eager", faster=True)
    last, product = table[-2], table.pop()
    rate, peak = batch * multiply_adds(model, shape_of(name)) / last["ms"] / 1e6, 1024**3 / product["ms"] / 1e6
    last |= {"G multiply-adds/s": rate, "of the matrix product": rate / peak}
    return f"{name} at {sparsity}, batch {batch} ({origin})", table


def sweep(name: str, *, repeats: int, batch: int = 64) -> list[dict]:
    """Return milliseconds by sparsity, of the network dense and sparse, the same share removed from every layer."""
    images, table = torch.randn(batch, *shape_of(name)), []
    for sparsity in SPARSITIES:
        model, _ = pruned_network(name, sparsity, uniform=True)
        functions = {engine: ENGINES[engine](model, images) for engine in ("torch eager", "sparse")}
        dense, fast = rows(interleave(functions, repeats=repeats), reference="torch eager", faster=True)
        table.append({"network": name, "sparsity": sparsity, "dense ms": dense["ms"], "sparse ms": fast["ms"]})
        table[-1] |= {"sparse_quartiles": fast["ms_quartiles"], "times faster": fast["ratio"], "n": fast["n"]}
    return table


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=[], help="which networks")
    parser.add_argument(
        "--sparsity", nargs="+", type=options.real(0, high=1), default=[0.95], metavar="S", help="fractions of zeros"
    )
    parser.add_argument(
        "--batch", nargs="+", type=options.whole(1), default=[1, 64, 256], metavar="N", help="images at once"
    )
    parser.add_argument("--repeats", type=options.whole(2), default=9, metavar="N", help="timings of each")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="what to compare")
    parser.add_argument("--figure", action="store_true", help="time against sparsity instead")
    parser.add_argument("--save", metavar="DIR", default="runs/bench", help="folder of the outputs")
    return parser


@torch.inference_mode()
def main(args: argparse.Namespace) -> dict:
    """Measure, print and write.

    Returns:
        The content of sparse.json.

    Raises:
        OptionError: neither a network nor the figure is asked for.
    """
    if not (args.network or args.figure):
        raise options.OptionError("nothing to measure: name a --network, or ask for the --figure")
    folder = Path(args.save)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sparse.json"
    results = read_json(path) or {"machine": {}, "tables": {}}
    results["machine"] = describe(args, torch.device("cpu"))
    engines = [engine for engine in ENGINES if engine in {*args.engines, "torch eager", "sparse"} - {*missing()}]
    if missing():
        print(f"not measured, not installed: {', '.join(missing())} (pip install -r requirements-bench.txt)")
    jobs = [(name, s, batch) for name in args.network for s in args.sparsity for batch in args.batch]
    for job in jobs:
        title, table = measure(*job, repeats=args.repeats, engines=engines)
        results["tables"].setdefault(title, []).append(table)  # one more run
        results.setdefault("runs", []).append({"table": title} | results["machine"])
        print(markdown(title, table), flush=True)
        write_json(path, results)
    if args.figure:
        results["sparsity"] = [row for name, n in FAMILIES.items() for row in sweep(name, repeats=n)]
        results.setdefault("runs", []).append({"table": "sparsity"} | results["machine"])
        print(markdown("Time against sparsity, batch 64", results["sparsity"]), flush=True)
        write_json(path, results)
        plot_sparsity(results["sparsity"], folder / "sparse.png")
    return results


if __name__ == "__main__":
    run_script(main, get_parser())
