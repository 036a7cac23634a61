"""HALO (Hierarchical Adaptive Lasso, arXiv 2008.10183) on torch alone, for any training loop.

May enter: the penalties, the step of lam, which tensors, exact pruning, fixed zeros, sparse inference, shrinking.
May not: anything but torch and this folder. Installed, this folder is the package `halo`.
"""

from .decoupled import DecoupledLambdaSGD
from .floor import LAMBDA_FLOOR
from .gradual import GradualPruning
from .lambda_sgd import FusedHALO, LambdaSGD
from .masks import FixedZeros
from .parameters import penalized_parameters, prunable_weights
from .penalties import HALO, L1, MCP, SWS, Penalty, make_penalty
from .pruning import (
    LayerSparsity,
    count_macs,
    prune_by_magnitude_,
    prune_layerwise_,
    prune_random_,
    prune_shuffled_,
    savings,
    sparsity_per_layer,
)
from .shrink import shrink
from .sparse import SparseNetwork
from .suggest import suggest

__version__ = "0.1.0"
__all__ = [
    "HALO",
    "L1",
    "LAMBDA_FLOOR",
    "MCP",
    "SWS",
    "DecoupledLambdaSGD",
    "FixedZeros",
    "FusedHALO",
    "GradualPruning",
    "LambdaSGD",
    "LayerSparsity",
    "Penalty",
    "SparseNetwork",
    "count_macs",
    "make_penalty",
    "penalized_parameters",
    "prunable_weights",
    "prune_by_magnitude_",
    "prune_layerwise_",
    "prune_random_",
    "prune_shuffled_",
    "savings",
    "shrink",
    "sparsity_per_layer",
    "suggest",
]
