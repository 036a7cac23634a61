"""Compile a small C++ file on the spot and load it, where there is a compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Nothing that changes results: no -ffast-math, which would lose NaN.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]


def find_compiler() -> list[str] | None:
    """Return the command of a C++ compiler: that of the environment variable CXX, else g++; None if there is none."""
    try:
        program, *options = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError:  # a quotation without an end
        return None
    path = shutil.which(program)
    return [path, *options] if path else None


def load_native(source: Path, *, fuse: bool = False, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile a C++ file for this processor (in up to two seconds) and load it; nothing stays on disk.

    Args:
        source: the file; its functions are declared extern "C".
        fuse: whether the compiler may round a product and a sum once instead of twice. Inference may; a step of
            training may not, since it states its operations.
        flags: further options of the compiler.

    Returns:
        The library.

    Raises:
        OSError: there is no compiler, or it or the loader refuses; the message is one line.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError(f"no C++ compiler {os.environ.get('CXX') or 'g++'} on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        compiled, library = f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"
        # Linked without -fopenmp, so that OpenMP is the one that torch has loaded: two would fight for the cores.
        options = [*FLAGS, f"-ffp-contract={'fast' if fuse else 'off'}", *flags]
        for command in ([*options, "-c", str(source), "-o", compiled], ["-shared", compiled, "-o", library]):
            done = subprocess.run([*compiler, *command], capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{shlex.join(compiler)} failed: {(done.stderr or 'no message').strip().splitlines()[0]}")
        return ctypes.CDLL(library)
