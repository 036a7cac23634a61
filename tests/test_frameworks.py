"""The lines of docs/own_loop.md for accelerate and Lightning: a run that is resumed is the run that was not stopped."""

import re

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def run_block(tmp_path, monkeypatch):
    """Run the block that has a word in it, after the data and the network of the first block; return its names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loop.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)

    def run(word: str) -> dict:
        names = {"__name__": "page"}
        (block,) = [block for block in blocks if word in block]
        before = blocks[0].split("\nmodel = network()")[0].replace("import halo", "import utils.halo as halo")
        for part in (before, block):
            exec(compile(part, "own_loop.md", "exec"), names)
        return names

    return run


def assert_same(first, second):
    """The same to the last bit, in weights, lam, and momentum of lam."""
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def state_of(model, penalty, lam_optimizer) -> dict[str, torch.Tensor]:
    momenta = {f"momentum {i}": s["momentum_buffer"] for i, s in enumerate(lam_optimizer.state.values())}
    assert len(momenta) == len(penalty.lambdas) == 6
    return {**model.state_dict(), **{f"lam of {name}": lam for name, lam in penalty.lambdas.items()}, **momenta}


def test_accelerate_resumes_bit_for_bit(run_block):
    pytest.importorskip("accelerate", reason="pip install -r requirements-dev.txt")
    names = run_block("import Accelerator")
    first, second = ((model, penalty, lam) for _, model, _, penalty, lam in (names["first"], names["second"]))
    assert_same(state_of(*first), state_of(*second))
    lam = first[1].lambdas["0.weight"]
    assert (lam != names["coefficients"]["lambda_init"]).all()


def test_lightning_resumes_bit_for_bit(run_block, capfd):
    pytest.importorskip("pytorch_lightning", reason="pip install -r requirements-dev.txt")
    names = run_block("import pytorch_lightning")
    half, whole, resumed = (
        state_of(m.model, m.penalty, m.lam_optimizer) for m in map(names.get, ("module", "whole", "resumed_module"))
    )
    assert_same(whole, resumed)
    kept = torch.load("lightning.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(kept["penalty.lam.0/weight"], half["lam of 0.weight"])
    assert not torch.equal(half["lam of 0.weight"], whole["lam of 0.weight"])
