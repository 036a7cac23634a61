"""Train one network on CIFAR-10/100, on digits or on your own image folder, with HALO or another penalty.

    python cifar.py --halo                                        # the release's VGG-16 experiment on CIFAR-10
    python cifar.py -d digits -a resnet --depth 20 --halo --xi 1e-4 --psi 1e-4 --epochs 8 --schedule 4 6

Leaves in --save_dir (default runs/<dataset>_<arch>_<penalty>_seed<k>): config.json, log.csv (a row an epoch),
init, checkpoint, model_best and final .pth.tar, arrays as .npy, curves.png, regularization.png, summary.json.
"""

import argparse
from pathlib import Path

from models import ARCHS, build_model, resolve_depth
from utils import options
from utils.data import DATASETS, load_dataset
from utils.experiment import Experiment, evaluate_checkpoint, memory_format
from utils.logger import say
from utils.parameters import penalized_parameters
from utils.penalties import make_penalty
from utils.run import choose_device, clear_run, describe, prepare_folder, run_script, set_seed, write_json


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    options.add_data(parser, DATASETS, default="cifar10")
    options.add_model(parser, ARCHS, default="vgg16_bn")
    options.add_penalty(parser)
    options.add_training(parser)
    options.add_run(parser)
    return parser


def main(args: argparse.Namespace) -> dict:
    """Train, or with --evaluate only evaluate, as the options say.

    Returns:
        The content of summary.json; with --evaluate, `loss`, `top1`, `top5` and `epoch`.
    """
    options.resolve(args, depth_of=resolve_depth)
    device = choose_device(args.device)
    generator = set_seed(args.seed)
    if not args.evaluate:
        prepare_folder(Path(args.save_dir), resume=args.resume, overwrite=args.overwrite)
    data = load_dataset(args.dataset, args.data, val_split=args.val_split)
    model = build_model(args.arch, len(data.classes), args.depth).to(device, memory_format=memory_format(device))
    if args.evaluate:
        result = evaluate_checkpoint(args.resume, model, data, device, batch_size=args.test_batch)
        say(f"{args.resume}: test loss {result['loss']:.4f}  top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%")
        return result

    coefficients = {"xi": args.xi, "psi": args.psi, "lambda_init": args.lambda_init}
    penalty = make_penalty(args.penalty, penalized_parameters(model), **coefficients)
    experiment = Experiment(args, data, model, penalty, device=device, generator=generator)
    if args.resume:
        experiment.load(args.resume)
    else:
        clear_run(Path(args.save_dir))
    write_json(Path(args.save_dir) / "config.json", describe(args, device))
    return experiment.run()


if __name__ == "__main__":
    run_script(main, get_parser())
