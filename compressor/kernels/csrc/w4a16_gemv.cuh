// y[m, n] = sum over k of x[m, k] * (code[n, k] - zero[g, n]) * scale[g, n], for 1 to TOKENS <= 8 tokens m.
//
//   x       [tokens, K] bfloat16 or float16, 16-byte aligned     y       [tokens, N] of the same dtype
//   packed  T16x64 (layouts.py), [N / 16, K / 64, 32 uint4]      scales  [K / GROUP, N] of the same dtype
//   zeros   [K / GROUP, N] int8, -8..55 (ZEROS = 1), or nothing
//
// Weights are operand A of mma.m16n8k16 (16 rows), tokens operand B (8 columns): up to 8 tokens cost what one costs.
// A block takes 16 rows of the weight after another (grid-stride); its warps split K between them, each with DEPTH loads
// of 512 bytes under way, straight into registers, also across the border between two blocks of rows. x lies in shared
// memory for all of them. Sums of the warps meet in shared memory, in one order: the result is the same bits each time.
//
// K is split over SPLITS blocks where there are too few rows for the chip, or where x does not fit: CLUSTER = 1 adds
// their sums through distributed shared memory, CLUSTER = 0 writes y as float32 [SPLITS, tokens, N] for sum_splits.
//
// Constants: BF16, N, K, GROUP (K: one scale a row), ZEROS, TOKENS, WARPS, DEPTH, SPLITS, CLUSTER.
// Launch: SPLITS * any blocks of 32 * WARPS threads, in clusters of SPLITS if CLUSTER; shared memory: x, then the sums.
#include "mma.cuh"

HOST_DEVICE constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

constexpr int SLICES = K / 64;                  // a slice: 64 columns, one load of a warp
constexpr bool GROUPED = GROUP < K;
constexpr int PARTS = GROUP == 32 ? 2 : 1;      // groups in a slice
constexpr int UNIT = GROUPED && GROUP == 128 ? 2 : 1;                             // slices in a group
constexpr int SHARE = round_up((SLICES + SPLITS - 1) / SPLITS, UNIT);             // slices of a block
constexpr int OWN = round_up((SHARE + WARPS - 1) / WARPS, UNIT);                  // slices of a warp
constexpr int STEPS = round_up(OWN, DEPTH);     // the same in whole turns of the ring of loads
constexpr bool EVEN = OWN == STEPS && SHARE == OWN * WARPS && SLICES == SHARE * SPLITS;
constexpr int ROW = SHARE * 64 + 8;             // of x in shared memory: 8 more, so that 8 rows lie in different banks
constexpr int SUM_ROW = 20;                     // of sums: 16, and 4 more for the same reason
constexpr int X_BYTES = TOKENS * ROW * 2;
constexpr int SUMS = WARPS * TOKENS * SUM_ROW;

static_assert(N % 16 == 0 && K % 64 == 0, "T16x64");
static_assert(GROUP == 32 || GROUP == 64 || GROUP == 128 || GROUP == K, "GROUP is 32, 64, 128 or K");
static_assert(K % GROUP == 0, "groups fill the row");
static_assert(TOKENS >= 1 && TOKENS <= 8 && WARPS >= 1 && WARPS <= 16 && SPLITS >= 1, "plan");
static_assert(!CLUSTER || SPLITS <= 8, "clusters of more than 8 blocks are not portable");
static_assert(DEPTH % UNIT == 0, "the ring holds whole groups");

// What a warp holds of UNIT slices while they are under way. `grid` is the scale of row `lane` in lanes 0..15 and the
// zero of row `lane - 16` in the others: one register for both.
struct Slot {
    uint4 q[UNIT];
    int grid[PARTS];
};

// Fill a slot that begins at a slice, from the lane's place in the rows' weights and in the rows' scales and zeros.
DEVICE void load_slot(Slot& slot, const uint4* packed, const unsigned short* scales, const signed char* zeros,
                      int slice, bool upper) {
#pragma unroll
    for (int i = 0; i < UNIT; i++) slot.q[i] = load_streaming(packed + (slice + i) * 32);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int group = GROUPED ? slice / UNIT * PARTS + part : 0;
        if (ZEROS && upper) slot.grid[part] = zeros[group * N];
        else if (GROUPED) slot.grid[part] = scales[group * N];
    }
}

// sums[0..1] of row lane / 4, sums[2..3] of the row eight below, += the slot's weights times x.
DEVICE void add_slot(float (&sums)[4], const Slot& slot, unsigned x_address, int lane) {
    constexpr int TILES = 4 * UNIT / PARTS;  // of a group
    const float nothing[4] = {0.f, 0.f, 0.f, 0.f};
    float products[4];
    unsigned b[8], a[4];
    Zero low = make_zero(8), high = make_zero(8);
#pragma unroll
    for (int tile = 0; tile < 4 * UNIT; tile++) {
        const int i = tile % 4, part = tile / TILES;
        if (i == 0) {
            load_matrices(b, x_address + tile / 4 * 128);
            load_matrices(b + 4, x_address + tile / 4 * 128 + 64);
        }
        const uint4 q = slot.q[tile / 4];
        const unsigned word = i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w;
        if (ZEROS && tile % TILES == 0) {
            low = make_zero(8 + __shfl_sync(0xffffffffu, slot.grid[part], lane / 4 + 16));
            high = make_zero(8 + __shfl_sync(0xffffffffu, slot.grid[part], lane / 4 + 24));
        }
        dequantize(word, low, high, a);
        if (!GROUPED) mma_16x8x16(sums, a, b[2 * i], b[2 * i + 1], sums);
        else if (tile % TILES == 0) mma_16x8x16(products, a, b[2 * i], b[2 * i + 1], nothing);
        else mma_16x8x16(products, a, b[2 * i], b[2 * i + 1], products);
        if (GROUPED && tile % TILES == TILES - 1) {
            const float upper = to_float(__shfl_sync(0xffffffffu, slot.grid[part], lane / 4));
            const float lower = to_float(__shfl_sync(0xffffffffu, slot.grid[part], lane / 4 + 8));
            sums[0] += upper * products[0];
            sums[1] += upper * products[1];
            sums[2] += lower * products[2];
            sums[3] += lower * products[3];
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)  // 128 registers
w4a16_gemv(const unsigned short* x, const uint4* packed, const unsigned short* scales, const signed char* zeros,
           void* y, int tokens) {
    DYNAMIC_SHARED(uint4, shared);
    unsigned short* const shared_x = (unsigned short*)shared;         // [TOKENS, ROW]
    float* const shared_sums = (float*)((char*)shared + X_BYTES);      // [2, WARPS, TOKENS, SUM_ROW]
#if CLUSTER
    float* const shared_splits = shared_sums + 2 * SUMS;              // [2, SPLITS, TOKENS * 16]
#endif

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int split = blockIdx.x % SPLITS, stride = gridDim.x / SPLITS;
    const int share_begin = split * SHARE, share_end = min(share_begin + SHARE, SLICES);
    const int begin = share_begin + warp * OWN, end = min(begin + OWN, share_end);
    int n = blockIdx.x / SPLITS;  // which 16 rows of the weight

    if (lane % 8 == 0 && n < N / 16) {
        for (int i = 0; i < DEPTH && begin + i < end; i++)
            prefetch_l2(packed + (n * SLICES + begin + i) * 32 + lane);
    }
    wait_for_kernel_ahead();

    Slot ring[DEPTH / UNIT];
    const auto fill = [&](Slot& slot, int rows, int slice) {
        const int column = rows * 16 + lane % 16;
        load_slot(slot, packed + rows * (SLICES * 32) + lane, scales + column, zeros + column, slice, lane >= 16);
    };
#pragma unroll
    for (int i = 0; i < DEPTH; i += UNIT)
        if (n < N / 16 && begin + i < end) fill(ring[i / UNIT], n, begin + i);
    const int chunks = (SLICES % SHARE ? share_end - share_begin : SHARE) * 8;  // of 8 numbers, in a row of x
    for (int i = threadIdx.x; i < tokens * chunks; i += 32 * WARPS) {
        const int token = i / chunks, chunk = i % chunks;
        copy_async(shared_x + token * ROW + chunk * 8, x + (size_t)token * K + share_begin * 64 + chunk * 8);
    }
    copy_async_commit();
    copy_async_wait<0>();
#if CLUSTER
    cluster_barrier();  // also: the other blocks have started, so that their shared memory may be written
#else
    __syncthreads();
#endif
    let_next_kernel_start();

    // Rows that hold no token repeat the last: what the MMA makes of them stays in columns that nobody reads.
    const int token_row = min(lane % 8, TOKENS - 1);
    const unsigned x_address = shared_address(shared_x + token_row * ROW + lane / 8 * 8 + (begin - share_begin) * 64);

    for (int turn = 0; n < N / 16; n += stride, turn ^= 1) {
        float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
        for (int step = 0; step < STEPS; step += DEPTH) {
            const bool stays = step + DEPTH < STEPS;  // the ring's next turn is of the same rows
            const int next_n = stays ? n : n + stride, next_step = stays ? step + DEPTH : 0;
#pragma unroll
            for (int i = 0; i < DEPTH; i += UNIT) {
                Slot& slot = ring[i / UNIT];
                if (EVEN || begin + step + i < end) add_slot(sums, slot, x_address + (step + i) * 128, lane);
                if (next_n < N / 16 && (EVEN || begin + next_step + i < end)) fill(slot, next_n, begin + next_step + i);
            }
        }

        float* const mine = shared_sums + turn * SUMS + warp * TOKENS * SUM_ROW;
        const int token = lane % 4 * 2, row = lane / 4;
        if (token < TOKENS) {
            mine[token * SUM_ROW + row] = sums[0];
            mine[token * SUM_ROW + row + 8] = sums[2];
        }
        if (token + 1 < TOKENS) {
            mine[(token + 1) * SUM_ROW + row] = sums[1];
            mine[(token + 1) * SUM_ROW + row + 8] = sums[3];
        }
        // One barrier a turn is enough: sums of the next turn go to the other half, and nobody is two turns ahead.
        __syncthreads();
#if CLUSTER
        for (int i = threadIdx.x; i < tokens * 16; i += 32 * WARPS) {
            float sum = 0.f;
            for (int w = 0; w < WARPS; w++)
                sum += shared_sums[turn * SUMS + (w * TOKENS + i / 16) * SUM_ROW + i % 16];
            store_in_cluster(shared_splits + (turn * SPLITS + split) * TOKENS * 16 + i, 0, sum);
        }
        cluster_barrier();
        if (split != 0) continue;
#endif
        for (int i = threadIdx.x; i < tokens * 16; i += 32 * WARPS) {
            float sum = 0.f;
#if CLUSTER
            for (int s = 0; s < SPLITS; s++) sum += shared_splits[(turn * SPLITS + s) * TOKENS * 16 + i];
#else
            for (int w = 0; w < WARPS; w++)
                sum += shared_sums[turn * SUMS + (w * TOKENS + i / 16) * SUM_ROW + i % 16];
#endif
            const int column = n * 16 + i % 16;
            if (!GROUPED) sum *= to_float(scales[column]);
            const size_t at = (size_t)(i / 16) * N + column;
            if (SPLITS > 1 && !CLUSTER) ((float*)y)[(size_t)split * tokens * N + at] = sum;
            else ((unsigned short*)y)[at] = (unsigned short)from_float(sum);
        }
    }
}
