"""Keys and values in 8 or 4 bits: full blocks of 32 tokens as codes, the newest tokens in a ring of 16 bits.

B sequences, H key/value heads, Q query heads (a multiple of H), T tokens, N blocks, D head width, R slots of the ring.

Keys have one scale a channel over the 32 tokens of a block, because their outliers are channels; values one a token. In
8 bits codes are signed; in 4 bits there is a minimum beside each scale (KIVI, Liu et al. 2024). A block is written when
the ring is full, just before the next token, so that the last R - 31 tokens at least are exact.

`codes [B, H, N, 2, 32 D bits / 8]` uint8: keys, then values, in the order of the A fragments of mma.m16n8k16, so that a
lane loads its own in 16 bytes. Keys are the matrix [32 tokens, D], values [D, 32 tokens]. `scales [B, H, N, P, D + 32]`
float16, P = 1 in 8 bits and 2 in 4 (scales, then minima): D of the keys, 32 of the values, in the lanes' order too.
Token p lies in slot p % R of the ring `[B, H, R, D]` as long as it is not older than `quantized_tokens`.
"""

import torch
from torch import Tensor

BLOCK = 32
SMALLEST_SCALE = 2.0**-24  # the smallest float16; a row of equal numbers has no other


def quantized_tokens(length: int, ring: int) -> int:
    """How many of the first `length` tokens, the newest included, are held as codes."""
    return max(0, (length - ring + BLOCK - 1) // BLOCK) * BLOCK


def quantize_blocks(keys_BHTD: Tensor, values_BHTD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of T / 32 blocks, from keys and values `[B, H, T, D]`; T and D are multiples of 32."""
    keys, values = (part.float().unflatten(2, (-1, BLOCK)) for part in (keys_BHTD, values_BHTD))  # [B, H, N, 32, D]
    key_codes, key_scales = _to_grid(keys, -2, bits)
    value_codes, value_scales = _to_grid(values, -1, bits)
    codes = torch.stack([to_fragments(key_codes, bits, True), to_fragments(value_codes.mT, bits, False)], dim=-2)
    scales = torch.cat([_key_order(torch.stack(key_scales, -2)), _value_order(torch.stack(value_scales, -2))], dim=-1)
    return codes, scales


def dequantize_blocks(codes: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, H, 32 N, D]` in float32, from what `quantize_blocks` gave."""
    D = scales.shape[-1] - BLOCK
    key_codes, value_codes = codes.unbind(-2)
    key_scales, value_scales = _from_key_order(scales[..., :D]), _from_value_order(scales[..., D:])
    keys = _off_grid(from_fragments(key_codes, bits, D, True), key_scales.unsqueeze(-2), bits)
    values = _off_grid(from_fragments(value_codes, bits, D, False).mT, value_scales.unsqueeze(-1), bits)
    return keys.flatten(2, 3), values.flatten(2, 3)


def attend(
    query_BQD: Tensor, codes: Tensor, scales: Tensor, recent_BHRD: tuple[Tensor, Tensor],
    starts_B: Tensor, lengths_B: Tensor, bits: int, scaling: float,
) -> Tensor:  # fmt: skip
    """Attention of each sequence's newest token, `[B, Q, D]`: over its blocks and over the ring of keys and values.

    Sequence b has `lengths_B[b]` tokens, the newest included, of which those before `starts_B[b]` are padding.
    Arithmetic is float32 (float64 for float64 queries).
    """
    dtype = torch.float64 if query_BQD.dtype == torch.float64 else torch.float32
    H, R = recent_BHRD[0].shape[1:3]
    blocks = dequantize_blocks(codes, scales, bits)
    keys, values = (torch.cat(pair, dim=2).to(dtype) for pair in zip(blocks, recent_BHRD, strict=True))
    newest = lengths_B[:, None] - 1
    coded = (newest - R + BLOCK).div(BLOCK, rounding_mode="floor").clamp(min=0) * BLOCK
    block_positions = torch.arange(blocks[0].shape[2], device=keys.device).expand(len(keys), -1)
    ring_positions = newest - (newest - torch.arange(R, device=keys.device)) % R  # of the token in each slot
    positions = torch.cat([block_positions, ring_positions], dim=1)
    held = torch.cat([block_positions < coded, ring_positions >= coded], dim=1)
    attended = held & (positions >= starts_B[:, None])
    query = query_BQD.to(dtype).unflatten(1, (H, -1))
    logits = (query @ keys.mT * scaling).masked_fill(~attended[:, None, None], -torch.inf)
    values = values.masked_fill(~attended[:, None, :, None], 0)  # slots not yet written may hold anything
    return (logits.softmax(-1) @ values).flatten(1, 2).to(query_BQD.dtype)


def to_fragments(codes: Tensor, bits: int, keys: bool) -> Tensor:
    """Unsigned codes `[..., M, K]` as bytes `[..., M K bits / 8]` in the order of A fragments of mma.m16n8k16.

    Lane 4 r + t holds of each 16 x 16 tile four pairs: rows r and r + 8, columns 2t, 2t + 1 and 8 further. Tiles of
    keys go down the rows first (32 tokens), those of values along the columns (32 tokens). In 4 bits pair j of a tile
    is at bits 4j and 4j + 16 of a word; in 8 bits pairs are bytes one after the other.
    """
    M, K = codes.shape[-2:]
    tiles = codes.reshape(*codes.shape[:-2], M // 16, 2, 8, K // 16, 2, 4, 2)  # m, hi, r, k, half, t, pair
    outer = (3, 0) if keys else (0, 3)
    tiles = _permute_tail(tiles, (*outer, 2, 5, 4, 1, 6)).flatten(-3, -2)  # [tile, tile, r, t, j, pair]
    tiles = tiles.to(torch.uint8)
    if bits == 4:  # bytes: pairs 0 and 1 or 2 and 3, of the lower half-word, then of the upper
        tiles = (tiles[..., 0::2, :] | tiles[..., 1::2, :] << 4).mT
    lanes = tiles.flatten(-2).flatten(-5, -4).flatten(-3, -2)  # [tiles, 32, bytes]
    together = 2 if bits == 8 else 4  # tiles that a lane loads in 16 bytes
    return _permute_tail(lanes.unflatten(-3, (-1, together)), (0, 2, 1, 3)).flatten(-4).contiguous()


def from_fragments(fragments: Tensor, bits: int, D: int, keys: bool) -> Tensor:
    """What `to_fragments` was given, as float32: unsigned codes `[..., 32, D]` of keys, or `[..., D, 32]` of values."""
    together, size = (2, 8) if bits == 8 else (4, 4)
    lanes = fragments.unflatten(-1, (-1, 32, together, size))
    tiles = _permute_tail(lanes, (0, 2, 1, 3)).flatten(-4, -3)  # [tiles, 32, bytes]
    if bits == 4:
        bytes = tiles.unflatten(-1, (2, 2)).mT  # [pairs 0 and 1 or 2 and 3, half-word]
        tiles = torch.stack([bytes & 15, bytes >> 4], dim=-2).flatten(-3)
    M, K = (BLOCK, D) if keys else (D, BLOCK)
    outer = (K // 16, M // 16) if keys else (M // 16, K // 16)
    grid = tiles.float().reshape(*tiles.shape[:-3], *outer, 8, 4, 2, 2, 2)  # tile, tile, r, t, half, hi, pair
    order = (1, 5, 2, 0, 4, 3, 6) if keys else (0, 5, 2, 1, 4, 3, 6)
    return _permute_tail(grid, order).reshape(*tiles.shape[:-3], M, K)


def _to_grid(x: Tensor, dim: int, bits: int) -> tuple[Tensor, list[Tensor]]:
    """Unsigned codes of x, and its scales (and minima) over `dim`, rounded to float16 before the codes are chosen."""
    if bits == 8:
        scale = (x.abs().amax(dim, keepdim=True) * (1 / 127)).clamp(min=SMALLEST_SCALE).half()
        codes = (x * (1 / scale.float())).round().clamp(-127, 127) + 128
        return codes, [scale.squeeze(dim)]
    low, high = x.amin(dim, keepdim=True).half(), x.amax(dim, keepdim=True)
    scale = ((high - low.float()) * (1 / 15)).clamp(min=SMALLEST_SCALE).half()
    codes = ((x - low.float()) * (1 / scale.float())).round().clamp(0, 15)
    return codes, [scale.squeeze(dim), low.squeeze(dim)]


def _off_grid(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """codes * scale (+ minimum); `scales` has P at dimension 3."""
    scales = scales.float()
    if bits == 8:
        return (codes - 128) * scales.select(3, 0)
    return codes * scales.select(3, 0) + scales.select(3, 1)


def _key_order(x: Tensor) -> Tensor:
    """Channels `[..., D]` so that those of one lane (2t, 2t + 1, 8 further, and these of the next 16) are 16 bytes."""
    return _permute_tail(x.unflatten(-1, (-1, 2, 2, 4, 2)), (0, 3, 1, 2, 4)).flatten(-5)


def _from_key_order(x: Tensor) -> Tensor:
    return _permute_tail(x.unflatten(-1, (-1, 4, 2, 2, 2)), (0, 2, 3, 1, 4)).flatten(-5)


def _value_order(x: Tensor) -> Tensor:
    """Tokens `[..., 32]` so that those of one lane (r, r + 8, r + 16, r + 24) are 8 bytes."""
    return x.unflatten(-1, (4, 8)).mT.flatten(-2)


def _from_value_order(x: Tensor) -> Tensor:
    return x.unflatten(-1, (8, 4)).mT.flatten(-2)


def _permute_tail(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute the last dimensions, leave those before them."""
    lead = x.dim() - len(order)
    return x.permute(*range(lead), *(lead + place for place in order))
