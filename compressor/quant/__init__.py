"""What a quantized weight is: spec, tensor, packing."""

from compressor.quant.packing import pack_codes, packed_bytes, unpack_codes
from compressor.quant.spec import BITS, GROUP_SIZES, QuantSpec
from compressor.quant.tensor import QuantizedTensor, concatenate, split_rows, stack

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "QuantSpec",
    "QuantizedTensor",
    "concatenate",
    "pack_codes",
    "packed_bytes",
    "split_rows",
    "stack",
    "unpack_codes",
]
