"""The rooms behind the scripts; hands on halo's public names, so that `from utils import HALO` works.

Imports run one way: scripts -> studies -> stages -> training -> files, plots, logger, run, options, distributed ->
models, halo. tests/test_architecture.py holds everyone to it.
"""

import importlib


def __getattr__(name: str) -> object:
    """Return one of halo's public names; not before it is asked for, since torch takes seconds to load."""
    halo = importlib.import_module("utils.halo")
    if name == "__all__" or name in halo.__all__:
        return getattr(halo, name)
    raise AttributeError(f"module 'utils' has no attribute {name!r}")
