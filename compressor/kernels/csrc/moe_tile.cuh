// Sixteen rows of an expert's four-bit weight times tokens, a slice of 64 columns after another.
//
// GATED = 1: the weight is gate and up together, in each 16 rows eight of gate and then the same eight of up, so that
// both of a number lie in one lane; y is act(gate) * up. GATED = 0: y is the sum times the router's weight.
//
// Constants: BF16, N, K, GROUP (K: one scale a row), GATED, GELU (1: gelu with tanh, 0: silu), FLOAT_WEIGHTS (the
// router's weights are float32; else of the activations' dtype).
#pragma once

#if !defined(__CUDACC__)
#include <cmath>
#endif

#include "moe_pairs.cuh"

HOST_DEVICE constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

constexpr int TILES = N / 16;
constexpr int SLICES = K / 64;                          // a slice: one load of a warp, 512 bytes
constexpr bool GROUPED = GROUP < K;
constexpr int PARTS = GROUP == 32 ? 2 : 1;              // groups in a slice
constexpr int UNIT = GROUPED && GROUP == 128 ? 2 : 1;   // slices in a group
constexpr int OUTPUTS = GATED ? N / 2 : N;

static_assert(N % 16 == 0 && K % 64 == 0, "T16x64");
static_assert(GROUP == 32 || GROUP == 64 || GROUP == 128 || GROUP == K, "GROUP is 32, 64, 128 or K");
static_assert(K % GROUP == 0, "groups fill the row");

// What a warp holds of UNIT slices while they are under way; lane l has the scales of row l % 16.
struct Slot {
    uint4 q[UNIT];
    unsigned scale[PARTS];
};

// Where a lane finds its part of 16 rows: weights of slice 0, and the scale of its row in group 0.
struct Rows {
    const uint4* packed;
    const unsigned short* scales;
};

DEVICE Rows rows_of(const uint4* packed, const unsigned short* scales, int expert, int tile, int lane) {
    return {packed + ((size_t)expert * TILES + tile) * (SLICES * 32) + lane,
            scales + (size_t)expert * (K / GROUP) * N + tile * 16 + lane % 16};
}

// Begin to load UNIT slices from `slice` on.
DEVICE void load_slot(Slot& slot, Rows rows, int slice) {
#pragma unroll
    for (int i = 0; i < UNIT; i++) slot.q[i] = load_streaming(rows.packed + (slice + i) * 32);
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        if (GROUPED) slot.scale[part] = rows.scales[(slice / UNIT * PARTS + part) * N];
}

// sums[b] += the slot's weights times tokens 8 b .. 8 b + 7: [0..1] of row lane / 4, tokens 2 (lane % 4) and the next,
// [2..3] of the row eight below. x: where this lane's row of the first eight tokens lies in shared memory, `stride`
// bytes before the next eight's.
template <int EIGHTS>
DEVICE void add_slot(float (&sums)[EIGHTS][4], const Slot& slot, unsigned x, unsigned stride, int lane) {
    constexpr int OF_GROUP = 4 * UNIT / PARTS;  // tiles of 16 columns
    const float nothing[4] = {0.f, 0.f, 0.f, 0.f};
    const Zero zero = make_zero(8);
    float products[EIGHTS][4];
    unsigned b[EIGHTS][4], a[4];
#pragma unroll
    for (int tile = 0; tile < 4 * UNIT; tile++) {
        if (tile % 2 == 0) {
            __syncwarp();  // else ptxas begins with everything at once, and runs out of registers
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) load_matrices(b[n], x + n * stride + tile * 32);
        }
        const uint4 q = slot.q[tile / 4];
        const int i = tile % 4, part = tile / OF_GROUP, pair = tile % 2 * 2;
        dequantize(i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w, zero, zero, a);
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            if (!GROUPED) mma_16x8x16(sums[n], a, b[n][pair], b[n][pair + 1], sums[n]);
            else if (tile % OF_GROUP == 0) mma_16x8x16(products[n], a, b[n][pair], b[n][pair + 1], nothing);
            else mma_16x8x16(products[n], a, b[n][pair], b[n][pair + 1], products[n]);
        }
        if (GROUPED && tile % OF_GROUP == OF_GROUP - 1) {
            const float upper = to_float(__shfl_sync(0xffffffffu, slot.scale[part], lane / 4));
            const float lower = to_float(__shfl_sync(0xffffffffu, slot.scale[part], lane / 4 + 8));
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
                sums[n][0] += upper * products[n][0];
                sums[n][1] += upper * products[n][1];
                sums[n][2] += lower * products[n][2];
                sums[n][3] += lower * products[n][3];
            }
        }
    }
}

// act(gate) * up. Both are gate / (1 + exp(-z)): gelu's (1 + tanh(u)) / 2 is the sigmoid of 2 u.
HOST_DEVICE float gated(float gate, float up) {
    const float z = GELU ? 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate) : gate;
    return gate / (1.f + exp2f(-1.4426950408889634f * z)) * up;
}

DEVICE float router_weight(const void* weights, int pair) {
    return FLOAT_WEIGHTS ? ((const float*)weights)[pair] : to_float(((const unsigned short*)weights)[pair]);
}
