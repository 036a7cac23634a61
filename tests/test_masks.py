"""Zeros that stay zero: in every penalty and optimizer, through the scripts, over a stop (test_gmp.py: processes)."""

import json
import shlex
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import train
from test_cifar import assert_equal_runs, rows
from torch import nn

import cifar_prune_iterative
import mnist.mnist
from utils import FixedZeros, make_penalty, penalized_parameters, prunable_weights, prune_by_magnitude_
from utils.files.checkpoint import load_checkpoint, save_checkpoint
from utils.halo.gradual import GradualPruning
from utils.halo.lambda_sgd import FusedHALO, LambdaSGD
from utils.halo.masks import and_
from utils.halo.memory import CHUNK
from utils.paths import portable_path
from utils.training import experiment
from utils.training.compiled import find_compiler

COEFFICIENTS = {"none": {}, "l1": {"xi": 0.01}, "mcp": {"xi": 0.01, "psi": 9}}
LEARNED = {"xi": 1e-3, "psi": 1e-3}
LENET = ["-d", "digits", "-a", "lenet_300_100", "--lr", "0.1", "--train_batch", "64", "--seed", "3"]


def lenet(*options):
    return mnist.mnist.main(mnist.mnist.get_parser().parse_args([*LENET, *(str(o) for o in options)]))


def assert_positive_zeros(tensors, masks):
    """Exactly 0.0, never -0.0, wherever the mask says; and somewhere else something is left."""
    for name, mask in masks.items():
        inside = tensors[name][mask]
        assert (inside == 0).all() and not inside.signbit().any(), name
    assert any((tensors[name][~mask] != 0).any() for name, mask in masks.items())


def momenta(state):
    """Return the momenta of a checkpoint of a LeNet-300-100 by the names of their weights."""
    names = list(state["state_dict"])  # no buffers: parameters in order
    return {names[i]: s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_whatever_a_number_was_it_becomes_positive_zero(dtype):
    tensor = torch.tensor([[-1.5, -0.0, float("nan"), 2.0], [float("inf"), -3.0, 0.5, float("-inf")]], dtype=dtype)
    keep = torch.tensor([[0, 0, 0, -1], [0, -1, -1, 0]], dtype=torch.int8)
    and_(tensor, keep)
    assert tensor.tolist() == [[0, 0, 0, 2.0], [0, -3.0, 0.5, 0]] and tensor.signbit().sum() == 1


@pytest.mark.parametrize("like", [torch.channels_last, torch.contiguous_format])
def test_layouts_may_differ(like):
    """A gradient may lie in memory in another order than its weight."""
    w = nn.Parameter(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last))
    zeros = FixedZeros({"w": w}, {"w": w > 0})
    expected = (grad := torch.randn(6, 5, 3, 3)).masked_fill(zeros.masks["w"], 0)
    w.grad = grad.contiguous(memory_format=like)
    zeros.clear_grad_()
    assert torch.equal(w.grad, expected)


def test_clearing_allocates_no_copy_of_the_weights():
    w = nn.Parameter(torch.randn(8 * CHUNK))
    w.grad = torch.randn_like(w)
    zeros = FixedZeros({"w": w}, {"w": w.abs() < 1})
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        zeros.clear_grad_()
    used = [event.self_cpu_memory_usage for event in profiler.events()]
    assert 0 < max(used) <= 4 * CHUNK  # one piece, in the words of the gradient


def toy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 7))
    prune_by_magnitude_(prunable_weights(model, linear=True), 0.7)
    return model, torch.randn(8, 3, 8, 8), torch.randint(7, (8,))


def steps_of(penalty, optimizer, path):
    """Return what is called after the backward pass on each path of the optimizers."""
    factors = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    if path == "add_grad_":
        learned = [LambdaSGD(penalty, **factors)] if list(penalty.parameters()) else []
        return [learned[0].step if learned else penalty.add_grad_, optimizer.step]
    fused = FusedHALO(penalty, **factors, weights=optimizer if path == "kernel" else None)
    if path == "pieces":
        fused._kernel = None
    return [fused.step, optimizer.step]


@pytest.mark.parametrize("wd", [0.0, 0.01])
@pytest.mark.parametrize(
    ("name", "path"),
    [*((n, "add_grad_") for n in ("none", "l1", "ws", "mcp", "halo")), ("halo", "kernel"), ("halo", "pieces")],
)
def test_zeros_stay_in_weights_and_momentum(name, path, wd):
    model, images, labels = toy()
    weights = prunable_weights(model, linear=True)
    penalty = make_penalty(name, penalized_parameters(model, linear=True), **COEFFICIENTS.get(name, LEARNED))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=wd, fused=True)
    zeros, steps = FixedZeros(weights), steps_of(penalty, optimizer, path)
    masks, before = zeros.masks, {n: w.detach().clone() for n, w in weights.items()}
    for _ in range(20):
        F.cross_entropy(model(images), labels).backward()
        zeros.clear_grad_()
        for step in steps:
            step()
        optimizer.zero_grad()
        assert_positive_zeros(weights, masks)
        assert_positive_zeros({n: optimizer.state[w]["momentum_buffer"] for n, w in weights.items()}, masks)
    assert zeros.zeros == sum(int(m.sum()) for m in masks.values()) == round(0.7 * zeros.total)
    assert all(not torch.equal(before[n], w) for n, w in weights.items())


def test_zeros_come_back_without():
    """What the test above would show if nothing held them."""
    model, images, labels = toy()
    weights = prunable_weights(model, linear=True)
    masks = FixedZeros(weights).masks
    F.cross_entropy(model(images), labels).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(AssertionError):
        assert_positive_zeros(weights, masks)


def test_adamw_with_weight_decay_keeps_them_too():
    model, images, labels = toy()
    weights = prunable_weights(model, linear=True)
    zeros, optimizer = FixedZeros(weights), torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        zeros.clear_grad_()
        optimizer.step()
    assert_positive_zeros(weights, zeros.masks)


def test_a_mask_in_the_middle_of_training_clears_the_momentum():
    model, images, labels = toy()
    weights = prunable_weights(model, linear=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    prune_by_magnitude_(weights, 0.5)
    zeros = FixedZeros(weights)
    zeros.clear_(optimizer)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_positive_zeros(weights, zeros.masks)


def test_a_mask_of_another_shape_is_refused():
    w = nn.Parameter(torch.ones(3))
    for masks in ({}, {"w": torch.zeros(4, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="no mask of the shape of w"):
            FixedZeros({"w": w}, masks)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A trained LeNet-300-100, and the same pruned to 0.95: folder with init, final and pruned/pruned_0.95."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    lenet("--epochs", 6, "--schedule", 4, "--save_dir", folder)
    lenet_prune(folder / "final.pth.tar", 0.95, folder / "pruned")
    return folder


def lenet_prune(file, percent, folder):
    options = ["-d", "digits", "-a", "lenet_300_100", "--percent", percent, "--resume", file, "--save_dir", folder]
    report = mnist.mnist.main(mnist.mnist.get_parser().parse_args([str(o) for o in options]))
    return report["results"][0]


def masks_of(file):
    return {n: w == 0 for n, w in load_checkpoint(file)["state_dict"].items() if n.endswith("weight")}


def assert_zeros_kept(folder, file):
    """Every file of a run has the zeros of the mask's file, its momentum too, and the records say so."""
    masks = masks_of(file)
    count = sum(int(m.sum()) for m in masks.values())
    for name in ("init", "model_best", "final", "checkpoint"):
        state = load_checkpoint(folder / f"{name}.pth.tar")
        assert_positive_zeros(state["state_dict"], masks)
        assert state["mask"] == {"source": str(file), "zeros": count, "prunable": 266_200}
    assert_positive_zeros(momenta(state), masks)
    written = json.loads((folder / "config.json").read_text())["mask"]
    assert written == state["mask"] | {"source": portable_path(file)}
    assert {float(row["sparsity"]) for row in rows(folder)} == {count / 266_200}


def test_fine_tuning_regains_the_accuracy(pruned, tmp_path):
    """docs/after_pruning.md, "Fine-tune"."""
    file = pruned / "pruned" / "pruned_0.95.pth.tar"
    before, cut = (load_checkpoint(f)["acc"] for f in (pruned / "final.pth.tar", file))
    options = ["--start", file, "--mask", file, "--lr", 0.05, "--epochs", 3, "--schedule", 2]
    summary = lenet(*options, "--save_dir", tmp_path / "run")
    assert cut < before - 10 and summary["final"]["test_top1"] > before - 2
    assert_zeros_kept(tmp_path / "run", file)


def test_a_lottery_ticket_starts_from_the_first_weights(pruned, tmp_path):
    """docs/after_pruning.md, "Lottery tickets"."""
    file = pruned / "pruned" / "pruned_0.95.pth.tar"
    options = ["--start", pruned / "init.pth.tar", "--mask", file, "--epochs", 6, "--schedule", 4]
    summary = lenet(*options, "--save_dir", tmp_path / "run")
    ours, first = (load_checkpoint(f / "init.pth.tar")["state_dict"] for f in (tmp_path / "run", pruned))
    for name, mask in masks_of(file).items():
        assert torch.equal(ours[name], first[name].masked_fill(mask, 0))
    assert summary["final"]["test_top1"] > 90
    assert_zeros_kept(tmp_path / "run", file)


def test_pruning_in_turns_with_training(pruned, tmp_path):
    """docs/after_pruning.md, "In turns": what is left of the second cut is a share of what the first one left."""
    file, left = pruned / "final.pth.tar", 266_200
    for number in (1, 2):
        folder = tmp_path / f"round{number}"
        result = lenet_prune(file, 0.8, folder / "pruned")
        assert result["removed"] == round(left * 0.8)
        left -= result["removed"]
        file = folder / "pruned" / "pruned_0.8.pth.tar"
        options = ["--start", file, "--mask", file, "--lr", 0.05, "--epochs", 3, "--schedule", 2]
        summary = lenet(*options, "--save_dir", folder / "run")
        assert_zeros_kept(folder / "run", file)
        file = folder / "run" / "final.pth.tar"
    assert sum(int((~m).sum()) for m in masks_of(file).values()) == left == 10_648
    assert summary["final"]["test_top1"] > load_checkpoint(pruned / "final.pth.tar")["acc"] - 2


def test_start_alone_begins_a_run_in_which_zeros_come_back(pruned, tmp_path):
    file = pruned / "pruned" / "pruned_0.95.pth.tar"
    summary = lenet("--start", file, "--epochs", 1, "--save_dir", tmp_path / "run")
    first, last = (load_checkpoint(tmp_path / "run" / f"{n}.pth.tar") for n in ("init", "final"))
    start = load_checkpoint(file)["state_dict"]
    assert all(torch.equal(first["state_dict"][n], start[n]) for n in start)
    assert first["epoch"] == 0 and summary["final"]["epoch"] == 1 and "mask" not in first
    assert all((last["state_dict"][n][mask] != 0).any() for n, mask in masks_of(file).items())


@pytest.mark.parametrize("options", [["--halo", "--xi", "1e-4", "--psi", "1e-3"], []])
def test_a_resumed_run_is_the_same_and_needs_the_file_no_more(pruned, tmp_path, options):
    """Neither the file nor the option: the checkpoint holds the mask."""
    file = tmp_path / "copy.pth.tar"
    shutil.copy(pruned / "pruned" / "pruned_0.95.pth.tar", file)
    options = [*options, "--schedule", 1]
    begin = ["--start", file, "--mask", file]
    lenet(*options, *begin, "--epochs", 2, "--save_dir", tmp_path / "straight")
    lenet(*options, *begin, "--epochs", 1, "--save_dir", tmp_path / "halves")
    file.unlink()
    checkpoint = tmp_path / "halves" / "checkpoint.pth.tar"
    lenet(*options, "--epochs", 2, "--save_dir", tmp_path / "halves", "--resume", checkpoint)
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")
    shutil.copy(pruned / "pruned" / "pruned_0.95.pth.tar", file)
    assert_zeros_kept(tmp_path / "halves", file)
    assert load_checkpoint(checkpoint)["config"]["start"] == str(file)


@pytest.mark.parametrize("extra", [["--amp", "bf16", "--halo"], ["--amp", "fp16", "--halo"], ["--amp", "fp16", "--ws"]])
def test_mixed_precision_keeps_them(pruned, tmp_path, extra):
    file = pruned / "pruned" / "pruned_0.95.pth.tar"
    lenet("--mask", file, "--epochs", 1, "--save_dir", tmp_path / "run", *extra)
    assert_zeros_kept(tmp_path / "run", file)


@pytest.mark.skipif(find_compiler() is None, reason="--compile needs a C++ compiler")
def test_a_compiled_network_keeps_them(pruned, tmp_path):
    file = pruned / "pruned" / "pruned_0.95.pth.tar"
    lenet("--mask", file, "--epochs", 1, "--save_dir", tmp_path / "run", "--compile", "--halo")
    assert_zeros_kept(tmp_path / "run", file)


def test_convolutions_in_channels_last_and_only_their_weights(tiny, tmp_path):
    """On CIFAR the classifier is no prunable weight: its zeros are not kept, nor those of biases and BatchNorm."""
    train(*tiny, "--epochs", 1, "--save_dir", tmp_path / "dense")
    state = load_checkpoint(tmp_path / "dense" / "final.pth.tar")
    state["state_dict"]["layer1.0.conv1.weight"][:, ::2] = -0.0
    state["state_dict"]["fc.weight"].zero_()
    state["state_dict"]["bn1.bias"].zero_()
    save_checkpoint(tmp_path / "cut.pth.tar", state)
    train(*tiny, "--halo", "--start", tmp_path / "cut.pth.tar", "--mask", tmp_path / "cut.pth.tar")
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")
    kept = state["state_dict"]["layer1.0.conv1.weight"][:, ::2]
    assert (kept == 0).all() and not kept.signbit().any() and state["mask"]["zeros"] == kept.numel()
    assert (state["state_dict"]["fc.weight"] != 0).all() and (state["state_dict"]["bn1.bias"] != 0).any()


def test_held_out_images_that_the_start_has_seen_are_noted(tiny, tmp_path, capsys):
    train(*tiny, "--epochs", 1, "--val_split", 4)
    for held_out, note in ((4, ""), (3, ""), (6, "trained on 2 of the 6 held-out images: accuracy on them says too")):
        capsys.readouterr()
        other = ["--save_dir", tmp_path / str(held_out), "--val_split", held_out, "--epochs", 1]
        train(*tiny, *other, "--start", tmp_path / "run" / "final.pth.tar")
        said = capsys.readouterr().err
        assert note in said and ("held-out images" in said) == bool(note)
    train(*tiny, *other, "--overwrite", "--start", tmp_path / "run" / "init.pth.tar")  # trained on nothing
    assert "held-out images" not in capsys.readouterr().err


def test_the_command_that_continues_does_not_begin_again(pruned, tmp_path, monkeypatch):
    file = pruned / "pruned" / "pruned_0.95.pth.tar"
    begin = ["--start", file, "--mask", file, "--save_dir", tmp_path / "run"]
    options = [str(option) for option in (*LENET, *begin, "--epochs", 2, "--schedule", 1)]
    monkeypatch.setattr(sys, "argv", ["mnist/mnist.py", *options])
    original = experiment.run_epoch

    def until(run):
        if run.epoch:
            raise KeyboardInterrupt
        return original(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="continue with: python mnist") as stop:
        patch.setattr(experiment, "run_epoch", until)
        mnist.mnist.main(mnist.mnist.get_parser().parse_args(options))
    _, _, *command = shlex.split(str(stop.value).split("continue with: ")[1])
    assert mnist.mnist.main(mnist.mnist.get_parser().parse_args(command))["final"]["epoch"] == 2
    assert_zeros_kept(tmp_path / "run", file)


def test_what_cannot_be_kept_is_said(tiny, tmp_path, fails, capsys):
    train(*tiny, "--epochs", 1)
    final = tmp_path / "run" / "final.pth.tar"
    other = ["--save_dir", tmp_path / "other"]
    status, line = fails(*tiny, *other, "--mask", final)
    assert status == 1 and "has no zeros" in line and str(final) in line
    for option in ("--mask", "--start"):
        status, line = fails(*tiny, *other, "--depth", 14, option, final)
        assert status == 1 and "of another network" in line and "--depth 8" in line
        status, line = fails(*tiny, *other, option, tmp_path / "missing.pth.tar")
        assert status == 1 and "missing.pth.tar" in line
        status, line = fails(*tiny, "--overwrite", option, final)
        assert status == 2 and "choose another --save_dir" in line and final.exists()
    status, line = fails(*tiny, "--start", final, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert status == 2 and "--start" in line and "--resume" in line
    status, line = fails(*tiny, "--mask", final, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert status == 1 and "mask None (now " in line
    status, line = fails(*tiny, "--mask", final, "--evaluate", "--resume", final)
    assert status == 2 and "--mask does nothing with --evaluate" in line

    state = load_checkpoint(final)
    state["state_dict"]["conv1.weight"].zero_()
    save_checkpoint(tmp_path / "empty.pth.tar", state)
    capsys.readouterr()
    train(*tiny, *other, "--mask", tmp_path / "empty.pth.tar", "--epochs", 1)
    assert "no weight is left in conv1.weight" in capsys.readouterr().err


def test_percent_of_all_is_the_sparsity_afterwards(pruned, tmp_path, capsys):
    file = pruned / "pruned" / "pruned_0.95.pth.tar"
    parser = mnist.mnist.get_parser()
    base = ["-d", "digits", "-a", "lenet_300_100", "--resume", str(file), "--percent", "0.9", "0.95", "0.98"]
    results = {}
    for of in ("all", "nonzero"):
        capsys.readouterr()
        report = mnist.mnist.main(parser.parse_args([*base, "--of", of, "--save_dir", str(tmp_path / of)]))
        results[of] = [r["removed"] for r in report["results"]]
        assert ("do not count" in capsys.readouterr().err) == (of == "nonzero") and report["of"] == of
    assert results["all"] == [0, 0, round(266_200 * 0.98) - round(266_200 * 0.95)]
    assert results["nonzero"] == [round(13_310 * p) for p in (0.9, 0.95, 0.98)]
    assert cifar_prune_iterative.get_parser().get_default("of") == "nonzero"


@pytest.mark.parametrize("kind", ["fixed", "gradual"])
def test_zeros_that_an_optimizer_moves_are_noticed(kind):
    """It has a momentum of theirs, which nobody has cleared, as one that is made while others are masked."""
    w = torch.nn.Parameter(torch.linspace(-1, 1, 20))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.ones_like(w)
    optimizer.step()
    other = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    if kind == "fixed":
        zeros = FixedZeros({"w": w}, {"w": w.detach().abs() < 0.5})
    else:
        zeros = GradualPruning({"w": w}, optimizer=other, sparsity=0.5, begin=0, end=2, every=1)
        zeros.advance_()
    w.grad = torch.ones_like(w)
    zeros.clear_grad_()
    optimizer.step()
    with pytest.raises(ValueError, match="weights of w that are held at zero have moved: their momentum"):
        zeros.advance_()
    zeros.clear_(optimizer)
    zeros.clear_grad_()
    optimizer.step()
    zeros.advance_()
    assert int((w == 0).sum()) == zeros.zeros > 0


@pytest.mark.parametrize("lr", [0.0, None], ids=["a learning rate of 0", "steps that a scaler leaves out"])
def test_they_are_noticed_behind_steps_that_move_nothing(lr):
    w = torch.nn.Parameter(torch.linspace(-1, 1, 20))
    zeros, optimizer = FixedZeros({"w": w}, {"w": w.detach().abs() < 0.5}), torch.optim.SGD([w], lr=0.1)
    held = zeros.masks["w"]
    for rate in (lr, lr, lr, 0.1):
        w.grad = torch.ones_like(w)  # and nobody calls clear_grad_()
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        if not w[held].any():
            zeros.advance_()
    with pytest.raises(ValueError, match="10 weights of w that are held at zero have moved"):
        zeros.advance_()


def test_a_weight_that_left_its_model_is_noticed():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1))
    prune_by_magnitude_(prunable_weights(model), 0.5)
    zeros = FixedZeros(prunable_weights(model))
    zeros.clear_grad_()
    model.load_state_dict(model.state_dict(), assign=True)  # the same tensors, but not the same parameters
    with pytest.raises(ValueError, match="'0.weight' is no longer a parameter of Sequential"):
        zeros.clear_grad_()


def test_what_one_run_has_seen_the_runs_after_it_have(tiny, tmp_path, capsys, fails_in):
    """The second says that it holds out 6 images; two of them the first was trained on."""
    train(*tiny, "--epochs", 1, "--val_split", 4)
    first = ["--start", tmp_path / "run" / "final.pth.tar", "--save_dir", tmp_path / "second"]
    options = [*tiny, *first, "--val_split", 6, "--schedule", "1"]
    train(*options, "--epochs", 1)
    resume = ["--resume", tmp_path / "second" / "checkpoint.pth.tar"]
    train(*[o for o in options if o not in first[:2]], "--epochs", 2, *resume)
    final = tmp_path / "second" / "final.pth.tar"
    prune = ["--data", tiny[3], "--resume", final, "--percent", 0.5, "--save_dir", tmp_path / "pruned", "--val_split"]
    status, line = fails_in(cifar_prune_iterative, *prune, 6)
    assert status == 2 and "was trained on all but 4 images: give at most --val_split 4" in line
    cifar_prune_iterative.main(cifar_prune_iterative.get_parser().parse_args([str(o) for o in (*prune, 4)]))
    for file in (final, tmp_path / "pruned" / "pruned_0.5.pth.tar"):
        capsys.readouterr()
        train(*tiny, "--epochs", 1, "--val_split", 6, "--start", file, "--save_dir", tmp_path / "3", "--overwrite")
        assert "trained on 2 of the 6 held-out images" in capsys.readouterr().err


def test_of_images_that_changed_nobody_knows_which_were_held_out(images, tiny, tmp_path, capsys):
    """Which are held out goes by position: one image more, and they are others."""
    shutil.copytree(images, tmp_path / "images")
    more = [*tiny, "--data", tmp_path / "images", "--epochs", 1, "--val_split", 4]
    train(*more)
    start = ["--start", tmp_path / "run" / "final.pth.tar", "--save_dir", tmp_path / "next", "--overwrite"]
    train(*more, *start)
    assert "trained on" not in capsys.readouterr().err
    train(*more, *start, "--val_split", 6)
    assert "trained on 2 of the 6 held-out images" in capsys.readouterr().err
    first = next((tmp_path / "images" / "train").glob("*/*.png"))
    shutil.copy(first, first.with_name("zzz.png"))
    train(*more, *start)
    assert "trained on other images, or in another order" in capsys.readouterr().err
    unknown = tmp_path / "next" / "final.pth.tar"
    assert load_checkpoint(unknown)["config"]["unseen"] is None
    train(*more, "--start", unknown, "--save_dir", tmp_path / "third")  # nor of what follows
    assert "does not say on what it was trained: whether on those now held out is not known" in capsys.readouterr().err


def test_a_file_that_records_nothing_may_have_seen_all(tiny, tmp_path, capsys):
    """As the authors' checkpoints, which were trained on every image."""
    train(*tiny, "--epochs", 1)
    bare = {"state_dict": load_checkpoint(tmp_path / "run" / "final.pth.tar")["state_dict"]}
    torch.save(bare, tmp_path / "bare.pth.tar")
    for held_out in (0, 4):
        capsys.readouterr()
        options = [
            "--start",
            tmp_path / "bare.pth.tar",
            "--val_split",
            held_out,
            "--save_dir",
            tmp_path / str(held_out),
        ]
        train(*tiny, "--epochs", 1, *options)
        assert ("whether on those now held out is not known" in capsys.readouterr().err) == (held_out > 0)


def test_a_link_to_a_file_that_the_run_would_replace_is_refused(tiny, tmp_path, fails):
    train(*tiny, "--epochs", 1)
    (tmp_path / "link.pth").symlink_to(tmp_path / "run" / "final.pth.tar")
    status, line = fails(*tiny, "--start", tmp_path / "link.pth", "--overwrite")
    assert status == 2 and "link.pth lies in --save_dir" in line
    assert (tmp_path / "run" / "final.pth.tar").exists()


def test_the_first_network_of_a_run_that_began_from_one_was_trained_too(tiny, tmp_path, capsys):
    train(*tiny, "--epochs", 1)
    train(*tiny, "--epochs", 1, "--start", tmp_path / "run" / "final.pth.tar", "--save_dir", tmp_path / "second")
    for name, seen in (("run", False), ("second", True)):
        start = ["--start", tmp_path / name / "init.pth.tar", "--save_dir", tmp_path / "third", "--overwrite"]
        capsys.readouterr()
        train(*tiny, "--epochs", 1, "--val_split", 4, *start)
        assert ("trained on 4 of the 4 held-out images" in capsys.readouterr().err) == seen
