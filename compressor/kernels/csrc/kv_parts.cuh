// What blocks of threads find of an attention step, and how it is put together.
//
// Parts [sequence, head * tile, splits + 1, 8, D] float32 with (m, l) [..., 8, 2]: the output is sum(part * 2^m) /
// sum(l * 2^m); l = 0 says that there is nothing, and its part is not written.
#pragma once
#include "kv_blocks.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int HEADS = 8, HEAD_TILES = (GROUP + HEADS - 1) / HEADS;  // query heads that share a pass over the codes
constexpr int OUT_ROW = D + 4;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NOTHING = -3e38f;  // the maximum of nothing: finite, since 0 * infinity would not be 0

// The part of `parts` found by `count` groups of threads, whose outputs, m and l lie in shared memory.
DEVICE void store_part(const float* outs, const Pair* sums, int count, float* part, Pair* part_sums) {
    for (int i = threadIdx.x; i < HEADS * D; i += THREADS) {
        const int head = i / D;
        float m = NOTHING, out = 0, l = 0;
        for (int group = 0; group < count; ++group) m = fmaxf(m, sums[group * HEADS + head].x);
        for (int group = 0; group < count; ++group) {
            const Pair sum = sums[group * HEADS + head];
            const float weight = sum.y == 0 ? 0 : exp2f(sum.x - m);
            out += weight * outs[(group * HEADS + head) * OUT_ROW + i % D];
            l += weight * sum.y;
        }
        part[i] = out;
        if (i % D == 0) part_sums[head] = {m, l};
    }
}
