// One linear of all experts for few tokens: y[p] for every pair p of a token and an expert (moe_tile.cuh).
//
//   x        GATED: tokens [pairs / SLOTS, K]; else [pairs, K], what GATED gave; 16-byte aligned
//   packed   T16x64 of each expert, [EXPERTS, N / 16, K / 64, 32 uint4]     scales   [EXPERTS, K / GROUP, N]
//   index    [pairs] the router's experts                                   weights  [pairs] the router's weights
//   y        GATED: [pairs, N / 2] of x's dtype; else float32 [pairs, SPLITS, N], to be summed by moe_sum
//
// Nothing is sorted. Blocks stand for (16 rows, pair); of the pairs that share an expert every TOKENS-th leads, in order:
// its block computes the next TOKENS of them, which cost what one costs since tokens are the eight columns of the MMA,
// and the blocks of the others end at once. The warps of a block split K; their sums meet in shared memory in one order.
// Outputs of pairs without an expert are not written.
//
// The second linear fetches its weights before the first has ended: they depend on the index only.
//
// Constants: those of moe_tile.cuh, TOKENS, WARPS, DEPTH (loads under way in a warp), SPLITS (of K, over blocks).
// Launch: N / 16 * SPLITS * pairs blocks of 32 * WARPS threads; shared memory: x, the sums, the pairs.
#include "moe_tile.cuh"

constexpr int SHARE = round_up((SLICES + SPLITS - 1) / SPLITS, UNIT);   // slices of a block
constexpr int OWN = round_up((SHARE + WARPS - 1) / WARPS, UNIT);        // slices of a warp
constexpr int STEPS = round_up(OWN, DEPTH);                             // the same in whole turns of the ring of loads
constexpr bool EVEN = OWN == STEPS && SHARE == OWN * WARPS && SLICES == SHARE * SPLITS;
constexpr int ROW = SHARE * 64 + 8;  // of x in shared memory: 8 more, so that 8 rows lie in different banks
constexpr int SUM_ROW = 20;          // of sums: 16, and 4 more for the same reason
constexpr int X_BYTES = TOKENS * ROW * 2;
constexpr int SUMS = WARPS * TOKENS * SUM_ROW;

static_assert(TOKENS >= 1 && TOKENS <= 8 && WARPS >= 1 && WARPS <= 8 && SPLITS >= 1 && DEPTH % UNIT == 0, "plan");
static_assert(!GATED || SPLITS == 1, "the activation needs whole sums");

// Bit l: what lane l says.
DEVICE unsigned lanes_where(bool yes) {
#if defined(__CUDACC__)
    return __ballot_sync(0xffffffffu, yes);
#else
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) all |= (unsigned)__shfl_sync(0xffffffffu, (int)yes, lane) << lane;
    return all;
#endif
}

HOST_DEVICE int count_bits(unsigned bits) {
#if defined(__CUDA_ARCH__)
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, (GROUP == 32 ? 16 : 20) / WARPS)  // 128 or 96 registers
moe_decode(const unsigned short* x, const uint4* packed, const unsigned short* scales, const void* index,
           const void* weights, void* y, int pairs) {
    DYNAMIC_SHARED(uint4, shared);
    unsigned short* const shared_x = (unsigned short*)shared;        // [TOKENS, ROW]
    float* const shared_sums = (float*)((char*)shared + X_BYTES);    // [WARPS, TOKENS, SUM_ROW]
    int* const members = (int*)(shared_sums + SUMS);                 // [TOKENS] pairs

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x % TILES, split = blockIdx.x / TILES % SPLITS, pair = blockIdx.x / (TILES * SPLITS);
    if (GATED) wait_for_kernel_ahead();

    const int expert = expert_of(index, pair);
    int found = 0, rank = 0;  // pairs of this expert: all so far; those before ours
    for (int first = 0; first < pairs; first += 32) {
        const int other = first + lane;
        const bool same = other < pairs && expert_of(index, other) == expert;
        const unsigned mask = lanes_where(same);
        if (pair / 32 == first / 32) rank = found + count_bits(mask & ((1u << pair % 32) - 1));
        const int place = found + count_bits(mask & ((1u << lane) - 1)) - rank;
        if (warp == 0 && same && other >= pair && place < TOKENS) members[place] = other;
        found += count_bits(mask);
    }
    if (expert < 0 || rank % TOKENS != 0) return;  // not sooner: the index is read at once
    const int count = min(found - rank, TOKENS);

    const int share_begin = split * SHARE, share_end = min(share_begin + SHARE, SLICES);
    const int begin = share_begin + warp * OWN, end = min(begin + OWN, share_end);
    const Rows rows = rows_of(packed, scales, expert, tile, lane);
    Slot ring[DEPTH / UNIT];
#pragma unroll
    for (int i = 0; i < DEPTH; i += UNIT)
        if (EVEN || begin + i < end) load_slot(ring[i / UNIT], rows, begin + i);

    if (!GATED) wait_for_kernel_ahead();
    __syncthreads();  // the members
    const int chunks = (SLICES % SHARE ? share_end - share_begin : SHARE) * 8;  // of 8 numbers, in a row of x
    for (int i = threadIdx.x; i < count * chunks; i += 32 * WARPS) {
        const int token = i / chunks, chunk = i % chunks, row = GATED ? members[token] / SLOTS : members[token];
        copy_async(shared_x + token * ROW + chunk * 8, x + (size_t)row * K + share_begin * 64 + chunk * 8);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    let_next_kernel_start();

    // Rows that hold no token: what the MMA makes of them stays in columns that nobody reads.
    const int token_row = min(lane % 8, TOKENS - 1);
    const unsigned x_address = shared_address(shared_x + token_row * ROW + lane / 8 * 8 + (begin - share_begin) * 64);
    float sums[1][4] = {{0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
    for (int step = 0; step < STEPS; step += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; i += UNIT) {
            const int next = step + i + DEPTH;
            if (EVEN || begin + step + i < end) add_slot(sums, ring[i / UNIT], x_address + (step + i) * 128, 0, lane);
            if (next < STEPS && (EVEN || begin + next < end)) load_slot(ring[i / UNIT], rows, begin + next);
        }
    }

#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
        if (token < TOKENS) shared_sums[(warp * TOKENS + token) * SUM_ROW + row] = sums[0][i];
    }
    __syncthreads();
    const auto sum_of = [&](int token, int row) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += shared_sums[(w * TOKENS + token) * SUM_ROW + row];
        return GROUPED ? sum : sum * to_float(scales[(size_t)expert * N + tile * 16 + row]);
    };
    constexpr int ROWS = GATED ? 8 : 16;  // of outputs
    for (int i = threadIdx.x; i < count * ROWS; i += 32 * WARPS) {
        const int token = i / ROWS, row = i % ROWS, member = members[token];
        if (GATED) {
            const float value = gated(sum_of(token, row), sum_of(token, row + 8));
            ((unsigned short*)y)[(size_t)member * OUTPUTS + tile * 8 + row] = (unsigned short)from_float(value);
        } else {
            const float value = router_weight(weights, member) * sum_of(token, row);
            ((float*)y)[((size_t)member * SPLITS + split) * N + tile * 16 + row] = value;
        }
    }
}
