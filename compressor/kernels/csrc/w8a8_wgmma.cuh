// int8 product on Hopper (sm_90a): out [M, N] = codes x * codes w, times column scale and row scale, plus bias.
//
// x [K/128, M8, 128] and w [K/128, N, 128] int8 in the layout of w8a8.cuh (M8 = M rounded up to 8, N % 8 == 0), x_scales
// [M] and w_scales [N] float32, bias and out 16-bit, out [M, N] 16-byte aligned. Sums are exact in int32, so the result
// does not depend on tiles. Constants: K, N, BM, BN, STAGES, CLUSTER, BLOCKS (resident in a multiprocessor), BF16, BIAS.
//
// One warp copies, BM / 64 warpgroups multiply. A stage is 128 codes of K: BM rows of x and BN of w, which are contiguous
// in the layout, so that bulk copies without tensor maps fill it. The blocks of a cluster lie below each other: each
// copies its part of w to all of them, and so waits until all of them have left the stage.
#pragma once
#include "w8a8.cuh"
#include "wgmma.cuh"

constexpr int CONSUMERS = BM * 2;  // threads that multiply: 4 warps for 64 rows
constexpr int X_BYTES = BM * 128;
constexpr int STAGE_BYTES = X_BYTES + BN * 128;
constexpr int SHARE = BN / CLUSTER;           // rows of w that one block copies
constexpr int STAGED_ROW = BN * 2 + 16;       // bytes; the 16 keep the rows of a warp in different banks
static_assert(K % 128 == 0 && K <= 65536, "sums of 128 * 128 stay below 2^31");
static_assert(N % 8 == 0 && BM % 64 == 0 && SHARE % 8 == 0, "");
static_assert(BM * STAGED_ROW <= STAGES * STAGE_BYTES, "outputs are staged where the operands were");

DEVICE void all_blocks_barrier() {
    if constexpr (CLUSTER == 1) {
        __syncthreads();
    } else {
        cluster_barrier();
    }
}

struct Tile {
    unsigned stages, full, empty;  // shared-memory addresses: operands; a barrier of 8 bytes a stage
    int rank, m, n;                    // block of the cluster; first row, first column
};

DEVICE void copy_stages(const Tile& tile, const uint4* x, const uint4* w, int rows) {
    const int x_rows = clip(rows - tile.m, BM);
    const int w_rows = clip(N - tile.n, BN);
    const int share = clip(w_rows - tile.rank * SHARE, SHARE);
    for (int block = 0; block < K / 128; ++block) {
        const int stage = block % STAGES;
        const unsigned full = tile.full + 8 * stage, shared = tile.stages + stage * STAGE_BYTES;
        barrier_wait(tile.empty + 8 * stage, (block / STAGES & 1) ^ 1);
        barrier_expect(full, (x_rows + w_rows) * 128);
        if (x_rows > 0) bulk_copy(shared, x + code_chunk(block, tile.m, 0, rows), x_rows * 128, full);
        if (share > 0) {
            const unsigned target = shared + X_BYTES + tile.rank * SHARE * 128;
            const uint4* source = w + code_chunk(block, tile.n + tile.rank * SHARE, 0, N);
            if constexpr (CLUSTER == 1) {
                bulk_copy(target, source, share * 128, full);
            } else {
                bulk_copy_multicast(target, source, share * 128, full, (1 << CLUSTER) - 1);
            }
        }
    }
}

// Each warp tells every block of the cluster that it has left the stage.
DEVICE void leave_stage(const Tile& tile, int stage) {
    const int lane = threadIdx.x % 32;
    if constexpr (CLUSTER == 1) {
        if (lane == 0) barrier_arrive(tile.empty + 8 * stage);
    } else {
        if (lane < CLUSTER) barrier_arrive_remote(tile.empty + 8 * stage, lane);
    }
}

DEVICE void multiply_stages(const Tile& tile, int (&sums)[BN / 2]) {
    const int group = threadIdx.x / 128;
    wgmma_pin(sums);
    for (int block = 0; block < K / 128; ++block) {
        const int stage = block % STAGES;
        const unsigned shared = tile.stages + stage * STAGE_BYTES;
        const unsigned long long x = swizzled_descriptor(shared + group * 64 * 128);
        const unsigned long long w = swizzled_descriptor(shared + X_BYTES);
        barrier_wait(tile.full + 8 * stage, block / STAGES & 1);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma_s8(sums, x + 2 * step, w + 2 * step, 1);
        wgmma_commit();
        wgmma_wait<1>();  // the products of the stage before are done; these run on
        if (block > 0) leave_stage(tile, (block - 1) % STAGES);
    }
    wgmma_wait<0>();
    wgmma_pin(sums);
}

// Scales the sums of one warp (16 rows), lays them out as rows in its part of `staged`, and stores whole rows.
DEVICE void store_tile(
    const Tile& tile, const int (&sums)[BN / 2], unsigned char* staged, const float* columns, const float* x_scales,
    unsigned short* out, int tokens) {
    const int lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    const int first = tile.m + threadIdx.x / 32 * 16;
    unsigned char* mine = staged + threadIdx.x / 32 * 16 * STAGED_ROW;
    const float upper = first + r < tokens ? x_scales[first + r] : 0.0f;
    const float lower = first + r + 8 < tokens ? x_scales[first + r + 8] : 0.0f;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
        const int* four = sums + 4 * j;
        unsigned* place = reinterpret_cast<unsigned*>(mine + r * STAGED_ROW + 16 * j + 4 * t);
        const ColumnPair pair = column_pair<BN>(columns, 8 * j + 2 * t);
        place[0] = scaled_pair(four[0], four[1], upper, pair);
        place[8 * STAGED_ROW / 4] = scaled_pair(four[2], four[3], lower, pair);
    }
    __syncwarp();
    for (int i = lane; i < 16 * (BN / 8); i += 32) {
        const int row = i / (BN / 8), column = i % (BN / 8) * 8;
        if (first + row < tokens && tile.n + column < N) {
            *reinterpret_cast<uint4*>(out + (long long)(first + row) * N + tile.n + column) =
                *reinterpret_cast<const uint4*>(mine + row * STAGED_ROW + column * 2);
        }
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, BLOCKS) w8a8_wgmma(
    const uint4* x, const float* x_scales, const uint4* w, const float* w_scales, const unsigned short* bias,
    unsigned short* out, int tokens) {
    DYNAMIC_SHARED(unsigned char, operands);
    const unsigned stages = shared_address(operands);
    if (stages % 1024) trap();  // the swizzle counts on it
    float* columns = reinterpret_cast<float*>(operands + STAGES * STAGE_BYTES);
    const int rows = (tokens + 7) & ~7;
    const int rank = blockIdx.x % CLUSTER;
    const int tiles_m = (tokens + BM * CLUSTER - 1) / (BM * CLUSTER);
    const TilePlace place = tile_place(blockIdx.x / CLUSTER, tiles_m, (N + BN - 1) / BN);
    const unsigned barriers = stages + STAGES * STAGE_BYTES + BN * 8;
    const Tile tile = {stages, barriers, barriers + 8 * STAGES, rank, (place.m * CLUSTER + rank) * BM, place.n * BN};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(tile.full + 8 * stage, 1);
            barrier_init(tile.empty + 8 * stage, CLUSTER * CONSUMERS / 32);
        }
        barrier_init_fence();
    }
    load_columns<BN>(columns, w_scales, bias, tile.n, threadIdx.x, blockDim.x);
    all_blocks_barrier();
    wait_for_kernel_ahead();
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) copy_stages(tile, x, w, rows);
    } else {
        int sums[BN / 2] = {};
        multiply_stages(tile, sums);
        named_barrier(1, CONSUMERS);  // no warp of this block reads operands any more
        store_tile(tile, sums, operands, columns, x_scales, out, tokens);
    }
    __syncwarp();
    all_blocks_barrier();  // no block leaves while another still arrives at its barriers
}
