"""Parameter counts and names that checkpoints of the release have."""

import pytest
import torch
import torch.nn.functional as F

from models import CIFAR_ARCHS, MNIST_ARCHS, build_model, guess_arch, resolve_depth
from utils import penalized_parameters, prunable_weights


def count(tensors):
    return sum(t.numel() for t in tensors)


@pytest.mark.parametrize(
    "arch, classes, depth, parameters, convs, conv_weights, entries",
    [
        ("resnet", 100, 50, 764_404, 51, 754_096, 308),
        ("resnet", 10, 50, 758_554, 51, 754_096, 308),
        ("vgg16_bn", 10, 16, 14_728_266, 13, 14_710_464, 13 * 7 + 2),
        ("vgg16_bn", 100, None, 14_774_436, 13, 14_710_464, 13 * 7 + 2),
        ("vgg16", 10, None, 14_719_818, 13, 14_710_464, 13 * 2 + 2),
    ],
)
def test_counts(arch, classes, depth, parameters, convs, conv_weights, entries):
    model = build_model(arch, classes, depth)
    weights = prunable_weights(model)
    assert (count(model.parameters()), len(weights), count(weights.values())) == (parameters, convs, conv_weights)
    assert len(model.state_dict()) == entries


def test_vgg16_penalises_weights_and_biases_of_convolutions():
    model = build_model("vgg16_bn", 10)
    penalized, prunable = penalized_parameters(model), prunable_weights(model)
    assert count(penalized.values()) == 14_710_464 + 4_224
    assert set(penalized) - set(prunable) == {name.replace("weight", "bias") for name in prunable}
    assert not any(name.startswith("classifier") for name in penalized)
    assert "classifier.weight" in prunable_weights(model, linear=True)


def test_resnet_is_initialised_for_its_outputs():
    """He et al. 2015 with the fan of the outputs: 32 filters of 3x3 where there are 16 inputs."""
    torch.manual_seed(0)
    w = build_model("resnet", 10, 20).state_dict()["layer2.0.conv1.weight"]
    assert w.shape == (32, 16, 3, 3) and w.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)


def test_resnet_names():
    names = set(build_model("resnet", 10, 20).state_dict())
    expected = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight"}
    assert expected | {"layer3.0.downsample.1.weight", "layer3.2.bn2.bias", "fc.weight", "fc.bias"} <= names
    assert "layer1.0.downsample.0.weight" not in names


def test_vgg_names():
    names = set(build_model("vgg16_bn", 10).state_dict())
    assert {"features.0.weight", "features.0.bias", "features.1.running_var", "classifier.weight"} <= names


@pytest.mark.parametrize("arch", [name for name in CIFAR_ARCHS if "vgg" in name] + ["resnet-14", "resnet-56"])
def test_forward_and_layer_count(arch):
    name, _, depth = arch.partition("-")
    model = build_model(name, 7, int(depth) if depth else None).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    if "vgg" in arch:  # the classifier is one layer here, three in the original
        assert len(prunable_weights(model)) == int(name.removesuffix("_bn")[3:]) - 3
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == name.endswith("_bn")


@torch.no_grad()
def test_outputs_equal_the_layers_called_by_hand():
    torch.manual_seed(0)
    images, digits = torch.randn(2, 3, 32, 32), torch.randn(2, 1, 28, 28)
    vgg, lenet = build_model("vgg16_bn", 10).eval(), build_model("lenet_5", 10).eval()
    torch.testing.assert_close(vgg(images), vgg.classifier(vgg.features(images).mean((2, 3))))
    pooled = F.max_pool2d(lenet.conv2(F.max_pool2d(lenet.conv1(digits).relu(), 2)).relu(), 2)
    torch.testing.assert_close(lenet(digits), lenet.fc3(lenet.fc2(lenet.fc1(pooled.flatten(1)).relu()).relu()))


def test_vgg_classifies_with_small_weights_at_first():
    assert build_model("vgg16_bn", 100).classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_bottlenecks_stride_in_their_3x3_convolution():
    block = build_model("resnet", 10, 56).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


WRONG = [("vgg16_bn", 50), ("resnet", 9), ("resnet", 2), ("resnet", 62), ("lenet9", None)]


@pytest.mark.parametrize("arch, depth", WRONG)
def test_contradicting_depth_is_an_error(arch, depth):
    with pytest.raises(ValueError, match=str(depth or arch)):
        resolve_depth(arch, depth)
    with pytest.raises(ValueError):
        build_model(arch, 10, depth)


@pytest.mark.parametrize(
    "arch, parameters, prunable", [("lenet_300_100", 266_610, 266_200), ("lenet_5", 61_706, 61_470)]
)
def test_lenets(arch, parameters, prunable):
    model = build_model(arch, 10)
    assert count(model.parameters()) == count(penalized_parameters(model, linear=True).values()) == parameters
    assert count(prunable_weights(model, linear=True).values()) == prunable
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert type(build_model("LeNet31", 10)) is type(build_model("lenet_300_100", 10))


@pytest.mark.parametrize(
    "arch, depth",
    [("resnet", 20), ("resnet", 56), ("vgg13", 13), ("vgg19_bn", 19), *((a, None) for a in MNIST_ARCHS[::2])],
)
def test_an_arch_is_recognised_by_its_weights(arch, depth):
    guess = guess_arch(build_model(arch, 17, depth).state_dict())
    assert guess == f"-a {arch}" + (f" --depth {depth}" if depth else "") + " with 17 classes"
    assert guess_arch({"w": torch.zeros(3, 4)}) is None


def test_a_network_without_convolutions_says_what_to_do():
    with pytest.raises(ValueError, match="linear=True"):
        penalized_parameters(torch.nn.Linear(2, 2))
