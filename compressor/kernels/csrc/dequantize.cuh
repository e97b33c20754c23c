// Rows n_begin .. n_begin + n_rows - 1 of a T16x64 weight as bfloat16 or float16, row-major [n_rows, K]:
// (code - zero) * scale, rounded once, as torch rounds (codes.float() * scales.float()).to(dtype).
//
//   packed, scales, zeros as in w4a16_gemv.cuh; n_begin and n_rows are multiples of 16
//
// A warp takes one tile of 16 rows x 64 columns at a time; the four lanes of a row exchange words, so that each lane
// writes 32 bytes of a row in a piece, and the four of them the row's 128.
//
// Constants: BF16, N, K, GROUP (K: one scale a row), ZEROS. Launch: any number of blocks of 256 threads (grid-stride).
#include "quads.cuh"

static_assert(N % 16 == 0 && K % 64 == 0, "T16x64");
static_assert(GROUP == 32 || GROUP == 64 || GROUP == 128 || GROUP == K, "GROUP is 32, 64, 128 or K");
constexpr int SLICES = K / 64;

extern "C" __global__ void __launch_bounds__(256)
dequantize_rows(const uint4* packed, const unsigned short* scales, const signed char* zeros, uint4* weight, int n_begin,
                int n_rows) {
    const int lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    const int tiles = n_rows / 16 * SLICES;
    for (int tile = blockIdx.x * 8 + threadIdx.x / 32; tile < tiles; tile += gridDim.x * 8) {
        const int slice = tile % SLICES, row = tile / SLICES * 16 + r;
        const uint4 q = packed[(size_t)n_begin / 16 * SLICES * 32 + (size_t)tile * 32 + lane];
        unsigned words[4] = {q.x, q.y, q.z, q.w};
        transpose_quad(words, t);  // now the four lanes' words of the 16x16 tile t: columns 16 t .. 16 t + 15

        const size_t group = GROUP == K ? 0 : (slice * 64 + t * 16) / GROUP, at = group * N + n_begin + row;
        const unsigned upper = scales[at] * 0x00010001u, lower = scales[at + 8] * 0x00010001u;
        const Zero low = make_zero(ZEROS ? 8 + zeros[at] : 8), high = make_zero(ZEROS ? 8 + zeros[at + 8] : 8);

        unsigned numbers[2][8];  // row half; two columns a word
#pragma unroll
        for (int s = 0; s < 4; s++) {
            unsigned a[4];
            dequantize(words[s], low, high, a);
            numbers[0][s] = fma_pair(a[0], upper, 0x80008000u);  // + -0: a product, rounded once, with its sign
            numbers[0][s + 4] = fma_pair(a[2], upper, 0x80008000u);
            numbers[1][s] = fma_pair(a[1], lower, 0x80008000u);
            numbers[1][s + 4] = fma_pair(a[3], lower, 0x80008000u);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4* const out = weight + (size_t)(row + 8 * half) * (K / 8) + slice * 8 + t * 2;
            const unsigned(&w)[8] = numbers[half];
            out[0] = {w[0], w[1], w[2], w[3]};
            out[1] = {w[4], w[5], w[6], w[7]};
        }
    }
}
