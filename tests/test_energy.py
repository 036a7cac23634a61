"""Streaming covariance against numpy, energies by hand, and hooks that do not stay."""

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model
from utils.stages.energy import (
    POOLS,
    StreamingCovariance,
    components,
    effective_rank,
    eigenvalue_energy,
    layer_energies,
    measured_layers,
    watch_outputs,
)

RANDOM = torch.Generator().manual_seed(0)
SHAPE = (1, 28, 28)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streaming_equals_numpy(batch):
    vectors = torch.randn(100, 6, generator=RANDOM, dtype=torch.float64) @ torch.randn(6, 6, generator=RANDOM).double()
    vectors += 1e4  # where a sum of squares would lose its digits
    stream = StreamingCovariance(6)
    for part in vectors.split(batch):
        stream.update(part)
    expected = np.cov(vectors.numpy(), rowvar=False)
    assert np.abs(stream.covariance().numpy() - expected).max() < 1e-10
    values = np.linalg.eigvalsh(expected)[::-1]
    assert np.abs(eigenvalue_energy(stream.covariance()).numpy() - values / values.sum()).max() < 1e-10


def test_one_image_has_no_covariance():
    stream = StreamingCovariance(2)
    stream.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2"):
        stream.covariance()


def test_what_varies_by_rounding_alone_is_constant():
    """Outputs of one input in batches of several sizes differ in the last bit of fp32."""
    noise = torch.finfo(torch.float32).eps * torch.randint(-1, 2, (50, 3), generator=RANDOM)
    stream = StreamingCovariance(3)
    stream.update(torch.tensor([3.0, -700.0, 0.0]) * (1 + noise))
    assert not stream.covariance().any()
    stream.update(torch.tensor([[3.0, -700.01, 0.0]]))
    assert stream.covariance()[1, 1] > 0 and not stream.covariance()[0].any()


def test_energy_by_hand():
    energy = eigenvalue_energy(torch.diag(torch.tensor([1.0, 6.0, 3.0, 0.0], dtype=torch.float64)))
    assert energy.tolist() == pytest.approx([0.6, 0.3, 0.1, 0])
    assert components(energy) == {"50%": 1, "90%": 2, "95%": 3, "99%": 3}
    assert effective_rank(energy) == pytest.approx(np.exp(-(0.6 * np.log(0.6) + 0.3 * np.log(0.3) + 0.1 * np.log(0.1))))
    assert effective_rank(torch.full((8,), 1 / 8)) == pytest.approx(8)


def test_a_dead_layer_has_no_energy():
    energy = eigenvalue_energy(torch.zeros(3, 3))
    assert energy.tolist() == [0, 0, 0] and effective_rank(energy) == 0
    assert components(energy) == {"50%": 0, "90%": 0, "95%": 0, "99%": 0}


def test_pools():
    maps = torch.randn(2, 3, 4, 5, generator=RANDOM)
    assert torch.equal(POOLS["max"](maps), maps.amax((2, 3)))
    torch.testing.assert_close(POOLS["avg"](maps), maps.mean((2, 3)))
    assert torch.equal(POOLS["topleft"](maps), maps[:, :, 0, 0])
    # what the release does: a max-pool of kernel 1 with the size of the map as stride
    square = torch.randn(2, 3, 4, 4, generator=RANDOM)
    assert torch.equal(POOLS["topleft"](square), nn.functional.max_pool2d(square, 1, stride=4).flatten(1))


def test_layers_that_are_measured():
    assert len(measured_layers(build_model("vgg16_bn", 10), linear=False, shape=(3, 32, 32))) == 13
    assert list(measured_layers(build_model("lenet_5", 10), linear=True, shape=SHAPE)) == [
        "conv1",
        "conv2",
        "fc1",
        "fc2",
    ]


def test_the_layer_of_the_logits_is_the_one_that_runs_last():
    """Not the one that was registered last, which may be hidden, or a convolution."""

    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.hidden, self.conv = nn.Linear(5, 3), nn.Linear(4, 5), nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.head(self.hidden(self.conv(x).mean((2, 3))).relu())

    assert set(measured_layers(HeadFirst(), linear=True, shape=SHAPE)) == {"conv", "hidden"}


@pytest.mark.parametrize("pool", POOLS)
def test_energies_of_a_network_equal_numpy_on_all_outputs(pool):
    torch.manual_seed(0)
    model = build_model("lenet_5", 10).eval()
    images = torch.rand(30, 1, 28, 28)
    result = layer_energies(
        model,
        measured_layers(model, linear=True, shape=SHAPE),
        zip(images.split(8), images.split(8), strict=True),
        pool=pool,
    )
    kept = {}
    with watch_outputs(
        measured_layers(model, linear=True, shape=SHAPE), lambda name, out: kept.__setitem__(name, out.detach())
    ):
        model(images)
    for name, output in kept.items():
        vectors = POOLS[pool](output) if output.dim() == 4 else output
        values = np.linalg.eigvalsh(np.cov(vectors.double().numpy(), rowvar=False))[::-1]
        assert np.abs(result[name].numpy() - values / values.sum()).max() < 1e-6  # fp32 outputs of other batch sizes


def test_tokens_count_each_and_what_never_ran_is_left_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.unused, self.head = nn.Linear(5, 3), nn.Linear(5, 4), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.hidden(x).mean((1, 2)))

    torch.manual_seed(0)
    model, images = Tokens().eval(), torch.randn(6, 2, 4, 5)  # 8 tokens an image
    result = layer_energies(model, measured_layers(model, linear=True, shape=(2, 4, 5)), [(images, None)], pool="max")
    with torch.no_grad():
        values = np.linalg.eigvalsh(np.cov(model.hidden(images).flatten(0, 2).double().numpy(), rowvar=False))[::-1]
    assert list(result) == ["hidden"] and np.abs(result["hidden"].numpy() - values / values.sum()).max() < 1e-6


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_outputs_that_overflow_are_named(value):
    model = build_model("lenet_5", 10)
    with torch.no_grad():
        model.conv2.bias[3] = value
    layers, images = measured_layers(model, linear=True, shape=SHAPE), torch.rand(6, 1, 28, 28)
    with pytest.raises(ValueError, match="the outputs of conv2 are NaN or infinite: use another checkpoint"):
        layer_energies(model, layers, zip(images.split(4), images.split(4), strict=True), pool="max")


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_go_even_after_an_error():
    model = build_model("lenet_5", 10)
    with (
        pytest.raises(ZeroDivisionError),
        watch_outputs(measured_layers(model, linear=True, shape=SHAPE), lambda *_: 1 / 0),
    ):
        assert hooks(model) == 4
        model(torch.zeros(1, 1, 28, 28))
    assert hooks(model) == 0


def test_memory_does_not_grow_with_the_images():
    """Between 20 and 200 batches no tensor is kept: the bytes held by tensors are the same."""
    import gc

    model = build_model("lenet_5", 10)

    def held(count):
        seen = []

        def batches():
            for index in range(count):
                if index == count - 1:
                    gc.collect()
                    seen.append(sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor))
                images = torch.rand(10, 1, 28, 28)
                yield images, images

        layer_energies(model, measured_layers(model, linear=True, shape=SHAPE), batches(), pool="max")
        return seen[0]

    assert held(200) == held(20)
