"""The bytes of one tensor in one of GGUF's types.

R rows, I input features.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UnsupportedModel
from compressor.exporters.gguf.blocks import CARRIES, carry
from compressor.exporters.gguf.k_quants import quantize_q4_k, quantize_q6_k
from compressor.exporters.gguf.types import row_bytes
from compressor.exporters.gguf.weights import Weight

CHUNK_ELEMENTS = 1 << 22  # weights that are widened to float32 at once


def encode(weight: Weight, type: str) -> Any:
    """A tensor as numpy bytes `[..., row bytes]`: codes carried over, or values rounded as the type's definition says.

    UnsupportedModel where a value is beyond float16's range and float16 was asked for.
    """
    row = row_bytes(type, weight.shape[-1])
    data = torch.empty((prod(weight.shape[:-1]), row), dtype=torch.uint8)
    place = 0
    for part in weight.parts():
        for encoded in _encoded(part, type):
            data[place : place + len(encoded)] = encoded
            place += len(encoded)
    assert place == len(data)
    return data.reshape(*weight.shape[:-1], row).numpy()


def _encoded(weight: Weight, type: str) -> Iterator[Tensor]:
    """The bytes of one matrix (or vector), some rows at a time."""
    if weight.packed is not None and type in CARRIES:
        yield carry(weight.quantized(), type)
        return
    values = weight.dense()
    rows = values.reshape(-1, values.shape[-1])
    for part in rows.split(max(1, CHUNK_ELEMENTS // rows.shape[-1])):
        yield _rows(part, type, weight)


def _rows(values_RI: Tensor, type: str, weight: Weight) -> Tensor:
    if type == "F32":
        return values_RI.float().contiguous().view(torch.uint8)
    if type == "BF16":
        return values_RI.bfloat16().contiguous().view(torch.uint8)
    if type == "F16":
        halves = values_RI.half()
        if not torch.isfinite(halves).all():
            raise UnsupportedModel(
                f"export.gguf: {weight.source} has values beyond float16's range (65504); use type bf16 or f32"
            )
        return halves.contiguous().view(torch.uint8)
    if type == "Q4_K":
        return quantize_q4_k(values_RI)
    if type == "Q6_K":
        return quantize_q6_k(values_RI)
    import gguf

    data = gguf.quants.quantize(values_RI.float().contiguous().numpy(), gguf.GGMLQuantizationType[type])
    return torch.from_numpy(data)
