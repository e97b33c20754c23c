"""T16x64: how our kernels hold four-bit codes, so that a warp's load of 512 bytes is 16 rows x 64 columns of weights.

N output features (rows of the weight), K input features (columns). A word (32 bits) is what one lane of a warp holds
of a 16x16 tile as operand A of mma.m16n8k16; its four words of four neighbouring tiles are the 16 bytes that it loads.

```
packed[n / 16, k / 64, 4 * lane + tile]      lane = 4 * r + t,  r = 0..7,  t = 0..3,  tile = k % 64 / 16

bits of a word     0-3        4-7        8-11       12-15      16-19      20-23      24-27      28-31
row                r          r + 8      r          r + 8      r          r + 8      r          r + 8
column of a tile   2t         2t         2t + 8     2t + 8     2t + 1     2t + 1     2t + 9     2t + 9
```

Nibbles are unsigned: code + 8. This module is the definition, in torch, on any device; csrc/pack.cuh is held to it.
"""

import torch
from torch import Tensor

ROWS = 16
COLUMNS = 64
WORDS = ROWS * COLUMNS // 8  # of a tile
GROUPS = (32, 64, 128)  # columns that share a scale; or all of a row

# Bits of a word, four at a time, as (row half, column half, column parity): the order of the MMA's registers.
_SHIFTS = torch.tensor([[[0, 16], [8, 24]], [[4, 20], [12, 28]]], dtype=torch.int32)


def check_t16x64(rows: int, columns: int) -> None:
    """Refuse a weight that the layout cannot hold."""
    if rows % ROWS or columns % COLUMNS or not rows or not columns:
        raise ValueError(
            f"a weight of {rows} x {columns} does not fit T16x64: rows have to be a multiple of {ROWS} and columns of "
            f"{COLUMNS}; pad it, or keep it dense"
        )


def check_group(columns: int, group_size: int) -> None:
    """Refuse a group size that no kernel takes."""
    if group_size != columns and (group_size not in GROUPS or columns % group_size):
        raise ValueError(
            f"groups of {group_size} in rows of {columns}: possible are {', '.join(map(str, GROUPS))} where they "
            f"divide the row, or the whole row"
        )


def pack_t16x64(codes_NK: Tensor) -> Tensor:
    """Codes from -8 to 7 (int8) `[N, K]` as words (int32) `[N / 16, K / 64, 128]`."""
    rows, columns = codes_NK.shape
    check_t16x64(rows, columns)
    nibbles = codes_NK.to(torch.int32) + 8
    # n = block, half, r     k = slice, tile, column half, t, parity
    nibbles = nibbles.reshape(rows // ROWS, 2, 8, columns // COLUMNS, 4, 2, 4, 2)
    words = nibbles << _SHIFTS.to(codes_NK.device)[:, None, None, None, :, None, :]
    words = words.sum(dim=(1, 5, 7), dtype=torch.int32)  # block, r, slice, tile, t; no two share a bit
    return words.permute(0, 2, 1, 4, 3).reshape(rows // ROWS, columns // COLUMNS, WORDS)


def unpack_t16x64(packed: Tensor) -> Tensor:
    """The codes `[N, K]` (int8) back out of T16x64."""
    blocks, slices, _ = packed.shape
    words = packed.reshape(blocks, slices, 8, 4, 4).permute(0, 2, 1, 4, 3)  # block, r, slice, tile, t
    shifts = _SHIFTS.to(packed.device)[:, None, None, None, :, None, :]
    nibbles = (words[:, None, :, :, :, None, :, None] >> shifts) & 15
    return (nibbles - 8).to(torch.int8).reshape(blocks * ROWS, slices * COLUMNS)
