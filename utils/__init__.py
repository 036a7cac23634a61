"""What a training loop of your own needs: the penalties and the tensors they act on."""

from utils.lambda_sgd import FusedHALO, LambdaSGD
from utils.parameters import penalized_parameters, prunable_weights
from utils.penalties import HALO, L1, MCP, SWS, Penalty, make_penalty

__all__ = [
    *("HALO", "L1", "MCP", "SWS", "Penalty", "make_penalty", "FusedHALO", "LambdaSGD"),
    *("penalized_parameters", "prunable_weights"),
]
