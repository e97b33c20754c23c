// int8 product for few tokens (sm_80 and later): every warp streams its own weights from memory to registers once.
//
// Operands and result as in w8a8_wgmma.cuh, with M <= TOKENS. Weights are the 16-row operand of mma.m16n8k32, tokens the
// 8-column one. A block computes ROWS weights x TOKENS tokens; its warps take blocks of 128 codes of K in turn and add up
// in shared memory. Constants: K, N, ROWS, TOKENS, WARPS, UNROLL, BF16, BIAS.
//
// The order of K inside a product is free as long as both operands share it: lane (r, t) holds chunks t and t + 4 of its
// rows as two 16-byte loads, and word j of each is what MMA j multiplies (a0, a2 and b0, b1). No shuffle, no ldmatrix.
#pragma once
#include "mma.cuh"
#include "w8a8.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int BLOCKS_OF_K = K / 128;
static_assert(K % 128 == 0 && K <= 65536, "sums of 128 * 128 stay below 2^31");
static_assert(WARPS <= BLOCKS_OF_K, "every warp has a block, and so waits for the activations");
static_assert(N % 8 == 0 && ROWS % 16 == 0 && TOKENS % 8 == 0, "");

// Chunks t and t + 4 of one row.
DEVICE void load_row(uint4 (&row)[2], const uint4* codes, int block, int index, int rows, int t) {
    row[0] = load_streaming(codes + code_chunk(block, index, t, rows));
    row[1] = load_streaming(codes + code_chunk(block, index, t + 4, rows));
}

DEVICE unsigned word(const uint4& chunk, int j) {
    return j == 0 ? chunk.x : j == 1 ? chunk.y : j == 2 ? chunk.z : chunk.w;
}

// 16 weight rows (`upper`: r, `lower`: r + 8) times 8 tokens over 128 codes.
DEVICE void multiply(int (&sums)[4], const uint4 (&upper)[2], const uint4 (&lower)[2], const uint4& near, const uint4& far) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const unsigned a[4] = {word(upper[0], j), word(lower[0], j), word(upper[1], j), word(lower[1], j)};
        mma_16x8x32_s8(sums, a, word(near, j), word(far, j), sums);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) w8a8_stream(
    const uint4* x, const float* x_scales, const uint4* w, const float* w_scales, const unsigned short* bias,
    unsigned short* out, int tokens) {
    DYNAMIC_SHARED(int, partial);  // [WARPS][TOKENS][ROWS]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
    const int n = blockIdx.x * ROWS;
    int sums[ROWS / 16][TOKENS / 8][4] = {};
    for (int first = warp; first < BLOCKS_OF_K; first += WARPS * UNROLL) {
        uint4 weights[UNROLL][ROWS / 8][2] = {};  // zeros past the end of K and of N
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int block = first + u * WARPS;
#pragma unroll
            for (int i = 0; i < ROWS / 8; ++i) {
                if (block < BLOCKS_OF_K && n + 8 * i < N) load_row(weights[u][i], w, block, n + 8 * i + r, N, t);
            }
        }
        if (first == warp) wait_for_kernel_ahead();  // the weights are on their way before the activations exist
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int block = first + u * WARPS < BLOCKS_OF_K ? first + u * WARPS : warp;
#pragma unroll
            for (int b = 0; b < TOKENS / 8; ++b) {
                const uint4 near = x[code_chunk(block, 8 * b + r, t, TOKENS)];
                const uint4 far = x[code_chunk(block, 8 * b + r, t + 4, TOKENS)];
#pragma unroll
                for (int i = 0; i < ROWS / 16; ++i) multiply(sums[i][b], weights[u][2 * i], weights[u][2 * i + 1], near, far);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
#pragma unroll
        for (int b = 0; b < TOKENS / 8; ++b) {
#pragma unroll
            for (int e = 0; e < 4; ++e) partial[(warp * TOKENS + 8 * b + 2 * t + e % 2) * ROWS + 16 * i + r + e / 2 * 8] = sums[i][b][e];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * ROWS; i += THREADS) {
        const int token = i / ROWS, row = i % ROWS;
        if (token >= tokens || n + row >= N) continue;
        int sum = 0;
#pragma unroll
        for (int k = 0; k < WARPS; ++k) sum += partial[(k * TOKENS + token) * ROWS + row];
        const float shift = BIAS ? to_float(bias[n + row]) : 0.0f;
        out[token * N + n + row] = from_float(scaled_sum(sum, w_scales[n + row], x_scales[token], shift));
    }
}
