"""The command line: defaults, rules between options, and that none is decoration."""

import ast
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT

import adaptivity
import check_params
import cifar
import cifar_prune_iterative
import compare_pruning
import compute_energy
import deploy
import mnist.mnist
import reproduce
from models import resolve_depth
from utils import options
from utils.interrupts import Terminated
from utils.run import run_script

SCRIPTS = {
    "adaptivity.py": adaptivity,
    "cifar.py": cifar,
    "cifar_prune_iterative.py": cifar_prune_iterative,
    "check_params.py": check_params,
    "compare_pruning.py": compare_pruning,
    "compute_energy.py": compute_energy,
    "deploy.py": deploy,
    "mnist/mnist.py": mnist.mnist,
    "reproduce.py": reproduce,
}


def resolved(line: str):
    args = cifar.get_parser().parse_args(shlex.split(line))
    options.resolve(args, depth_of=resolve_depth)
    return vars(args)


def test_plain_halo_is_the_command_of_the_release():
    line = "-d cifar10 -a vgg16_bn --depth 16 --wd 1e-4 --halo --psi 1e-8 --xi 1e-8 --save_dir "
    assert resolved("--halo") == resolved(line + "runs/cifar10_vgg16_bn_halo_seed1")


def test_defaults_of_the_release():
    args = resolved("--halo")
    expected = {"epochs": 160, "train_batch": 64, "lr": 0.1, "momentum": 0.9, "schedule": [80, 120], "gamma": 0.1}
    expected |= {"lambda_init": 1.0, "seed": 1, "reg_lr": 0.1, "reg_wd": 1e-4, "wd": 1e-4, "released_lr": False}
    assert {key: args[key] for key in expected} == expected


def test_mcp_starts_from_a_threshold_that_does_something():
    args = resolved("--mcp")
    assert (args["xi"], args["psi"]) == (1e-4, 1000) and args["xi"] * args["psi"] == pytest.approx(0.1)


def test_lam_follows_the_weights_unless_told():
    assert (resolved("--ws --lr 0.2 --wd 3e-4")["reg_lr"], resolved("--ws --wd 3e-4")["reg_wd"]) == (0.2, 3e-4)
    args = resolved("--halo --reg_lr 0 --reg_wd 0")
    assert (args["reg_lr"], args["reg_wd"], args["lr"]) == (0, 0, 0.1)


@pytest.mark.parametrize("name", ["none", "halo", "l1", "ws", "mcp"])
def test_flags_choose_penalty_and_folder(name):
    flag = "" if name == "none" else f"--{name}"
    args = resolved(f"-d digits -a resnet --depth 20 --seed 4 {flag}")
    assert (args["penalty"], args["save_dir"]) == (name, f"runs/digits_resnet_{name}_seed4")


def sources_of(script):
    """Return the files of this project that a script imports, directly or not, and the script."""
    found, ahead = {}, [ROOT / script]
    while ahead:
        path = ahead.pop()
        if path in found or not path.is_file():
            continue
        found[path] = path.read_text()
        for node in ast.walk(ast.parse(found[path])):
            module = getattr(node, "module", None)  # of a "from"
            names = [f"{module}.{alias.name}" if module else alias.name for alias in getattr(node, "names", [])]
            for name in filter(None, (module, *(n for n in names if isinstance(node, (ast.Import, ast.ImportFrom))))):
                place = ROOT / name.replace(".", "/")
                ahead += [place.with_suffix(".py"), place / "__init__.py"]
    return found


def test_a_script_is_searched_with_what_it_imports():
    pruning, training = sources_of("cifar_prune_iterative.py"), sources_of("cifar.py")
    steps = ROOT / "utils" / "training" / "optimizers.py"
    assert steps in training and steps not in pruning and ROOT / "utils" / "stages" / "prune.py" in pruning


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_read(script):
    text = "\n".join(sources_of(script).values())
    names = {action.dest for action in SCRIPTS[script].get_parser()._actions} - {"help"}
    reads_coefficients = 'for name in ("xi", "psi", "lambda_init")' in text
    assert reads_coefficients and len(names) >= 6
    assert [name for name in sorted(names) if not re.search(rf"\bargs\.{name}\b", text)] == []


@pytest.mark.parametrize(
    "line, words",
    [
        ("-a vgg12", "vgg12"),
        ("-d imagenet", "imagenet"),
        ("-a vgg16_bn --depth 19", "--depth 19"),
        ("-a resnet --depth 21", "21"),
        ("--halo --l1", "--halo"),
        ("--halo --xi -1", "-1"),
        ("--halo --xi nan", "nan"),
        ("--halo --psi -1e-8", "-1e-8"),
        ("--lr -0.1", "-0.1"),
        ("--lr fast", "fast"),
        ("--momentum 9", "--momentum 9: no step would ever fade; give less than 1"),
        ("--momentum 1", "--momentum 1"),
        ("--epochs -3", "-3"),
        ("--epochs 0", "0"),
        ("--epochs 2.5", "2.5"),
        ("--halo --lambda_init 0", "lambda_init"),
        ("--xi 1e-4", "--xi"),
        ("--l1 --psi 1", "--psi"),
        ("--mcp --lambda_init 2", "--lambda_init"),
        ("--mcp --psi 0", "--psi 0"),
        ("--l1 --reg_lr 0.1", "--reg_lr"),
        ("--reg_wd 0", "--reg_wd"),
        ("--released_lr", "--released_lr"),
        ("--evaluate", "--resume"),
        ("--no_test", "--val_split"),
        ("--epoch 3", "--epoch"),
        ("--device tpu", "tpu"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(fails, tmp_path, line, words):
    status, message = fails(*shlex.split(line), "--save_dir", tmp_path / "run")
    assert status == 2 and words in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
@pytest.mark.parametrize("option", ["--save_dir", "--data", "--resume"])
def test_a_text_that_can_be_no_path_is_refused(option, text, fails):
    status, line = fails(option, text)
    assert status == 2 and option in line and "give one" in line


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_stop_during_start_up_says_so(stop, status, capsys, monkeypatch):
    def main(args):
        raise stop

    monkeypatch.setattr(sys, "argv", ["cifar.py"])
    with pytest.raises(SystemExit) as stopped:
        run_script(main, options.Parser("Nothing."))
    assert stopped.value.code == status
    assert capsys.readouterr().err.strip().endswith(": interrupted")


def test_what_is_wrong_with_a_megabyte_is_said_in_a_line_of_both_its_ends(capsys, monkeypatch):
    def fail(args):
        raise ValueError("bad \n" + "x" * 10**6 + " give another")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit):
        run_script(fail, options.Parser("Nothing."))
    line = capsys.readouterr().err
    assert "error: bad xxx" in line and line.endswith("xxx give another\n") and 2000 < len(line) < 2200


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1),
        (RuntimeError("CUDA error: out of memory"), 1),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 1),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_too_little_memory_ends_in_one_line(error, status, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit if status else RuntimeError) as ended:
        run_script(fail, options.Parser("Nothing."))
    if status:
        assert ended.value.code == status and capsys.readouterr().err == f"x.py: error: {error}\n"
