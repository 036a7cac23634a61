"""Which tensors are taken in networks that nobody here wrote, and what is said about the others."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.prune import l1_unstructured

from models import ARCHS, build_model
from utils import count_macs, halo, penalized_parameters, prunable_weights, prune_by_magnitude_

CONVOLUTIONS = {
    "Conv1d": (2, 6, 3),
    "Conv2d": (2, 6, 3),
    "Conv3d": (2, 6, 3),
    "ConvTranspose1d": (2, 6, 3),
    "ConvTranspose2d": (2, 6, 3),
    "ConvTranspose3d": (2, 6, 3),
}


@pytest.fixture(autouse=True)
def notes():
    """Every note that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def note_of(call) -> str:
    """Return the one note that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (note,) = [str(w.message) for w in caught]
    assert "\n" not in note
    return note


def count(tensors):
    return sum(t.numel() for t in tensors.values())


class Net(nn.Module):
    """Layers by name, run one after the other."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class ViT(nn.Module):
    """A small vision transformer: 24,069 parameters, 6,176 of them in its one convolution."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.encoder(x)[:, 0]))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_convolution_is_taken(kind):
    model = Net(conv=getattr(nn, kind)(*CONVOLUTIONS[kind]), norm=nn.BatchNorm1d(6))
    assert list(penalized_parameters(model)) == ["conv.weight", "conv.bias"]
    assert list(prunable_weights(model)) == ["conv.weight"] and prunable_weights(model)["conv.weight"].dim() > 2


def test_every_matrix_of_a_transformer_is_taken():
    model = encoder()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    weights = prunable_weights(model, linear=True)
    assert list(weights) == [f"layers.{i}.{name}" for i in range(2) for name in names]
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    assert {id(p) for p in matrices.values()} == {id(p) for p in weights.values()}
    biases = set(penalized_parameters(model, linear=True)) - set(weights)
    assert biases == {n.replace("weight", "bias") for n in weights}
    prune_by_magnitude_(weights, 0.9)
    assert sum(int((p == 0).sum()) for p in matrices.values()) == round(0.9 * count(matrices))


def test_attention_with_separate_projections_and_bilinear():
    model = Net(attention=nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True), pair=nn.Bilinear(3, 4, 5))
    letters = [f"attention.{letter}_proj_weight" for letter in "qkv"]
    assert list(prunable_weights(model, linear=True)) == [*letters, "attention.out_proj.weight", "pair.weight"]
    biases = {"attention.in_proj_bias", "attention.out_proj.bias", "pair.bias"}
    assert set(penalized_parameters(model, linear=True)) - set(prunable_weights(model, linear=True)) == biases


@pytest.mark.parametrize("arch", ARCHS)
def test_the_networks_of_this_project_need_no_note(arch):
    model = build_model(arch, 10)
    for choose in (penalized_parameters, prunable_weights):
        assert count(choose(model, linear=ARCHS[arch].linear)) > 60_000


def test_a_transformer_without_linear_says_what_it_lacks():
    model = ViT()
    note = note_of(partial(penalized_parameters, model))
    assert note.startswith("halo takes 6,176 of 24,069 trainable parameters of ViT; left out are Linear or attention")
    matrices = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64) + 5 * 32
    assert (
        f"linear=True takes them): 9 with {matrices:,} parameters (encoder.layers.0.self_attn.in_proj_weight, " in note
    )
    assert " and 6 more); tables, such as embeddings: 1 with 544 parameters (positions)." in note
    assert note_of(partial(prunable_weights, model)) == note
    assert count(prunable_weights(model, linear=True)) == 6_176 - 32 + matrices
    assert list(penalized_parameters(model, exclude=["encoder", "head"])) == ["patches.weight", "patches.bias"]


def test_the_note_is_shown_once():
    model = ViT()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for choose in (penalized_parameters, prunable_weights, prunable_weights):
            choose(model)
    assert len(caught) == 1


def test_one_linear_layer_is_a_classifier_only_at_the_end():
    prunable_weights(Net(conv=nn.Conv2d(3, 4, 3), hidden=nn.Linear(4, 4).requires_grad_(False), fc=nn.Linear(4, 2)))
    two = Net(conv=nn.Conv2d(3, 4, 3), hidden=nn.Linear(4, 4), fc=nn.Linear(4, 2))
    assert (
        "Linear or attention weights (linear=True takes them): 2 with 24 parameters (hidden.weight, fc.weight)."
        in note_of(partial(prunable_weights, two))
    )
    assert ": 1 with 16 parameters (hidden.weight)." in note_of(partial(prunable_weights, two, exclude="fc"))
    assert list(prunable_weights(two, exclude="hidden")) == ["conv.weight"]


NORMS = {
    "new": torch.nn.utils.parametrizations.weight_norm,
    "old": torch.nn.utils.weight_norm,
    "spectral": torch.nn.utils.parametrizations.spectral_norm,
    "prune": partial(l1_unstructured, name="weight", amount=0.5),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_left_out_aloud(kind):
    model = Net(first=nn.Conv2d(3, 4, 3), second=nn.Conv2d(4, 4, 3), fc=nn.Linear(4, 2))
    NORMS[kind](model.second)
    note = note_of(partial(penalized_parameters, model))
    assert "left out are matrices of reparametrised layers" in note and ": 1 with 144 parameters (second." in note
    (name,) = [part.strip("().") for part in note.split() if part.startswith("(second.")]
    assert name in dict(model.named_parameters())
    assert list(penalized_parameters(model, exclude=name)) == ["first.weight", "first.bias"]
    assert list(penalized_parameters(model, exclude=[model.second])) == ["first.weight", "first.bias"]


def test_attention_with_a_computed_weight_keeps_its_other_layers():
    model = Net(attention=nn.MultiheadAttention(8, 2))
    torch.nn.utils.parametrizations.spectral_norm(model.attention, "in_proj_weight")
    note = note_of(partial(prunable_weights, model, linear=True))
    assert "matrices of reparametrised layers" in note and ": 1 with 192 parameters (attention." in note
    assert list(prunable_weights(model, linear=True, exclude="attention.parametrizations")) == [
        "attention.out_proj.weight"
    ]


def test_raw_matrices_and_recurrent_layers_are_named_embeddings_only_mentioned():
    model = Net(words=nn.Embedding(7, 4), conv=nn.Conv1d(4, 4, 3), norm=nn.LayerNorm((4, 4)), scale=nn.PReLU(4))
    assert list(prunable_weights(model, linear=True)) == ["conv.weight"]
    model.lstm, model.mixing = nn.LSTM(4, 4), nn.Parameter(torch.ones(4, 3))
    note = note_of(partial(prunable_weights, model, linear=True))
    assert "other kinds: 3 with 140 parameters (mixing, lstm.weight_ih_l0, lstm.weight_hh_l0);" in note
    assert "tables, such as embeddings: 1 with 28 parameters (words.weight)." in note
    model.lstm.requires_grad_(False)
    assert list(prunable_weights(model, linear=True, exclude="mixing")) == ["conv.weight"]


def test_tied_weights_come_once_and_are_excluded_by_any_name():
    model = Net(words=nn.Embedding(9, 4), one=nn.Linear(4, 4), two=nn.Linear(4, 4), out=nn.Linear(4, 9))
    model.two.weight, model.out.weight = model.one.weight, model.words.weight
    assert list(prunable_weights(model, linear=True)) == ["one.weight", "out.weight"]
    assert list(penalized_parameters(model, linear=True))[2:] == ["two.bias", "out.weight", "out.bias"]
    assert list(prunable_weights(model, linear=True, exclude="words")) == ["one.weight"]
    assert list(prunable_weights(model, linear=True, exclude="two")) == ["out.weight"]
    clone = copy.deepcopy(model)
    assert prunable_weights(clone, linear=True)["one.weight"] is clone.two.weight is not model.two.weight


def test_frozen_weights_are_pruned_but_not_penalised():
    model = Net(one=nn.Conv2d(3, 4, 3).requires_grad_(False), two=nn.Conv2d(4, 4, 3))
    assert list(penalized_parameters(model)) == ["two.weight", "two.bias"]
    assert list(prunable_weights(model)) == ["one.weight", "two.weight"]
    model.two.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="all weights of Net to penalise are frozen"):
        penalized_parameters(model)


def test_exclude_takes_names_prefixes_and_modules():
    model = build_model("resnet", 10, 8)
    everything = set(prunable_weights(model))
    for choose, expected in ((penalized_parameters, everything), (prunable_weights, everything)):
        assert set(choose(model, exclude="conv1")) == expected - {"conv1.weight"}  # not layer1.0.conv1
        assert set(choose(model, exclude="conv1.weight")) == expected - {"conv1.weight"}
        rest = {name for name in expected if not name.startswith(("layer1", "layer2.0"))}
        assert set(choose(model, exclude=["layer2.0", model.layer1])) == rest
        assert set(choose(model, exclude=iter(["fc"]))) == expected
        assert "fc.weight" not in choose(model, linear=True, exclude=model.fc)


@pytest.mark.parametrize("exclude", ["layer", "layer1.0.relu", "", ["fc", "head"], nn.Linear(2, 2), nn.ReLU(), [3]])
def test_an_exclude_that_matches_nothing_is_named(exclude):
    wrong = exclude[-1] if isinstance(exclude, list) else exclude
    said = type(wrong).__name__ if isinstance(wrong, nn.Module) else repr(wrong)
    for choose in (penalized_parameters, prunable_weights):
        with pytest.raises(ValueError, match=f"^exclude: {said} is no part of ResNet .*conv1, bn1, layer1.*fc"):
            choose(build_model("resnet", 10, 8), exclude=exclude)


def test_what_leaves_nothing_says_so():
    with pytest.raises(ValueError, match="Linear has no convolution whose weight is a parameter: pass linear=True"):
        prunable_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Net has no convolution, Linear or attention layer whose"):
        prunable_weights(Net(words=nn.Embedding(2, 2)), linear=True)
    with pytest.raises(ValueError, match="besides those excluded"):
        penalized_parameters(Net(conv=nn.Conv2d(1, 1, 1)), exclude="conv.weight")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_need_a_batch_first():
    model = Net(first=nn.Conv2d(3, 4, 3), lazy=nn.LazyConv2d(5, 3), fc=nn.Flatten())
    with pytest.raises(ValueError, match="lazy.weight has no shape yet: run one batch"):
        prunable_weights(model)
    model(torch.zeros(1, 3, 8, 8))
    assert list(prunable_weights(model)) == ["first.weight", "lazy.weight"]


def test_names_are_those_of_the_inner_network():
    model = build_model("resnet", 10, 8)
    plain = penalized_parameters(model)
    wrapped = [torch.compile(model), nn.DataParallel(model)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped += [torch.compile(DistributedDataParallel(model)), DistributedDataParallel(torch.compile(model))]
    finally:
        dist.destroy_process_group()
    for outer in wrapped:
        found = penalized_parameters(outer)
        assert list(found) == list(plain) and all(found[name] is plain[name] for name in plain)
        assert "conv1.weight" not in prunable_weights(outer, exclude="conv1")
        assert [m.name for m in count_macs(outer, (3, 8, 8))] == [m.name for m in count_macs(model, (3, 8, 8))]
    model.layer1 = torch.compile(model.layer1)
    assert list(penalized_parameters(model)) == list(plain)
    assert "layer1.0.conv1.weight" not in penalized_parameters(model, exclude="layer1.0")


def test_a_part_that_is_called_module_keeps_its_name():
    assert list(prunable_weights(Net(module=nn.Conv2d(1, 1, 1)))) == ["module.weight"]


def test_a_penalty_that_is_an_attribute_is_no_part_of_the_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    prune_by_magnitude_(prunable_weights(net), 0.9)
    before = halo.savings(net, (3, 6, 6))
    net.penalty = halo.HALO(penalized_parameters(net), xi=0.1, psi=0.1)
    assert len([*net.parameters()]) == 10
    net[3].weight.requires_grad_(False)
    names = [*penalized_parameters(net)]  # no note of matrices in lam
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    net.forward = lambda x: nn.Sequential.forward(nn.Sequential(*[*net.children()][:4]), x)
    assert halo.savings(net, (3, 6, 6)) == before
