"""shrink(): fewer channels, the same outputs, whatever the dead filters leave behind."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from models import ARCHS, build_model
from models.widths import narrow_, widths_of
from utils import HALO, penalized_parameters, prunable_weights, shrink

FAMILIES = [
    ("vgg11", None),
    ("vgg11_bn", None),
    ("resnet", 14),
    ("resnet", 56),
    ("lenet_5", None),
    ("lenet_300_100", None),
]


@torch.no_grad()
def unsettle(model, *, dead=0.5, unread=0.2, only=""):
    """Give a network large biases and BatchNorm shifts, dead filters, and channels that nobody reads."""
    generator = torch.Generator().manual_seed(1)

    def normal(tensor, scale):
        tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    for name, layer in layers[:-1]:
        if isinstance(layer, nn.BatchNorm2d):
            normal(layer.weight, 1.0)
            normal(layer.running_mean, 1.0)
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.2)
        elif name.startswith(only):
            layer.weight[torch.rand(len(layer.weight), generator=generator) < dead] = 0
            if layer.weight.shape[1] > 3:
                layer.weight[:, torch.rand(layer.weight.shape[1], generator=generator) < unread] = 0
        if layer.bias is not None:
            normal(layer.bias, 3.0)
    return model.eval()


def images(arch, count=6):
    """Return images so loud that they are seen behind the large shifts."""
    return 30 * torch.randn(count, *ARCHS[arch].shape, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def difference(one, other, x):
    """Return the largest difference of the outputs, relative to the largest output."""
    a, b = one(x), other(x)
    return float((a - b).abs().max() / a.abs().max())


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arch, depth", FAMILIES)
def test_a_shrunk_network_computes_the_same(arch, depth):
    torch.manual_seed(0)
    model = unsettle(build_model(arch, 10, depth))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, x = shrink(model), images(arch)
    with torch.inference_mode():
        assert model(x).std(0).max() > 1e-3 * model(x).abs().max()  # more than what is compared below
    assert parameters(small) < 0.7 * parameters(model)
    assert difference(model, small, x) < 1e-5
    assert type(small) is type(model) and not small.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())  # untouched
    assert same_state(shrink(small), small)  # nothing more to remove
    again = build_model(arch, 10, depth, widths=widths_of(small)).eval()
    again.load_state_dict(small.state_dict())
    assert difference(small, again, x) == 0


@pytest.mark.parametrize("arch, depth", FAMILIES)
def test_in_double_precision_only_rounding_is_left(arch, depth):
    model = unsettle(build_model(arch, 10, depth), dead=0.3, unread=0.4).double()
    assert difference(model, shrink(model), images(arch).double()) < 1e-13


@pytest.mark.parametrize("arch, depth", FAMILIES)
@pytest.mark.parametrize("density", [0.02, 0.001, 0])
def test_weights_pruned_in_no_pattern(arch, depth, density):
    model = unsettle(build_model(arch, 10, depth), dead=0, unread=0)
    for weight in prunable_weights(model, linear=ARCHS[arch].linear).values():
        weight.data *= torch.rand(weight.shape) < density
    small = shrink(model)
    assert difference(model, small, images(arch)) < 1e-5
    count, left = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    assert left < count if density < 0.01 else left <= count


@pytest.mark.parametrize(
    "layer",
    ["conv1", "layer1.0.conv1", "layer1.1.conv2", "layer2.0.conv2", "layer2.0.downsample.0", "layer3.1.conv1"],
)
def test_one_layer_left_empty(layer):
    model = unsettle(build_model("resnet", 10, 14), dead=1, unread=0, only=layer)
    small = shrink(model)
    assert difference(model, small, images("resnet")) < 1e-5
    assert min(min(sizes) for sizes in widths_of(small).values()) >= 1
    if layer in ("layer1.0.conv1", "layer3.1.conv1"):  # nothing but constants, and a padded layer behind
        assert small.get_submodule(layer).out_channels == 1


@pytest.mark.parametrize("arch, depth", FAMILIES)
def test_nothing_to_remove_changes_nothing(arch, depth):
    model = build_model(arch, 10, depth).eval()
    assert same_state(shrink(model), model)


def test_a_network_in_training_mode_stays_in_it():
    model = unsettle(build_model("resnet", 10, 8)).train()
    small = shrink(model)
    assert model.training and all(module.training for module in small.modules())
    assert difference(model.eval(), small.eval(), images("resnet")) < 1e-5


def with_dead(layer, *rows):
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(0.5, 4, len(layer.bias)))
    return layer


def tail(channels):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]


@pytest.mark.parametrize(
    "behind, left",
    [
        ([nn.Conv2d(6, 4, 3)], 3),  # no border: into the bias
        ([nn.Conv2d(6, 4, 3, padding=1)], 4),  # a border: one constant carries the others
        ([nn.Conv2d(6, 4, 3, padding="same")], 4),
        ([nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")], 3),  # the border is of the same constant
        ([nn.Conv2d(6, 4, 3, bias=False)], 4),  # nowhere to put it
        ([nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)], 3),  # into the running mean
        ([nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(6, 4, 1)], 3),  # beyond the border is -infinity
        ([nn.AvgPool2d(2), nn.Conv2d(6, 4, 1)], 3),
        ([nn.AvgPool2d(3, 2, padding=1), nn.Conv2d(6, 4, 1)], 6),  # zeros come in: no constant any more
        ([nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(6, 4, 1)], 6),  # nor the same one
        ([nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 1)], 3),
        ([nn.BatchNorm2d(6, affine=False), nn.SiLU(), nn.Conv2d(6, 4, 1)], 3),
        ([nn.Conv2d(6, 4, 3, groups=2)], 6),  # not understood, so all are kept
    ],
)
def test_where_constants_go(behind, left):
    torch.manual_seed(0)
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 1, 3, 4), nn.ReLU(), *behind, *tail(4)).eval()
    for norm in (layer for layer in behind if isinstance(layer, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        if norm.affine:
            nn.init.normal_(norm.bias)
    small = shrink(model)
    assert small[0].out_channels == left
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6


@pytest.mark.parametrize("bias, left", [(True, 3), (False, 4)])
def test_units_and_flattened_maps(bias, left):
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 0, 2, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 5, bias))
    small = shrink(model.eval())
    assert small[0].out_channels == left and small[3].in_features == left * 49
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6


class Clips(nn.Module):
    """Reads clips (N, T, C, H, W), or pairs of images, one after the other; the features are in another order."""

    def __init__(self, size):
        super().__init__()
        self.conv, self.fc, self.size = with_dead(nn.Conv2d(2, 4, 3), 0, 2), nn.Linear(2 * 4 * 9, 5), size

    def forward(self, x):
        count = self.size(x)
        if self.size is clips:
            x = x.flatten(0, 1)
        return self.fc(F.relu(self.conv(x)).view(count, -1))


def clips(x):
    return x.size(0)


def pairs(x):
    return x.shape[0] // 2


@pytest.mark.parametrize("size, shape", [(clips, (3, 2, 2, 5, 5)), (pairs, (6, 2, 5, 5))])
def test_views_that_join_images_are_no_flattening(size, shape):
    model = Clips(size).eval()
    small = shrink(model)
    assert small.conv.out_channels == 4
    assert difference(model, small, torch.randn(shape)) < 1e-6


def test_the_number_of_images_may_be_asked_at_the_beginning():
    """As residual networks do: no step between changes it."""
    model = Clips(lambda x: x.shape[0]).eval()
    model.fc = nn.Linear(4 * 9, 5).eval()
    small = shrink(model)
    assert small.conv.out_channels == 2
    assert difference(model, small, torch.randn(6, 2, 5, 5)) < 1e-6


class Viewing(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.conv, self.fc, self.size = with_dead(nn.Conv2d(2, 6, 3), 0, 2, 5), nn.Linear(6 * 49, 5), size

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.view(*self.size(x)))


@pytest.mark.parametrize(
    "size, left",
    [
        (lambda x: (x.size(0), -1), 3),
        (lambda x: ((x.shape[0], -1),), 3),
        (lambda x: (-1, 6 * 49), 6),
        (lambda x: (x.size(0) // 1, -1), 6),
    ],
)
def test_views_that_flatten(size, left):
    model = Viewing(size).eval()
    small = shrink(model)
    assert small.conv.out_channels == left
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6


class Joining(nn.Module):
    """Flattens as the keywords say, and reads the last dimension, of 49 values (or of 7)."""

    def __init__(self, features, **dims):
        super().__init__()
        self.conv, self.fc, self.dims = with_dead(nn.Conv2d(2, 7, 3), 0, 2, 5), nn.Linear(features, 5), dims

    def forward(self, x):
        return self.fc(torch.flatten(F.relu(self.conv(x)), **self.dims))


@pytest.mark.parametrize(
    ("features", "dims", "left"),
    [(7, {"end_dim": 1}, 7), (7 * 49, {"end_dim": -1, "start_dim": 1}, 4), (49, {"start_dim": 2}, 7)],
)
def test_flattening_goes_by_the_names_of_its_dimensions(features, dims, left):
    model = Joining(features, **dims).eval()
    small = shrink(model)
    assert small.conv.out_channels == left
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6


def test_infinity_in_a_dead_channel_is_left_alone():
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 1), nn.ReLU(), nn.Conv2d(6, 4, 1), *tail(4)).eval()
    with torch.no_grad():
        model[0].bias[1] = torch.inf
        model[2].weight[2, 1] = 0
    small, x = shrink(model), torch.randn(5, 2, 9, 9)
    with torch.no_grad():
        assert torch.equal(model(x).isfinite(), small(x).isfinite())


def test_weights_that_are_computed_anew_are_refused_or_kept():
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 1), nn.ReLU(), nn.Conv2d(6, 4, 1), *tail(4)).eval()
    prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(ValueError, match="cannot be copied .*: remove what .*prune.remove"):
        shrink(model)
    prune.remove(model[2], "weight")
    model[0].register_forward_hook(lambda layer, inputs, output: output + 1)
    small = shrink(model)
    assert small[0].out_channels == 6
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6


@pytest.mark.parametrize("step", [nn.MaxPool2d(1), nn.ReLU(), nn.Dropout()])
@pytest.mark.parametrize("change", [lambda x: 3 * x, lambda x: x - x.mean(1, keepdim=True)])
def test_a_hook_may_change_any_step(step, change):
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 1), step, nn.Conv2d(6, 4, 1), *tail(4)).eval()
    step.register_forward_hook(lambda layer, inputs, output: change(output))
    small = shrink(model)
    assert small[0].out_channels == 6
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6


def test_a_layer_may_have_a_forward_of_its_own():
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 1), nn.ReLU(), nn.Conv2d(6, 4, 1), *tail(4)).eval()
    model[1].forward = lambda x: x - x.mean(1, keepdim=True)
    small = shrink(model)
    assert small[0].out_channels == 6
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="Sequential cannot be found .its forward.. was set on the instance"):
        shrink(model)


def test_a_hook_of_all_modules_may_change_any_step():
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 1), nn.ReLU(), nn.Conv2d(6, 4, 1), *tail(4)).eval()
    hook = nn.modules.module.register_module_forward_hook(lambda layer, inputs, output: output + 1)
    try:
        small = shrink(model)
        assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6
    finally:
        hook.remove()
    assert small[0].out_channels == 6


def test_a_network_that_cannot_be_copied_says_why():
    model = nn.Sequential(nn.Conv2d(2, 6, 3))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="Sequential cannot be copied .*lock.*: remove what .*or cannot be copied"):
        shrink(model)


class Given(nn.Module):
    """A step writes into the tensor that it is given, or reads a parameter beside it."""

    def __init__(self, step):
        super().__init__()
        self.one, self.two, self.fc = with_dead(nn.Conv2d(2, 2, 1), 0, 1), nn.Conv2d(2, 4, 1), nn.Linear(4, 3)
        self.slope, self.step = nn.Parameter(torch.tensor(-0.1), requires_grad=False), step

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.two(self.step(self, self.one(x), x)), 1).flatten(1))


def added(m, y, x):
    torch.add(y, x, out=y)
    return y


def squashed(m, y, x):
    torch.tanh(x, out=y)
    return y


@pytest.mark.parametrize("step", [added, squashed, lambda m, y, x: F.leaky_relu(y, m.slope)])
def test_a_step_may_be_given_other_tensors(step):
    torch.manual_seed(0)
    model = Given(step).eval()
    assert difference(model, shrink(model), torch.randn(5, 2, 6, 6)) < 1e-6


def test_a_layer_may_hold_other_tensors():
    """Which it does not read: they stay as they are, also where a file gives the widths."""
    model = nn.Sequential(with_dead(nn.Conv2d(2, 6, 3), 1), nn.ReLU(), nn.Conv2d(6, 4, 1), *tail(4)).eval()
    for name, size in (("one", (1,)), ("all", model[0].weight.shape)):
        model[0].register_buffer(name, torch.ones(size))
    small = shrink(model)
    narrow_(model, widths_of(small))
    model.load_state_dict(small.state_dict())
    assert small[0].out_channels == 5 and model[0].all.shape == (6, 2, 3, 3)


def test_batchnorm_with_factor_zero_makes_a_constant():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), *tail(4))
    with torch.no_grad():
        model[1].weight[:4] = 0
        model[1].bias.copy_(torch.linspace(-1, 2, 6))
    small = shrink(model.eval())
    assert small[0].out_channels == 3
    assert difference(model, small, torch.randn(5, 2, 9, 9)) < 1e-6


def test_a_residual_stream_loses_what_no_layer_writes():
    model = build_model("resnet", 10, 8)
    writers = [model.conv1, model.layer1[0].conv2]
    with torch.no_grad():
        for layer in writers:
            layer.weight[:5] = 0
        writers[0].weight[5:9] = 0  # the block still writes these
        for norm in (model.bn1, model.layer1[0].bn2):
            nn.init.normal_(norm.bias, 2.0)
    small = shrink(model.eval())
    assert small.conv1.out_channels == small.layer1[0].conv2.out_channels
    assert 11 <= small.conv1.out_channels <= 13  # 16 - 5, and the constants that carry others
    assert difference(model, small, images("resnet")) < 1e-5


def test_torchvision_resnet18():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = unsettle(torchvision.models.resnet18(num_classes=10), dead=0.6)
    small = shrink(model)
    assert parameters(small) < 0.3 * parameters(model)
    assert difference(model, small, torch.randn(2, 3, 64, 64)) < 1e-5
    assert same_state(shrink(small), small)


class Odd(nn.Module):
    """Steps that a careless rewrite gets wrong, one of them chosen by its name."""

    def __init__(self, step):
        super().__init__()
        self.one = with_dead(nn.Conv2d(2, 4, 3, padding=1), 0, 3)
        self.two = with_dead(nn.Conv2d(4, 4, 3, padding=1), 1, 3)
        self.norm, self.fc, self.step = nn.BatchNorm2d(4), nn.Linear(4, 3), step
        with torch.no_grad():
            self.one.bias.mul_(-1)
        if step == "tied":
            self.three = nn.Conv2d(4, 4, 3, padding=1)
            self.three.weight = self.two.weight

    def forward(self, x):
        x = self.one(x)
        if self.step == "overwritten":  # the sum sees what ReLU has left in x
            x = F.relu(x, inplace=True) + x
        elif self.step == "added in place":
            y = self.two(F.relu(x))
            y += 1.5
            x = x + y
        elif self.step == "kept, then added":
            kept, x = x.abs().mean((2, 3)), self.two(F.relu(x)) + x
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)) + kept[:, :3]
        elif self.step == "added under two names":
            y = x
            y += self.two(F.relu(x))
            x = F.relu(x) + y
        elif self.step == "scaled under two names":
            y = F.dropout(x, training=self.training)
            y *= 0.5
            x = self.two(x)
        elif self.step == "rectified behind dropout":
            y = F.dropout(x, training=self.training)
            x = F.relu(y, True) + self.two(x)
        elif self.step == "weights read twice":
            x = self.two(F.relu(F.conv2d(F.relu(x), self.two.weight, padding=1)))
        elif self.step == "called twice":
            x = self.two(F.relu(self.two(x)))
        elif self.step == "tied":
            x = self.three(F.relu(self.two(x)))
        elif self.step == "concatenated":
            x = self.two(torch.cat([x[:, 2:], x[:, :2]], 1))
        elif self.step == "view":
            x = self.norm(x).view(x.size(0), 4, -1).unsqueeze(-1)
        elif self.step == "scaled":
            x = x * torch.sigmoid(self.two(x).mean((2, 3), keepdim=True))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize(
    "step",
    [
        *(
            "overwritten",
            "added in place",
            "kept, then added",
            "called twice",
            "tied",
            "concatenated",
            "view",
            "scaled",
        ),
        *("added under two names", "scaled under two names", "rectified behind dropout", "weights read twice"),
    ],
)
def test_steps_that_are_not_understood_keep_what_they_read(step):
    torch.manual_seed(0)
    model = Odd(step).eval()
    assert difference(model, shrink(model), torch.randn(5, 2, 6, 6)) < 1e-6


def test_a_network_that_cannot_be_traced_says_why():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branching cannot be found .*torch.fx can trace"):
        shrink(Branching())


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'fc4'"):
        build_model("lenet_300_100", 10, widths={"fc4": [3, 4]})
    with pytest.raises(ValueError, match="'fc1' are .301, 784.: give whole numbers from 1"):
        build_model("lenet_300_100", 10, widths={"fc1": [301, 784]})
    with pytest.raises(ValueError, match="'fc1'"):
        narrow_(build_model("lenet_300_100", 10), {"fc1": [7]})


class WithPenalty(nn.Module):
    """As a LightningModule has it: the penalty is an attribute, and no step of the network."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.penalty = HALO(penalized_parameters(self), xi=0.1, psi=0.1)

    def forward(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))


def test_a_penalty_does_not_come_along():
    model = WithPenalty().eval()
    with torch.no_grad():
        model.first.weight[2:] = model.first.bias[2:] = 0
    small = shrink(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small(x), model(x))
    assert small.first.out_channels == 2
    assert [name for name, _ in small.named_parameters()] == [
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    ]
    assert model.penalty.lambdas["first.weight"].shape == (8, 3, 3, 3)
