// One linear of all experts for many tokens: y[p] for every pair p of a token and an expert (moe_tile.cuh).
//
//   x, packed, scales, weights, y   as in moe_decode.cuh, with SPLITS = 1
//   order, experts                  from moe_route: blocks of TOKENS pairs that share an expert
//
// A block computes a block of pairs times WARPS * ROW_TILES * 16 rows of the weight. Each warp has rows of its own, whose
// weights go from global memory straight into registers, DEPTH slices ahead; a weight becomes a number once for all
// TOKENS. x goes through shared memory in chunks of 128 columns, STAGES of them under way. Blocks of pairs are the
// faster part of the grid: those of one expert run together and share its weights in L2.
//
// The second linear fetches its weights before the first has ended: they depend on the routing only.
//
// Constants: those of moe_tile.cuh, TOKENS, WARPS, ROW_TILES, DEPTH, STAGES, RESIDENT (blocks on a multiprocessor).
// Launch: `blocks` of pairs * row blocks, of 32 * WARPS threads; shared memory: STAGES chunks of x, TOKENS pairs.
#include "moe_tile.cuh"

constexpr int CHUNK = 128;                         // columns of x in a stage
constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK;
constexpr int ROW = CHUNK + 8;                     // 8 more, so that 8 rows lie in different banks
constexpr int THREADS = 32 * WARPS;
constexpr int AT_ONCE = THREADS / 16;              // tokens whose chunks all threads copy together, 16 bytes each
constexpr int COPIES = (TOKENS + AT_ONCE - 1) / AT_ONCE;
constexpr int TURN = DEPTH / 2;                    // chunks in a turn of the ring of weights

static_assert(TOKENS % 8 == 0 && DEPTH % 2 == 0 && DEPTH % UNIT == 0 && STAGES >= 2, "plan");

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
moe_grouped(const unsigned short* x, const uint4* packed, const unsigned short* scales, const int* order,
            const int* experts, const void* weights, void* y, int blocks) {
    DYNAMIC_SHARED(uint4, shared);
    unsigned short* const stages = (unsigned short*)shared;      // [STAGES, TOKENS, ROW]
    int* const members = (int*)(stages + STAGES * TOKENS * ROW);  // [TOKENS] pairs, -1: none

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int block = blockIdx.x % blocks, first_tile = (blockIdx.x / blocks * WARPS + warp) * ROW_TILES;
    if (GATED) wait_for_kernel_ahead();
    const int expert = experts[block];
    if (expert < 0) return;

    Rows rows[ROW_TILES];  // tiles past the last repeat it and are not written
    Slot ring[ROW_TILES][DEPTH / UNIT];
#pragma unroll
    for (int j = 0; j < ROW_TILES; j++) rows[j] = rows_of(packed, scales, expert, min(first_tile + j, TILES - 1), lane);
#pragma unroll
    for (int i = 0; i < DEPTH; i += UNIT)
#pragma unroll
        for (int j = 0; j < ROW_TILES; j++)
            if (i < SLICES) load_slot(ring[j][i / UNIT], rows[j], i);

    for (int i = threadIdx.x; i < TOKENS; i += THREADS) members[i] = order[block * TOKENS + i];
    __syncthreads();
    if (!GATED) wait_for_kernel_ahead();

    const int part = threadIdx.x % 16, own_token = threadIdx.x / 16;
    const auto fetch = [&](int chunk) {
        const int column = chunk * CHUNK + part * 8;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int token = own_token + i * AT_ONCE;
            if (TOKENS % AT_ONCE && token >= TOKENS) continue;
            const int pair = members[token], row = max(GATED ? pair / SLOTS : pair, 0);
            unsigned short* const place = stages + (chunk % STAGES * TOKENS + token) * ROW + part * 8;
            const bool valid = pair >= 0 && (K % CHUNK == 0 || column < K);
            copy_async_or_zero(place, x + (size_t)row * K + (valid ? column : 0), valid);
        }
    };
    for (int chunk = 0; chunk < STAGES - 1; chunk++) {
        if (chunk < CHUNKS) fetch(chunk);
        copy_async_commit();
    }

    let_next_kernel_start();

    const unsigned x_address = shared_address(stages + lane % 8 * ROW + lane / 8 * 8);
    float sums[ROW_TILES][TOKENS / 8][4] = {};
#pragma unroll 1
    for (int turn = 0; turn < CHUNKS; turn += TURN) {
#pragma unroll
        for (int i = 0; i < TURN; i++) {
            const int chunk = turn + i;
            if (CHUNKS % TURN && chunk >= CHUNKS) break;
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // this chunk is there, and nobody reads the one before it any more
            if (chunk + STAGES - 1 < CHUNKS) fetch(chunk + STAGES - 1);
            copy_async_commit();
            const unsigned stage = x_address + chunk % STAGES * (TOKENS * ROW * 2);
#pragma unroll
            for (int s = 0; s < 2; s += UNIT) {
                const int slice = chunk * 2 + s, next = slice + DEPTH;
#pragma unroll
                for (int j = 0; j < ROW_TILES; j++) {
                    Slot& slot = ring[j][(i * 2 + s) / UNIT];
                    if (SLICES % 2 == 0 || slice < SLICES) add_slot(sums[j], slot, stage + s * 128, 16 * ROW, lane);
                    if (next < SLICES) load_slot(slot, rows[j], next);
                }
            }
        }
    }

    const int r = lane / 4;
#pragma unroll
    for (int j = 0; j < ROW_TILES; j++) {
        const int tile = first_tile + j;
        if (tile >= TILES) break;
        const unsigned short* const scale = scales + (size_t)expert * N + tile * 16 + r;  // only where !GROUPED
        const float upper = GROUPED ? 1.f : to_float(scale[0]), lower = GROUPED ? 1.f : to_float(scale[8]);
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int member = members[n * 8 + lane % 4 * 2 + i];
                if (member < 0) continue;
                const float above = upper * sums[j][n][i], below = lower * sums[j][n][i + 2];
                if (GATED) {
                    const unsigned value = from_float(gated(above, below));
                    ((unsigned short*)y)[(size_t)member * OUTPUTS + tile * 8 + r] = (unsigned short)value;
                } else {
                    float* const out = (float*)y + (size_t)member * N + tile * 16 + r;
                    const float weight = router_weight(weights, member);
                    out[0] = weight * above;
                    out[8] = weight * below;
                }
            }
    }
}
