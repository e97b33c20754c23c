// int8 product by mma.sync (sm_80 and later): out [M, N] = codes x * codes w, times column scale and row scale, plus bias.
//
// Operands and result as in w8a8_wgmma.cuh. Constants: K, N, WARP_M, WARP_N (rows and columns of a warp, multiples of 16),
// WARPS_M, WARPS_N, STAGES, BLOCKS, BF16, BIAS. A stage is 128 codes of K, copied by cp.async as it lies in memory.
#pragma once
#include "mma.cuh"
#include "w8a8.cuh"

constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int BM = WARP_M * WARPS_M, BN = WARP_N * WARPS_N;
constexpr int STAGE = (BM + BN) * 8;  // in 16 bytes: x, then w
constexpr int BLOCKS_OF_K = K / 128;
static_assert(K % 128 == 0 && K <= 65536, "sums of 128 * 128 stay below 2^31");
static_assert(N % 8 == 0 && WARP_M % 16 == 0 && WARP_N % 16 == 0, "");

// Rows that one ldmatrix.x4 reads: lane's row and 16-byte chunk (0 or 1) in a 16-row, 32-byte-wide part of a tile. Of x the
// four 8x16 matrices become a0..a3, of w they become b0, b1 of the first 8 columns and b0, b1 of the next.
HOST_DEVICE constexpr int x_lane_row(int lane) { return lane % 16; }
HOST_DEVICE constexpr int x_lane_chunk(int lane) { return lane / 16; }
HOST_DEVICE constexpr int w_lane_row(int lane) { return lane % 8 + lane / 16 * 8; }
HOST_DEVICE constexpr int w_lane_chunk(int lane) { return lane / 8 % 2; }

// Byte of a chunk in a tile in shared memory, which is a part of block 0 of the layout.
HOST_DEVICE constexpr unsigned tile_byte(int row, int chunk) { return 16 * (unsigned)code_chunk(0, row, chunk, 0); }

// Starts the copies of block `block` of K; rows past the last are left as they are.
DEVICE void copy_stage(
    uint4* shared, const uint4* x, const uint4* w, int block, int m, int n, int rows) {
    const uint4* x_tile = x + code_chunk(block, m, 0, rows);
    const uint4* w_tile = w + code_chunk(block, n, 0, N);
#pragma unroll
    for (int i = threadIdx.x; i < BM * 8; i += THREADS) {
        if (m + i / 8 < rows) copy_async(shared + i, x_tile + i);
    }
#pragma unroll
    for (int i = threadIdx.x; i < BN * 8; i += THREADS) {
        if (n + i / 8 < N) copy_async(shared + BM * 8 + i, w_tile + i);
    }
}

DEVICE void multiply_stage(
    int (&sums)[WARP_M / 16][WARP_N / 8][4], const uint4* shared, int warp_m, int warp_n) {
    const int lane = threadIdx.x % 32;
    const unsigned x = shared_address(shared), w = shared_address(shared + BM * 8);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        unsigned a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
        for (int i = 0; i < WARP_M / 16; ++i) {
            const int row = warp_m * WARP_M + 16 * i + x_lane_row(lane);
            load_matrices(a[i], x + tile_byte(row, 2 * step + x_lane_chunk(lane)));
        }
#pragma unroll
        for (int j = 0; j < WARP_N / 16; ++j) {
            const int row = warp_n * WARP_N + 16 * j + w_lane_row(lane);
            load_matrices(b[j], w + tile_byte(row, 2 * step + w_lane_chunk(lane)));
        }
#pragma unroll
        for (int i = 0; i < WARP_M / 16; ++i) {
#pragma unroll
            for (int j = 0; j < WARP_N / 8; ++j) {
                const unsigned* two = b[j / 2] + j % 2 * 2;
                mma_16x8x32_s8(sums[i][j], a[i], two[0], two[1], sums[i][j]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) w8a8_mma(
    const uint4* x, const float* x_scales, const uint4* w, const float* w_scales, const unsigned short* bias,
    unsigned short* out, int tokens) {
    DYNAMIC_SHARED(uint4, stages);
    float* columns = reinterpret_cast<float*>(stages + STAGES * STAGE);
    const int rows = (tokens + 7) & ~7;
    const TilePlace place = tile_place(blockIdx.x, (tokens + BM - 1) / BM, (N + BN - 1) / BN);
    const int m = place.m * BM, n = place.n * BN;
    const int warp = threadIdx.x / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    load_columns<BN>(columns, w_scales, bias, n, threadIdx.x, THREADS);
    wait_for_kernel_ahead();

    int sums[WARP_M / 16][WARP_N / 8][4] = {};
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < BLOCKS_OF_K) copy_stage(stages + stage * STAGE, x, w, stage, m, n, rows);
        copy_async_commit();
    }
    for (int block = 0; block < BLOCKS_OF_K; ++block) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // the block's operands are here, and nobody reads the stage that is filled next
        const int ahead = block + STAGES - 1;
        if (ahead < BLOCKS_OF_K) copy_stage(stages + ahead % STAGES * STAGE, x, w, ahead, m, n, rows);
        copy_async_commit();  // empty at the end, so that the count of groups stays right
        multiply_stage(sums, stages + block % STAGES * STAGE, warp_m, warp_n);
    }

    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = m + warp_m * WARP_M + 16 * i + 8 * half + r;
            if (row >= tokens) continue;
            const float row_scale = x_scales[row];
            unsigned short* line = out + (long long)row * N + n;
#pragma unroll
            for (int j = 0; j < WARP_N / 8; ++j) {
                const int column = warp_n * WARP_N + 8 * j + 2 * t;
                if (n + column >= N) continue;
                const int* two = sums[i][j] + 2 * half;
                *reinterpret_cast<unsigned*>(line + column) =
                    scaled_pair(two[0], two[1], row_scale, column_pair<BN>(columns, column));
            }
        }
    }
}
