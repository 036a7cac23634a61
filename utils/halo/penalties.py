"""The penalties: HALO and the ones it is compared with.

Each is written twice and no more: `forward()` is the equation, differentiable, and the oracle of the tests;
`add_grad_()` adds the same gradient in closed form, without autograd, and is what training calls. A penalty that is
written elsewhere needs `forward()` alone: without a closed form of its own, autograd takes the gradient of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .floor import floored, floored_square, inverse_of
from .guard import require_beside
from .memory import gradient, pieces
from .penalty import Penalty


def _check(name: str, value: float, *, positive: bool = False, high: float = math.inf) -> None:
    if not math.isfinite(value) or not 0 <= value <= high or (positive and value == 0):
        most = f", at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{name} must be finite and {'> 0' if positive else '>= 0'}{most}, got {value}")


def _check_lambda(value: float) -> None:
    """Raise unless a starting value of lam has a square that is a number, and not 0, in fp32."""
    if not 1e-18 <= abs(value) <= 1e18:
        raise ValueError(f"|lambda_init| must be > 0, from 1e-18 to 1e18, got {value}")


class HALO(Penalty):
    """Hierarchical Adaptive Lasso: xi * sum_j |w_j| / lam_j^2 + psi * sum_j |lam_j| (arXiv 2008.10183).

    Closed form: d/dw_j = xi * sign(w_j) / lam_j^2, d/dlam_j = -2 * xi * |w_j| / lam_j^3 + psi * sign(lam_j).

    Args:
        params: name to tensor, the penalised parameters w.
        xi: strength of the lasso, in [0, 100]: above it the slope of lam at LAMBDA_FLOOR is no number in fp32.
        psi: strength of the pull of lam towards zero, >= 0.
        lambda_init: starting value of every lam, not 0.

    Raises:
        ValueError: a coefficient is out of range, or a name is taken ("keys", or "a/b" beside "a.b").

    Note:
        lam takes the shape and the memory layout of its weight, in fp32. Train it with an optimizer of its own, best
        `LambdaSGD`. Below LAMBDA_FLOOR it acts as LAMBDA_FLOOR.
    """

    def __init__(self, params: Mapping[str, Tensor], *, xi: float, psi: float, lambda_init: float = 1.0) -> None:
        super().__init__(params)
        _check("xi", xi, high=100)
        _check("psi", psi)
        _check_lambda(lambda_init)
        self.xi, self.psi = xi, psi
        self.lam = nn.ParameterDict()
        for name, w in self.penalized.items():
            key = name.replace(".", "/")  # ParameterDict refuses dots in its keys; `lambdas` gives the names back
            if hasattr(self.lam, key):
                raise ValueError(f"cannot keep a lam under the name {name!r}: give the tensor another name")
            self.lam[key] = nn.Parameter(torch.full_like(w, lambda_init, dtype=self._dtype))

    @property
    def lambdas(self) -> dict[str, Tensor]:
        """One lam per weight tensor, of its shape."""
        return {name: self.lam[name.replace(".", "/")] for name in self.penalized}

    def strength(self, lam: Tensor) -> Tensor:
        """Return xi / lam^2."""
        return self.xi / floored_square(lam)

    def forward(self) -> Tensor:
        """Return xi * sum |w| / lam^2 + psi * sum |lam|."""
        total = super().forward()
        for name, lam in self.lambdas.items():
            w = self._elements(self.penalized[name])
            total = total + self.xi * (w.abs() / floored(lam).square()).sum() + self.psi * lam.abs().sum()
        return total

    def _add_grad_(self) -> None:
        """Add both gradients in one pass over pieces that stay in cache."""
        for name, lam in self.lambdas.items():
            w = self.penalized[name]
            require_beside(name, w, lam)
            w_grad = [gradient(w)] if w.requires_grad else []
            lam_grad = [gradient(lam)] if lam.requires_grad else []
            for w_piece, lam_piece, *grads in pieces(w, lam, *w_grad, *lam_grad):
                w_piece = self._elements(w_piece)
                inverse = inverse_of(lam_piece)
                strength = inverse.square().mul_(self.xi)
                if w_grad:
                    grads[0].add_(w_piece.sign().mul_(strength))
                if lam_grad:
                    slope = strength.mul_(inverse).mul_(w_piece.abs())
                    grads[-1].add_(slope, alpha=-2).add_(lam_piece.sign(), alpha=self.psi)


class L1(Penalty):
    """Lasso of one fixed strength: xi * sum_j |w_j| / lambda_init^2.

    Args:
        params: name to tensor, the penalised parameters w.
        xi: strength of the lasso, >= 0.
        lambda_init: the fixed value that lam has in HALO and SWS, not 0; 1 leaves xi as it is.

    Raises:
        ValueError: a coefficient is out of range.
    """

    def __init__(self, params: Mapping[str, Tensor], *, xi: float, lambda_init: float = 1.0) -> None:
        super().__init__(params)
        _check("xi", xi)
        _check_lambda(lambda_init)
        self.scale = xi / lambda_init**2

    def strength(self, lam: Tensor | None = None) -> Tensor:
        """Return xi / lambda_init^2."""
        return torch.tensor(self.scale)

    def forward(self) -> Tensor:
        """Return xi * sum |w| / lambda_init^2."""
        return super().forward() + self.scale * sum(self._elements(w).abs().sum() for w in self.penalized.values())

    def _add_weight_grad_(self, w: Tensor, grad: Tensor) -> None:
        for w_piece, grad_piece in pieces(w, grad):
            grad_piece.add_(self._elements(w_piece).sign(), alpha=self.scale)


class SWS(Penalty):
    """Lasso with one learned strength for all weights: xi * sum_j |w_j| / lam^2 + psi * lam^2 (SWS of the release).

    Closed form: d/dw_j = xi * sign(w_j) / lam^2, d/dlam = -2 * xi * sum_j |w_j| / lam^3 + 2 * psi * lam.

    Args:
        params: name to tensor, the penalised parameters w.
        xi: strength of the lasso, >= 0.
        psi: strength of the pull of lam towards zero, >= 0.
        lambda_init: starting value of lam, not 0.

    Raises:
        ValueError: a coefficient is out of range.
    """

    def __init__(self, params: Mapping[str, Tensor], *, xi: float, psi: float, lambda_init: float = 1.0) -> None:
        super().__init__(params)
        _check("xi", xi)
        _check("psi", psi)
        _check_lambda(lambda_init)
        self.xi, self.psi = xi, psi
        self.lam = nn.Parameter(torch.tensor(lambda_init, dtype=self._dtype, device=self._first.device))

    @property
    def lambdas(self) -> dict[str, Tensor]:
        """The one lam, under the name "all"."""
        return {"all": self.lam}

    def strength(self, lam: Tensor) -> Tensor:
        """Return xi / lam^2."""
        return self.xi / floored_square(lam)

    def forward(self) -> Tensor:
        """Return xi * sum |w| / lam^2 + psi * lam^2."""
        norm = sum(self._elements(w).abs().sum() for w in self.penalized.values())
        return self.xi * norm / floored(self.lam).square() + self.psi * self.lam.square()

    def _add_grad_(self) -> None:
        self._scale = self.strength(self.lam)
        super()._add_grad_()
        if self.lam.requires_grad:
            norm = sum(self._norm(w) for w in self.penalized.values())
            gradient(self.lam).add_(-2 * self._scale * norm / floored(self.lam) + 2 * self.psi * self.lam)

    def _norm(self, w: Tensor) -> Tensor:
        return torch.linalg.vector_norm(w, 1, dtype=torch.promote_types(w.dtype, self._dtype)).to(self._dtype)

    def _add_weight_grad_(self, w: Tensor, grad: Tensor) -> None:
        for w_piece, grad_piece in pieces(w, grad):
            grad_piece.add_(self._elements(w_piece).sign().mul_(self._scale))


class MCP(Penalty):
    """Minimax concave penalty, which stops growing at |w| = psi * xi (Zhang, Annals of Statistics 38:894, 2010).

    sum_j of: xi * |w_j| - w_j^2 / (2 * psi) if |w_j| <= psi * xi, else psi * xi^2 / 2.
    Closed form: d/dw_j = sign(w_j) * max(xi - |w_j| / psi, 0).

    Args:
        params: name to tensor, the penalised parameters w.
        xi: slope at zero, >= 0.
        psi: concavity, > 0: large is close to the lasso, small leaves all but the smallest weights alone.

    Raises:
        ValueError: a coefficient is out of range.
    """

    def __init__(self, params: Mapping[str, Tensor], *, xi: float, psi: float) -> None:
        super().__init__(params)
        _check("xi", xi)
        _check("psi", psi, positive=True)
        self.xi, self.psi = xi, psi

    def strength(self, lam: Tensor | None = None) -> Tensor:
        """Return xi, the slope at w = 0."""
        return torch.tensor(self.xi)

    def forward(self) -> Tensor:
        """Return the sum of the piecewise penalty."""
        total = super().forward()
        for tensor in self.penalized.values():
            a = self._elements(tensor).abs()
            inside = self.xi * a - a.square() / (2 * self.psi)
            total = total + torch.where(a <= self.psi * self.xi, inside, self.psi * self.xi**2 / 2).sum()
        return total

    def _add_weight_grad_(self, w: Tensor, grad: Tensor) -> None:
        for w_piece, grad_piece in pieces(w, grad):
            w_piece = self._elements(w_piece)
            slope = w_piece.abs().div_(-self.psi).add_(self.xi).clamp_(min=0)
            grad_piece.add_(slope.mul_(w_piece.sign()))


BY_NAME: dict[str, type[Penalty]] = {"none": Penalty, "halo": HALO, "l1": L1, "ws": SWS, "mcp": MCP}


def make_penalty(
    name: str,
    params: Mapping[str, Tensor],
    *,
    xi: float | None = None,
    psi: float | None = None,
    lambda_init: float | None = None,
) -> Penalty:
    """Build a penalty by the name of its flag.

    Args:
        name: a key of BY_NAME.
        params: name to tensor, the penalised parameters.
        xi, psi, lambda_init: the coefficients, each only where the penalty has it; None otherwise.

    Returns:
        The penalty; for "none" one that is zero and adds nothing.

    Raises:
        ValueError: the name is unknown, or a coefficient is missing, superfluous or out of range.
    """
    if name not in BY_NAME:
        raise ValueError(f"unknown penalty {name!r}: choose from {', '.join(BY_NAME)}")
    given = {"xi": xi, "psi": psi, "lambda_init": lambda_init}
    try:
        return BY_NAME[name](params, **{key: value for key, value in given.items() if value is not None})
    except TypeError as error:
        raise ValueError(f"penalty {name!r}: {error}") from None
