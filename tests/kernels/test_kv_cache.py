"""The quantized KV cache in torch: layout, rounding, attention, and the ops."""

import pytest
import torch

from compressor.kernels import kv_cache, ops_kv
from compressor.kernels.kv_cache import BLOCK, attend, dequantize_blocks, quantize_blocks, quantized_tokens

RING = 64


def random_cache(bits, dtype=torch.float32, D=64, num_blocks=5, B=2, H=2):
    """Keys and values whose channels and tokens differ in size, their blocks, and rings of other tokens."""
    generator = torch.Generator().manual_seed(bits + D)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    keys = (draw(B, H, num_blocks * BLOCK, D) + draw(D)) * draw(D).exp()
    values = draw(B, H, num_blocks * BLOCK, D) * draw(num_blocks * BLOCK, 1).exp()
    rings = draw(B, H, RING, D).to(dtype), draw(B, H, RING, D).to(dtype)
    keys, values = keys.to(dtype), values.to(dtype)
    return keys, values, *quantize_blocks(keys, values, bits), rings


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("keys", [True, False])
def test_fragments_are_those_of_the_tensor_core(bits, keys):
    """Every code is where the PTX ISA's map of mma.m16n8k16 says that its lane finds it."""
    D = 64
    rows, columns = (BLOCK, D) if keys else (D, BLOCK)
    matrix = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(0))
    words = kv_cache.to_fragments(matrix, bits, keys).view(torch.int32).reshape(-1, 32, 4).tolist()
    order = [(m, k) for k in range(columns // 16) for m in range(2)] if keys else None
    order = order or [(m, k) for m in range(rows // 16) for k in range(2)]
    for number, (m, k) in enumerate(order):
        for lane in range(32):
            for j in range(4):
                for pair in range(2):
                    row = 16 * m + lane // 4 + 8 * (j & 1)
                    column = 16 * k + 2 * (lane % 4) + 8 * (j >> 1) + pair
                    if bits == 4:
                        found = words[number // 4][lane][number % 4] >> (4 * j + 16 * pair) & 15
                    else:
                        found = words[number // 2][lane][number % 2 * 2 + j // 2] >> (16 * (j % 2) + 8 * pair) & 255
                    assert found == matrix[row, column]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_codes_and_scales_come_back(bits, D):
    """What is read back is at most half a step from what was written: a step is the scale of a channel or a token."""
    keys, values, codes, scales, _ = random_cache(bits, D=D)
    found = dequantize_blocks(codes, scales, bits)
    for given, back, dim in ((keys, found[0], 3), (values, found[1], 4)):
        given, back = given.unflatten(2, (-1, BLOCK)), back.unflatten(2, (-1, BLOCK))
        low, high = given.amin(dim, keepdim=True), given.amax(dim, keepdim=True)
        step = torch.maximum(-low, high) / 127 if bits == 8 else (high - low) / 15
        rounding = 2e-3 * given.abs().amax()  # scales and minima are float16
        assert ((back - given).abs() <= 0.5 * step + rounding).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_numbers_are_exact(bits):
    """A channel, or a token, of equal numbers has no range; zeros stay zeros."""
    keys = torch.arange(64.0).expand(1, 1, BLOCK, 64)
    values = torch.zeros(1, 1, BLOCK, 64)
    found = dequantize_blocks(*quantize_blocks(keys, values, bits), bits)
    assert torch.equal(found[1], values)
    assert (found[0] - keys).abs().max() < 0.04 if bits == 8 else torch.equal(found[0], keys)


@pytest.mark.parametrize("ring", [64, 96])
def test_the_ring_always_holds_what_is_not_in_blocks(ring):
    """Blocks are whole, and the rest fits the ring and is all of it or nearly."""
    for length in range(1, 400):
        exact = length - quantized_tokens(length, ring)
        assert quantized_tokens(length, ring) % BLOCK == 0
        assert exact == length if length <= ring else ring - BLOCK < exact <= ring


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_is_softmax_over_the_tokens_that_count(bits):
    """Against a float64 loop over sequences and heads: grouped queries, left padding, a ring that has gone round."""
    *_, codes, scales, rings = random_cache(bits)
    lengths, starts = torch.tensor([200, 150]), torch.tensor([0, 40])
    query = torch.randn(2, 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = attend(query, codes, scales, rings, starts, lengths, bits, 0.3)
    blocks = dequantize_blocks(codes, scales, bits)
    for b in range(2):
        coded = quantized_tokens(int(lengths[b]), RING)
        slots = [position % RING for position in range(coded, int(lengths[b]))]
        for head in range(6):
            keys, values = (
                torch.cat([block[b, head // 3, starts[b] : coded], ring[b, head // 3, slots]]).double()
                for block, ring in zip(blocks, rings, strict=True)
            )
            expected = (keys @ query[b, head] * 0.3).softmax(0) @ values
            assert torch.allclose(found[b, head], expected, rtol=0, atol=1e-12)


def test_slots_that_were_never_written_do_not_count():
    """Whatever lies in them, infinities included."""
    *_, codes, scales, rings = random_cache(8)
    lengths = torch.tensor([10, 10])
    query = torch.randn(2, 2, 64)
    arguments = (torch.zeros(2, dtype=torch.int64), lengths, 8, 0.1)
    expected = attend(query, codes, scales, rings, *arguments)
    for ring in rings:
        ring[:, :, 10:] = torch.nan
    assert torch.equal(attend(query, codes, scales, rings, *arguments), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_appending_gives_the_blocks_of_writing_at_once(bits):
    """Token by token, sequences of different lengths: the same codes and scales, and the newest tokens in the ring."""
    keys, values, codes, scales, _ = random_cache(bits)
    rings = torch.zeros(2, 2, RING, 64), torch.zeros(2, 2, RING, 64)
    held = torch.zeros_like(codes), torch.zeros_like(scales)
    ahead = torch.tensor([0, 7])  # the second sequence began earlier
    rings[0][1, :, :7], rings[1][1, :, :7] = keys[1, :, :7], values[1, :, :7]
    for step in range(150):
        now = ahead + step
        token = (
            torch.stack([keys[b, :, now[b]] for b in range(2)]),
            torch.stack([values[b, :, now[b]] for b in range(2)]),
        )
        new = token[0].unsqueeze(2), token[1].unsqueeze(2)
        torch.ops.compressor.kv_append(*new, *held, *rings, (now + 1).int(), bits)
    for b, length in enumerate((150, 157)):
        full = quantized_tokens(length, RING) // BLOCK
        assert torch.equal(held[0][b, :, :full], codes[b, :, :full])
        assert torch.equal(held[1][b, :, :full], scales[b, :, :full])
        slots = torch.arange(full * BLOCK, length) % RING
        assert torch.equal(rings[0][b, :, slots], keys[b, :, full * BLOCK : length])


@pytest.mark.parametrize("bits", [8, 4])
def test_ops_pass_opcheck(bits):
    """Schemas, fake tensors and tracing agree with the real ops."""
    keys, values, codes, scales, rings = random_cache(bits, torch.bfloat16)
    lengths, starts = torch.tensor([65, 70], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    ops = torch.ops.compressor
    torch.library.opcheck(ops.kv_write.default, (keys, values, bits))
    new = keys[:, :, :1].contiguous(), values[:, :, :1].contiguous()
    torch.library.opcheck(ops.kv_append.default, (*new, codes, scales, *rings, lengths, bits))
    query = torch.randn(2, 6, 64).to(torch.bfloat16)
    torch.library.opcheck(ops.kv_attention.default, (query, codes, scales, *rings, starts, lengths, bits, 0.125))


def test_empty_blocks_have_the_shapes_of_written_ones():
    """What reserves memory and what fills it agree."""
    keys, _, codes, scales, _ = random_cache(4)
    assert [part.shape for part in ops_kv.empty_blocks(keys, 5, 4)] == [codes.shape, scales.shape]
