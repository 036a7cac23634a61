"""docs/add_a_penalty.md: the penalty that stands there is added as it says, trained, resumed and pruned with."""

import re

import pytest
import torch
from conftest import ROOT, train
from torch import nn

import cifar_prune_iterative
from utils import options
from utils.files.checkpoint import load_checkpoint
from utils.halo import penalties

PLACES = {"BY_NAME": penalties.BY_NAME, "PENALTIES": options.PENALTIES, "MEANINGS": options.MEANINGS}


@pytest.fixture(autouse=True)
def added():
    """Run the code of the page, and take its names out again."""
    names = vars(penalties) | PLACES
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_a_penalty.md").read_text(), re.DOTALL):
        exec(block, names)
    assert all("logsum" in place for place in PLACES.values())
    yield
    for place in PLACES.values():
        del place["logsum"]


def test_its_gradient_is_that_of_the_equation_by_hand():
    w = nn.Parameter(torch.tensor([0.0, 0.5, -2.0]))
    penalty = penalties.make_penalty("logsum", {"w": w}, xi=0.3, psi=0.5)
    assert penalty().item() == pytest.approx(0.3 * (0 + torch.log(torch.tensor([2.0, 5.0])).sum().item()))
    penalty.add_grad_()
    torch.testing.assert_close(w.grad, torch.tensor([0.0, 0.3 / 1.0, -0.3 / 2.5]))
    assert penalty.strength() == pytest.approx(0.6)


def test_it_trains_resumes_and_prunes(tiny, images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("--help")
    assert "--logsum" in (text := capsys.readouterr().out) and "log-sum penalty" in text
    train(*tiny, "--logsum", "--xi", "1e-4")
    folder = tmp_path / "run"
    state = load_checkpoint(folder / "final.pth.tar")
    assert [state["config"][key] for key in ("penalty", "xi", "psi")] == ["logsum", 1e-4, 1e-2]
    epochs = str(state["epoch"] + 1)
    train(*tiny, "--logsum", "--xi", "1e-4", "--epochs", epochs, "--resume", folder / "checkpoint.pth.tar")
    command = ["--data", str(images), "--percent", "0.5", "--resume", str(folder / "final.pth.tar")]
    parser = cifar_prune_iterative.get_parser()
    report = cifar_prune_iterative.main(parser.parse_args([*command, "--save_dir", str(tmp_path / "pruned")]))
    assert report["results"][-1]["sparsity"] == pytest.approx(0.5, abs=1e-3)
