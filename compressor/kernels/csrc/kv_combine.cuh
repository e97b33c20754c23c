// Adds up what the blocks of kv_attention.cuh found of each query head, in a fixed order. Constants: as there.
#pragma once
#include "kv_parts.cuh"

// Grid: sequences * query heads; a thread has two channels. `count` parts each.
extern "C" __global__ void __launch_bounds__(D / 2) kv_combine(
    const Pair* parts, const Pair* sums, unsigned* out, int query_heads, int count) {
    wait_for_kernel_ahead();
    const int sequence = blockIdx.x / query_heads, query = blockIdx.x % query_heads, within = query % GROUP;
    const int tiles = query_heads / GROUP * HEAD_TILES, tile = query / GROUP * HEAD_TILES + within / HEADS;
    const long long first = (static_cast<long long>(sequence) * tiles + tile) * count * HEADS + within % HEADS;
    float m = NOTHING, l = 0;
    for (int i = 0; i < count; ++i) m = fmaxf(m, sums[first + i * HEADS].x);
    Pair total = {0, 0};
    for (int i = 0; i < count; ++i) {
        const Pair sum = sums[first + i * HEADS];
        if (sum.y == 0) continue;
        const float weight = exp2f(sum.x - m);
        const Pair part = parts[(first + i * HEADS) * (D / 2) + threadIdx.x];
        total.x += weight * part.x, total.y += weight * part.y;
        l += weight * sum.y;
    }
    const float over = 1.0f / l;
    out[static_cast<long long>(blockIdx.x) * (D / 2) + threadIdx.x] =
        to_model(total.x * over) | to_model(total.y * over) << 16;
}
