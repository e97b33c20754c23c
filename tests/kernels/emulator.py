"""Which lane holds what: the tensor cores' fragments in numpy float64, from packed bytes.

The maps are PTX ISA's, written as index arithmetic over (lane, register, part of the register); the kernels' index
maths is not used. `wgmma` m64nNk16 and m64nNk32 with A in registers are four warps of the m16 map, one below the other.
"""

import numpy as np

LANES = np.arange(32)
R, T = LANES // 4, LANES % 4


def a_coordinates(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of operand A, m16 x k, at `[lane, register, part]`; k is 16 (16-bit numbers) or 32 (bytes)."""
    parts = k // 8  # numbers in a 32-bit register
    register, part = np.arange(4), np.arange(parts)
    row = R[:, None, None] + 8 * (register % 2)[None, :, None] + 0 * part
    column = parts * T[:, None, None] + (k // 2) * (register // 2)[None, :, None] + part
    return row, column


def b_coordinates(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Row (of k) and column (of n8) of operand B at `[lane, register, part]`."""
    parts = k // 8
    register, part = np.arange(2), np.arange(parts)
    row = parts * T[:, None, None] + (k // 2) * register[None, :, None] + part
    return row, R[:, None, None] + 0 * row


def c_coordinates() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the m16 x n8 result at `[lane, register]`."""
    register = np.arange(4)
    return R[:, None] + 8 * (register // 2), 2 * T[:, None] + register % 2


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One instruction on fragments a `[32, 4, parts]`, b `[32, 2, parts]`, c `[32, 4]`; 2 parts for k16, 4 for k32."""
    k = {2: 16, 4: 32}[a.shape[-1]]
    dense_a, dense_b = np.zeros((16, k)), np.zeros((k, 8))
    dense_a[a_coordinates(k)] = a
    dense_b[b_coordinates(k)] = b
    return c + (dense_a @ dense_b)[c_coordinates()]


def words_of(packed: np.ndarray) -> np.ndarray:
    """T16x64 bytes as the words that a lane loads: `[block, slice, lane, tile]` uint32."""
    blocks, slices, _ = packed.shape
    return packed.view(np.uint32).reshape(blocks, slices, 32, 4)


def a_of_word(words: np.ndarray) -> np.ndarray:
    """The unsigned codes of operand A `[32, 4, 2]` from a lane's word each: pair j in bits 4j and 4j + 16."""
    shifts = 4 * np.arange(4)[:, None] + 16 * np.arange(2)
    return ((words[:, None, None].astype(np.int64) >> shifts) & 15).astype(np.float64)


def int4_linear(packed: np.ndarray, scales_GN: np.ndarray, zeros_GN: np.ndarray | None, x_MK: np.ndarray) -> np.ndarray:
    """x times the transposed weight for M <= 8 tokens, one instruction after another, `[M, N]` float64.

    Weights are operand A, tokens the columns of operand B; a group's scale is applied to its own sum.
    """
    tokens, columns = x_MK.shape
    words = words_of(packed)
    group = columns // len(scales_GN)
    x = np.zeros((8, columns))
    x[:tokens] = x_MK
    y_NM = np.zeros((words.shape[0] * 16, 8))
    row, column = c_coordinates()
    k_row, k_column = b_coordinates(16)
    for block in range(words.shape[0]):
        for tile in range(columns // 16):
            n = 16 * block + a_coordinates(16)[0]
            zero = 8 + (0 if zeros_GN is None else zeros_GN[tile * 16 // group, n])
            a = a_of_word(words[block, tile // 4, :, tile % 4]) - zero
            sums = mma(a, x[k_column, 16 * tile + k_row], np.zeros((32, 4)))
            y_NM[16 * block + row, column] += sums * scales_GN[tile * 16 // group, 16 * block + row]
    return y_NM[:, :tokens].T
