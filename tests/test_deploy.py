"""From zeros to speed: both forms proved, measured and written, and the smaller network in every other stage."""

import copy
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, TINY, train
from torch import nn

import check_params
import cifar_prune_iterative
import compute_energy
import deploy
from models import build_model
from models.widths import widths_of
from utils import plot_deploy, prunable_weights, prune_by_magnitude_, shrink
from utils.files import load_model
from utils.files.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.files.preprocessing import CIFAR
from utils.halo import sparse
from utils.halo.fold import fold_batch_norm
from utils.stages import compiler
from utils.stages import deploy as stage
from utils.stages.deploy import _summary

ONNX = ["--onnx"] if all(map(find_spec, ("onnx", "onnxscript"))) else []
SAFETENSORS = ["--safetensors"] if find_spec("safetensors") else []
QUICK = ["--batch", 1, 3, "--no_compile"]


def call(script, *options):
    return script.main(script.get_parser().parse_args([str(option) for option in options]))


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr("utils.stages.timing.REPEATS", (2, 2))


@pytest.fixture
def no_export(monkeypatch):
    """Leave out torch.export, which takes longer than the rest."""
    monkeypatch.setattr(stage, "contents", lambda *_: {})


@torch.no_grad()
def write_pruned(path, arch="resnet", depth=8, *, zeros=0.9, **config):
    """Write a checkpoint of a pruned network with dead filters and shifts far from zero; return the network."""
    torch.manual_seed(0)
    model = build_model(arch, 3, depth)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if zeros and isinstance(module, nn.Conv2d) and name != "conv1":
            module.weight[::3] = 0
    if zeros:
        prune_by_magnitude_(prunable_weights(model), zeros)
    config = {"dataset": "folder", "arch": arch, "depth": depth, "num_classes": 3} | config
    about = {"preprocessing": CIFAR.record(), "class_names": ["class0", "class1", "class2"], "config": config}
    save_checkpoint(path, {"epoch": 2, "state_dict": model.state_dict(), "acc": 40.0, "best_acc": 41.0} | about)
    return model.eval()


@pytest.fixture(scope="module")
def deployed(images, tmp_path_factory):
    """A pruned checkpoint, what deploy.py made of it in a folder that was not there, and its report and lines."""
    folder = tmp_path_factory.mktemp("deployed")
    model = write_pruned(folder / "pruned.pth.tar")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.stages.timing.REPEATS", (5, 5))
        patch.setattr(stage, "say", lines.append)
        options = ["--data", images, "--checkpoint", folder / "pruned.pth.tar", "--save", folder / "new" / "small"]
        report = call(deploy, *options, *QUICK, *ONNX, *SAFETENSORS)
    return model, folder, report, "\n".join(lines).splitlines()


def test_both_forms_are_proved_and_measured(deployed):
    model, folder, report, lines = deployed
    proof, small = report["proof"], shrink(model)
    assert proof["images"] == 18 and not proof["random"] and list(proof["forms"]) == ["shrunk", "sparse"]
    for form in proof["forms"].values():
        assert form["top1"] == proof["top1"] and form["changed"] == 0
        assert form["difference"] <= 1e-5 * proof["largest_logit"]
    assert report["macs"]["sparse"] < report["macs"]["shrunk"] < 0.8 * report["macs"]["dense"]
    kept = {layer["name"]: layer["kept"] for layer in report["layers"]}
    assert kept == {name: sizes[0] for name, sizes in widths_of(small).items() if len(sizes) == 2}
    assert list(report["milliseconds"]) == ["1", "3"]
    (titles,) = [number for number, line in enumerate(lines) if line.split()[:1] == ["batch"]]
    for line, (batch, row) in zip(lines[titles + 1 :], report["milliseconds"].items(), strict=False):
        cells = [f"{cell['ms']:.2f} ({cell['times_faster']:.1f})" for cell in row.values()]
        assert line.split() == " ".join([batch, *cells]).split()
    for row in report["milliseconds"].values():
        assert list(row) == ["dense", "shrunk", "sparse"] and row["dense"]["times_faster"] == 1
        assert all(cell["n"] == 5 and cell["ms"] > 0 for cell in row.values())
    assert lines[-1] == report["sentence"] and "at batch 3" in lines[-1] and "at batch 1." in lines[-1]
    summary = _summary([1.0, 2.0, 1.0], dense=[3.0, 4.0, 3.0])
    assert (summary["times_faster"], summary["ms"], summary["quartiles"]) == (3, 1000, [1000, 2000])
    ratio = report["milliseconds"]["3"]["sparse"]["times_faster"]
    assert lines[-1].startswith(f"The sparse network is {ratio:.1f} times ")
    assert max(len(line) for line in lines if not line.startswith("wrote in")) <= 120


def test_the_files_that_are_left(deployed):
    _, folder, report, _ = deployed
    names = sorted(path.name for path in (folder / "new").iterdir())
    others = ["small.onnx"] * len(ONNX) + ["small.safetensors"] * len(SAFETENSORS)
    assert names == sorted(["small.json", "small.png", "small.pt2", "small.pth.tar", *others])
    written = json.loads((folder / "new" / "small.json").read_text())
    assert written["proof"] == report["proof"] and written["sentence"] == report["sentence"]
    assert str(folder) not in (folder / "new" / "small.json").read_text()
    assert (folder / "new" / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ratios, text", [((2.04, 3), "2.0 times faster than"), ((2, 0.7), "2.0 times as fast as")])
def test_the_sentence_says_what_was_measured(ratios, text):
    times = {b: {"sparse": {"times_faster": r}} for b, r in zip(("64", "1"), ratios, strict=True)}
    assert stage.finding(times) == f"The sparse network is {text} dense at batch 64, {ratios[1]:.1f} at batch 1."
    assert "16" not in stage.finding(times | {"16": times["1"]})
    both = {"64": {"sparse": {"times_faster": 0.9}, "shrunk": {"times_faster": 2.0}}}
    assert stage.finding(both) == "The shrunk network is 2.0 times faster than dense at batch 64."
    alone = {"7": {"shrunk": {"times_faster": 1.5}}}
    assert stage.finding(alone) == "The shrunk network is 1.5 times faster than dense at batch 7."


def test_the_smaller_network_is_loaded_by_every_stage(deployed, images, tmp_path):
    model, folder, report, _ = deployed
    small = folder / "new" / "small.pth.tar"
    x = torch.randn(5, 3, 32, 32)
    loaded = load_model(small)
    assert loaded.class_names == ("class0", "class1", "class2") and widths_of(loaded) == widths_of(shrink(model))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    data = ["--data", images]
    checked = call(check_params, *data, "--checkpoint", small, "--compact", tmp_path / "small.halo")
    assert checked["test"]["top1"] == checked["stored_top1"] == report["proof"]["top1"]
    assert checked["macs_shrunk"] == checked["macs_dense"] == report["macs"]["shrunk"]
    pruned = call(cifar_prune_iterative, *data, "--percent", 0.5, "--resume", tmp_path / "small.halo")
    assert pruned["before"]["top1"] == report["proof"]["top1"]
    again = call(check_params, "--no_data", "--checkpoint", tmp_path / "pruned" / "pruned_0.5.pth.tar")
    assert again["macs_dense"] == report["macs"]["shrunk"]
    energy = call(compute_energy, *data, "--checkpoint", small, "--save", tmp_path / "energy", "--layers", "conv1")
    assert next(iter(energy["checkpoints"].values()))["conv1"]["channels"] == loaded.conv1.out_channels


def test_fine_tuning_goes_on_from_the_smaller_network(deployed, images, tmp_path):
    small = deployed[1] / "new" / "small.pth.tar"
    options = ["-d", "folder", "--data", images, *TINY, "--save_dir", tmp_path / "run"]
    options += ["--start", small, "--mask", small, "--lr", "0.01"]
    train(*options, "--epochs", 1)
    train(*options[:-6], "--epochs", 2, "--lr", "0.01", "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    final = load_checkpoint(tmp_path / "run" / "final.pth.tar")
    assert final["config"]["widths"] == load_checkpoint(small)["config"]["widths"] and final["epoch"] == 2
    before = load_checkpoint(small)["state_dict"]
    weights = prunable_weights(load_model(small))
    assert all((final["state_dict"][name][before[name] == 0] == 0).all() for name in weights)
    assert any(not torch.equal(final["state_dict"][name], before[name]) for name in weights)
    result = train(*options[:-6], "--resume", tmp_path / "run" / "final.pth.tar", "--evaluate")
    assert result["top1"] == final["acc"]


def test_the_export_loads_without_this_project(deployed, tmp_path):
    """In another process, in another folder, with torch alone; one image and many."""
    model, folder, *_ = deployed
    x = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "pair")
    program = """
import sys, torch
program = torch.export.load(sys.argv[1])
assert not {"utils", "models", "halo"} & set(sys.modules)
assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
pair, network = torch.load(sys.argv[2]), program.module()
with torch.no_grad():
    have = torch.cat([network(pair["x"][:1]), network(pair["x"][1:])])
print(float((have - pair["y"]).abs().max() / pair["y"].abs().max()))
"""
    arguments = [sys.executable, "-I", "-c", program, folder / "new" / "small.pt2", tmp_path / "pair"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_onnx_gives_the_same_logits(deployed, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    if not ONNX:
        pytest.skip("needs onnx and onnxscript")
    model, folder, *_ = deployed
    session = runtime.InferenceSession(folder / "new" / "small.onnx")
    for count in (1, 5):
        x = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            wanted = model(x)
        (have,) = session.run(None, {"images": x.numpy()})
        assert (torch.from_numpy(have) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.skipif(not SAFETENSORS, reason="safetensors is not installed")
def test_safetensors_may_share_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    config = {"arch": "resnet", "depth": 20, "num_classes": 3, "widths": {}}
    assert stage.export.safetensors_bytes(model, {"config": config})


@pytest.mark.skipif(not SAFETENSORS, reason="safetensors is not installed")
def test_safetensors_load_as_the_page_says(deployed, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), flags=re.S)
    (code,) = [block for block in blocks if "safe_open" in block]
    monkeypatch.chdir(deployed[1] / "new")
    names = {}
    exec(code, names)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(names["network"].eval()(images), shrink(deployed[0])(images), atol=1e-5)


def test_safetensors_hold_the_smaller_network(deployed):
    load = pytest.importorskip("safetensors.torch").load
    from utils.stages.export import safetensors_bytes

    written = load((deployed[1] / "new" / "small.safetensors").read_bytes())
    kept = load_checkpoint(deployed[1] / "new" / "small.pth.tar")["state_dict"]
    assert {*written} == {*kept} and all(torch.equal(written[name], kept[name]) for name in kept)

    small = shrink(deployed[0])
    state = load_checkpoint(deployed[1] / "new" / "small.pth.tar")
    tensors = load(safetensors_bytes(small, state))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize("kind, package", [("onnx", "onnx"), ("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_a_missing_package_is_named_before_the_work(deployed, tmp_path, monkeypatch, fails_in, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--checkpoint", deployed[1] / "pruned.pth.tar", "--save", tmp_path / "x" / "small", f"--{kind}"]
    code, line = fails_in(deploy, *options)
    assert code == 2 and f"--{kind} needs the package" in line and "requirements-deploy.txt" in line
    assert list(tmp_path.iterdir()) == []


def test_folding_leaves_a_norm_that_is_not_alone():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.free = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.conv(self.free(x))
            return self.norm(x) + x

    model, x = Both(), torch.randn(2, 3, 5, 5)
    model(x)
    folded = fold_batch_norm(model.eval())
    assert type(folded.norm) is type(folded.free) is nn.BatchNorm2d and torch.equal(folded(x), model(x))


def test_lenet_on_its_digits(tmp_path, no_export):
    pytest.importorskip("sklearn")
    file = ROOT / "pretrained_models" / "digits_lenet300_halo_0.98.halo"
    report = call(deploy, "--checkpoint", file, "--save", tmp_path / "small", *QUICK)
    assert report["dataset"] == "digits" and report["proof"]["images"] == 360
    assert all(form["top1"] == report["proof"]["top1"] > 97 for form in report["proof"]["forms"].values())
    assert report["layers"][0] == {"name": "fc1", "channels": 300, "kept": report["layers"][0]["kept"]}
    assert report["layers"][0]["kept"] < 100


def test_no_zeros_is_a_note(tmp_path, capsys):
    write_pruned(tmp_path / "dense.pth.tar", zeros=0)
    report = call(deploy, "--checkpoint", tmp_path / "dense.pth.tar", "--save", tmp_path / "small", "--no_data")
    assert report["sparsity"] == 0 and "has no zeros" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense.pth.tar"]


def test_no_zeros_leave_what_was_there_and_no_folder(tmp_path):
    write_pruned(tmp_path / "dense.pth.tar", zeros=0)
    for kind in stage.KINDS:
        (tmp_path / f"small.{kind}").write_text("of an earlier call")
    options = ["--checkpoint", tmp_path / "dense.pth.tar", "--no_data", "--overwrite", "--save"]
    for place in ("small", "new/small"):
        call(deploy, *options, tmp_path / place)
    assert all((tmp_path / f"small.{kind}").read_text() == "of an earlier call" for kind in stage.KINDS)
    assert len(list(tmp_path.iterdir())) == 1 + len(stage.KINDS)


NETWORKS = """
import threading
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.two(torch.sigmoid(self.one(x))).mean((2, 3)))

class Flat(Odd):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.norm, self.fc = nn.BatchNorm1d(8 * 28 * 28), nn.Linear(8 * 28 * 28, num_classes)

    def forward(self, x):
        return self.fc(self.norm(self.two(self.one(x)).flatten(1)))

class Deep(Odd):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.deep = nn.Conv3d(1, 1, 1)

    def forward(self, x):
        return super().forward(self.deep(x[:, None])[:, 0])

class Branching(Odd):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Lazy(Odd):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.two, self.fc = nn.LazyConv2d(8, 3), nn.LazyLinear(num_classes)

class Spectral(Odd):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.two = nn.utils.spectral_norm(self.two)

class Normed(Odd):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.two = nn.utils.weight_norm(self.two)

class Locked(Odd):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.lock = threading.Lock()

class Hidden(Odd):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.fc = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, num_classes))
"""


@torch.no_grad()
def own(tmp_path, monkeypatch, name, *, dead="one"):
    """Write a checkpoint of a pruned network of one's own; return the options that name it."""
    (tmp_path / f"net_{name}.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arch = f"net_{name}:{name}"
    model = build_model(arch, 3)
    model.eval()(torch.zeros(1, 3, 32, 32))  # makes the parameters of lazy layers
    model.get_submodule(dead).weight[2:6] = 0
    config = {"dataset": "folder", "arch": arch, "depth": None, "num_classes": 3}
    state = {"state_dict": model.state_dict(), "config": config, "preprocessing": CIFAR.record()}
    save_checkpoint(tmp_path / "own.pth.tar", {"epoch": 1, "acc": None, "best_acc": None, **state})
    return ["-a", arch, "--checkpoint", "own.pth.tar", "--save", "small", "--no_data"]


def test_an_operation_that_sparse_inference_lacks_leaves_the_other_form(tmp_path, monkeypatch, capsys):
    report = call(deploy, *own(tmp_path, monkeypatch, "Odd"), *QUICK)
    assert "no sparse form: sparse inference does not support sigmoid()" in capsys.readouterr().err
    assert list(report["proof"]["forms"]) == ["shrunk"] and report["sentence"].startswith("The shrunk network is")
    assert load_model("small.pth.tar").one.out_channels == 4
    assert set(report["proof"]["forms"]) == {"shrunk"} and (tmp_path / "small.pt2").exists()


def test_a_network_with_weights_of_five_dimensions_is_deployed(tmp_path, monkeypatch, no_export):
    """torch has channels_last for four alone."""
    report = call(deploy, *own(tmp_path, monkeypatch, "Deep"), *QUICK)
    assert list(report["proof"]["forms"]) == ["shrunk"]


def test_a_map_that_sparse_inference_cannot_read_leaves_the_other_form(tmp_path, monkeypatch, capsys):
    """It is followed well, and first fails on an image."""
    report = call(deploy, *own(tmp_path, monkeypatch, "Flat"), *QUICK)
    assert "no sparse form: norm is BatchNorm of a flattened map" in capsys.readouterr().err.replace("'", "")
    assert list(report["proof"]["forms"]) == ["shrunk"] and load_model("small.pth.tar").one.out_channels == 4


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:halo takes")
@pytest.mark.parametrize("name", ["Lazy", "Spectral"])
def test_the_smaller_network_loads_whatever_makes_its_weights(tmp_path, monkeypatch, no_export, name):
    call(deploy, *own(tmp_path, monkeypatch, name), *QUICK)
    small = load_model("small.pth.tar")
    assert small.one.out_channels == (4 if name == "Lazy" else 8)
    call(check_params, "-a", f"net_{name}:{name}", "--checkpoint", "small.pth.tar", "--no_data")


def test_a_smaller_network_that_would_not_load_again_is_not_written(deployed, tmp_path, monkeypatch, fails_in):
    monkeypatch.setattr(stage, "build_recorded", lambda *_: build_model("resnet", 3, 8))
    options = ["--checkpoint", deployed[1] / "pruned.pth.tar", "--save", tmp_path / "small", "--no_data"]
    code, line = fails_in(deploy, *options, *QUICK)
    assert code == 1 and "the smaller network would not load again" in line and list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:halo takes")
def test_zeros_of_layers_that_are_not_pruned_count(tmp_path, monkeypatch, no_export):
    report = call(deploy, *own(tmp_path, monkeypatch, "Hidden", dead="fc.0"), *QUICK)
    assert report["sparsity"] == 0 and report["macs"]["shrunk"] < report["macs"]["dense"]
    assert load_model("small.pth.tar").fc[0].out_features == 12


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:halo takes")
@pytest.mark.parametrize("name", ["Normed", "Locked"])
def test_a_network_that_cannot_be_copied_is_one_line(tmp_path, monkeypatch, fails_in, name):
    code, line = fails_in(deploy, *own(tmp_path, monkeypatch, name), *QUICK)
    assert code == 1 and f"{name} cannot be copied" in line and not (tmp_path / "small.pth.tar").exists()
    checked = call(check_params, "-a", f"net_{name}:{name}", "--checkpoint", "own.pth.tar", "--no_data")
    assert (checked["macs_shrunk"] is None) == (name == "Locked")  # the other one can be once it has run


def test_a_network_that_cannot_be_followed_is_one_line(tmp_path, monkeypatch, fails_in):
    code, line = fails_in(deploy, *own(tmp_path, monkeypatch, "Branching"), *QUICK)
    assert code == 1 and "the steps of Branching cannot be found" in line and not (tmp_path / "small.pth.tar").exists()
    options = ["-a", "net_Branching:Branching", "--checkpoint", "own.pth.tar", "--no_data"]
    assert call(check_params, *options)["macs_shrunk"] is None


def test_without_a_compiler_the_smaller_network_is_left(deployed, tmp_path, monkeypatch, capsys, no_export):
    def no_kernel():
        raise OSError("no C++ compiler g++ on the PATH")

    monkeypatch.setattr(sparse, "load_kernel", no_kernel)
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    options = ["--checkpoint", deployed[1] / "pruned.pth.tar", "--save", tmp_path / "small", "--no_data"]
    with pytest.warns(UserWarning, match="no C.. compiler"):
        report = call(deploy, *options, "--batch", 2)
    assert list(report["milliseconds"]["2"]) == ["dense", "shrunk"]
    assert "torch.compile is left out" in capsys.readouterr().err


@pytest.mark.parametrize("load, said", [(100.0, 1), (0.5, 0)])
def test_a_busy_machine_is_noted(monkeypatch, capsys, load, said):
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    stage.warn_if_busy()
    assert capsys.readouterr().err.count("100.0 on 2 cores: if other processes still run, these times mislead") == said


class Optimized(nn.Module):
    """Like what torch.compile returns, which has no length."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def __len__(self):
        raise TypeError


def test_the_compiled_network_is_measured_too(deployed, tmp_path, monkeypatch, no_export):
    monkeypatch.setattr(torch, "compile", lambda network, **options: Optimized(network))
    options = ["--checkpoint", deployed[1] / "pruned.pth.tar", "--save", tmp_path / "small", "--no_data"]
    report = call(deploy, *options, "--batch", 2, 1, 2)
    assert {batch: list(row) for batch, row in report["milliseconds"].items()} == {
        batch: ["dense", "compiled", "shrunk", "sparse"] for batch in ("1", "2")
    }


def test_compiling_is_bounded_in_time_and_may_fail(deployed, monkeypatch, capsys):
    model, x = deployed[0], torch.zeros(1, 3, 32, 32)
    seen = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: seen.append(options) or network)
    one = compiler.Compiler(model)
    assert one.compile(x) is model and one.compile(x) is model and seen[0]["options"] == {"freezing": True}
    monkeypatch.setattr(compiler, "LIMIT", 1e-9)
    slow = compiler.Compiler(model)
    assert slow.compile(x) is model and slow.compile(x) is None and len(seen) == 3
    assert "left out for larger batches" in capsys.readouterr().err

    def fails(images):
        raise AssertionError("inductor\nfell over")

    monkeypatch.setattr(torch, "compile", lambda network, **options: fails)
    broken = compiler.Compiler(model)
    assert broken.compile(x) is None and broken.compile(x) is None
    assert capsys.readouterr().err.count("inductor fell over") == 1


def test_an_export_that_computes_something_else_is_not_written(deployed, tmp_path, monkeypatch, fails_in):
    original = stage.export.run_pt2
    monkeypatch.setattr(stage.export, "run_pt2", lambda *arguments: original(*arguments) + 0.1)
    options = ["--checkpoint", deployed[1] / "pruned.pth.tar", "--save", tmp_path / "small", "--no_data"]
    code, line = fails_in(deploy, *options, *QUICK)
    assert code == 1 and "torch.export computes something else" in line and list(tmp_path.iterdir()) == []


def test_the_figure_has_milliseconds_an_image(monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_deploy, "save_figure", lambda figure, path: drawn.append(figure))
    report = {"layers": [{"name": "conv1", "channels": 16, "kept": 5}], "arch": "resnet", "depth": 20}
    report |= {"milliseconds": {"1": {"dense": {"ms": 3.0}}, "64": {"dense": {"ms": 64.0}}}, "sentence": "Fast."}
    plot_deploy.plot_deploy(report | {"dataset": "digits", "sparsity": 0.5, "hardware": "a processor"}, "unused.png")
    speed, widths = drawn[0].axes
    assert speed.lines[0].get_xydata().tolist() == [[1, 3], [64, 1]]
    assert [bar.get_width() for bar in widths.patches] == [16, 5]


@pytest.mark.parametrize("form", ["shrink", "SparseNetwork"])
def test_a_form_that_computes_something_else_is_not_written(deployed, tmp_path, monkeypatch, fails_in, form):
    class Wrong:
        compiled = True

        def __init__(self, model):
            self.model = model

        def __call__(self, images):
            return self.model(images) + 0.1

    def spoilt(model):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.fc.bias += 0.1
        return model

    monkeypatch.setattr(stage, form, spoilt if form == "shrink" else Wrong)
    options = ["--checkpoint", deployed[1] / "pruned.pth.tar", "--save", tmp_path / "small", "--no_data"]
    code, line = fails_in(deploy, *options, *QUICK)
    assert code == 1 and "differs from the network by 0.1" in line and list(tmp_path.iterdir()) == []


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
        return
    state = torch.load(path, weights_only=True)
    if how == "NaN":
        state["state_dict"]["conv1.weight"][0] = float("nan")
    elif how == "variance":
        state["state_dict"]["bn1.running_var"][:] = -1
    torch.save(state, path)


@pytest.mark.parametrize(
    "how, text",
    [("truncated", "damaged"), ("NaN", "NaN or infinity in conv1.weight"), ("variance", "logits that are NaN")],
)
def test_damaged_checkpoints_are_one_line(deployed, tmp_path, fails_in, how, text):
    file = shutil.copy(deployed[1] / "pruned.pth.tar", tmp_path / "p.pth.tar")
    damage(file, how)
    code, line = fails_in(deploy, "--checkpoint", file, "--save", tmp_path / "small", "--no_data", *QUICK)
    assert code == 1 and text in line and [path.name for path in tmp_path.iterdir()] == ["p.pth.tar"]


@pytest.mark.parametrize(
    "options, text",
    [
        (["--batch", "0"], "--batch"),
        (["--save", "{folder}/pruned", "--overwrite"], "would replace the checkpoint that is read"),
        (["--save", "{folder}/pruned.pth.tar", "--overwrite"], "would replace the checkpoint that is read"),
        (["--save", "{folder}/new"], "is a folder: give a name in it"),
    ],
)
def test_wrong_options_are_one_line(deployed, fails_in, options, text):
    folder = deployed[1]
    before = (folder / "pruned.pth.tar").read_bytes()
    options = [option.format(folder=folder) for option in options]
    code, line = fails_in(
        deploy, "--checkpoint", folder / "pruned.pth.tar", "--save", folder / "other", "--no_data", *QUICK, *options
    )
    assert code == 2 and text in line and (folder / "pruned.pth.tar").read_bytes() == before


def test_outputs_are_not_replaced_unasked_nor_by_half(deployed, tmp_path, monkeypatch, fails_in, no_export):
    checkpoint = deployed[1] / "pruned.pth.tar"
    shutil.copy(deployed[1] / "new" / "small.pth.tar", tmp_path / "small.pth.tar")
    before = (tmp_path / "small.pth.tar").read_bytes()
    options = ["--checkpoint", checkpoint, "--save", tmp_path / "small.pth.tar", "--no_data", *QUICK]
    code, line = fails_in(deploy, *options)
    assert code == 1 and "exists already: give --overwrite" in line

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(stage, "refuse_existing", lambda *_, **__: None)  # which would notice before the work
    code, line = fails_in(deploy, *options, "--overwrite")
    assert code == 1 and "No space left on device" in line
    assert (tmp_path / "small.pth.tar").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("val_split", [0, 9])
def test_the_accuracy_in_its_file_is_of_the_images_it_was_measured_on(images, tmp_path, capsys, no_export, val_split):
    """The test images, where a pruned file, or a run with held-out images, has that of those."""
    write_pruned(tmp_path / "p.pth.tar", val_split=val_split)
    options = ["--checkpoint", tmp_path / "p.pth.tar", "--save", tmp_path / "small", "--data", images, *QUICK]
    for more, of in ([], "test"), (["--no_data"], "val" if val_split else "test"):
        call(deploy, *options, *more, "--overwrite")
        report = call(check_params, "--checkpoint", tmp_path / "small.pth.tar", "--no_data")
        assert report["stored_images"] == of
        assert ("of held-out images" in capsys.readouterr().out) == (of == "val")


def test_files_of_an_earlier_call_are_named(deployed, tmp_path, capsys, no_export):
    options = ["--checkpoint", deployed[1] / "pruned.pth.tar", "--save", tmp_path / "small", "--no_data", *QUICK]
    (tmp_path / "small.onnx").write_bytes(b"of another network")
    call(deploy, *options)
    said = capsys.readouterr().err
    assert f"{tmp_path}/small.onnx was there before" in said and "give --onnx too" in said
    assert "safetensors" not in said


@pytest.mark.parametrize(
    "widths, text",
    [
        ({"conv1": 3}, "widths that are no whole numbers"),
        ([3], "widths that are no whole numbers"),
        ({"conv1": [3.5, 3]}, "widths that are no whole numbers"),
        ({"conv9": [3, 3]}, "do not fit resnet .*conv9"),
        ({"conv1": [17, 3]}, "do not fit resnet .*from 1 to"),
        ({"conv1": [0, 3]}, "do not fit resnet"),
        ({"conv1": [3, 3]}, "do not fit resnet"),  # and what reads it is as wide as before
        ({"fc": [2, 64]}, "not those of 3 classes"),
    ],
)
def test_widths_that_cannot_be_are_refused(tmp_path, widths, text):
    write_pruned(tmp_path / "p.pth.tar", widths=widths)
    with pytest.raises(CheckpointError, match=f"records {text}|{text}"):
        load_model(tmp_path / "p.pth.tar")
