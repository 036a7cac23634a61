"""What a training loop of your own needs: the penalties, the tensors they act on, and the step of lam."""

from utils.lambda_sgd import FusedHALO, LambdaSGD
from utils.parameters import penalized_parameters, prunable_weights
from utils.penalties import HALO, L1, MCP, SWS, Penalty, make_penalty

__all__ = [
    "HALO",
    "L1",
    "MCP",
    "SWS",
    "FusedHALO",
    "LambdaSGD",
    "Penalty",
    "make_penalty",
    "penalized_parameters",
    "prunable_weights",
]
