"""Packed modules that call kernels.ops."""

from compressor.layers.joining import joined
from compressor.layers.layouts import CANONICAL, CPU, CUDA
from compressor.layers.packed import (
    PackedExperts,
    PackedLinear,
    PackedWeight,
    packed_weights,
    relayout,
    routed,
)

__all__ = [
    "CANONICAL",
    "CPU",
    "CUDA",
    "PackedExperts",
    "PackedLinear",
    "PackedWeight",
    "joined",
    "packed_weights",
    "relayout",
    "routed",
]
