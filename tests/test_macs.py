"""Multiply-accumulates of convolutions of every kind, attention and shared layers, by hand and by torch's counter."""

import pytest
import torch
from test_parameters import CONVOLUTIONS, Net, ViT, encoder
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import count_macs, prunable_weights, prune_by_magnitude_, savings

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_macs_of_convolutions_by_hand_and_by_torchs_counter(kind, groups):
    dims = int(kind[-2])
    model = Net(conv=getattr(nn, kind)(4, 6, 3, stride=2, groups=groups))
    positions = (7 if "Transpose" in kind else 3) ** dims  # of the input, 7 wide, or of the output: (7 - 3) / 2 + 1
    shape = (4, *[7] * dims)
    weights = 4 * 6 * 3**dims // groups
    assert [m[:2] for m in count_macs(model, shape)] == [("conv", weights * positions)]
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    assert counter.get_total_flops() == 2 * weights * positions
    model.conv.weight.data[0] = 0
    left = weights - model.conv.weight[0].numel()
    assert count_macs(model, shape)[0].remaining == left * positions


@pytest.mark.parametrize("batch_first", [True, False])
def test_macs_of_an_encoder_by_hand(batch_first):
    model = encoder()
    for layer in model.layers:
        layer.self_attn.batch_first = batch_first
    per_token = [3 * 16 * 16, 16 * 16, 16 * 32, 32 * 16]
    names = ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    expected = {f"layers.{i}.{n}": 5 * macs for i in range(2) for n, macs in zip(names, per_token, strict=True)}
    model.layers[0].eval()  # modes are put back, also where they differ
    assert {m.name: m.dense for m in count_macs(model, (5, 16))} == expected
    assert (model.training, model.layers[0].training, model.layers[1].linear1.training) == (True, False, True)
    model.layers[0].self_attn.in_proj_weight.data[:16] = 0
    assert count_macs(model, (5, 16))[0].remaining == 5 * 2 * 16 * 16
    prune_by_magnitude_(prunable_weights(model, linear=True), 1.0)
    result = savings(model, (5, 16))
    assert (result["macs_dense"], result["macs_nonzero"]) == (sum(expected.values()), 0)


class Cross(nn.Module):
    """Three tokens ask ten others, whose keys and values have sizes of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

    def forward(self, x):
        n = len(x)
        return self.attention(x, value=x.new_zeros(n, 10, 6), key=x.new_zeros(n, 10, 4), need_weights=False)[0]


def test_macs_of_cross_attention_by_hand():
    model = Cross().to(torch.float64)
    dense = 8 * 8 * 3 + 8 * 4 * 10 + 8 * 6 * 10
    assert [m[:2] for m in count_macs(model, (3, 8))] == [("attention", dense), ("attention.out_proj", 8 * 8 * 3)]


def test_macs_of_a_vision_transformer():
    per_token = 3 * 32 * 32 + 32 * 32 + 2 * 32 * 64
    assert savings(ViT(), (3, 32, 32))["macs_dense"] == 6_144 * 16 + 2 * 17 * per_token + 5 * 32


def test_macs_count_windows_in_the_batch_and_lose_nothing_to_a_shared_layer():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x.reshape(-1, 4)) + self.fc(x[:, :4])

    assert [m[:2] for m in count_macs(Windows(), (12,))] == [("fc", 8 * 3), ("fc", 8)]


def test_layers_whose_operations_cannot_be_seen_are_named():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(nn.functional.linear(x, self.qkv.weight))

    with pytest.warns(UserWarning, match="counted for 1 layers that were not called: qkv$"):
        assert [m.name for m in count_macs(Reads(), (4,))] == ["fc"]
