"""The structures of sparse_kernel.cpp, as ctypes sees them."""

from __future__ import annotations

import ctypes

TILES, STRIPS, DOTS, MAX, SUM, SPLIT = range(6)  # the kernel's kinds
NUMBERS = (
    "kind relu height width stride_y stride_x source source_pitch source_plane output output_pitch output_plane "
    "residual residual_pitch residual_plane count"
)
POINTERS = "channels starts terms bias windows scales mask"
MAP = "offset pitch plane channels height width"


class COp(ctypes.Structure):
    """The kernel's struct Op."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in NUMBERS.split()),
        *((name, ctypes.c_void_p) for name in POINTERS.split()),
        ("step_y", ctypes.c_int64),
        ("step_x", ctypes.c_int64),
    ]


class CMap(ctypes.Structure):
    """The kernel's struct Map."""

    _fields_ = [(name, ctypes.c_int64) for name in MAP.split()]


class CPlan(ctypes.Structure):
    """The kernel's struct Plan."""

    _fields_ = [
        ("base", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("ops", ctypes.c_void_p),
        ("input", CMap),
        ("output", CMap),
        ("wanted", ctypes.c_void_p),
    ]
