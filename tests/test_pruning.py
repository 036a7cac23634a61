"""Exact counts, ties, composition, the controls, and multiply-accumulates."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from utils import prunable_weights
from utils.halo.pruning import (
    SCHEMES,
    count_macs,
    dead_filters,
    magnitude_threshold,
    overall_sparsity,
    prune_by_magnitude_,
)


def weights(*rows):
    return {f"layer{i}.weight": nn.Parameter(torch.tensor(row)) for i, row in enumerate(rows)}


def values(layers):
    return [w.tolist() for w in layers.values()]


def random_weights():
    generator = torch.Generator().manual_seed(0)
    return {
        n: nn.Parameter(torch.randn(s, generator=generator))
        for n, s in (("a", (40, 5)), ("b", (3, 7, 3, 3)), ("c", (12,)))
    }


def zeros(layers):
    return sum(int((w == 0).sum()) for w in layers.values())


def test_the_smallest_of_all_layers_go():
    layers = weights([3.0, -1.0, 2.0], [-0.5, 4.0, 1.5])
    result = prune_by_magnitude_(layers, 0.5)
    assert values(layers) == [[3.0, 0.0, 2.0], [0.0, 4.0, 0.0]]
    assert [(layer.total, layer.remaining) for layer in result] == [(3, 2), (3, 1)]
    assert result[1].sparsity == pytest.approx(2 / 3) and overall_sparsity(result) == 0.5


def test_ties_go_in_order_of_position():
    layers = weights([1.0, -1.0, 1.0], [1.0, -1.0])
    prune_by_magnitude_(layers, 0.6)
    assert values(layers) == [[0.0, 0.0, 0.0], [1.0, -1.0]]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("scheme", ["global", "random", "shuffle"])
def test_exact_counts(scheme, fraction):
    layers = random_weights()
    total = sum(w.numel() for w in layers.values())
    SCHEMES[scheme](layers, fraction, generator=torch.Generator().manual_seed(1))
    assert zeros(layers) == round(total * fraction)


def test_calls_compose_on_what_is_left():
    twice, once = random_weights(), random_weights()
    total = sum(w.numel() for w in twice.values())
    half = round(total * 0.5)
    prune_by_magnitude_(twice, 0.5)
    prune_by_magnitude_(twice, 0.5)
    assert zeros(twice) == half + round((total - half) * 0.5)
    prune_by_magnitude_(once, zeros(twice) / total)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    before = zeros(once)
    prune_by_magnitude_(once, 0)
    assert zeros(once) == before


def test_layerwise_prunes_each_layer_alike():
    layers = random_weights()
    layers["a"].data *= 100
    result = SCHEMES["layerwise"](layers, 0.25)
    assert [layer.total - layer.remaining for layer in result] == [50, round(189 * 0.25), 3]
    for name, original in random_weights().items():
        kept, gone = original[layers[name] != 0].abs(), original[layers[name] == 0].abs()
        assert gone.max() <= kept.min()


def test_shuffle_has_the_counts_of_magnitude_and_other_positions():
    shuffled, magnitude = random_weights(), random_weights()
    magnitude["b"].data /= 10
    shuffled["b"].data /= 10
    generator = torch.Generator().manual_seed(1)
    assert SCHEMES["shuffle"](shuffled, 0.5, generator=generator) == prune_by_magnitude_(magnitude, 0.5)
    assert not torch.equal(shuffled["a"] == 0, magnitude["a"] == 0)


def test_random_depends_on_the_seed_and_spares_nothing():
    one, same, other = random_weights(), random_weights(), random_weights()
    for layers, seed in ((one, 1), (same, 1), (other, 2)):
        SCHEMES["random"](layers, 0.5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(one["a"], same["a"]) and not torch.equal(one["a"], other["a"])
    gone = random_weights()["a"][one["a"] == 0].abs()
    assert gone.max() > random_weights()["a"].abs().median()


@pytest.mark.parametrize("scheme", ["random", "shuffle"])
def test_what_is_zero_already_is_not_removed_again(scheme):
    layers = random_weights()
    prune_by_magnitude_(layers, 0.5)
    before, total = zeros(layers), sum(w.numel() for w in layers.values())
    SCHEMES[scheme](layers, 0.5, generator=torch.Generator().manual_seed(1))
    assert zeros(layers) == before + round((total - before) * 0.5)


def test_channels_last_weights_are_pruned_in_place():
    w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    plain, strided = {"w": w.clone()}, {"w": w.clone(memory_format=torch.channels_last)}
    prune_by_magnitude_(plain, 0.7)
    prune_by_magnitude_(strided, 0.7)
    assert torch.equal(plain["w"], strided["w"]) and zeros(strided) == round(288 * 0.7)


def test_a_layer_without_weights_has_no_zeros():
    layers = random_weights() | {"empty": nn.Parameter(torch.empty(3, 0, 3, 3))}
    *_, empty = prune_by_magnitude_(layers, 0.5)
    assert (empty.total, empty.sparsity) == (0, 0) and overall_sparsity([empty]) == 0
    assert zeros(layers) == 200


def test_threshold_is_the_largest_that_went():
    layers = random_weights()
    before = {name: w.detach().clone() for name, w in layers.items()}
    prune_by_magnitude_(layers, 0.5)
    threshold = magnitude_threshold(before, layers)
    gone = torch.cat([before[n][layers[n] == 0].abs() for n in layers])
    left = torch.cat([w[w != 0].abs() for w in layers.values()])
    assert gone.max().item() == threshold <= left.min().item()
    assert magnitude_threshold(before, before) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_ratios_out_of_range(fraction, scheme):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        SCHEMES[scheme](random_weights(), fraction, generator=torch.Generator())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_to_prune_is_said(scheme):
    with pytest.raises(ValueError, match="no weights to prune"):
        SCHEMES[scheme]({}, 0.5, generator=torch.Generator())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_has_no_magnitude(scheme):
    with pytest.raises(ValueError, match="layer0.weight holds NaN"):
        SCHEMES[scheme](weights([1.0, float("nan")]), 0.5, generator=torch.Generator())


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 16, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(1))


def test_macs_by_hand():
    model = TwoLayers()
    assert [(m.name, m.dense, m.remaining) for m in count_macs(model, (3, 8, 8))] == [
        ("conv", 108 * 16, 108 * 16),
        ("fc", 320, 320),
    ]
    model.conv.weight.data[0] = 0
    model.fc.weight.data[:, :10] = 0
    assert [m.remaining for m in count_macs(model, (3, 8, 8))] == [81 * 16, 270]
    assert model.training and not model.conv._forward_hooks


@pytest.mark.parametrize(
    "arch, depth, shape", [("vgg16_bn", 16, (3, 32, 32)), ("resnet", 20, (3, 32, 32)), ("lenet_5", None, (1, 28, 28))]
)
def test_dense_macs_agree_with_torchs_counter(arch, depth, shape):
    model = build_model(arch, 10, depth).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    assert 2 * sum(m.dense for m in count_macs(model, shape)) == counter.get_total_flops()


def test_dead_filters():
    model = build_model("resnet", 10, 8)
    model.conv1.weight.data[[2, 5]] = 0
    model.conv1.weight.data[6, 0] = 0
    dead = dead_filters(prunable_weights(model))
    assert dead["conv1.weight"] == 2 and sum(dead.values()) == 2
