"""Packing is compared with compressed-tensors, whose files it must read and write."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from compressor.quant import pack_codes, packed_bytes, unpack_codes


def random_codes(rows: int, width: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + width)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, width), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [32, 576, 100, 37])
def test_packed_words_are_those_of_compressed_tensors(bits, width):
    """Every word equals what the reference library writes, for whole and for ragged rows."""
    codes = random_codes(5, width, bits)
    assert torch.equal(pack_codes(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [64, 100])
def test_unpacking_gives_the_codes_back(bits, width):
    """No code changes on the way through the file, in a stack of experts as well."""
    codes = torch.stack([random_codes(4, width, bits), random_codes(4, width, bits)])
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, width), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_survives(bits):
    """All 2^bits codes, each at every position of a word."""
    all_codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8)
    codes = (
        torch.stack([all_codes.repeat(32)[shift : shift + 64] for shift in range(32)]) if bits < 8 else all_codes[None]
    )
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, codes.shape[1]), codes)
    assert torch.equal(unpack_from_int32(pack_codes(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_bytes_predicts_the_size(bits):
    """The plan's figure is the size of the words."""
    assert pack_codes(random_codes(1, 100, bits), bits).nbytes == packed_bytes(100, bits)
