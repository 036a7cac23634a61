"""Small files that lose nothing."""

import pytest
import torch

from models import build_model
from utils import prunable_weights
from utils.files.checkpoint import CheckpointError, load_checkpoint
from utils.files.compact import entropy_bound, same_bits, save_compact
from utils.halo.pruning import prune_by_magnitude_


def test_every_bit_comes_back(tmp_path):
    tensors = {
        "w": torch.tensor([[0.0, -0.0, 1.5], [1e-45, -3.0, 0.0]]),
        "half": torch.tensor([0, 1, -2], dtype=torch.bfloat16),
        "count": torch.tensor(12345678901),
        "empty": torch.zeros(0, 3),
        "zeros": torch.zeros(4),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "more": torch.randn(5),
    }
    state = {"epoch": 7, "acc": 70.5, "best_acc": 71.0, "config": {"xi": 1e-8}, "optimizer": {"large": 1}}
    save_compact(tmp_path / "c", state | {"state_dict": tensors})
    loaded = load_checkpoint(tmp_path / "c")
    assert same_bits(tensors, loaded["state_dict"])
    assert torch.signbit(loaded["state_dict"]["w"]).tolist() == torch.signbit(tensors["w"]).tolist()
    assert {k: v for k, v in loaded.items() if k != "state_dict"} == {
        k: v for k, v in state.items() if k != "optimizer"
    }


def test_same_bits_sees_a_sign_of_zero_and_a_name():
    one = {"w": torch.tensor([0.0])}
    assert same_bits(one, {"w": torch.tensor([0.0])})
    assert not same_bits(one, {"w": torch.tensor([-0.0])})
    assert not same_bits(one, {"v": torch.tensor([0.0])})
    assert not same_bits(one, {"w": torch.tensor([0.0], dtype=torch.float64)})


def test_vgg16_at_95_percent_is_close_to_the_bound(tmp_path):
    torch.manual_seed(0)
    model = build_model("vgg16_bn", 10)
    weights = prunable_weights(model)
    prune_by_magnitude_(weights, 0.95)
    save_compact(tmp_path / "c", {"state_dict": model.state_dict()})
    assert same_bits(model.state_dict(), load_checkpoint(tmp_path / "c")["state_dict"])
    assert (tmp_path / "c").stat().st_size < 1.15 * entropy_bound(weights)


def test_bound_by_hand():
    # 8 elements, 2 of them not zero: 8 * H(1/4) + 64 bits, H(1/4) = 0.811278
    assert entropy_bound({"w": torch.tensor([0, 0, 0, 5.0, 0, 0, 0, 1])}) == pytest.approx((8 * 0.8112781 + 64) / 8)
    assert entropy_bound({"w": torch.zeros(8)}) == 0


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.99])
def test_truncated(tmp_path, kept):
    path = tmp_path / "c"
    save_compact(path, {"state_dict": {"w": torch.randn(1000)}})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_flipped_bytes(tmp_path):
    path = tmp_path / "c"
    save_compact(path, {"state_dict": {"w": torch.randn(1000)}})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
