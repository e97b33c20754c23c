// y[m, n] = sum over k of x[m, k] * weight[n, k], for many tokens, on Hopper (sm_90a): wgmma with weights from registers.
//
// Operands and result as in w4a16_gemv.cuh, all 16-byte aligned. Weights are (code - zero) * scale rounded once to
// bfloat16 or float16, the same bits that dequantize.cuh writes; with one scale a row the sums are scaled instead. Sums
// are float32; the result is the same bits each time.
//
// A block computes ROWS = 128 * HEIGHT rows for TOKENS tokens: two warpgroups, each HEIGHT times m64nTOKENSk16, whose
// operand A is four blocks of T16x64, a warp each. Weights of a slice are dequantized while the products of the slice
// before run. All threads copy, by cp.async: x is not tiled, so no bulk copy would swizzle it. A warp that runs ahead of
// the others waits for them at two barriers a stage (`full`: all have their copies of a slice; `empty`: all have done
// their products of it), each of which needs only that the others are one slice behind: they do not run in step.
//
// K is split over SPLITS blocks where there are few tiles; their sums meet as w4a16_tile.cuh says.
//
// Constants: BF16, N, K, GROUP (K: one scale a row), ZEROS, TOKENS (64, 128), HEIGHT (1, 2), STAGES, SPLITS, CLUSTER.
// Launch: SPLITS blocks of 256 threads for each tile, tiles of the same rows beside each other, in clusters of SPLITS if
// CLUSTER; shared memory: the stages or the sums, whichever is more, and 16 bytes a stage.
constexpr int ROWS = 128 * HEIGHT, THREADS = 256, COPIERS = 256, WAYS = 1;
#include "w4a16_tile.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int BARRIERS = STAGES * SLICE_BYTES > SUM_BYTES ? STAGES * SLICE_BYTES : SUM_BYTES;
constexpr int SHARE = (SLICES + SPLITS - 1) / SPLITS;  // slices of a block
static_assert(STAGES >= 4, "a slice in use, one before and one behind it, and copies under way");

typedef float Sums[HEIGHT][TOKENS / 2];
typedef unsigned Weights[HEIGHT][4][4];  // of a slice: operand A of four products

struct Block {
    char* stages;
    unsigned full, empty;  // shared-memory addresses: a barrier of 8 bytes a stage
    int m, n, begin, count;  // first token, row, slice; slices
};

// Row of the tile where the 16 rows of this warp in its h-th m64 begin.
DEVICE int first_row(int h) {
    const int warp = threadIdx.x / 32;
    return (warp / 4 * HEIGHT + h) * 64 + warp % 4 * 16;
}

DEVICE void load_weights(Weights& a, const char* slice) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < HEIGHT; h++) {
        const int first = first_row(h), row = first + lane / 4;
        const uint4 q = ((const uint4*)(slice + WEIGHTS_AT))[first / 16 * 32 + lane];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const Zero low = zero_in(slice, part, row), high = zero_in(slice, part, row + 8);
            unsigned scales[2] = {0, 0};
            if (GROUPED) {
                scales[0] = scale_in(slice, part, row) * 0x00010001u;
                scales[1] = scale_in(slice, part, row + 8) * 0x00010001u;
            }
#pragma unroll
            for (int tile = part * 4 / PARTS; tile < (part + 1) * 4 / PARTS; tile++) {
                dequantize(word_of(q, tile), low, high, a[h][tile]);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (GROUPED) a[h][tile][i] = fma_pair(a[h][tile][i], scales[i % 2], 0x80008000u);  // + -0
            }
        }
    }
}

DEVICE void multiply(float (&sums)[TOKENS / 2], unsigned (&a)[4], unsigned long long b) {
#if BF16
    wgmma_bf16(sums, a, b, 1);
#else
    wgmma_f16(sums, a, b, 1);
#endif
}

// The copies of slice i of the block, if there is one; always one group, so that the count of groups is that of slices.
DEVICE void copy_stage(const Block& block, const Operands& in, int i) {
    if (i < block.count) {
        char* const target = block.stages + i % STAGES * SLICE_BYTES;
        copy_slice(target, in, block.m, block.n, block.begin + i);
    }
    copy_async_commit();
}

// This warp's copies of slice i have arrived, which the thread has waited for: let wgmma see them, and tell the others.
DEVICE void announce(const Block& block, int i) {
    async_proxy_fence();
    __syncwarp();
    if (i < block.count && threadIdx.x % 32 == 0) barrier_arrive(block.full + i % STAGES * 8);
}

// Slice i of the block: its products are started, those of the slice before have ended, and a later slice is copied.
DEVICE void step(Sums& sums, Weights& a, const Block& block, const Operands& in, int i) {
    copy_async_wait<STAGES - 4>();  // of slice i + 1 and all before; copied are those up to i + STAGES - 3
    announce(block, i + 1);
    const int stage = i % STAGES;
    const char* const slice = block.stages + stage * SLICE_BYTES;
    barrier_wait(block.full + stage * 8, i / STAGES & 1);
    load_weights(a, slice);
    const unsigned long long b = swizzled_descriptor(shared_address(slice));
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int tile = 0; tile < 4; tile++) wgmma_pin(a[h][tile]);
    wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
        for (int h = 0; h < HEIGHT; h++) multiply(sums[h], a[h][tile], b + 2 * tile);
    wgmma_commit();
    wgmma_wait<1>();  // the products of slice i - 1 are done; these run on
    if (i > 0 && threadIdx.x % 32 == 0) barrier_arrive(block.empty + (i - 1) % STAGES * 8);
    // The stage of slice i - 2: only the other warps may still be in it.
    if (i >= 2) barrier_wait(block.empty + (i - 2) % STAGES * 8, (i - 2) / STAGES & 1);
    copy_stage(block, in, i + STAGES - 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
w4a16_gemm(const unsigned short* x, const uint4* packed, const unsigned short* scales, const signed char* zeros, void* y,
           int tokens) {
    DYNAMIC_SHARED(char, stages);
    const unsigned barriers = shared_address(stages) + BARRIERS;
    if (shared_address(stages) % 1024) trap();  // the swizzle counts on it
    const Operands in = {x, packed, scales, zeros, tokens};
    const int split = blockIdx.x % SPLITS, tile = blockIdx.x / SPLITS, tiles_m = (tokens + TOKENS - 1) / TOKENS;
    const int begin = split * SHARE, count = max(0, min(SHARE, SLICES - begin));
    const Block block = {stages, barriers, barriers + 8 * STAGES, tile % tiles_m * TOKENS, tile / tiles_m * ROWS, begin, count};
    if (threadIdx.x < STAGES) {
        barrier_init(block.full + 8 * threadIdx.x, WARPS);
        barrier_init(block.empty + 8 * threadIdx.x, WARPS);
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_kernel_ahead();
    for (int i = 0; i < STAGES - 2; i++) copy_stage(block, in, i);
    let_next_kernel_start();
    copy_async_wait<STAGES - 3>();
    announce(block, 0);

    Sums sums = {};
    Weights even, odd;  // one is read by products that run on while the other is written
#pragma unroll
    for (int h = 0; h < HEIGHT; h++) wgmma_pin(sums[h]);
#pragma unroll 1
    for (int i = 0; i + 1 < count; i += 2) {
        step(sums, even, block, in, i);
        step(sums, odd, block, in, i + 1);
    }
    if (count % 2) step(sums, even, block, in, count - 1);
    wgmma_wait<0>();
#pragma unroll
    for (int h = 0; h < HEIGHT; h++) wgmma_pin(sums[h]);
    __syncthreads();  // nobody reads operands any more

    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
            put_sums((float*)stages, 8 * j + lane % 4 * 2, first_row(h) + lane / 4, sums[h] + 4 * j);
    write_sums((float*)stages, y, in, block.m, block.n, split);
}
