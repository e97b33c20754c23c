"""The canonical byte order of codes: dense bit packing along a row into int32 words (docs/format.md).

Code i of a row occupies bits `[i * bits, (i + 1) * bits)` of the row's bit stream; words hold the stream's bits lowest
first, and a code may cross two words (3 bits). Codes are stored with an offset of 2^(bits-1), so they are unsigned.
This is the order of the compressed-tensors format `pack-quantized`. Zero points are packed in the same way, along the
output axis.
"""

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 codes `[..., I]` to int32 words `[..., ceil(I * bits / 32)]`."""
    width = codes.shape[-1]
    num_words = -(-width * bits // 32)
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits in (2, 4, 8):  # whole codes in a byte: no code crosses a word
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(unsigned, (0, num_words * 4 * per_byte - width))
        lanes = padded.unflatten(-1, (-1, per_byte))
        packed = lanes[..., 0].clone()
        for lane in range(1, per_byte):
            packed |= lanes[..., lane] << (lane * bits)
        return packed.contiguous().view(torch.int32)
    # 32 codes fill exactly `bits` words; bit planes of one such group at a time
    padded = torch.nn.functional.pad(unsigned, (0, -width % 32)).unflatten(-1, (-1, 32))
    stream = torch.stack([(padded >> bit) & 1 for bit in range(bits)], dim=-1).flatten(-2)  # [..., groups, 32 * bits]
    bytes_ = stream.unflatten(-1, (-1, 8))
    packed = torch.zeros(bytes_.shape[:-1], dtype=torch.uint8, device=codes.device)
    for bit in range(8):
        packed |= bytes_[..., bit] << bit
    return packed.flatten(-2).contiguous().view(torch.int32)[..., :num_words].contiguous()


def unpack_codes(words: Tensor, bits: int, width: int) -> Tensor:
    """int32 words `[..., W]` back to int8 codes `[..., width]`."""
    bytes_ = words.contiguous().view(torch.uint8)
    offset = 1 << (bits - 1)
    if bits in (2, 4, 8):
        per_byte = 8 // bits
        lanes = torch.stack([(bytes_ >> (lane * bits)) & ((1 << bits) - 1) for lane in range(per_byte)], dim=-1)
        unsigned = lanes.flatten(-2)[..., :width]
    else:
        num_groups = -(-width // 32)
        bytes_ = torch.nn.functional.pad(bytes_, (0, num_groups * 4 * bits - bytes_.shape[-1]))
        stream = torch.stack([(bytes_ >> bit) & 1 for bit in range(8)], dim=-1).flatten(-2)
        planes = stream.unflatten(-1, (num_groups * 32, bits))
        unsigned = torch.zeros(planes.shape[:-1], dtype=torch.uint8, device=words.device)
        for bit in range(bits):
            unsigned |= planes[..., bit] << bit
        unsigned = unsigned[..., :width]
    return (unsigned.to(torch.int16) - offset).to(torch.int8)


def packed_bytes(in_features: int, bits: int) -> int:
    """Bytes that one row of codes takes."""
    return -(-in_features * bits // 32) * 4
