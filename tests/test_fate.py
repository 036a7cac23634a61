"""Mistakes in the order of a step: a penalty that no step sees, or that enters the gradients twice."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from utils import halo
from utils.halo.fate import FOLLOWED, Steps
from utils.halo.guard import WATCHED_STEPS

X, Y = torch.randn(8, 3, 6, 6), torch.arange(8) % 2


def parts(make=halo.LambdaSGD, seed=0, **sgd):
    """Return a network, its optimizer, a penalty and the optimizer of lam."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    penalty = halo.HALO(halo.penalized_parameters(model), xi=1e-2, psi=1e-2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, **sgd), penalty, make(penalty, lr=0.1)


def backward(model):
    loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward()
    return loss


@pytest.mark.parametrize("make", [halo.LambdaSGD, halo.FusedHALO])
@pytest.mark.parametrize("sgd", [{}, {"fused": True}])
def test_the_step_of_lam_behind_that_of_the_weights_raises(make, sgd):
    model, optimizer, _, lam_optimizer = parts(make, **sgd)
    with pytest.raises(ValueError, match="did not reach the weights"):
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            lam_optimizer.step()


def test_a_closure_that_zeroes_the_penalty_away_raises_and_one_that_holds_it_does_not():
    model, optimizer, _, lam_optimizer = parts()

    def without():
        optimizer.zero_grad()
        return backward(model)

    def whole():
        loss = without()
        lam_optimizer.step()
        return loss

    for _ in range(5):
        optimizer.step(whole)
    with pytest.raises(ValueError, match="at the end of the closure"):
        for _ in range(3):
            lam_optimizer.step()
            optimizer.step(without)


def correct(model, optimizer, lam_optimizer):
    backward(model)
    lam_optimizer.step()
    optimizer.step()
    optimizer.zero_grad()


def left_out(model, optimizer, lam_optimizer):
    """As a scaler does where the gradients are infinite."""
    backward(model)
    lam_optimizer.step()
    optimizer.zero_grad()


def without_penalty(model, optimizer, lam_optimizer):
    backward(model)
    optimizer.step()
    optimizer.zero_grad()


def another_gradient(model, optimizer, lam_optimizer):
    backward(model)
    lam_optimizer.step()
    for p in model.parameters():
        p.grad = p.grad * 0.9
    optimizer.step()
    optimizer.zero_grad()


def accumulated(model, optimizer, lam_optimizer):
    backward(model)
    correct(model, optimizer, lam_optimizer)


@pytest.mark.parametrize("between", [left_out, without_penalty, another_gradient, accumulated])
@pytest.mark.parametrize("make", [halo.LambdaSGD, halo.FusedHALO])
def test_what_looks_like_it_and_is_right_goes_on(make, between):
    model, optimizer, _, lam_optimizer = parts(make)
    for _ in range(3):
        correct(model, optimizer, lam_optimizer)
        between(model, optimizer, lam_optimizer)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("make", [halo.LambdaSGD, halo.FusedHALO])
def test_a_penalty_may_rest_for_some_steps(make, replaced):
    model, optimizer, _, lam_optimizer = parts(make)
    for step in range(2 * WATCHED_STEPS):
        backward(model)
        if step % 3:
            lam_optimizer.step()
        for p in model.parameters():
            p.grad = p.grad * 0.9 if replaced else p.grad
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [halo.LambdaSGD, halo.FusedHALO])
def test_one_gradient_for_all_steps_is_no_accumulation(make):
    """DistributedDataParallel(gradient_as_bucket_view=True) puts it back after every backward pass."""
    model, optimizer, _, lam_optimizer = parts(make)
    buckets = {p: torch.zeros(p.numel() + 1)[1:].view_as(p) for p in model.parameters()}

    def put_back(p):
        p.grad = buckets[p].copy_(p.grad) if p.grad is not buckets[p] else p.grad

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(put_back)
    for step in range(6):
        backward(model)
        lam_optimizer.step()
        if step != 2:  # which a GradScaler leaves out
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [halo.DecoupledLambdaSGD, halo.FusedHALO])
def test_one_that_is_built_anew_leaves_nothing_of_the_old(make):
    model, optimizer, penalty, lam_optimizer = parts()
    old = weakref.ref(penalty)
    lam_optimizer = make(penalty, weights=optimizer, lr=0.1)
    penalty = halo.HALO(halo.penalized_parameters(model), xi=1e-2, psi=1e-2)
    lam_optimizer = make(penalty, weights=optimizer, lr=0.1)
    gc.collect()
    assert old() is None
    before = penalty.lambdas["0.weight"].clone()
    backward(model)
    lam_optimizer.step()
    optimizer.step()
    assert not torch.equal(penalty.lambdas["0.weight"], before)


def test_a_penalty_that_is_decoupled_may_rest_for_some_steps():
    """It takes its gradient out again, so that there is none that could be lost."""
    model, *_, penalty, _ = parts()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    lam_optimizer = halo.DecoupledLambdaSGD(penalty, weights=optimizer, lr=0.1)
    for step in range(2 * WATCHED_STEPS):
        optimizer.zero_grad()
        backward(model)
        if step % 3:
            lam_optimizer.step()
        optimizer.step()


class Equal(TorchDispatchMode):
    """Count the operations that compare values, for which the host waits."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.equal.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_no_value_is_compared_in_a_loop_of_torchs_optimizers(fused, set_to_none):
    """Nor is a step of learning rate zero, which leaves the values as they are, taken for none."""
    model, optimizer, _, lam_optimizer = parts(fused=fused)
    optimizer.param_groups[0]["lr"] = 0.0
    with Equal() as compared:
        for _ in range(2 * WATCHED_STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model)
            lam_optimizer.step()
            optimizer.step()
    assert compared.count == 0


class Foreign:
    """An optimizer that is none of torch's, and steps without a new version."""

    def __init__(self, params):
        self.params = [*params]

    def step(self):
        for w in self.params:
            w.data.sub_(w.grad, alpha=0.1)
            w.grad.zero_()


def test_an_optimizer_that_is_none_of_torchs_is_seen_by_its_values():
    model, _, _, lam_optimizer = parts()
    optimizer = Foreign(model.parameters())
    for _ in range(3):
        backward(model)
        lam_optimizer.step()
        optimizer.step()
    backward(model)
    lam_optimizer.step()
    with pytest.raises(ValueError, match="a backward pass was added"):
        backward(model)
        lam_optimizer.step()


def test_nothing_is_followed_after_some_steps_nor_for_a_penalty_that_is_gone():
    gc.collect()
    model, optimizer, penalty, lam_optimizer = parts()
    before = len(FOLLOWED)
    correct(model, optimizer, lam_optimizer)
    assert len(FOLLOWED) == before + 1
    for _ in range(WATCHED_STEPS):
        correct(model, optimizer, lam_optimizer)
    assert {type(one) for one in FOLLOWED if one.w in {*model.parameters()}} == {Steps}
    assert not any(w._post_accumulate_grad_hooks for w in penalty.penalized.values())
    model, optimizer, penalty, lam_optimizer = parts()
    correct(model, optimizer, lam_optimizer)
    assert len(FOLLOWED) == before + 1
    del penalty, lam_optimizer
    gc.collect()
    assert len(FOLLOWED) == before
    assert len(_global_optimizer_post_hooks) == 1


def test_penalties_may_be_collected_during_a_step():
    model, optimizer, _, lam_optimizer = parts()
    optimizer.register_step_post_hook(lambda *_: gc.collect())
    for _ in range(3):
        correct(*parts()[:2], parts()[3])  # garbage, in cycles
        correct(model, optimizer, lam_optimizer)


def test_a_penalty_may_be_added_by_a_hook_of_all_optimizers():
    model, optimizer, _, lam_optimizer = parts()

    def zero_then_next(stepped, *_):
        if stepped is optimizer:
            optimizer.zero_grad()
            backward(model)
            lam_optimizer.step()

    handle = register_optimizer_step_post_hook(zero_then_next)
    try:
        correct(model, optimizer, lam_optimizer)
    finally:
        handle.remove()


def test_copies_in_mid_run_go_on():
    original = parts()
    correct(*original[:2], original[3])
    model, optimizer, _, lam_optimizer = copy.deepcopy(original)
    for _ in range(3):
        correct(model, optimizer, lam_optimizer)
        correct(*original[:2], original[3])
    assert all(map(torch.equal, model.parameters(), original[0].parameters()))


def test_a_penalty_in_the_loss_and_in_the_step_raises():
    model, optimizer, penalty, lam_optimizer = parts()
    (nn.functional.cross_entropy(model(X), Y) + penalty()).backward()
    with pytest.raises(ValueError, match="already, by the loss"):
        lam_optimizer.step()
    with pytest.raises(ValueError, match="already, by the loss"):
        penalty.add_grad_()


@pytest.mark.parametrize("make", [halo.LambdaSGD, halo.FusedHALO])
def test_add_grad_and_the_step_of_lam_raises(make):
    model, _, penalty, lam_optimizer = parts(make)
    backward(model)
    penalty.add_grad_()
    with pytest.raises(ValueError, match=r"already, by add_grad_\(\)"):
        lam_optimizer.step()


def test_a_penalty_that_is_only_looked_at_does_not_count():
    model, optimizer, penalty, lam_optimizer = parts()
    for _ in range(3):
        penalty().item()
        correct(model, optimizer, lam_optimizer)
    penalty().backward()  # for its own sake, and cleared
    optimizer.zero_grad()
    penalty.zero_grad()
    correct(model, optimizer, lam_optimizer)


def test_a_term_of_ones_own_on_lam_is_allowed():
    model, optimizer, penalty, lam_optimizer = parts()
    for _ in range(3):
        (nn.functional.cross_entropy(model(X), Y) + sum(lam.square().sum() for lam in penalty.parameters())).backward()
        lam_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    # (1 - 0.1 * 2)^3, of which HALO alone changes little
    assert penalty.lambdas["0.weight"].mean().item() == pytest.approx(0.512, abs=0.01)


@pytest.mark.parametrize("weights", [False, True])
def test_a_term_of_ones_own_on_lam_is_refused_by_the_fused_step_which_would_not_see_it(weights):
    model, optimizer, penalty, _ = parts()
    lam_optimizer = halo.FusedHALO(penalty, lr=0.1, weights=optimizer if weights else None)
    (nn.functional.cross_entropy(model(X), Y) + sum(lam.square().sum() for lam in penalty.parameters())).backward()
    with pytest.raises(ValueError, match="lam has a gradient of its own, .* use LambdaSGD"):
        lam_optimizer.step()


FORMS = {"decoupled": halo.DecoupledLambdaSGD, "fused": halo.FusedHALO}


class Sharpness(torch.optim.Optimizer):
    """SAM as it is usually written: its steps have names of their own."""

    def __init__(self, params, base):
        self.base_optimizer = base
        super().__init__(params, {})
        self.param_groups = base.param_groups

    def step(self, closure=None):
        raise AssertionError


@pytest.mark.parametrize(("form", "way"), [("decoupled", "rebuilt"), ("fused", "rebuilt"), ("decoupled", "SAM")])
def test_another_optimizer_than_the_one_that_was_named_is_noticed(form, way):
    model, optimizer, penalty, _ = parts()
    named = Sharpness(model.parameters(), optimizer) if way == "SAM" else torch.optim.SGD(model.parameters(), lr=0.1)
    lam_optimizer = FORMS[form](penalty, lr=0.1, weights=named)
    backward(model)
    lam_optimizer.step()
    lam_optimizer.step()  # nothing has been stepped yet, as where gradients are accumulated
    optimizer.step()
    with pytest.raises(ValueError, match="by another optimizer than weights=, so that the penalty did not act"):
        lam_optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_of_other_weights_may_step_between(form):
    model, optimizer, penalty, _ = parts()
    lam_optimizer, other = FORMS[form](penalty, lr=0.1, weights=optimizer), torch.optim.SGD([nn.Parameter(X)], lr=0.1)
    for _ in range(3):
        before = penalty.lambdas["0.weight"].clone()
        backward(model)
        lam_optimizer.step()
        other.step()
        lam_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(penalty.lambdas["0.weight"], before)


def test_options_that_a_state_brings_are_refused_by_the_pass_with_the_weights():
    model, optimizer, penalty, _ = parts(momentum=0.9)
    lam_optimizer = halo.FusedHALO(penalty, lr=0.1, weights=optimizer)
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True).state_dict())
    backward(model)
    lam_optimizer.step()
    with pytest.raises(ValueError, match="without nesterov"):
        optimizer.step()


def test_a_maximizing_optimizer_is_told_what_is_right():
    model, _, penalty, _ = parts()
    with pytest.raises(ValueError, match="maximize=True: minimise the negative, or use DecoupledLambdaSGD"):
        halo.FusedHALO(penalty, lr=0.1, weights=torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))


def test_what_is_computed_is_no_parameter():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="cannot penalise 'a': it is computed from other tensors"):
        halo.HALO({"a": layer.weight}, xi=1e-3, psi=1e-3)
    with pytest.raises(ValueError, match="a is computed from other tensors"):
        halo.prune_by_magnitude_({"a": layer.weight}, 0.5)


@pytest.mark.parametrize("make", [halo.LambdaSGD, halo.FusedHALO, halo.DecoupledLambdaSGD])
def test_lam_that_gets_another_layout_with_the_model_goes_on_with_its_momenta(make):
    def trained(change):
        model, optimizer, _, _ = parts()
        model.penalty = halo.HALO(halo.penalized_parameters(model), xi=0.1, psi=0.1, lambda_init=0.5)
        weights = {"weights": optimizer} if make is halo.DecoupledLambdaSGD else {}
        lam_optimizer = make(model.penalty, lr=0.05, momentum=0.9, **weights)
        for step in range(6):
            if change and step == 3:
                model.to(memory_format=torch.channels_last)
            nn.functional.cross_entropy(model[3](model[:3](X)), Y).backward()
            lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        return model.penalty.lambdas["0.weight"]

    assert trained(True).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-5)


def test_clipping_in_16_bits_is_no_scaler():
    """The only number of the smallest tensor is halved, by chance, in no scaler's name."""
    w = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    penalty = halo.L1({"w": w}, xi=1e-3)
    for _ in range(3):
        w.grad = torch.ones_like(w)
        penalty.add_grad_()
        w.grad.mul_(0.5)
        torch.optim.SGD([w], lr=0.1).step()
        w.grad = None


class Log(halo.Penalty):
    """xi * sum log(1 + |w| / eps), with a learned eps."""

    def __init__(self, params, *, xi):
        super().__init__(params)
        self.xi, self.eps = xi, nn.Parameter(torch.tensor(0.1))

    def forward(self):
        return self.xi * sum((w.abs() / self.eps).log1p().sum() for w in self.penalized.values())


class SquaredHALO(halo.HALO):
    """HALO with another pull of lam, and nothing but the equation."""

    def forward(self):
        return sum(
            self.xi * (self.penalized[n].abs() / lam**2).sum() + lam.square().sum() for n, lam in self.lambdas.items()
        )


@pytest.mark.parametrize("make", [lambda p: Log(p, xi=0.1), lambda p: SquaredHALO(p, xi=0.1, psi=0.1)])
def test_an_equation_alone_is_a_penalty(make):
    model = parts()[0]
    penalty = make(halo.penalized_parameters(model))
    tensors = [*penalty.penalized.values(), *penalty.parameters()]
    expected = torch.autograd.grad(penalty(), tensors)
    backward(model)
    of_loss = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in tensors]
    penalty.add_grad_()
    for p, before, grad in zip(tensors, of_loss, expected, strict=True):
        torch.testing.assert_close(p.grad, before + grad)
        assert grad.abs().sum() > 0


def test_an_equation_of_what_is_frozen_adds_nothing():
    model = parts()[0]
    penalty = Log(halo.penalized_parameters(model), xi=0.1)
    for p in (*penalty.penalized.values(), *penalty.parameters()):
        p.requires_grad_(False)
    penalty.add_grad_()
    assert all(p.grad is None for p in (*penalty.penalized.values(), *penalty.parameters()))


def test_the_fused_step_takes_halo_alone():
    model = parts()[0]
    with pytest.raises(ValueError, match="HALO alone, not of SquaredHALO: use LambdaSGD"):
        halo.FusedHALO(SquaredHALO(halo.penalized_parameters(model), xi=0.1, psi=0.1), lr=0.1)


def test_closed_forms_are_used_where_they_are(monkeypatch):
    monkeypatch.setattr(halo.Penalty, "_add_autograd_", lambda _: pytest.fail("autograd"))
    for name, coefficients in (
        ("none", {}),
        ("halo", {"xi": 1, "psi": 1}),
        ("l1", {"xi": 1}),
        ("mcp", {"xi": 1, "psi": 1}),
    ):
        model = parts()[0]
        backward(model)
        halo.make_penalty(name, halo.penalized_parameters(model), **coefficients).add_grad_()
