"""Small files that lose nothing."""

import pytest
import torch

import check_params
from models import build_model
from utils import prunable_weights
from utils.files.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.files.compact import entropy_bound, same_bits, save_compact, without_negative_zeros
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


def test_what_is_no_plain_value_is_refused(tmp_path):
    state = {"state_dict": {"w": torch.ones(2)}, "config": {"device": torch.device("cpu")}}
    with pytest.raises(ValueError, match=r"no plain value \(Object of type device"):
        save_compact(tmp_path / "c", state)
    assert not (tmp_path / "c").exists()


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


def test_negative_zeros_are_counted_and_stored_as_zeros_when_asked(tmp_path, capsys, fails_in):
    """A network of another program, 95% of whose weights are -0.0."""
    torch.manual_seed(0)
    model = build_model("resnet", 10, 8)
    weights = prunable_weights(model)
    prune_by_magnitude_(weights, 0.95)
    count = sum(int((w == 0).sum()) for w in weights.values())
    with torch.no_grad():
        for w in weights.values():
            w[w == 0] = -0.0
    save_checkpoint(tmp_path / "foreign", {"state_dict": model.state_dict()})
    options = ["-d", "cifar10", "-a", "resnet", "--depth", "8", "--no_data", "--checkpoint", str(tmp_path / "foreign")]

    def check(name, *more):
        args = check_params.get_parser().parse_args([*options, "--compact", str(tmp_path / name), *more])
        return check_params.main(args)["compact"], capsys.readouterr().out

    kept, said = check("kept")
    assert kept["negative_zeros"] == count and f"{count} negative zeros are kept bit for bit" in said
    assert "--plain_zeros" in said
    plain, said = check("plain", "--plain_zeros")
    assert f"{count} negative zeros were stored as zeros" in said and plain["bytes"] < 0.8 * kept["bytes"]
    one, other = (load_checkpoint(tmp_path / name)["state_dict"] for name in ("kept", "plain"))
    assert same_bits(model.state_dict(), one) and not same_bits(one, other)
    assert all(torch.equal(one[name], other[name]) for name in one)  # -0.0 == 0.0
    assert without_negative_zeros(other)[1] == 0
    status, line = fails_in(check_params, *options, "--plain_zeros")
    assert status == 2 and "--plain_zeros does nothing without --compact" in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_negative_zeros_of_every_float_type(dtype):
    tensors = {"w": torch.tensor([-0.0, 0.0, -1.0, -0.0], dtype=dtype), "n": torch.tensor([-(2**31), 0])}
    plain, count = without_negative_zeros(tensors)
    assert count == 2 and not plain["w"].signbit()[[0, 1, 3]].any() and plain["w"][2] == -1
    assert plain["n"] is tensors["n"]
