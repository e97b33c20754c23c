// What the int8 kernels share: where a code lies, which tile a block computes, how a sum becomes an output.
//
// Codes of weights and of activations are [K / 128, rows, 128] int8: rows of 128 bytes whose eight 16-byte chunks are
// XORed with row % 8. That is the 128-byte swizzle of wgmma, and free of bank conflicts for ldmatrix, so that tiles go to
// shared memory as they are: any 8 rows are 1024 contiguous bytes. K is the padded one, a multiple of 128; codes past the
// real K are zero. Activations have `rows` = M rounded up to 8; rows past M hold anything, and their outputs are not stored.
#pragma once
#include "numbers.cuh"

// Index in 16 bytes of chunk `chunk` (0..7) of row `row` in block `block` of 128 codes.
HOST_DEVICE constexpr long long code_chunk(int block, int row, int chunk, int rows) {
    return ((long long)block * rows + row) * 8 + (chunk ^ (row & 7));
}

struct TilePlace {
    int m, n;
};

// Tile `index` of `tiles_m` x `tiles_n`, in bands of BAND tile rows: tiles that run together share operands in L2.
HOST_DEVICE constexpr TilePlace tile_place(int index, int tiles_m, int tiles_n) {
    constexpr int BAND = 8;
    const int first = index / (BAND * tiles_n) * BAND;
    const int height = tiles_m - first < BAND ? tiles_m - first : BAND;
    const int inside = index % (BAND * tiles_n);
    return {first + inside % height, inside / height};
}

HOST_DEVICE constexpr int clip(int value, int highest) { return value < 0 ? 0 : value < highest ? value : highest; }

// sum * column scale * row scale + bias, each step rounded to float32: the same bits as torch and in every kernel.
HOST_DEVICE float scaled_sum(int sum, float column_scale, float row_scale, float bias) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), column_scale), row_scale), bias);
#else
    return (float)sum * column_scale * row_scale + bias;
#endif
}

#if defined(N)
// Scale and bias of the `count` columns that a block computes, in shared memory: `columns[i]` and `columns[count + i]`.
template <int count>
DEVICE void load_columns(float* columns, const float* scales, const unsigned short* bias, int first, int thread, int threads) {
    for (int i = thread; i < count; i += threads) {
        const bool real = first + i < N;
        columns[i] = real ? scales[first + i] : 0.0f;
        columns[count + i] = BIAS && real ? to_float(bias[first + i]) : 0.0f;
    }
}

struct ColumnPair {
    float scale[2], bias[2];
};

// Columns `column` and `column` + 1 of the block.
template <int count>
DEVICE ColumnPair column_pair(const float* columns, int column) {
    const float *scales = columns + column, *biases = columns + count + column;
    return {{scales[0], scales[1]}, {biases[0], biases[1]}};
}

// Two outputs in one register.
DEVICE unsigned scaled_pair(int left, int right, float row_scale, const ColumnPair& pair) {
    return pack_floats(scaled_sum(left, pair.scale[0], row_scale, pair.bias[0]),
                       scaled_sum(right, pair.scale[1], row_scale, pair.bias[1]));
}
#endif
