// y[m, n] = sum of parts[m, s, j, n] over slots s that have an expert, and over splits j, in this order.
//
//   parts  float32 [tokens, SLOTS, SPLITS, N]     index  [tokens * SLOTS]     y  [tokens, N] bfloat16 or float16
//
// Constants: BF16, N, SPLITS, and those of moe_pairs.cuh. Launch: enough blocks of 128 threads for tokens * N / 4.
#include "moe_pairs.cuh"

static_assert(N % 4 == 0, "a thread takes four columns");

extern "C" __global__ void __launch_bounds__(128)
moe_sum(const uint4* parts, const void* index, uint2* y, int tokens) {
    wait_for_kernel_ahead();
    let_next_kernel_start();
    const int i = blockIdx.x * 128 + threadIdx.x, token = i / (N / 4), column = i % (N / 4);
    if (token >= tokens) return;
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
    for (int part = 0; part < SLOTS * SPLITS; part++) {
        if (expert_of(index, token * SLOTS + part / SPLITS) < 0) continue;
        const uint4 four = parts[((size_t)token * SLOTS * SPLITS + part) * (N / 4) + column];
        sums[0] += float_of_bits(four.x);
        sums[1] += float_of_bits(four.y);
        sums[2] += float_of_bits(four.z);
        sums[3] += float_of_bits(four.w);
    }
    y[i] = {pack_floats(sums[0], sums[1]), pack_floats(sums[2], sums[3])};
}
