"""The mathematics: closed form against autograd, against finite differences and by hand."""

import pytest
import torch
from torch import nn

from utils import HALO, L1, MCP, SWS, FusedHALO, LambdaSGD, make_penalty, penalized_parameters
from utils.halo import memory as module

MAKERS = {
    "halo": lambda params: HALO(params, xi=0.3, psi=0.2, lambda_init=0.7),
    "l1": lambda params: L1(params, xi=0.3, lambda_init=0.7),
    "ws": lambda params: SWS(params, xi=0.3, psi=0.2, lambda_init=0.7),
    "mcp": lambda params: MCP(params, xi=0.8, psi=1.5),
}


def random_params(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 3, 3, 3), "a.bias": (4,), "b.weight": (5, 7)}
    params = {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}
    params["a.weight"].data = params["a.weight"].data.contiguous(memory_format=torch.channels_last)
    return params


def randomize(penalty):
    """Give every lam another value, both signs among them."""
    generator = torch.Generator().manual_seed(1)
    for lam in penalty.lambdas.values():
        noise = torch.rand(lam.shape, generator=generator, dtype=lam.dtype) + 0.5
        lam.data.copy_(noise * torch.where(torch.rand(lam.shape, generator=generator) < 0.3, -1, 1))


def both_gradients(penalty):
    """Return the gradients by autograd and in closed form, of the weights and of lam."""
    tensors = [*penalty.penalized.values(), *penalty.lambdas.values()]
    automatic = torch.autograd.grad(penalty(), tensors)
    for tensor in tensors:
        tensor.grad = None
    penalty.add_grad_()
    return automatic, [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("chunk", [module.CHUNK, 7])
def test_closed_form_equals_autograd(name, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    penalty = MAKERS[name](random_params())
    randomize(penalty)
    for automatic, closed in zip(*both_gradients(penalty), strict=True):
        assert automatic.abs().sum() > 0
        torch.testing.assert_close(closed, automatic, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_gradcheck(name):
    penalty = MAKERS[name](random_params())
    randomize(penalty)
    tensors = (*penalty.penalized.values(), *penalty.lambdas.values())
    assert torch.autograd.gradcheck(lambda *_: penalty(), tensors)


def two_weights(values=(0.5, -2.0)):
    return {"w": nn.Parameter(torch.tensor(values, dtype=torch.float64))}


def test_halo_by_hand():
    penalty = HALO(two_weights(), xi=0.1, psi=0.01, lambda_init=2.0)
    penalty.lambdas["w"].data[1] = -1.0
    penalty.add_grad_()
    # 0.1 * (0.5 / 4 + 2 / 1) + 0.01 * (2 + 1)
    assert penalty().item() == pytest.approx(0.2425, abs=1e-15)
    # 0.1 / 4 and -0.1 / 1
    assert penalty.penalized["w"].grad.tolist() == pytest.approx([0.025, -0.1], abs=1e-15)
    # -0.2 * 0.5 / 8 + 0.01 and -0.2 * 2 / (-1) - 0.01
    assert penalty.lambdas["w"].grad.tolist() == pytest.approx([-0.0025, 0.39], abs=1e-15)


def test_l1_by_hand():
    penalty = L1(two_weights(), xi=0.1, lambda_init=2.0)
    penalty.add_grad_()
    assert penalty().item() == pytest.approx(0.0625, abs=1e-15)
    assert penalty.penalized["w"].grad.tolist() == pytest.approx([0.025, -0.025], abs=1e-15)
    assert penalty.lambdas == {} and list(penalty.parameters()) == []


def test_sws_by_hand():
    penalty = SWS(two_weights(), xi=0.1, psi=0.01, lambda_init=2.0)
    penalty.add_grad_()
    # 0.1 * 2.5 / 4 + 0.01 * 4; -0.2 * 2.5 / 8 + 0.02 * 2
    assert penalty().item() == pytest.approx(0.1025, abs=1e-15)
    assert penalty.penalized["w"].grad.tolist() == pytest.approx([0.025, -0.025], abs=1e-15)
    assert penalty.lam.grad.item() == pytest.approx(-0.0225, abs=1e-15)


def test_mcp_by_hand():
    penalty = MCP(two_weights(), xi=1.0, psi=1.5)
    penalty.add_grad_()
    # 0.5 - 0.25 / 3 inside; 1.5 / 2 outside, where the slope is 0
    assert penalty().item() == pytest.approx(0.5 - 0.25 / 3 + 0.75, abs=1e-15)
    assert penalty.penalized["w"].grad.tolist() == pytest.approx([1 - 0.5 / 1.5, 0.0], abs=1e-15)


def test_halo_with_frozen_unit_lam_is_l1():
    halo_params, l1_params = random_params(), random_params()
    halo, l1 = HALO(halo_params, xi=0.3, psi=0.0), L1(l1_params, xi=0.3)
    for lam in halo.parameters():
        lam.requires_grad_(False)
    for _ in range(3):
        for penalty, params in ((halo, halo_params), (l1, l1_params)):
            penalty.add_grad_()
            torch.optim.SGD(params.values(), lr=0.1).step()
    assert halo().item() == pytest.approx(l1().item(), abs=1e-12)
    for name, w in halo_params.items():
        torch.testing.assert_close(w, l1_params[name], rtol=0, atol=1e-15)
    assert all(lam.grad is None and (lam == 1).all() for lam in halo.parameters())


def test_none_is_zero_and_adds_nothing():
    params = random_params()
    penalty = make_penalty("none", params)
    penalty.add_grad_()
    assert penalty().item() == 0
    assert all(w.grad is None or not w.grad.any() for w in params.values())


@pytest.mark.parametrize("name", MAKERS)
def test_add_grad_adds_to_what_is_there(name):
    params = random_params()
    penalty = MAKERS[name](params)
    penalty.add_grad_()
    once = {n: w.grad.clone() for n, w in params.items()}
    lam_once = [lam.grad.clone() for lam in penalty.parameters()]
    penalty.add_grad_()
    for n, w in params.items():
        torch.testing.assert_close(w.grad, 2 * once[n])
    for lam, expected in zip(penalty.parameters(), lam_once, strict=True):
        torch.testing.assert_close(lam.grad, 2 * expected)


@pytest.mark.parametrize("power, decay, psi", [(1 / 3, 0.0, 0.05), (1 / 2, 0.05, 0.0)])
def test_at_rest_halo_is_a_bridge_penalty(power, decay, psi):
    """Minimised over lam, HALO is c * |w|^(1/3) with psi alone, c * |w|^(1/2) with weight decay on lam alone."""
    w = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    penalty = HALO({"w": w}, xi=0.02, psi=psi)
    lam = penalty.lambdas["w"]
    at_rest = (2 * 0.02 * w / psi) ** (1 / 3) if psi else (2 * 0.02 * w / decay) ** (1 / 4)
    lam.data.copy_(at_rest)
    penalty.add_grad_()
    torch.testing.assert_close(lam.grad + decay * lam, torch.zeros_like(w), rtol=0, atol=1e-12)
    value = 0.02 * w / at_rest**2 + psi * at_rest + decay / 2 * at_rest**2
    torch.testing.assert_close(value / w**power, (value / w**power)[:1].expand(3), rtol=1e-12, atol=0)
    strength = penalty.strength(lam)
    assert (strength[:-1] > strength[1:]).all()  # the smaller the weight, the stronger


def test_training_moves_lam_to_rest():
    w = nn.Parameter(torch.tensor([0.01, 0.1, 1.0]), requires_grad=False)
    penalty = HALO({"w": w}, xi=0.02, psi=0.05)
    optimizer = torch.optim.SGD(penalty.parameters(), lr=0.05, momentum=0.5)
    for _ in range(4000):
        optimizer.zero_grad()
        penalty.add_grad_()
        optimizer.step()
    torch.testing.assert_close(penalty.lambdas["w"].data, (2 * 0.02 * w / 0.05) ** (1 / 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_penalised_in_fp32(dtype):
    w = nn.Parameter(torch.tensor([0.5, -0.25], dtype=dtype))
    penalty = HALO({"w": w}, xi=1e-8, psi=0.0, lambda_init=0.01)
    penalty.add_grad_()
    lam = penalty.lambdas["w"]
    assert lam.dtype == torch.float32
    # in fp16, xi would be 0 and 1 / lam^3 infinite
    assert lam.grad.tolist() == pytest.approx([-0.01, -0.005], rel=1e-5)
    assert w.grad.tolist() == pytest.approx([1e-4, -1e-4], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_only_the_gradient_of_half_precision_weights_is_rounded(name, dtype):
    params = random_params(dtype)
    exact = {n: nn.Parameter(w.detach().float()) for n, w in params.items()}
    penalty, other = MAKERS[name](params), MAKERS[name](exact)
    for one in (penalty, other):
        randomize(one)
        one.add_grad_()
    assert penalty().item() == pytest.approx(other().item(), rel=1e-6)
    assert all(torch.equal(w.grad, exact[n].grad.to(dtype)) for n, w in params.items())
    for lam, same in zip(penalty.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(lam.grad, same.grad, rtol=1e-6, atol=0)


def test_only_lam_is_a_parameter_of_the_penalty():
    params = random_params()
    penalty = HALO(params, xi=1, psi=1)
    assert sum(lam.numel() for lam in penalty.parameters()) == sum(w.numel() for w in params.values())
    assert list(penalty.lambdas) == list(params)
    for name, w in params.items():
        assert (penalty.lambdas[name].shape, penalty.lambdas[name].stride()) == (w.shape, w.stride())


def test_frozen_weights_get_no_gradient():
    params = random_params()
    params["a.bias"].requires_grad_(False)
    for make in MAKERS.values():
        make(params).add_grad_()
    assert params["a.bias"].grad is None and params["a.weight"].grad is not None


@pytest.mark.parametrize(
    "build, word",
    [
        (lambda p: HALO(p, xi=-1, psi=0), "xi"),
        (lambda p: HALO(p, xi=101, psi=0), "xi must be finite and >= 0, at most 100, got 101"),
        (lambda p: HALO(p, xi=1, psi=float("nan")), "psi"),
        (lambda p: HALO(p, xi=1, psi=0, lambda_init=0), "lambda_init"),
        (lambda p: L1(p, xi=1, lambda_init=0), "lambda_init"),
        (lambda p: SWS(p, xi=float("inf"), psi=0), "xi"),
        (lambda p: MCP(p, xi=1, psi=0), "psi"),
        (lambda p: HALO({}, xi=1, psi=0), "empty"),
        (lambda p: HALO({"n": torch.tensor([1])}, xi=1, psi=0), "int64"),
        (lambda p: make_penalty("lasso", p), "lasso"),
        (lambda p: make_penalty("l1", p, xi=1, psi=1), "psi"),
    ],
)
def test_wrong_coefficients_name_themselves(build, word):
    with pytest.raises(ValueError, match=word):
        build(random_params())


def test_halo_in_a_loop_of_ones_own():
    """The five lines of the README: small, useless weights go to zero, and useful ones stay."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 10)
    targets = inputs[:, :2].sum(1, keepdim=True)
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    penalty = HALO(penalized_parameters(model, linear=True), xi=1e-2, psi=1e-2)
    lam_optimizer = torch.optim.SGD(penalty.parameters(), lr=0.05, momentum=0.9)
    for _ in range(400):
        optimizer.zero_grad()
        lam_optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        penalty.add_grad_()
        optimizer.step()
        lam_optimizer.step()
    weights, lam = model.weight.detach().abs()[0], penalty.lambdas["weight"].detach().abs()[0]
    assert weights[:2].min() > 0.9 and weights[2:].max() < 0.05
    assert lam[:2].min() > 2 * lam[2:].max()


@pytest.mark.parametrize("names", [("keys", "values"), ("a/b", "a.b")])
def test_a_name_that_cannot_be_kept_is_refused(names):
    with pytest.raises(ValueError, match="give the tensor another name"):
        HALO({name: torch.ones(2, requires_grad=True) for name in names}, xi=1, psi=1)


@pytest.mark.parametrize("step", [LambdaSGD, FusedHALO])
def test_lam_of_0_is_a_number_at_the_largest_xi(step):
    """The slope of lam is 100 / LAMBDA_FLOOR^3 times |w|; where w is 0, too."""
    w = torch.tensor([0.0, 1e-3]).requires_grad_()
    penalty = HALO({"w": w}, xi=100, psi=0)
    with torch.no_grad():
        penalty.lambdas["w"].zero_()
    step(penalty, lr=0.1).step()
    assert penalty.lambdas["w"].isfinite().all()
