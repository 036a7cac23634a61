"""Sparse inference: the compiled network returns what the network returns, whatever it is made of."""

import copy
import pickle
import random
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import needs_compiler
from torch import nn

from models import ARCHS, build_model
from utils import SparseNetwork, prunable_weights, prune_by_magnitude_
from utils.halo import sparse, sparse_plan, sparse_workspace
from utils.halo.native import find_compiler, load_native
from utils.halo.sparse_trace import trace

BOUND = 1e-5  # of the largest output


def pruned(model, sparsity, *, seed=0):
    """Give BatchNorm statistics far from their start, prune all weights, and switch to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low, high in [
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 2),
                (module.weight, -1.5, 1.5),
                (module.bias, -1, 1),
            ]:
                if tensor is not None:  # without affine
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    if any(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()):
        prune_by_magnitude_(prunable_weights(model, linear=True), sparsity)
    return model.eval()


def images(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def close(have, want):
    assert have.shape == want.shape and have.dtype == want.dtype
    assert torch.isfinite(have).all()
    assert (have - want).abs().max() <= BOUND * want.abs().max(), (have - want).abs().max() / want.abs().max()


@torch.no_grad()
def check(model, *inputs):
    """Compare the compiled network, and the readable form of its program, with the network."""
    fast = SparseNetwork(model)
    assert fast.compiled
    for x in inputs:
        want = model(x.clone())  # some networks write into their input
        close(fast.program.run(x), want)
        close(fast(x), want)
    return fast


NETWORKS = {
    "resnet20": lambda: (build_model("resnet", 10, 20), (3, 32, 32)),
    "bottleneck": lambda: (build_model("resnet", 10, 56), (3, 16, 16)),
    "vgg16_bn": lambda: (build_model("vgg16_bn", 10), (3, 32, 32)),
    "lenet_300_100": lambda: (build_model("lenet_300_100", 10), ARCHS["lenet_300_100"].shape),
    "lenet_5": lambda: (build_model("lenet_5", 10), ARCHS["lenet_5"].shape),
    "torchvision_resnet18": lambda: (torchvision.models.resnet18(num_classes=10), (3, 64, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_at_any_batch_size_and_number_of_threads(name):
    """The logits of 17 images do not depend on how many are sent together, nor on the threads."""
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    fast = check(pruned(model, 0.9), images(17, *shape))
    x = images(17, *shape)
    whole = fast(x)
    for count in (1, 3, 16):
        close(fast(x[:count]), whole[:count])
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            close(fast(x), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NETWORKS)
def test_threads_share_the_operations_of_few_images(name, monkeypatch):
    """Each computes some channels of every operation, in the same order: equal bit for bit.

    Of as many images as the number of threads does not decide how to lay them out, since a compiler may round the same
    sums of a vector and of a single float differently.
    """
    monkeypatch.setattr(sparse, "SHARE", 1)
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    fast, x = SparseNetwork(pruned(model, 0.5)), images(18, *shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = {count: fast(x[:count]) for count in (1, 16, 17, 18)}
        for n in (2, 3, 8):
            torch.set_num_threads(n)
            for count, want in alone.items():
                assert torch.equal(fast(x[:count]), want)
            close(fast(x[:2]), alone[16][:2])
            for jobs in ((0, 1), (1, 0)):
                assert sparse._threads_for(fast._prepared[shape], *jobs, most=n) == (n, True)
    finally:
        torch.set_num_threads(threads)


def test_threads_share_only_large_operations():
    """Large and small by far, however wide the registers are: those of ResNet-20 are large only without avx512."""
    for arch, shape, sparsity, want in (("vgg16_bn", (3, 32, 32), 0.5, 2), ("lenet_300_100", (1, 28, 28), 0.9, 1)):
        fast = SparseNetwork(pruned(build_model(arch, 10), sparsity))
        fast(images(1, *shape))
        prepared = fast._prepared[shape]
        assert all(sparse._threads_for(prepared, *jobs, most=2) == (want, want == 2) for jobs in ((0, 1), (1, 0)))
        assert all(sparse._threads_for(prepared, *jobs, most=2) == (2, False) for jobs in ((0, 3), (4, 0)))


def test_a_batch_of_several_blocks():
    check(pruned(build_model("resnet", 10, 8), 0.95), images(64, 3, 32, 32), images(50, 3, 32, 32))


def test_convolutions_in_blocks_of_channels_and_bands_of_rows():
    """Cut by the schedule: partial sums, a second convolution that follows the first, and an addition in place."""
    torch.manual_seed(0)
    wide, other = nn.Conv2d(3, 80, 3, padding=1), nn.Conv2d(80, 80, 5, padding=2)
    narrow = nn.Sequential(wide, nn.ReLU(), other, nn.ReLU(), nn.Conv2d(80, 80, 3, 2), nn.Conv2d(80, 8, 1))
    fast = check(pruned(narrow, 0.3), images(16, 3, 24, 24))
    assert fast._prepared[3, 24, 24].block.c.count > 50
    check(pruned(Forward(lambda m, x: x + m.other(m.conv(x)).relu()), 0.2), images(16, 4, 90, 90))


def test_batchnorm_addition_and_relu_are_merged():
    ops = trace(pruned(build_model("resnet", 10, 20), 0.9)).ops
    assert [op.kind for op in ops] == ["conv"] * 21 + ["adaptive", "linear"]
    assert sum(op.residual is not None for op in ops) == 9 and sum(op.relu for op in ops) == 19


def random_layer(choose, channels, size):
    """Return a convolution or a pooling that fits on `size` pixels, and the channels it returns."""
    kernel = tuple(choose.randint(1, min(5, n)) for n in size)
    dilation = tuple(choose.choice([1, 2]) if 2 * (k - 1) < n else 1 for k, n in zip(kernel, size, strict=True))
    stride = tuple(choose.choice([1, 1, 2, 3]) for _ in size)
    padding = tuple(choose.randint(0, k // 2) for k in kernel)
    kind = choose.randint(0, 7)
    if kind == 0:
        return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=choose.random() < 0.5), channels
    if kind == 1:
        counts = {"ceil_mode": choose.random() < 0.5, "count_include_pad": choose.random() < 0.5}
        return nn.AvgPool2d(kernel, stride, padding, **counts, divisor_override=choose.choice([None, 3])), channels
    if kind == 2:
        return nn.AdaptiveAvgPool2d(choose.choice([(2, 3), (None, 4), 5])), channels
    after, bias = choose.choice([4, 6, 12]), choose.random() < 0.5
    groups = choose.choice([1, 1, 2]) if channels % 2 == 0 else 1
    if kind == 3 and stride != (1, 1):
        padding = tuple(choose.randint(0, 2 * k) for k in kernel)
    if kind == 4:
        stride, padding = (1, 1), "same"
    return nn.Conv2d(channels, after, kernel, stride, padding, dilation, groups, bias), after


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed):
    """Any kernel, stride, padding, dilation and size of image, with more than one channel left empty."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    channels, shape = 3, (choose.randint(5, 40), choose.randint(5, 40))
    layers, x = [], torch.zeros(1, 3, *shape)
    for _ in range(choose.randint(1, 5)):
        layer, after = random_layer(choose, channels, x.shape[2:])
        norm = nn.BatchNorm2d(after, affine=seed % 4 > 0)
        parts = [layer, *[norm] * (choose.random() < 0.6), *[nn.ReLU()] * (choose.random() < 0.6)]
        try:
            x = nn.Sequential(*parts).eval()(x)
        except RuntimeError:  # it does not fit
            continue
        layers += parts
        channels = after
    if choose.random() < 0.7:
        layers += [nn.Flatten(), nn.Linear(x[0].numel(), 9), nn.BatchNorm1d(9), nn.ReLU(True), nn.Linear(9, 4)]
    check(pruned(nn.Sequential(*layers), choose.choice([0.5, 0.8, 0.95])), *(images(n, 3, *shape) for n in (2, 18)))


class Forward(nn.Module):
    """A forward pass to trace, with layers to use in it."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.down, self.norm = nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.relu, self.add, self.linear = nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4 * 6 * 6, 5)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def one_tensor_twice(m, x):
    y = m.conv(x)
    return m.relu(y) + y  # done in place, both are rectified


def added_in_place(m, x):
    y = m.conv(x)
    z = y.flatten(1)  # a view: it sees the addition
    y += m.other(x)
    return m.linear(z)


FORWARDS = {
    "input alone": lambda m, x: x,
    "relu of the input": lambda m, x: F.relu(x),
    "norm first": lambda m, x: m.conv(torch.relu(m.norm(x))),
    "norm after a sum": lambda m, x: m.norm(m.conv(x) + x),
    "twice the same": lambda m, x: m.norm(x + x),
    "sum with its own input": lambda m, x: F.relu(x + m.conv(x)),
    "sum of two": lambda m, x: torch.add(m.conv(x), m.other(x)).relu(),
    "a layer used twice": lambda m, x: m.conv(m.relu(m.conv(x))) + m.conv(x),
    "read before and after": lambda m, x: m.norm(m.conv(x)) + m.other(m.conv(x)).relu_(),
    "strided sum": lambda m, x: m.down(x) + m.down(m.conv(x)),
    "relu after pooling": lambda m, x: F.relu(F.max_pool2d(m.conv(x), 2)),
    "pool of the input": lambda m, x: F.avg_pool2d(x, 3, 2),
    "unread map": lambda m, x: (m.conv(x), m.other(x))[1],
    "view": lambda m, x: m.linear(m.conv(x).view(x.size(0), -1)),
    "reshape": lambda m, x: m.linear(m.add(m.conv(x)).reshape(-1, 144)),
    "relu after a view": lambda m, x: m.linear(F.relu(m.conv(x).view(-1, 144))),
    "relu after a view of a sum": lambda m, x: m.linear(F.relu((m.conv(x) + x).view(-1, 144))),
    "reshape by shape": lambda m, x: m.linear(torch.reshape(m.conv(x), (x.shape[0], -1))),
    "flat": lambda m, x: F.dropout(torch.flatten(m.conv(x), 1), 0.5, m.training),
    "sum of features": lambda m, x: m.linear(x.flatten(1)) + m.linear(m.conv(x).flatten(1)).relu(),
    "one tensor twice": one_tensor_twice,
    "added in place": added_in_place,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_ways_to_write_a_network(name):
    torch.manual_seed(0)
    if name == "reshape by shape":
        try:
            torch.fx.symbolic_trace(Forward(FORWARDS[name]))
        except TypeError:
            pytest.skip("torch.fx itself, of torch 2.6, does not follow torch.reshape by a shape it reads")
    check(pruned(Forward(FORWARDS[name]), 0.7), *(images(n, 4, 6, 6) for n in (1, 5, 19)))


def test_layers_left_empty_and_maps_of_one_pixel():
    model = pruned(build_model("resnet", 10, 8), 0.8)
    model.layer1[0].conv1.weight.data.zero_()
    model.layer3[0].conv2.weight.data.zero_()
    check(model, images(17, 3, 32, 32), images(3, 3, 5, 9), images(18, 3, 4, 4), images(2, 3, 1, 1))


def test_images_in_any_layout_and_none():
    model = pruned(build_model("resnet", 10, 8), 0.8)
    x = images(18, 3, 16, 16)
    fast = check(model, x.to(memory_format=torch.channels_last), x[::2].transpose(2, 3))
    assert fast(x[:0]).shape == (0, 10) and not fast(x).requires_grad


@pytest.mark.parametrize("pool", [nn.MaxPool2d((2,)), nn.AvgPool2d((3,), (2,), (1,))])
def test_sizes_that_are_one_number_in_a_tuple(pool):
    check(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), pool).eval(), images(18, 1, 9, 9))


def test_nan_and_infinity_stay():
    """Of 18 images, those with a NaN or an infinity give NaN, and no other does."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    x = images(18, 1, 8, 8)
    x[2, 0, 3, 3], x[17, 0, 4, 4] = float("nan"), float("inf")
    have = SparseNetwork(model.eval())(x)
    assert have.isfinite().all(1).tolist() == [index not in (2, 17) for index in range(18)]
    assert have[2].isnan().all()


def test_a_copy_keeps_its_weights():
    model, x = pruned(build_model("lenet_5", 10), 0.9), images(2, 1, 28, 28)
    fast = SparseNetwork(model)
    before, copied = fast(x), copy.deepcopy(fast)
    model.conv1.weight.data.zero_()
    assert torch.equal(fast(x), before)
    del fast
    assert torch.equal(copied(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(copied))(x), before)


@pytest.mark.parametrize("share", [sparse.SHARE, 1])
def test_several_threads_at_once(share, monkeypatch):
    """Each call has maps of its own, and more shapes than are kept work; also where each call's threads share."""
    monkeypatch.setattr(sparse, "SHARE", share)
    model = pruned(build_model("resnet", 10, 8), 0.8)
    fast = SparseNetwork(model)
    inputs = [
        images(n, 3, size, size, seed=n) for n, size in ((1, 32), (20, 32), (33, 16), *((2, s) for s in range(4, 12)))
    ]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    worst = []

    def work():
        torch.set_num_threads(2)
        for _ in range(5):
            for x, want in zip(inputs, wanted, strict=True):
                worst.append(float((fast(x) - want).abs().max() / want.abs().max()))

    threads, before = [threading.Thread(target=work) for _ in range(4)], torch.get_num_threads()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert len(worst) == 4 * 5 * len(inputs) and max(worst) <= BOUND


def test_memory_does_not_grow():
    fast, x = SparseNetwork(pruned(build_model("lenet_300_100", 10), 0.9)), images(33, 1, 28, 28)

    def pages():
        return int(Path("/proc/self/statm").read_text().split()[1])  # now; what earlier tests took does not count

    for _ in range(100):
        fast(x)
    before = pages()
    for _ in range(2000):  # each would leave 100 kB if it kept its maps
        fast(x)
    assert (pages() - before) * resource.getpagesize() < 20e6


@pytest.mark.parametrize("lanes", [4, 8])
def test_other_widths_of_registers(lanes, monkeypatch):
    library = load_native(sparse.KERNEL, fuse=True, flags=[f"-DLANES={lanes}"])
    assert library.halo_sparse_lanes() == lanes
    library.halo_sparse_run.argtypes = sparse.load_kernel().halo_sparse_run.argtypes
    monkeypatch.setattr(sparse, "load_kernel", lambda: library)
    check(pruned(build_model("resnet", 10, 8), 0.8), images(1, 3, 32, 32), images(19, 3, 21, 13))
    check(pruned(build_model("lenet_5", 10), 0.8), images(1, 1, 28, 28), images(19, 1, 28, 28))


def test_without_a_compiler_torch_runs_the_shrunk_network(monkeypatch):
    def no_kernel():
        raise OSError("no C++ compiler g++ on the PATH")

    monkeypatch.setattr(sparse, "load_kernel", no_kernel)
    model, x = pruned(build_model("resnet", 10, 8), 0.8), images(3, 3, 32, 32)
    model.layer2[0].conv1.weight.data[:20] = 0
    with pytest.warns(
        UserWarning, match="no C.. compiler g.. on the PATH: torch runs the network instead, which takes longer"
    ) as notes:
        slow = SparseNetwork(model)
    assert len(notes) == 1 and not slow.compiled and "compiled=False" in repr(slow)
    widths = {op.name: len(op.weight) for op in slow.program.ops if op.kind == "conv"}
    assert widths["layer2.0.conv1"] == 13  # 12 and what carries the constants of the others
    with torch.no_grad():
        close(slow(x), model(x))
    with pytest.warns(UserWarning, match="no C.. compiler"):
        close(pickle.loads(pickle.dumps(slow))(x), slow(x))


def test_without_a_compiler_a_network_that_cannot_be_copied_runs_too(monkeypatch):
    monkeypatch.setenv("CXX", "nope")
    monkeypatch.setattr(sparse, "load_kernel", sparse.load_kernel.__wrapped__)  # which keeps what it has compiled
    model, x = Forward(lambda m, x: m.conv(x)).eval(), images(2, 4, 6, 6)
    model.lock = threading.Lock()
    with pytest.warns(UserWarning, match="no C.. compiler nope on the PATH"):
        slow = SparseNetwork(model)
    with torch.no_grad():
        close(slow(x), model(x))


def test_the_compiler_may_be_a_command(tmp_path, monkeypatch):
    """Such as "ccache g++"."""
    monkeypatch.setenv("CXX", f"env {find_compiler()[0]}")
    assert find_compiler()[0] == shutil.which("env")
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')
    assert load_native(tmp_path / "one.cpp").one() == 1


@torch.no_grad()
def test_images_of_which_a_block_is_too_large_run_one_by_one(monkeypatch):
    model, x = Forward(lambda m, x: m.other(m.conv(x).relu())).eval(), images(35, 4, 20, 20)
    whole = SparseNetwork(model)(x)
    monkeypatch.setattr(sparse_plan, "FARTHEST", 4 * 4 * 700)  # 4 channels of an image, padding included
    fast = SparseNetwork(model)
    for count in (1, 16, 35):
        close(fast(x[:count]), whole[:count])
    assert fast._prepared[4, 20, 20].size == fast._prepared[4, 20, 20].image.size
    with pytest.raises(ValueError, match="maps of these images are too large .*: give smaller images"):
        fast(images(1, 4, 60, 60))


class WithMask(nn.Module):
    """A network with a second input, which need not be given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        return self.layer(x) if mask is None else self.layer(x) * mask


def test_a_network_with_a_second_input_is_refused_by_its_name():
    with pytest.raises(ValueError, match="the network reads a second input 'mask': only one is supported"):
        SparseNetwork(WithMask().eval())


@needs_compiler
def test_repr_counts_the_weights():
    model = pruned(build_model("lenet_300_100", 10), 0.9)
    assert repr(SparseNetwork(model)) == "SparseNetwork(3 layers, 26620 of 266200 weights, compiled=True)"


def fails_without_a_word(m, x):
    raise AssertionError


def hooked(*, whole=False):
    """A network in which a hook adds 1 to what a layer returns, or the network itself."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    (model if whole else model[0]).register_forward_hook(lambda layer, inputs, output: output + 1)
    return model


def replaced(*, whole=False):
    """A network in which a layer, or the network itself, computes something else than its class says."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    (model if whole else model[0]).forward = lambda x: 2 * x
    return model


def flat_in_place(m, x):
    y = m.conv(x)
    m.relu(y.flatten(1))  # with channels_last a copy
    return m.other(y)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Sigmoid(), "does not support Sigmoid"),
        (nn.ConvTranspose2d(4, 4, 3), "does not support ConvTranspose2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect': use zeros"),
        (nn.BatchNorm2d(4, track_running_stats=False), "without running statistics"),
        (nn.MaxPool2d(2, return_indices=True), "returns indices"),
        (nn.Flatten(2), "only flatten\\(1\\)"),
        (nn.Linear(6, 5), "flatten the map before Linear"),
        (nn.Sequential(nn.Flatten(), nn.Conv2d(4, 4, 3)), "reads features"),
        (Forward(lambda m, x: x * 2), "does not support mul\\(\\) \\(at 'mul'\\): run the network itself"),
        (Forward(lambda m, x: x + 1), "addition of anything but two maps"),
        (Forward(lambda m, x: x.flatten(1) + x), "addition of a map and features"),
        (Forward(lambda m, x: torch.add(x, x, out=m.conv(x))), "addition with out=.* \\(at 'add'\\)"),
        (Forward(flat_in_place), "change in place of 'conv' flattened, which may be a copy \\(at 'relu'\\)"),
        (Forward(lambda m, x: x.view(-1, 2, 72)), "view other than"),
        (Forward(lambda m, x: x.view(-1)), "view other than"),
        (Forward(lambda m, x: x.view(x.size())), "view other than"),
        (Forward(fails_without_a_word), "cannot follow the network \\(AssertionError\\)"),
        (Forward(lambda m, x: {4: m.conv}[x.shape[1]](x)), "cannot follow the network"),
        (hooked(), "does not support hooks, such as that of '0'"),
        (hooked(whole=True), "does not support hooks, such as that of the network itself"),
        (replaced(), "does not support a forward\\(\\) set on an instance, such as that of '0'"),
        (replaced(whole=True), "a forward\\(\\) set on an instance, such as that of the network itself"),
        (Forward(lambda m, x: (x, x)), "not one tensor"),
        (Forward(lambda m, x: x + m.linear.bias), "linear.bias"),
        (Forward(lambda m, x: x if x.sum() > 0 else -x), "torch.fx cannot follow the network"),
    ],
)
def test_what_is_not_supported_is_named(layer, message):
    with pytest.raises(ValueError, match=message):
        SparseNetwork(layer.eval())


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules_are_refused(register):
    hook = getattr(nn.modules.module, register)(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="does not support global hooks"):
            SparseNetwork(nn.Conv2d(4, 4, 3).eval())
    finally:
        hook.remove()


def test_a_kernel_without_large_pages(monkeypatch):
    monkeypatch.setattr(sparse_workspace, "ADVICE", 9999)  # madvise: invalid argument
    assert torch.equal(sparse_workspace.zeros(10**6), torch.zeros(10**6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@torch.no_grad()
def test_what_torch_makes_by_default_does_not_matter(dtype, device):
    """The kernel reads and writes fp32 on the CPU, in memory that Python gives it."""
    model, x = pruned(build_model("resnet", 10, 8), 0.5), images(3, 3, 32, 32)
    fast, late = SparseNetwork(model), SparseNetwork(model)
    want = fast(x)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            built = SparseNetwork(model)
            found = [network(x) for network in (fast, late, built)]  # prepared before and within
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(have, want) for have in found)


def test_training_mode_is_refused():
    model = build_model("resnet", 10, 8)
    with pytest.raises(ValueError, match="in training mode: call model.eval"):
        SparseNetwork(model)
    model.eval().layer1[0].bn1.train()
    with pytest.raises(ValueError, match="BatchNorm2d 'layer1.0.bn1' is in training mode"):
        SparseNetwork(model)
    with pytest.raises(ValueError, match="drops values in training mode"):
        SparseNetwork(Forward(lambda m, x: F.dropout(x)).eval())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 4, 6, 6).double(), TypeError, "float32 tensor on the CPU, not torch.float64 on cpu"),
        ([1.0], TypeError, "not list"),
        (torch.zeros(4, 6, 6), ValueError, "use unsqueeze"),
        (torch.zeros(1, 3, 6, 6), ValueError, "conv reads 4 channels, but its input has 3"),
        (torch.zeros(1, 4, 7, 6), ValueError, "linear reads 144 features, but its input has 168"),
        (torch.zeros(1, 4, 0, 6), ValueError, "does not fit on a map of 0 x 6"),
    ],
)
def test_images_that_do_not_fit(x, error, message):
    fast = SparseNetwork(Forward(lambda m, x: m.linear(m.conv(x).flatten(1))).eval())
    with pytest.raises(error, match=message):
        fast(x)


def test_maps_that_do_not_fit():
    with pytest.raises(ValueError, match="adds maps of different shapes"):
        SparseNetwork(Forward(lambda m, x: m.conv(x) + m.down(x)).eval())(torch.zeros(1, 4, 6, 6))
    flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144)).eval()
    with pytest.raises(ValueError, match="1 is BatchNorm of a flattened map: put BatchNorm2d before"):
        SparseNetwork(flat)(torch.zeros(1, 4, 6, 6))
    with pytest.raises(ValueError, match="adds a flattened map to features, which .* not support: run the network"):
        added = Forward(lambda m, x: m.square(x.flatten(1)) + x.flatten(1))
        added.square = nn.Linear(144, 144)
        SparseNetwork(added.eval())(torch.zeros(1, 4, 6, 6))
    with pytest.raises(ValueError, match="without a pixel on 1 of them: give larger images"):
        SparseNetwork(nn.MaxPool2d(2, 1, 1, 2).eval())(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match="view of 144 features for a map"):
        SparseNetwork(Forward(lambda m, x: x.view(-1, 144)).eval())(torch.zeros(1, 4, 8, 6))
