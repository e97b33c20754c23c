"""Packed modules that call kernels.ops."""

from compressor.layers.joining import joined
from compressor.layers.packed import (
    CANONICAL,
    CPU,
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
    "PackedExperts",
    "PackedLinear",
    "PackedWeight",
    "joined",
    "packed_weights",
    "relayout",
    "routed",
]
