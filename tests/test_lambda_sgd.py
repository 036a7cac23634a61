"""The fast step of HALO: in each of its forms it is `add_grad_()` and SGD, and allocates nothing of their size."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler, train
from test_penalties import random_params, randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import build_model
from utils import HALO, L1, SWS, penalized_parameters
from utils.halo import lambda_sgd, memory
from utils.halo.lambda_sgd import FusedHALO, LambdaSGD, load_kernel

FACTORS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
FORMS = ["kernel", "pieces", "compiled"]
# What benchmarks/README.md states of weights and lam after 200 steps: relative to the largest of their tensor.
BOUND = 2e-4


def no_kernel():
    raise OSError("no C++ compiler g++ on the PATH")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Run a test with the C++ kernel, with pieces of a few elements, and through torch.compile."""
    if request.param != "kernel":
        monkeypatch.setattr(lambda_sgd, "load_kernel", no_kernel)
    if request.param == "pieces":
        monkeypatch.setattr(lambda_sgd, "CHUNK", 7)
    return {"compiled": request.param == "compiled"}


@pytest.fixture(params=[1, 3])
def threads(request):
    """Let the kernel share its work between so many threads, whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def halo(params, *, coefficients=None):
    penalty = HALO(params, **(coefficients or {"xi": 0.3, "psi": 0.2, "lambda_init": 0.7}))
    randomize(penalty)
    return penalty


def test_torch_compile_makes_the_step_that_is_asked_for(monkeypatch):
    made = []

    def compile_step(step, **options):
        made.append(step)
        return step

    monkeypatch.setattr(lambda_sgd, "load_kernel", no_kernel)
    monkeypatch.setattr(torch, "compile", compile_step)
    for compiled in (False, True):
        params = random_params(torch.float32)
        FusedHALO(halo(params), **FACTORS, compiled=compiled).step()
        assert bool(made) == compiled


def test_where_compiling_fails_the_step_goes_on_without_and_says_so(monkeypatch):
    def broken(step, **options):
        def run(*args, **factors):
            raise RuntimeError("CppCompileError: no\nmore")

        return run

    monkeypatch.setattr(lambda_sgd, "load_kernel", no_kernel)
    monkeypatch.setattr(torch, "compile", broken)
    pair = []
    for compiled in (False, True):
        params = random_params(torch.float32)
        optimizer = FusedHALO(halo(params), **FACTORS, compiled=compiled)
        if compiled:
            with pytest.warns(UserWarning, match="could not be compiled, and takes longer: CppCompileError: no$"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.step()
        pair.append([*(p.grad for p in params.values()), *optimizer.penalty.lambdas.values()])
    assert all(torch.equal(one, other) for one, other in zip(*pair, strict=True))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("late")])
def test_what_is_no_failure_to_compile_is_raised(monkeypatch, error):
    """Lack of memory, and whatever comes after a step that worked: it may have changed something already."""
    works = not isinstance(error, torch.OutOfMemoryError)

    def fails_later(step, **options):
        calls = []

        def run(*args, **factors):
            calls.append(step(*args, **factors))
            if len(calls) > works:
                raise error

        return run

    monkeypatch.setattr(lambda_sgd, "load_kernel", no_kernel)
    monkeypatch.setattr(torch, "compile", fails_later)
    optimizer = FusedHALO(halo(random_params(torch.float32)), **FACTORS, compiled=True)
    if works:
        optimizer.step()
    with pytest.raises(RuntimeError, match=str(error)):
        optimizer.step()


def test_small_tensors_go_together_and_large_ones_in_pieces():
    sizes = [3, 4, 2, 25, 1, 9, 30]
    sets = [(torch.full((n,), float(i)), torch.arange(n)) for i, n in enumerate(sizes)]
    parts = [*memory.pieces_together(sets, size=10)]
    assert [[len(t) for t in firsts] for firsts, _ in parts] == [[3, 4, 2], [10], [10], [5, 1], [9], [10], [10], [10]]
    for position in (0, 1):
        walked = torch.cat([t for part in parts for t in part[position]])
        assert torch.equal(walked, torch.cat([tensors[position] for tensors in sets]))
    parts[0][0][1].zero_()
    assert not sets[1][0].any()  # they are the tensors themselves
    odd = torch.zeros(4, 6).t()[::2]
    assert [len(part[0]) for part in memory.pieces_together([(odd,), (torch.zeros(2),)], size=5)] == [1, 1]


@pytest.mark.usefixtures("threads")
def test_one_step_equals_the_readable_one(form):
    """Both signs of lam, a weight of 0, channels_last, and a gradient in another layout than its weight."""
    pair = []
    for make in (LambdaSGD, lambda *args, **kwargs: FusedHALO(*args, **kwargs, **form)):
        params = random_params(torch.float32)
        params["b.weight"].data[0, 0] = 0
        for p in params.values():
            p.grad = torch.ones(p.shape)
        assert params["a.weight"].grad.stride() != params["a.weight"].stride()
        optimizer = make(halo(params), **FACTORS)
        for _ in range(2):
            optimizer.step()
        state = [optimizer.state[lam]["momentum_buffer"] for lam in optimizer.penalty.lambdas.values()]
        pair.append([*(p.grad for p in params.values()), *optimizer.penalty.lambdas.values(), *state])
    for slow, fast in zip(*pair, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    assert any((lam < 0).any() for lam in pair[0]) and pair[0][2][0, 0] == 1  # the weight 0 has no slope


@needs_compiler
@pytest.mark.usefixtures("threads")
def test_by_hand():
    w = nn.Parameter(torch.tensor([0.5, -2.0]))
    w.grad = torch.tensor([1.0, 1.0])
    penalty = HALO({"w": w}, xi=0.1, psi=0.01, lambda_init=2.0)
    penalty.lambdas["w"].data[1] = -1.0
    optimizer = FusedHALO(penalty, lr=0.5, momentum=0.9, weight_decay=0.1)
    assert optimizer.slow_because is None
    optimizer.step()
    assert w.grad.tolist() == pytest.approx([1.025, 0.9])
    # slopes -0.0025 and 0.39 (test_penalties), plus the decays 0.1 * 2 and 0.1 * -1
    assert penalty.lambdas["w"].tolist() == pytest.approx([2 - 0.5 * 0.1975, -1 - 0.5 * 0.29])
    optimizer.step()
    assert optimizer.state[penalty.lambdas["w"]]["momentum_buffer"][0].item() > 0.9 * 0.1975


@pytest.mark.usefixtures("threads")
def test_the_weights_can_be_stepped_in_the_same_pass():
    """As LambdaSGD and SGD one after the other do, the parameters that are not penalised too; checkpoints alike."""
    results = []
    for fused in (False, True):
        params = random_params(torch.float32)
        free = nn.Parameter(torch.ones(3))
        weights = torch.optim.SGD([*params.values(), free], 0.1, momentum=0.9, weight_decay=0.01, fused=True)
        options = {"weights": weights} if fused else {}
        optimizer = (FusedHALO if fused else LambdaSGD)(halo(params), **FACTORS, **options)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for p in (*params.values(), free):
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()
            weights.step()
            assert all((p.grad is None) == fused for p in params.values())
            weights.zero_grad()
        velocities = [weights.state[p]["momentum_buffer"] for p in (*params.values(), free)]
        results.append([*params.values(), free, *optimizer.penalty.lambdas.values(), *velocities])
        assert not fused or optimizer._kernel
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_one_pass", [False, True])
def test_a_momentum_that_is_set_later_begins_with_nothing(form, in_one_pass):
    """As torch's SGD, which keeps no gradient while the factor is 0, and leaves what it had as it was."""
    results = []
    for fused in (False, True):
        params = random_params(torch.float32)
        weights = torch.optim.SGD(params.values(), 0.1, momentum=0.0)
        options = form | ({"weights": weights} if in_one_pass else {}) if fused else {}
        optimizer = (FusedHALO if fused else LambdaSGD)(halo(params), **FACTORS | {"momentum": 0.0}, **options)
        for step, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.0, 0.9)):
            for one in (weights, optimizer):
                one.param_groups[0]["momentum"] = momentum
            for p in params.values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).contiguous()
            optimizer.step()
            weights.step()
        results.append([*params.values(), *optimizer.penalty.lambdas.values()])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_gradient_of_half_precision_weights_is_rounded(dtype, compiled):
    pair = []
    for make in (LambdaSGD, partial(FusedHALO, compiled=compiled)):
        params = random_params(dtype)
        for p in params.values():
            p.grad = torch.ones_like(p)
        make(halo(params), **FACTORS).step()
        pair.append([p.grad for p in params.values()])
    assert all(torch.equal(slow, fast) for slow, fast in zip(*pair, strict=True))


@pytest.mark.parametrize("options", [{"nesterov": True}, {"dampening": 0.5}, {"maximize": True}])
def test_another_sgd_of_the_weights_is_refused(options):
    params = random_params(torch.float32)
    weights = torch.optim.SGD(params.values(), 0.1, momentum=0.9, **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        FusedHALO(halo(params), **FACTORS, weights=weights)


def exchange(what, model, optimizer, lam_optimizer):
    """Put another tensor where the step found one before, in a way that says nothing."""
    w = model.weight
    lam = lam_optimizer.penalty.lambdas["weight"]
    if what in ("w", "lam"):
        tensor = {"w": w, "lam": lam}[what]
        tensor.data = tensor.data * 2
    elif what == "layout":
        w.data = w.data.contiguous(memory_format=torch.channels_last)
    elif what == "grad":
        w.grad = w.grad * 2
    elif what == "grad layout":
        w.grad = w.grad.contiguous(memory_format=torch.channels_last)
    elif what == "no grad":
        w.grad = None
    elif what == "rates":
        optimizer.param_groups[0]["lr"], lam_optimizer.param_groups[0]["momentum"] = 0.3, 0.1
    elif what.startswith("state of"):
        of, parameter = (optimizer, w) if what.endswith("w") else (lam_optimizer, lam)
        of.load_state_dict(copy.deepcopy(of.state_dict()))
        of.state[parameter]["momentum_buffer"].mul_(2)
    elif what == "buffer":
        optimizer.state[w]["momentum_buffer"] = torch.ones_like(w)
    elif what == "one state":
        lam_optimizer.state[lam] = {"momentum_buffer": torch.ones_like(lam)}
    elif what == "buffer data":
        buffer = optimizer.state[w]["momentum_buffer"]
        buffer.data = torch.ones_like(buffer)
    else:
        lam_optimizer.state.clear()


EXCHANGED = ["w", "lam", "layout", "grad", "grad layout", "no grad", "rates", "state of w", "state of lam", "buffer"]


@pytest.mark.parametrize("what", [*EXCHANGED, "one state", "buffer data", "cleared"])
def test_what_is_exchanged_between_two_steps_is_noticed(what):
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 5, 3, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), **FACTORS)
        penalty = HALO(penalized_parameters(model), xi=0.3, psi=0.2, lambda_init=0.7)
        options = {"weights": optimizer} if fused else {}
        lam_optimizer = (FusedHALO if fused else LambdaSGD)(penalty, **FACTORS, **options)
        for step in range(5):
            model.weight.grad = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(step))
            if step == 2:
                before = lam_optimizer.penalty.lambdas["weight"].detach().clone()
                exchange(what, model, optimizer, lam_optimizer)
            lam_optimizer.step()
            optimizer.step()
        assert (penalty.lambdas["weight"] != before).all()
        results.append([model.weight, *penalty.parameters()])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def train_200(make_optimizer, *, in_one_pass=False):
    """Train LeNet-300-100 on random images, slowly: at 0.1 a rounding error grows without bound. Return w and lam."""
    torch.manual_seed(0)
    model = build_model("lenet_300_100", 10)
    images, labels = torch.rand(4, 20, 1, 28, 28), torch.randint(10, (4, 20))
    penalty = HALO(penalized_parameters(model, linear=True), xi=1e-5, psi=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    options = {"weights": optimizer} if in_one_pass else {}
    lam_optimizer = make_optimizer(penalty, lr=0.01, momentum=0.9, weight_decay=0.05, **options)
    for step in range(200):
        F.cross_entropy(model(images[step % 4]), labels[step % 4]).backward()
        lam_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    return {**penalty.penalized, **{f"lam {name}": lam for name, lam in penalty.lambdas.items()}}


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_200_steps_agree_within_the_stated_bound(in_one_pass):
    slow, fast = train_200(LambdaSGD), train_200(FusedHALO, in_one_pass=in_one_pass)
    for name, value in slow.items():
        assert (fast[name] - value).abs().max() <= BOUND * value.abs().max(), name
    assert max(lam.max() for name, lam in slow.items() if name.startswith("lam")) < 0.5  # they moved


@pytest.mark.parametrize("first, second", [(LambdaSGD, FusedHALO), (FusedHALO, LambdaSGD)])
def test_each_continues_the_state_of_the_other(first, second):
    results = []
    for then in (None, first, second):  # None: goes on without a state
        params = random_params(torch.float32)
        penalty = halo(params, coefficients={"xi": 0.01, "psi": 0.01})
        optimizer = first(penalty, **FACTORS)
        for _ in range(3):
            optimizer.step()
        if then:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = then(penalty, **FACTORS)
            optimizer.load_state_dict(state)
        optimizer.step()
        results.append(penalty.lambdas)
    for name, lam in results[0].items():
        for continued in results[1:]:
            torch.testing.assert_close(continued[name], lam, rtol=1e-5, atol=1e-7)


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that an operation returns, alone or in a list, in memory of its own."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {tensor.untyped_storage().data_ptr() for tensor in self.tensors((args, kwargs))}
        new = [t.numel() for t in self.tensors(result) if t.untyped_storage().data_ptr() not in old]
        self.numel = max(self.numel, *new, 0)
        return result

    @staticmethod
    def tensors(tree):
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kernel", [True, False])
def test_a_step_allocates_nothing_of_the_size_of_a_tensor(monkeypatch, kernel):
    size = 3 * memory.CHUNK
    w = nn.Parameter(torch.ones(size))
    w.grad = torch.zeros(size)
    if not kernel:
        monkeypatch.setattr(lambda_sgd, "load_kernel", no_kernel)
    fast = FusedHALO(HALO({"w": w}, xi=0.1, psi=0.1), **FACTORS)
    slow = LambdaSGD(HALO({"w": w}, xi=0.1, psi=0.1), **FACTORS)
    fast.step()
    with LargestTensor() as largest:
        fast.step()
    assert largest.numel <= memory.CHUNK
    with LargestTensor() as largest:
        slow.step()
    assert largest.numel == size  # the watch sees the gradient of lam


def test_nan_stays_visible():
    w = nn.Parameter(torch.tensor([float("nan"), 1.0]))
    w.grad = torch.tensor([0.0, float("nan")])
    penalty = HALO({"w": w}, xi=0.1, psi=0.1)
    FusedHALO(penalty, **FACTORS).step()
    assert penalty.lambdas["w"].isnan().tolist() == [True, False] and w.grad[1].isnan()


def test_other_types_go_without_the_kernel():
    params = random_params(torch.float64)
    optimizer = FusedHALO(halo(params), **FACTORS)
    assert optimizer._kernel is None and optimizer.slow_because is None
    slow = LambdaSGD(halo(random_params(torch.float64)), **FACTORS)
    for one in (optimizer, slow):
        one.step()
    for fast, plain in zip(optimizer.penalty.lambdas.values(), slow.penalty.lambdas.values(), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


@needs_compiler
def test_a_network_that_was_moved_afterwards_is_refused():
    model = nn.Conv2d(3, 4, 3)
    optimizer = FusedHALO(HALO(penalized_parameters(model), xi=0.1, psi=0.1), **FACTORS)
    model.double()
    with pytest.raises(ValueError, match="float64.*after moving"):
        optimizer.step()


def test_a_frozen_weight_is_refused():
    params = random_params(torch.float32)
    params["b.weight"].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen.*LambdaSGD"):
        FusedHALO(halo(params), **FACTORS)


@pytest.mark.parametrize("compiler", [None, "false", "no-such-compiler", "'g++"])
def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, compiler, capsys, tiny, tmp_path):
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    load_kernel.cache_clear()
    train(*tiny, "--halo", "--device", "cpu", *([] if compiler == "false" else ["--compile"]))
    load_kernel.cache_clear()
    notes = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    assert sum("HALO's step" in line for line in notes) == 1
    assert sum("uncompiled" in line for line in notes) == (compiler != "false")


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the type of their weights")
@pytest.mark.parametrize("later", [False, True])
def test_a_gradient_of_another_type_is_refused(later):
    """The kernel would read beyond it."""
    model = nn.Conv2d(3, 64, 3)
    optimizer = FusedHALO(HALO(penalized_parameters(model), xi=1e-3, psi=1e-3), lr=0.1)
    for steps in range(2 if later else 1):
        model.zero_grad()
        if steps == later:
            for p in model.parameters():
                p.grad_dtype = torch.bfloat16
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        if steps == later:
            with pytest.raises(ValueError, match="bfloat16, the weight torch.float32: use LambdaSGD"):
                optimizer.step()
        else:
            optimizer.step()


def test_penalties_that_it_cannot_step_are_named():
    params = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="L1 learns no lam: call penalty.add_grad_"):
        LambdaSGD(L1(params, xi=1e-3), lr=0.1)
    with pytest.raises(ValueError, match="not of SWS: use LambdaSGD"):
        FusedHALO(SWS(params, xi=1e-3, psi=1e-3), lr=0.1)
