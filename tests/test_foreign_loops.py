"""HALO in training loops that nobody here wrote: what works, and what the errors say."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_penalties import random_params
from torch import nn
from torch.nn.utils import prune

from utils import HALO, L1, MCP, SWS, DecoupledLambdaSGD, FusedHALO, LambdaSGD, penalized_parameters
from utils.halo import lambda_sgd
from utils.halo.floor import LAMBDA_FLOOR
from utils.halo.guard import NamedParameters

FACTORS = {"lr": 0.05, "momentum": 0.9}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def batch(*, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator)


def loss_of(model, **which):
    images, labels = batch(**which)
    return F.cross_entropy(model(images), labels)


def halo(model, **coefficients):
    return HALO(penalized_parameters(model), **({"xi": 0.01, "psi": 0.01} | coefficients))


def no_compiler():
    raise OSError("no C++ compiler g++ on the PATH")


def weights_after(model, *others):
    return [p.detach().clone() for p in (*model.parameters(), *(q for other in others for q in other.parameters()))]


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# What is passed to the constructor


@pytest.mark.parametrize("build", [lambda p: HALO(p, xi=1, psi=1), lambda p: L1(p, xi=1)])
@pytest.mark.parametrize(
    "wrong",
    [
        network(),
        network().parameters(),
        list(network().parameters()),
        list(network().named_parameters()),
        dict(network().named_children()),
    ],
)
def test_what_is_no_mapping_of_tensors_is_told_what_to_pass(build, wrong):
    with pytest.raises(ValueError, match=r"penalized_parameters\(model\)"):
        build(wrong)


def test_tied_weights_are_penalised_once():
    tied = nn.Parameter(torch.tensor([1.0, -2.0]))
    penalty = HALO({"encoder": tied, "decoder": tied}, xi=0.1, psi=0.2)
    penalty.add_grad_()
    assert list(penalty.lambdas) == ["encoder"]
    assert penalty().item() == pytest.approx(0.1 * 3 + 0.2 * 2)
    assert tied.grad.tolist() == pytest.approx([0.1, -0.1])


# GradScaler


def scaled_step(order, *, make=LambdaSGD, penalty_of=halo, scale=2.0**16, fused=None, blow_up=False):
    """Train for one step in fp16; return weights, lam, and whether the step was taken."""
    model = network()
    penalty = penalty_of(model)
    lam_optimizer = make(penalty, **FACTORS) if list(penalty.parameters()) else None
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = weights_after(model)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model) * (1e8 if blow_up else 1)
    scaler.scale(loss.float()).backward()
    if order == "unscaled first":
        scaler.unscale_(optimizer)
    (lam_optimizer.step if lam_optimizer else penalty.add_grad_)(scaler=scaler)
    if order == "unscaled later":
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return weights_after(model), weights_after(penalty), not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("make", [LambdaSGD, FusedHALO])
@pytest.mark.parametrize("order", ["unscaled later", "unscaled by the scaler's step"])
@pytest.mark.parametrize("fused", [None, True])
def test_with_a_scaler_either_order_is_right(make, order, fused):
    def strong(model):
        return halo(model, xi=10.0, psi=10.0)

    weights, lam, _ = scaled_step("unscaled first", make=make, penalty_of=strong)
    scaled_weights, scaled_lam, _ = scaled_step(order, make=make, penalty_of=strong, fused=fused)
    assert_same(scaled_weights, weights, rtol=1e-6, atol=1e-6)
    assert_same(scaled_lam, lam)
    assert (network()[0].weight - weights[0]).abs().min() > 0.5  # 0.1 * 10 and the loss


def test_with_a_scaler_l1_keeps_its_strength():
    results = [
        scaled_step(order, penalty_of=lambda model: L1(penalized_parameters(model), xi=10.0))[0]
        for order in ("unscaled first", "unscaled later")
    ]
    assert_same(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [LambdaSGD, FusedHALO])
def test_where_the_scaler_leaves_a_step_out_lam_is_stepped_all_the_same(make):
    _, lam, stepped = scaled_step("unscaled later", make=make)
    _, lam_without, stepped_without = scaled_step("unscaled later", make=make, blow_up=True)
    assert stepped and not stepped_without
    assert_same(lam_without, lam)


def test_where_the_scaler_leaves_out_a_step_that_has_lam_in_it_both_stay():
    model = network()
    penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), 0.1)
    lam_optimizer = FusedHALO(penalty, **FACTORS, weights=optimizer)
    scaler = torch.amp.GradScaler("cpu")
    moved = []
    for factor in (float("inf"), 1.0):
        before = weights_after(model, penalty)
        scaler.scale(loss_of(model) * factor).backward()
        lam_optimizer.step(scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append([not torch.equal(a, b) for a, b in zip(before, weights_after(model, penalty), strict=True)])
    assert not any(moved[0]) and all(moved[1])


def test_a_penalty_that_the_scaler_divides_is_noticed_at_the_next_step():
    model = network()
    penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    penalty.add_grad_()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(ValueError, match=r"divided by 65536 .*add_grad_\(scaler=scaler\)"):
        penalty.add_grad_()


@pytest.mark.parametrize("unscaled", ["none", "head", "all"])
def test_a_scaler_of_several_optimizers_unscales_none_or_all(unscaled):
    """The scaler does not tell whose gradients it has unscaled."""
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.Sequential(body, head)
    penalty = L1({"body": body.weight}, xi=10.0)
    optimizers = {"body": torch.optim.SGD(body.parameters(), 0.1), "head": torch.optim.SGD(head.parameters(), 0.1)}
    scaler, before = torch.amp.GradScaler("cpu"), body.weight.detach().clone()
    for step in range(2):
        scaler.scale(model(torch.ones(3, 4)).square().mean()).backward()
        for name, optimizer in optimizers.items():
            if unscaled in (name, "all"):
                scaler.unscale_(optimizer)
        if step and unscaled == "head":
            with pytest.raises(ValueError, match=r"scaler.unscale_\(\) of all optimizers before it or of none"):
                penalty.add_grad_(scaler=scaler)
            return
        penalty.add_grad_(scaler=scaler)
        for optimizer in optimizers.values():
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        if not step and unscaled != "head":
            assert ((body.weight - before).abs() - 1).abs().max() < 0.5  # 0.1 * 10, and what the loss does


@pytest.mark.parametrize("weights", [True, False])
def test_scaler_step_of_the_optimizer_of_lam_is_refused(weights):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=weights)
    lam_optimizer = FusedHALO(halo(model), **FACTORS, weights=optimizer) if weights else LambdaSGD(halo(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(ValueError, match=r"step\(scaler=scaler\)"):
        scaler.step(lam_optimizer)
    if weights:
        lam_optimizer = FusedHALO(halo(model), **FACTORS, weights=optimizer)
        lam_optimizer.step()
        with pytest.raises(ValueError, match="fused=True.*without weights="):
            scaler.step(optimizer)


# A tensor that is no longer the network's


def replace_a_layer(model):
    model[0] = nn.Conv2d(3, 4, 3)


def assign(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def reparametrise(model):
    nn.utils.parametrizations.weight_norm(model[0])


def convert(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("change", [replace_a_layer, assign, reparametrise, convert])
@pytest.mark.parametrize("kind", ["halo", "l1", "fused", "weights"])
def test_a_tensor_that_left_the_network_is_noticed(change, kind):
    model = network()
    params = penalized_parameters(model)
    penalty = L1(params, xi=0.1) if kind == "l1" else HALO(params, xi=0.1, psi=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"weights": optimizer} if kind == "weights" else {}
    step = penalty.add_grad_ if kind in ("halo", "l1") else FusedHALO(penalty, **FACTORS, **options).step
    step()
    optimizer.step()
    change(model)
    with pytest.raises(ValueError, match=r"'0\.(weight|bias)' is no longer .*Sequential.*penalty\.state_dict\(\)"):
        step()
        optimizer.step()
    if kind == "halo" and change is not reparametrise:
        new = halo(model)
        new.load_state_dict(penalty.state_dict())
        assert_same(weights_after(new), weights_after(penalty), check_dtype=False)


def test_a_layer_that_has_another_name_now_is_still_the_networks():
    model = network()
    penalty = halo(model)
    model.insert(0, nn.Identity())
    prune.identity(model[1], "weight")  # weight is weight_orig now
    penalty.add_grad_()
    assert model[1].weight_orig.grad is not None


@pytest.mark.parametrize("kind", [LambdaSGD, FusedHALO])
def test_lam_elsewhere_than_its_weight_is_an_error(kind):
    model = network()
    penalty = halo(model).to("meta")
    optimizer = kind(penalty, **FACTORS)
    with pytest.raises(ValueError, match=r"'0.weight' is on cpu, its lam on meta: .*penalty.to\('cpu'\)"):
        optimizer.step()


def test_a_weight_of_another_shape_is_an_error():
    model = network()
    penalty = halo(model)
    model[0].weight.data = torch.ones(1, 3, 3, 3)  # which would broadcast
    with pytest.raises(ValueError, match=r"\(1, 3, 3, 3\).*\(4, 3, 3, 3\)"):
        penalty.add_grad_()


def test_the_network_may_change_its_type_and_layout_and_lam_keeps_its_type():
    model = network()
    model.penalty = halo(model, xi=1e-8, lambda_init=1e-6)
    model.half()
    lam = model.penalty.lambdas["0.weight"]
    assert model[0].weight.dtype == torch.float16 and lam.dtype == torch.float32 and (lam == 1e-6).all()
    model.double()
    model.penalty.add_grad_()
    assert model[0].weight.grad.dtype == torch.float64 and lam.dtype == torch.float32


@pytest.mark.parametrize("kind", [HALO, L1, SWS, MCP])
def test_every_penalty_goes_on_in_fp64(kind):
    coefficients = {"xi": 1e-2} if kind is L1 else {"xi": 1e-2, "psi": 1e-2}
    grads = []
    for later in (False, True):
        model = network()
        if not later:
            model.double()
        penalty = kind(penalized_parameters(model), **coefficients)
        model.double()
        penalty.add_grad_()
        grads.append([w.grad for w in (*penalty.penalized.values(), *penalty.lambdas.values())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("option", ["nesterov", "maximize", "dampening"])
def test_a_state_with_an_option_that_the_kernel_lacks_is_refused(option):
    penalty = halo(network())
    value = {"nesterov": True, "maximize": True, "dampening": 0.5}[option]
    other = torch.optim.SGD(penalty.parameters(), 0.1, momentum=0.9, **{option: value})
    with pytest.raises(ValueError, match=f"an SGD with {option}, which FusedHALO does not have: use LambdaSGD"):
        FusedHALO(penalty, **FACTORS).load_state_dict(other.state_dict())


@pytest.mark.parametrize("weights", [True, False])
def test_a_layout_that_changes_later_is_followed(weights):
    """The kernel walks w and lam by address, so that different layouts would pair the wrong elements."""
    results = []
    for later in (False, True):
        model = network()
        if not later:
            model.to(memory_format=torch.channels_last)
        penalty = halo(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        lam_optimizer = FusedHALO(penalty, **FACTORS, **({"weights": optimizer} if weights else {}))
        model.to(memory_format=torch.channels_last)
        for step in range(3):
            loss_of(model, seed=step).backward()
            lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights_after(model, penalty))
    assert_same(*results)


def test_one_layer_of_another_type_is_refused_by_the_kernel():
    params = random_params(torch.float32)
    optimizer = FusedHALO(HALO(params, xi=0.1, psi=0.1), **FACTORS)
    params["b.weight"].data = params["b.weight"].data.double()
    with pytest.raises(ValueError, match="float64.*after moving"):
        optimizer.step()


def test_a_weight_that_is_frozen_later_is_refused_by_the_fused_step():
    model = network()
    optimizer = FusedHALO(halo(model), **FACTORS)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen.*LambdaSGD"):
        optimizer.step()


def test_a_partly_frozen_network():
    model = network()
    penalty = halo(model)
    optimizer = LambdaSGD(penalty, **FACTORS)
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    for _ in range(3):
        weights = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        loss_of(model).backward()
        optimizer.step()
        weights.step()
        weights.zero_grad()
    assert torch.equal(model[0].bias, before) and model[0].bias.grad is None


# Accumulation and clipping


@pytest.mark.parametrize("kind", ["halo", "l1", "lam", "fused"])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_adds_the_penalty_once_or_says_so(kind, fused, set_to_none):
    model = network()
    params = penalized_parameters(model)
    penalty = L1(params, xi=0.1) if kind == "l1" else HALO(params, xi=0.1, psi=0.1)
    steps = {"lam": lambda: LambdaSGD(penalty, **FACTORS).step, "fused": lambda: FusedHALO(penalty, **FACTORS).step}
    step = steps[kind]() if kind in steps else penalty.add_grad_
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=fused)
    for _ in range(3):  # the right order, with two backward passes a step
        for micro in range(2):
            loss_of(model, seed=micro).backward()
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    loss_of(model).backward()
    step()
    loss_of(model).backward()
    with pytest.raises(ValueError, match="once a step, after the last backward pass"):
        step()


def test_accumulation_with_the_weights_in_the_pass_cannot_go_wrong():
    results = []
    for often in (False, True):
        model = network()
        penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), 0.1)
        lam_optimizer = FusedHALO(penalty, **FACTORS, weights=optimizer)
        for micro in range(3):
            loss_of(model, seed=micro).backward()
            if often:
                lam_optimizer.step()
        if not often:
            lam_optimizer.step()
        optimizer.step()
        results.append(weights_after(model, penalty))
    assert_same(*results)


@pytest.mark.parametrize("kernel", [True, False])
def test_clipping_is_the_same_before_and_after_the_pass_with_the_weights(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(lambda_sgd, "load_kernel", no_compiler)
    results = []
    for order in ("before", "after", "readable"):
        model = network()
        penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        options = {} if order == "readable" else {"weights": optimizer}
        lam_optimizer = (LambdaSGD if order == "readable" else FusedHALO)(penalty, **FACTORS, **options)
        for step in range(3):
            loss_of(model, seed=step).backward()
            if order == "after":
                lam_optimizer.step()
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2
            if order != "after":
                lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights_after(model, penalty))
    assert_same(results[0], results[1], rtol=0, atol=0)
    assert_same(results[0], results[2], rtol=1e-5, atol=1e-6)


# Optimizers of the weights


def test_adamw_with_parameter_groups():
    model = network()
    penalty = halo(model)
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[4].parameters(), "lr": 1e-2}]
    optimizer, lam_optimizer = torch.optim.AdamW(groups, 1e-3), FusedHALO(penalty, **FACTORS)
    plain = copy.deepcopy(model)
    loss_of(model).backward()
    lam_optimizer.step()
    expected = [p.grad.clone() for p in model[0].parameters()]
    optimizer.step()
    # AdamW's first step is lr * sign(gradient), after the decay
    for before, after, grad in zip(plain[0].parameters(), model[0].parameters(), expected, strict=True):
        torch.testing.assert_close(after, before * (1 - 1e-3 * 0.1) - 1e-3 * grad.sign(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: torch.optim.AdamW(m.parameters()), "AdamW.*leave out weights="),
        (lambda m: torch.optim.SGD([{"params": m[0].parameters()}, {"params": m[4].parameters()}], 0.1), "has 2"),
        (lambda m: torch.optim.SGD(m[4].parameters(), 0.1), "'0.weight' is penalised.*does not have it"),
        (lambda m: torch.optim.SGD([{"params": m.parameters(), "nesterov": True}], 0.1, 0.9), "nesterov=True"),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9, maximize=True), "without maximize"),
    ],
)
def test_weights_that_the_pass_cannot_take(make, words):
    model = network()
    with pytest.raises(ValueError, match=words) as error:
        FusedHALO(halo(model), **FACTORS, weights=make(model))
    assert "nesterov" in words or "nesterov" not in str(error.value)


@pytest.mark.parametrize("kind", ["lam", "fused", "weights"])
def test_a_closure_is_called_and_its_loss_returned(kind):
    model = network()
    penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), 0.1)
    options = {"weights": optimizer} if kind == "weights" else {}
    lam_optimizer = (LambdaSGD if kind == "lam" else FusedHALO)(penalty, **FACTORS, **options)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    before = weights_after(penalty)
    assert lam_optimizer.step(closure).item() == pytest.approx(loss_of(network()).item())
    optimizer.step()
    assert all((a != b).any() for a, b in zip(before, weights_after(penalty), strict=True))
    assert lam_optimizer.step() is None and lam_optimizer.step(closure=None) is None
    if kind == "weights":
        with pytest.raises(ValueError, match="closure before"):
            optimizer.step(closure)


def test_a_scheduler_of_the_optimizer_of_lam():
    model = network()
    lam_optimizer = FusedHALO(halo(model), **FACTORS, weights=torch.optim.SGD(model.parameters(), 0.1))
    once = torch.optim.lr_scheduler.OneCycleLR(lam_optimizer, max_lr=0.05, total_steps=4)
    moved = []
    for _ in range(3):
        before = weights_after(lam_optimizer.penalty)[0]
        loss_of(model).backward()
        lam_optimizer.step()
        lam_optimizer._weights.step()
        once.step()
        moved.append((before - weights_after(lam_optimizer.penalty)[0]).abs().max().item())
    assert moved[0] < moved[1] and lam_optimizer.param_groups[0]["lr"] != 0.05


def decoupled_loop(order, *, copies=None):
    """Train with AdamW for three steps of two micro-batches; return weights and lam."""
    model = network()
    penalty, optimizer = halo(model, xi=0.1, psi=0.1), torch.optim.AdamW(model.parameters(), 1e-2)
    lam_optimizer = DecoupledLambdaSGD(penalty, weights=optimizer, **FACTORS)
    scaler = torch.amp.GradScaler("cpu", enabled=order == "scaled")
    for step in range(3):
        if copies and step == 1:
            model, penalty, optimizer, lam_optimizer = copies((model, penalty, optimizer, lam_optimizer))
        for micro in range(2):
            scaler.scale(loss_of(model, seed=step + micro)).backward()
            if order == "often":
                lam_optimizer.step()
        lam_optimizer.step(scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return weights_after(model, penalty)


def test_decoupled_from_adamw_the_pull_is_what_the_penalty_says():
    results = []
    for penalised in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(
            [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[4].parameters()}]
        )
        penalty = halo(model, xi=0.3, psi=0.0)
        lam_optimizer = DecoupledLambdaSGD(penalty, weights=optimizer, **FACTORS)
        loss_of(model).backward()
        grads = [p.grad.clone() for p in model[0].parameters()]
        if penalised:
            lam_optimizer.step()
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(model[0].parameters(), grads, strict=True))
        results.append([p.detach().clone() for p in model[0].parameters()])
    for plain, pulled, lam in zip(*results, penalty.lambdas.values(), strict=True):
        torch.testing.assert_close(pulled, plain - 1e-3 * 0.3 * plain.sign(), rtol=0, atol=1e-7)
        torch.testing.assert_close(lam.detach(), 1 + 0.05 * 2 * 0.3 * plain.abs(), rtol=0, atol=1e-6)


def test_decoupled_pulls_with_the_learning_rate_of_each_group():
    fast, slow = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [fast], "lr": 0.1}, {"params": [slow], "lr": 0.01}])
    pull = DecoupledLambdaSGD(L1({"fast": fast, "slow": slow}, xi=1.0), weights=optimizer, lr=0.0)
    fast.grad, slow.grad = torch.zeros(3), torch.zeros(3)
    pull.step()
    optimizer.step()
    assert fast.tolist() == pytest.approx([0.9] * 3) and slow.tolist() == pytest.approx([0.99] * 3)


@pytest.mark.parametrize(
    "make",
    [partial(L1, xi=0.1), partial(MCP, xi=0.1, psi=2.0), partial(HALO, xi=0.1, psi=0.1)],
    ids=["l1", "mcp", "halo"],
)
@pytest.mark.parametrize("way", ["add_grad_", "decoupled", "decoupled, asked before the backward pass"])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_penalty_in_the_loss_and_beside_it_would_count_twice(make, way, set_to_none):
    """Also one that learns nothing; in one way alone it may be in the loss, and change its way later."""
    model = network()
    penalty, optimizer = make(penalized_parameters(model)), torch.optim.SGD(model.parameters(), 0.01)
    beside = DecoupledLambdaSGD(penalty, weights=optimizer, lr=0.1) if way != "add_grad_" else None

    def step(*, in_loss, apart):
        if apart and "before" in way:
            beside.step()
        loss = loss_of(model) + (penalty() if in_loss else 0)
        loss.backward()
        if apart and "before" not in way:
            beside.step() if beside else penalty.add_grad_()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        penalty.zero_grad()

    for in_loss in (True, True, False, False, True):
        step(in_loss=in_loss, apart=not in_loss)
    with pytest.raises(ValueError, match="hold the penalty already, by the loss"):
        step(in_loss=True, apart=True)


@pytest.mark.parametrize("make", [LambdaSGD, FusedHALO])
def test_a_state_of_another_layout_is_continued_and_of_another_shape_refused(make):
    weights, results = torch.rand(4, 3, 3, 3) + 0.1, []
    gradient = torch.rand(4, 3, 3, 3)

    def begin(layout, shape=weights.shape):
        w = nn.Parameter(weights.expand(shape).contiguous(memory_format=layout))
        return w, make(HALO({"w": w}, xi=0.5, psi=0.1), **FACTORS)

    def run(w, optimizer):
        for _ in range(3):
            w.grad = gradient.contiguous(memory_format=torch.channels_last).clone()
            optimizer.step()
        return optimizer.penalty

    for layout in (torch.contiguous_format, torch.channels_last):
        penalty = run(*(first := begin(torch.contiguous_format)))
        w, optimizer = begin(layout)
        optimizer.penalty.load_state_dict(penalty.state_dict())
        optimizer.load_state_dict(first[1].state_dict())
        results.append(run(w, optimizer).lambdas["w"].detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1, 1, 3, 3))], 0.1, momentum=0.9)
    other.param_groups[0]["params"][0].grad = torch.ones(1, 1, 3, 3)
    other.step()
    with pytest.raises(ValueError, match=r"momentum of shape \(1, 1, 3, 3\), not \(4, 3, 3, 3\)"):
        begin(torch.contiguous_format)[1].load_state_dict(other.state_dict())


def test_decoupled_steps_lam_with_every_factor_that_it_was_given():
    """Beside weights that stand still, three steps of lam are those of LambdaSGD."""
    results = []
    for kind in (LambdaSGD, DecoupledLambdaSGD):
        model = network()
        penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), lr=0.0)
        options = {"weights": optimizer} if kind is DecoupledLambdaSGD else {}
        lam_optimizer = kind(penalty, lr=0.05, momentum=0.9, weight_decay=0.2, **options)
        for _ in range(3):
            loss_of(model).backward()
            lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        results.append([*penalty.lambdas.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_decoupled_from_an_optimizer_that_maximizes_the_penalty_is_minimised():
    """Where nothing but the penalty is there, the weights shrink."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    penalty = L1(penalized_parameters(model), xi=0.1)
    pull = DecoupledLambdaSGD(penalty, weights=optimizer, lr=0.0)
    before = [w.detach().clone() for w in penalty.penalized.values()]
    (0 * loss_of(model)).backward()
    pull.step()
    optimizer.step()
    for w, old in zip(penalty.penalized.values(), before, strict=True):
        torch.testing.assert_close(w.detach(), old - 0.01 * old.sign(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_decoupled_where_a_scaler_leaves_a_step_out_lam_stays_unless_fused(fused):
    """An unfused optimizer is not called then; a fused one is, and leaves its own part out."""
    model = network()
    penalty, optimizer = halo(model), torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    lam_optimizer = DecoupledLambdaSGD(penalty, weights=optimizer, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (torch.inf, 1.0):
        before = weights_after(penalty)
        (factor * scaler.scale(loss_of(model))).backward()
        lam_optimizer.step(scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        stayed = {torch.equal(now, was) for now, was in zip(weights_after(penalty), before, strict=True)}
        assert stayed == {factor != 1 and not fused}


def test_a_closure_that_is_called_often_takes_the_penalty_in_its_loss():
    """LBFGS with a line search compares losses: the whole objective falls in every step."""
    model = network()
    penalty = L1(penalized_parameters(model), xi=0.01)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = loss_of(model) + penalty()
        total.backward()
        return total

    losses = [closure().item()]
    for _ in range(3):
        optimizer.step(closure)
        losses.append(closure().item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5


def test_gradients_zeroed_in_place_after_a_step_left_out_look_like_accumulation():
    """As docs/own_loop.md says; with set_to_none, the default, the loop goes on."""
    for set_to_none in (True, False):
        model = network()
        penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), 0.1)
        lam_optimizer = LambdaSGD(penalty, **FACTORS)
        for step in range(3):
            loss_of(model).backward()
            if step == 2 and not set_to_none:
                with pytest.raises(ValueError, match="accumul|backward pass"):
                    lam_optimizer.step()
                break
            lam_optimizer.step()
            if step != 1:  # as a scaler does where a gradient overflows
                optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)


def test_lam_of_weights_that_are_held_begins_anew():
    """The one line of docs/own_loop.md resets lam of the zeros alone."""
    model = network()
    penalty = halo(model, psi=1.0)
    with torch.no_grad():
        for w, lam in zip(penalty.penalized.values(), penalty.lambdas.values(), strict=True):
            w.view(-1)[::2] = 0
            lam.fill_(0.3)
    for name in penalty.lambdas:
        penalty.lambdas[name].data.masked_fill_(penalty.penalized[name] == 0, 1.0)
    for w, lam in zip(penalty.penalized.values(), penalty.lambdas.values(), strict=True):
        assert (lam[w == 0] == 1).all() and (lam[w != 0] == 0.3).all()


@pytest.mark.parametrize("order", ["often", "scaled"])
def test_decoupled_no_order_is_wrong(order):
    assert_same(decoupled_loop(order), decoupled_loop("once"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_decoupled_goes_on_in_a_copy(copies):
    assert_same(decoupled_loop("once", copies=copies), decoupled_loop("once"), rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda p: L1(p, xi=0.3), lambda p: MCP(p, xi=0.3, psi=1e6)])
def test_decoupled_takes_penalties_that_learn_nothing(make):
    results = []
    for penalised in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        penalty = make(penalized_parameters(model))
        lam_optimizer = DecoupledLambdaSGD(penalty, weights=optimizer, **FACTORS)
        if penalised:
            lam_optimizer = pickle.loads(pickle.dumps((model, optimizer, penalty, lam_optimizer)))
            model, optimizer, penalty, lam_optimizer = lam_optimizer
        loss_of(model).backward()
        if penalised:
            lam_optimizer.step()
            lam_optimizer.load_state_dict(lam_optimizer.state_dict())
        optimizer.step()
        results.append([p.detach().clone() for p in penalty.penalized.values()])
    for plain, pulled in zip(*results, strict=True):
        torch.testing.assert_close(pulled, plain - 1e-3 * 0.3 * plain.sign(), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="learns no lam"):
        LambdaSGD(penalty, **FACTORS)


def test_decoupled_wants_every_penalised_weight_in_the_optimizer():
    model = network()
    with pytest.raises(ValueError, match="'0.weight' is penalised.*add it there"):
        DecoupledLambdaSGD(halo(model), weights=torch.optim.AdamW(model[4].parameters()), lr=0.1)


# Copies and files


@pytest.mark.parametrize("kind", ["lam", "fused", "weights"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_a_copy_of_all_goes_on_as_the_original_does(kind, copied):
    model = network()
    penalty, optimizer = halo(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    options = {"weights": optimizer} if kind == "weights" else {}
    lam_optimizer = (LambdaSGD if kind == "lam" else FusedHALO)(penalty, **FACTORS, **options)

    def go_on(model, optimizer, penalty, lam_optimizer):
        for step in range(2):
            loss_of(model, seed=step).backward()
            lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        return weights_after(model, penalty)

    go_on(model, optimizer, penalty, lam_optimizer)
    parts = copied((lam_optimizer, penalty, model, optimizer))
    before = weights_after(model, penalty)
    theirs = go_on(parts[2], parts[3], parts[1], parts[0])
    assert_same(weights_after(model, penalty), before, rtol=0, atol=0)
    assert_same(go_on(model, optimizer, penalty, lam_optimizer), theirs, rtol=0, atol=0)
    assert parts[1].penalized.model is parts[2]
    assert (theirs[0] != before[0]).any() and (theirs[-1] != before[-1]).any()


def test_lam_and_its_momentum_are_saved_by_state_dicts(tmp_path):
    def parts():
        model = network()
        penalty = halo(model)
        return model, torch.optim.AdamW(model.parameters(), 1e-2), penalty, FusedHALO(penalty, **FACTORS)

    def go_on(model, optimizer, penalty, lam_optimizer):
        for step in range(2):
            loss_of(model, seed=step).backward()
            lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()

    first, second = parts(), parts()
    go_on(*first)
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    for part, state in zip(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    go_on(*first)
    go_on(*second)
    assert_same(weights_after(first[0], first[2]), weights_after(second[0], second[2]), rtol=0, atol=0)


def test_lam_that_was_exchanged_is_noticed():
    penalty = halo(network())
    optimizer = LambdaSGD(penalty, **FACTORS)
    penalty.load_state_dict(halo(network()).state_dict(), assign=True)
    with pytest.raises(ValueError, match="lam was exchanged"):
        optimizer.step()


def test_a_penalty_inside_the_network_does_no_harm():
    """lam is then among model.parameters(), and neither clipped nor stepped by the optimizer of the weights."""
    results = []
    for inside in (False, True):
        model = network()
        penalty = halo(model)
        if inside:
            model.penalty = penalty
            assert any(p is penalty.lambdas["0.weight"] for p in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
        lam_optimizer = LambdaSGD(penalty, **FACTORS)
        for step in range(3):
            images, labels = batch(seed=step)
            logits = images
            for layer in list(model)[:5]:
                logits = layer(logits)
            F.cross_entropy(logits, labels).backward()
            lam_optimizer.step()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append([*weights_after(penalty), *(p.detach() for p in penalty.penalized.values())])
        assert not inside or pickle.loads(pickle.dumps(model)).penalty.penalized.model[0].weight.shape == (4, 3, 3, 3)
    assert_same(*results, rtol=0, atol=0)


# Networks


def test_a_compiled_network():
    results = []
    for compiled in (False, True):
        model = network()
        forward = torch.compile(model, backend="eager") if compiled else model
        penalty, optimizer = halo(forward), torch.optim.AdamW(forward.parameters(), 1e-2)
        lam_optimizer = LambdaSGD(penalty, **FACTORS)
        for step in range(3):
            loss_of(forward, seed=step).backward()
            lam_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights_after(model, penalty))
    assert_same(*results, rtol=1e-4, atol=1e-5)


def test_a_transformer_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    penalty = HALO(penalized_parameters(model, linear=True), xi=0.1, psi=0.01)
    optimizer, lam_optimizer = torch.optim.AdamW(model.parameters(), 1e-2), LambdaSGD(penalty, **FACTORS)
    norm = [sum(w.abs().sum().item() for w in penalty.penalized.values())]
    for _ in range(20):
        model(torch.randn(4, 5, 8)).square().mean().backward()
        lam_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    norm.append(sum(w.abs().sum().item() for w in penalty.penalized.values()))
    assert norm[1] < 0.8 * norm[0]


# The floor under |lam|


def forms():
    """Every form of the step, by name: a function that makes one from a penalty."""

    def plain(penalty, factors):
        optimizer = torch.optim.SGD(penalty.parameters(), **factors)

        def step():
            optimizer.zero_grad()
            penalty().backward()
            optimizer.step()

        return step

    return {
        "forward": plain,
        "readable": lambda penalty, factors: LambdaSGD(penalty, **factors).step,
        "kernel": lambda penalty, factors: FusedHALO(penalty, **factors).step,
        "pieces": lambda penalty, factors: FusedHALO(penalty, **factors).step,
    }


@pytest.mark.parametrize(
    "form, start, steps", [("kernel", 1.0, 3500), *((form, x, 50) for form in forms() for x in (0.0, -0.0, -1e-30))]
)
def test_lam_that_reaches_zero_stays_finite(form, start, steps, monkeypatch):
    """A weight that is 0 leaves lam to its decay, which takes it from 1 to 0 in some 3,000 steps."""
    if form == "pieces":
        monkeypatch.setattr(lambda_sgd, "load_kernel", no_compiler)
    w = nn.Parameter(torch.tensor([0.0, 0.0, 0.5]))
    penalty = HALO({"w": w}, xi=1e-8, psi=0.0)
    penalty.lambdas["w"].data[:2] = start
    step = forms()[form](penalty, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5})
    for _ in range(steps):
        w.grad = None
        step()
    assert (penalty.lambdas["w"][:2].abs() < (1e-37 if start == 1 else LAMBDA_FLOOR)).all()
    assert penalty.lambdas["w"].isfinite().all() and penalty().isfinite() and w.grad.isfinite().all()
    assert penalty.strength(penalty.lambdas["w"]).isfinite().all()


@pytest.mark.parametrize("lam", [0.0, 1e-13, -1e-20, 1e-12, -3e-12, 0.2])
def test_at_the_floor_all_forms_agree_and_lam_comes_back(lam, monkeypatch):
    """As if |lam| were the floor: strength xi / floor^2, and a weight that is not 0 pushes lam up again."""
    results = {}
    for form, make in forms().items():
        if form == "pieces":
            monkeypatch.setattr(lambda_sgd, "load_kernel", no_compiler)
        w = nn.Parameter(torch.tensor([1e-20, -3e-20]))
        penalty = HALO({"w": w}, xi=1e-8, psi=0.0)
        penalty.lambdas["w"].data.fill_(lam)
        make(penalty, {"lr": 1e-5, "momentum": 0.0})()
        results[form] = w.grad.clone(), penalty.lambdas["w"].detach().clone()
    acting = max(abs(lam), LAMBDA_FLOOR)
    assert results["forward"][0].tolist() == pytest.approx([1e-8 / acting**2, -1e-8 / acting**2], rel=1e-4)
    for weight_grad, stepped in results.values():
        torch.testing.assert_close(weight_grad, results["forward"][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(stepped, results["forward"][1], rtol=1e-5, atol=0)
    if abs(lam) <= LAMBDA_FLOOR:
        assert (results["kernel"][1].abs() > LAMBDA_FLOOR).all()


def test_sws_at_zero_stays_finite():
    w = nn.Parameter(torch.zeros(3))
    penalty = SWS({"w": w}, xi=1e-8, psi=0.1)
    penalty.lam.data.zero_()
    LambdaSGD(penalty, **FACTORS).step()
    assert penalty.lam.isfinite() and penalty().isfinite() and w.grad.isfinite().all()


def test_named_parameters_keep_their_model_through_copies():
    model = network()
    params = NamedParameters({"0.weight": model[0].weight}, model)
    twin = copy.deepcopy(params)
    assert twin.model is not model and twin["0.weight"] is twin.model[0].weight


@pytest.mark.parametrize(
    "make",
    [partial(L1, xi=0.1), partial(MCP, xi=0.1, psi=2.0), partial(HALO, xi=0.1, psi=0.1)],
    ids=["l1", "mcp", "halo"],
)
@pytest.mark.parametrize("order", [("add", "ask"), ("ask", "add")])
def test_a_decoupled_penalty_beside_add_grad_would_count_twice(make, order):
    model = network()
    penalty, optimizer = make(penalized_parameters(model)), torch.optim.SGD(model.parameters(), 0.01)
    pull = DecoupledLambdaSGD(penalty, weights=optimizer, lr=0.1)
    calls = {"add": penalty.add_grad_, "ask": pull.step}

    def step(*names):
        loss_of(model).backward()
        for name in names:
            calls[name]()
        optimizer.step()
        optimizer.zero_grad()
        penalty.zero_grad()

    for name in ("ask", "add", "ask", "ask", "add"):
        step(name)
    with pytest.raises(ValueError, match=r"hold the penalty already, by add_grad_\(\)"):
        step(*order)
