// y[m, n] = sum over k of x[m, k] * (code[n, k] - zero[g, n]) * scale[g, n], for up to TOKENS <= 64 tokens. sm_80 and newer.
//
// Operands and result as in w4a16_gemv.cuh, all 16-byte aligned. A block computes ROWS = 32 * WARPS_N rows of the weight
// for all tokens; K is split over its WARPS_K warps, slice by slice, and over SPLITS blocks, whose sums meet as
// w4a16_tile.cuh says. Weights are operand A of mma.m16n8k16, tokens operand B; a warp's 32 rows share each B. Sums of
// a group (of half of it where a group has 128 columns) are scaled in float32. The result is the same bits each time.
//
// Constants: BF16, N, K, GROUP (K: one scale a row), ZEROS, TOKENS (16, 32, 64), WARPS_N, WARPS_K, STAGES, SPLITS, CLUSTER.
// Launch: SPLITS blocks for each ROWS rows, in clusters of SPLITS if CLUSTER; 32 * WARPS_N * WARPS_K threads; shared
// memory: the stages or the sums, whichever is more.
constexpr int ROWS = 32 * WARPS_N, COPIERS = 32 * WARPS_N, THREADS = COPIERS * WARPS_K, WAYS = WARPS_K;
#include "w4a16_tile.cuh"

constexpr int STAGE = WARPS_K * SLICE_BYTES;
constexpr int SHARE = (SLICES + SPLITS - 1) / SPLITS;  // slices of a block
constexpr int STEPS = (SHARE + WARPS_K - 1) / WARPS_K;
static_assert(TOKENS % 16 == 0 && TOKENS <= 64 && THREADS <= 256 && STAGES >= 2, "plan");

typedef float Sums[2][TOKENS / 8][4];  // of 16 rows, of 8 tokens

// sums += the rows from `first_row` on of a slice, times its tokens.
DEVICE void multiply_slice(Sums& sums, const char* slice, int first_row) {
    const int lane = threadIdx.x % 32, row = first_row + lane / 4;
    const float nothing[4] = {0.f, 0.f, 0.f, 0.f};
    uint4 q[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        q[i] = ((const uint4*)(slice + WEIGHTS_AT))[(first_row / 16 + i) * 32 + lane];
    Sums products;
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {  // 16 columns
        constexpr int GROUP_TILES = 4 / PARTS;
        const int part = tile / GROUP_TILES;
        unsigned b[TOKENS / 8][2];
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {  // lanes 0..15 give the rows of one block of tokens, then the next
            const int token = 8 * j + lane / 16 * 8 + lane % 8, chunk = 2 * tile + lane / 8 % 2;
            load_matrices(b[j], shared_address(slice + swizzled_chunk(token, chunk)));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned a[4];
            dequantize(word_of(q[i], tile), zero_in(slice, part, row + 16 * i), zero_in(slice, part, row + 16 * i + 8), a);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) {
                if (!GROUPED) mma_16x8x16(sums[i][j], a, b[j][0], b[j][1], sums[i][j]);
                else if (tile % GROUP_TILES == 0) mma_16x8x16(products[i][j], a, b[j][0], b[j][1], nothing);
                else mma_16x8x16(products[i][j], a, b[j][0], b[j][1], products[i][j]);
            }
            if (GROUPED && tile % GROUP_TILES == GROUP_TILES - 1) {
                const float upper = to_float(scale_in(slice, part, row + 16 * i));
                const float lower = to_float(scale_in(slice, part, row + 16 * i + 8));
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++) sums[i][j][c] += (c < 2 ? upper : lower) * products[i][j][c];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
w4a16_skinny(const unsigned short* x, const uint4* packed, const unsigned short* scales, const signed char* zeros, void* y,
             int tokens) {
    DYNAMIC_SHARED(char, stages);
    const Operands in = {x, packed, scales, zeros, tokens};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
    const int split = blockIdx.x % SPLITS, n = blockIdx.x / SPLITS * ROWS;
    const int begin = split * SHARE, end = min(begin + SHARE, SLICES);
    const auto copy_step = [&](int step) {  // the slice of this way
        const int slice = begin + step * WARPS_K + warp_k;
        if (slice < end) copy_slice(stages + step % STAGES * STAGE + warp_k * SLICE_BYTES, in, 0, n, slice);
    };

    // The weights that the first steps copy, a line of 128 bytes a thread.
    constexpr int LINES = (STAGES - 1) * WARPS_K * 4;  // of a tile's row of slices
    for (int i = threadIdx.x; i < ROWS / 16 * LINES; i += THREADS) {
        const int block = n / 16 + i / LINES, slice = begin + i % LINES / 4;
        if (block < N / 16 && slice < end) prefetch_l2(packed + ((size_t)block * SLICES + slice) * 32 + i % 4 * 8);
    }
    wait_for_kernel_ahead();
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        copy_step(step);
        copy_async_commit();
    }
    let_next_kernel_start();

    Sums sums = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // the step's operands are here, and nobody reads the stage that is filled next
        copy_step(step + STAGES - 1);
        copy_async_commit();  // empty at the end, so that the count of groups stays right
        if (begin + step * WARPS_K + warp_k < end) {
            const char* const stage = stages + step % STAGES * STAGE;
            multiply_slice(sums, stage + warp_k * SLICE_BYTES, warp_n * 32);
        }
    }
    __syncthreads();  // nobody reads operands any more

    float* const parts = (float*)stages;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            const int token = warp_k * TOKENS + 8 * j + lane % 4 * 2;
            put_sums(parts, token, warp_n * 32 + 16 * i + lane / 4, sums[i][j]);
        }
    write_sums(parts, y, in, 0, n, split);
}
