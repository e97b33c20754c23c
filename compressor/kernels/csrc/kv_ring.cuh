// Attention over the exact tokens of a ring, in float32 without tensor cores: few tokens, beside all the blocks of codes.
#pragma once
#include "kv_parts.cuh"

// The `count` tokens from position `first` that lie in the ring, in float32.
DEVICE void attend_ring(
    const unsigned short* query, int queries, const unsigned short* keys, const unsigned short* values, int first, int count,
    float scaling, float* shared, float* part, Pair* part_sums) {
    constexpr int PAIRS = D / 2, GROUPS = THREADS / PAIRS;
    static_assert(THREADS % PAIRS == 0, "every thread has two channels");
    const int tid = threadIdx.x;
    float* q = shared;                                                // [HEADS, D]
    float* outs = q + HEADS * D;                                      // [GROUPS, HEADS, OUT_ROW]
    Pair* sums = reinterpret_cast<Pair*>(outs + GROUPS * HEADS * OUT_ROW);  // [GROUPS, HEADS]
    float* weights = reinterpret_cast<float*>(sums + GROUPS * HEADS);  // [count, HEADS]
    for (int i = tid; i < HEADS * D; i += THREADS) {
        q[i] = i / D < queries ? from_model(query[i]) * (scaling * LOG2_E) : 0;
    }
    __syncthreads();
    for (int token = tid; token < count; token += THREADS) {
        const uint4* row = reinterpret_cast<const uint4*>(keys + static_cast<long long>((first + token) % RING) * D);
        float logits[HEADS] = {};
#pragma unroll 4
        for (int i = 0; i < D / 8; ++i) {
            const uint4 eight = row[i];
            const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int head = 0; head < HEADS; ++head) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    logits[head] += from_model(pairs[j] & 0xFFFFu) * q[head * D + 8 * i + 2 * j];
                    logits[head] += from_model(pairs[j] >> 16) * q[head * D + 8 * i + 2 * j + 1];
                }
            }
        }
#pragma unroll
        for (int head = 0; head < HEADS; ++head) weights[token * HEADS + head] = logits[head];
    }
    __syncthreads();
    for (int head = tid / 32; head < HEADS; head += WARPS) {
        float m = NOTHING, l = 0;
        for (int token = tid % 32; token < count; token += 32) m = fmaxf(m, weights[token * HEADS + head]);
        for (int other = 1; other < 32; other *= 2) m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, other));
        for (int token = tid % 32; token < count; token += 32) {
            const float weight = exp2f(weights[token * HEADS + head] - m);
            weights[token * HEADS + head] = weight;
            l += weight;
        }
        for (int other = 1; other < 32; other *= 2) l += __shfl_xor_sync(0xFFFFFFFFu, l, other);
        if (tid % 32 < GROUPS) sums[tid % 32 * HEADS + head] = {m, tid % 32 == 0 ? l : 0};
    }
    __syncthreads();
    Pair out[HEADS] = {};
    const int pair = tid % PAIRS, group = tid / PAIRS;
    for (int token = group; token < count; token += GROUPS) {
        const unsigned* row = reinterpret_cast<const unsigned*>(values + static_cast<long long>((first + token) % RING) * D);
        const float low = from_model(row[pair] & 0xFFFFu), high = from_model(row[pair] >> 16);
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
            out[head].x += weights[token * HEADS + head] * low;
            out[head].y += weights[token * HEADS + head] * high;
        }
    }
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
        outs[(group * HEADS + head) * OUT_ROW + 2 * pair] = out[head].x;
        outs[(group * HEADS + head) * OUT_ROW + 2 * pair + 1] = out[head].y;
    }
    __syncthreads();
    for (int i = tid; i < HEADS * D; i += THREADS) {
        float sum = 0;
        for (int other = 0; other < GROUPS; ++other) sum += outs[(other * HEADS + i / D) * OUT_ROW + i % D];
        part[i] = sum;
        if (i % D == 0) part_sums[i / D] = sums[i / D];
    }
}
