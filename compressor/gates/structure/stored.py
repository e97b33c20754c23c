"""Weights of a model folder by the name of their linear layer, dense or packed, read one at a time.

O output features, I input features, G groups in a row.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from compressor.checkpoint import CheckpointReader
from compressor.errors import IntegrityError
from compressor.gates.structure.scheme import BadScheme, Claims, read_claims
from compressor.quant import QuantizedTensor, QuantSpec, unpack_codes

ROWS_AT_ONCE = 1 << 22  # elements that are dequantized together: 16 MB in float32
PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Packed:
    """One packed weight as it lies in the file; nothing is unpacked yet."""

    words: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        """What the tensor of codes is called, after the name of the linear layer."""
        return "weight" if self.words.dtype == torch.int8 else "weight_packed"

    def rows(self, rows: slice) -> QuantizedTensor:
        """Codes and scales of some rows."""
        words = self.words[rows]
        codes = words if self.key == "weight" else unpack_codes(words, self.spec.bits, self.shape[1])
        zeros = None if self.zeros_OG is None else self.zeros_OG[rows]
        return QuantizedTensor(codes, self.scales_OG[rows], zeros, self.spec)


class Stored:
    """A model folder whose files agree with each other; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = CheckpointReader(folder)

    @cached_property
    def claims(self) -> Claims:
        try:
            return read_claims(json.loads((self.folder / "config.json").read_bytes()))
        except (BadScheme, OSError, ValueError) as error:
            raise IntegrityError(f"{self.folder}/config.json: {error}") from error

    def is_packed(self, name: str) -> bool:
        return f"{name}.weight_packed" in self.reader or self.is_int8(name)

    def is_int8(self, name: str) -> bool:
        """Whether codes lie there as plain int8, the layout of weights that meet int8 activations."""
        return f"{name}.weight" in self.reader and self.reader.dtype(f"{name}.weight") == torch.int8

    def holds(self, name: str) -> bool:
        return self.is_packed(name) or f"{name}.weight" in self.reader

    def weight(self, name: str, expected: tuple[int, int] | None = None) -> Tensor | Packed:
        """The weight of a linear layer as it is stored; `expected` is believed in place of what the file says."""
        if not self.is_packed(name):
            return self.reader.tensor(f"{name}.weight")
        if self.is_int8(name):
            codes, scales = self.reader.tensors([f"{name}.weight", f"{name}.weight_scale"]).values()
            int8 = QuantSpec(bits=8, group_size=None, activation_bits=8)
            return Packed(codes, scales, None, int8, expected or (codes.shape[0], codes.shape[1]))
        keys = [f"{name}.{part}" for part in PARTS]
        words, scales, shape = self.reader.tensors(keys).values()
        rows, columns = expected or shape.tolist()
        spec = self.claims.spec_of(name)
        if spec is None:
            groups = scales.shape[-1]
            bits = words.shape[-1] * 32 // columns
            spec = QuantSpec(
                bits, None if groups == 1 else columns // groups, f"{name}.weight_zero_point" not in self.reader
            )
        zeros = None
        if not spec.symmetric:
            packed_zeros = self.reader.tensor(f"{name}.weight_zero_point")
            zeros = unpack_codes(packed_zeros.T.contiguous(), spec.bits, rows).T.contiguous()
        return Packed(words, scales, zeros, spec, (rows, columns))

    def sample(self, name: str, count: int) -> Tensor:
        """The first rows of a weight, float32."""
        return float_rows(self.weight(name), slice(0, count))


def float_rows(weight: Tensor | Packed, rows: slice) -> Tensor:
    """Some rows of a weight in float32."""
    return weight.rows(rows).dequantize() if isinstance(weight, Packed) else weight[rows].float()


def chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a tensor, so many at a time as stay small in float32."""
    width = max(1, _numel(shape[1:]))
    step = max(1, ROWS_AT_ONCE // width)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
