// Activations to int8 codes with one scale a token, bit for bit as `ops.token_codes`: scale = amax / 127.5 and code =
// round half to even(clamp(x / scale, -128, 127)), in float32; the scale of a row of zeros is epsilon.
//
// x [M, COLUMNS] 16-bit, 16-byte aligned, COLUMNS % 16 == 0 -> codes in the layout of w8a8.cuh (zeros past COLUMNS; rows
// past M not written) and scales [M] float32. A row with a NaN or an infinity gets that as its scale, so that its outputs
// are not finite either. One block a row, which is read once and kept in registers.
// Constants: COLUMNS, THREADS, BF16.
#pragma once
#include "mma.cuh"
#include "w8a8.cuh"
#if !defined(__CUDACC__)
#include <math.h>
#endif

constexpr int PIECES = (COLUMNS + 127) / 128 * 16;  // of 8 numbers, in a row padded to blocks of 128
constexpr int PER_THREAD = (PIECES + THREADS - 1) / THREADS;
static_assert(COLUMNS % 16 == 0 && THREADS % 32 == 0, "");

// What a row needs to turn numbers into codes. Rows of tiny numbers are multiplied by a power of two first, numbers and
// scale alike, so that no step is subnormal and the quotients stay what they are.
struct Divisor {
    float boost, scale, reciprocal;
};

HOST_DEVICE float scale_of(unsigned highest) {
    const float scale = to_float(highest) / 127.5f;
    return scale == 0.0f ? 1.1920928955078125e-7f : scale;
}

HOST_DEVICE Divisor make_divisor(float scale) {
    const float boost = scale < 1e-18f ? 18446744073709551616.0f : 1.0f;  // 2^64
    return {boost, scale * boost, 1.0f / (scale * boost)};
}

// The code of x as eight bits. The quotient is correctly rounded, made from the
// correctly rounded reciprocal in three steps (Markstein 1990) instead of a division; tests try the pairs there are.
HOST_DEVICE unsigned code_of(float x, Divisor by) {
    const float number = x * by.boost;
    const float guess = number * by.reciprocal;
    const float quotient = fmaf(fmaf(-guess, by.scale, number), by.reciprocal, guess);
    const float clamped = fminf(fmaxf(quotient, -128.0f), 127.0f);
    return bits_of_float(clamped + 12582912.0f) & 0xFFu;  // 1.5 * 2^23: the last bits are the rounded integer
}

HOST_DEVICE unsigned four_codes(unsigned low, unsigned high, Divisor by) {
    return code_of(to_float(low & 0xFFFFu), by) | code_of(to_float(low >> 16), by) << 8
           | code_of(to_float(high & 0xFFFFu), by) << 16 | code_of(to_float(high >> 16), by) << 24;
}

// The larger of two pairs of 16-bit numbers without their signs; as bits they are in order, infinity and NaN above all.
HOST_DEVICE unsigned larger(unsigned highest, unsigned pair) {
    const unsigned low = pair & 0x7FFFu, high = pair >> 16 & 0x7FFFu;
    const unsigned both = low > high ? low : high;
    return both > highest ? both : highest;
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_tokens(
    const uint4* x, uint2* codes, float* scales, int tokens) {
    DYNAMIC_SHARED(unsigned, highest_of);  // one a warp
    let_next_kernel_start();
    const int row = blockIdx.x, rows = (tokens + 7) & ~7;
    uint4 pieces[PER_THREAD];
    unsigned highest = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int piece = threadIdx.x + i * THREADS;
        pieces[i] = uint4{0, 0, 0, 0};
        if (piece < COLUMNS / 8) pieces[i] = load_streaming(x + (long long)row * (COLUMNS / 8) + piece);
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        highest = larger(larger(highest, pieces[i].x), pieces[i].y);
        highest = larger(larger(highest, pieces[i].z), pieces[i].w);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const unsigned other = __shfl_xor_sync(0xFFFFFFFFu, highest, lanes);
        highest = other > highest ? other : highest;
    }
    if (threadIdx.x % 32 == 0) highest_of[threadIdx.x / 32] = highest;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; ++i) highest = highest_of[i] > highest ? highest_of[i] : highest;
    const float scale = scale_of(highest);
    const Divisor by = make_divisor(scale);
    if (threadIdx.x == 0) scales[row] = scale;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int piece = threadIdx.x + i * THREADS;
        if (piece >= PIECES) break;
        const uint2 eight = {four_codes(pieces[i].x, pieces[i].y, by), four_codes(pieces[i].z, pieces[i].w, by)};
        codes[2 * code_chunk(piece / 16, row, piece / 2 % 8, rows) + piece % 2] = eight;
    }
}
