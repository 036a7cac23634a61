"""The rooms behind the scripts; hands on halo's public names, so that `from utils import HALO` works.

Imports run one way: scripts -> studies -> stages -> training -> files, plots, logger, run, options, distributed ->
models, halo. tests/test_architecture.py holds everyone to it.
"""

from utils.halo import *  # noqa: F403
from utils.halo import __all__ as __all__
