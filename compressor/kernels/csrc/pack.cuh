// Codes [N, K] int8, -8..7, to T16x64 (layouts.py) and back: `pack` and `unpack`, bit for bit as in torch.
//
// A warp takes one tile of 16 rows x 64 columns at a time. Of int8, lane (r, t) holds columns 16 t .. 16 t + 15 of rows
// r and r + 8, which are the 16x16 tile t; the four lanes of a row exchange words, so that memory is read and written in
// pieces of 16 bytes a lane.
//
// Constants: BF16 (unused), N, K. Launch: any number of blocks of 256 threads (grid-stride over N / 16 * K / 64 tiles).
#include "quads.cuh"

static_assert(N % 16 == 0 && K % 64 == 0, "T16x64");
constexpr int SLICES = K / 64;
constexpr int TILES = N / 16 * SLICES;

// Sixteen columns of rows r (`upper`) and r + 8 (`lower`), four to a word, to the words of lanes t = 0..3.
// Word t has columns 2t, 2t+1 and 2t+8, 2t+9: half-word t % 2 of words t / 2 and t / 2 + 2.
HOST_DEVICE unsigned word_of_codes(const unsigned (&upper)[4], const unsigned (&lower)[4], int t) {
    const int from = t / 2, shift = t % 2 * 16;
    const unsigned pairs[4] = {upper[from] >> shift, lower[from] >> shift, upper[from + 2] >> shift,
                               lower[from + 2] >> shift};
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {  // code + 8 is the code with its bit 3 flipped
        const unsigned q = (pairs[j] ^ 0x0808u);
        word |= (q & 0xfu) << (4 * j) | (q >> 8 & 0xfu) << (4 * j + 16);
    }
    return word;
}

// The other way: of the words of lanes t = 0..3, columns 4 i .. 4 i + 3 of row r (half 0) or r + 8 (half 1).
HOST_DEVICE unsigned codes_of_words(const unsigned (&words)[4], int half, int i) {
    const int shift = 4 * half + (i >= 2 ? 8 : 0), from = i % 2 * 2;
    unsigned codes = 0;
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        const unsigned word = words[from + pair] >> shift;
        codes |= (word & 0xfu) << (16 * pair) | (word >> 16 & 0xfu) << (16 * pair + 8);
    }
    // q - 8 as a byte: bit 3 flipped, then copied into the four bits above
    codes ^= 0x08080808u;
    return codes | ((codes & 0x08080808u) << 1) * 0xFu;
}

extern "C" __global__ void __launch_bounds__(256) pack(const uint4* codes, uint4* packed) {
    const int lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    for (int tile = blockIdx.x * 8 + threadIdx.x / 32; tile < TILES; tile += gridDim.x * 8) {
        const size_t row = (size_t)(tile / SLICES) * 16 + r, at = row * (K / 16) + tile % SLICES * 4 + t;
        const uint4 above = codes[at], below = codes[at + 8 * (K / 16)];
        const unsigned upper[4] = {above.x, above.y, above.z, above.w};
        const unsigned lower[4] = {below.x, below.y, below.z, below.w};
        unsigned words[4];
#pragma unroll
        for (int s = 0; s < 4; s++) words[s] = word_of_codes(upper, lower, s);
        transpose_quad(words, t);
        packed[(size_t)tile * 32 + lane] = {words[0], words[1], words[2], words[3]};
    }
}

extern "C" __global__ void __launch_bounds__(256) unpack(const uint4* packed, uint4* codes) {
    const int lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    for (int tile = blockIdx.x * 8 + threadIdx.x / 32; tile < TILES; tile += gridDim.x * 8) {
        const uint4 q = packed[(size_t)tile * 32 + lane];
        unsigned words[4] = {q.x, q.y, q.z, q.w};
        transpose_quad(words, t);
        const size_t row = (size_t)(tile / SLICES) * 16 + r, at = row * (K / 16) + tile % SLICES * 4 + t;
        unsigned rows[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) rows[i / 4][i % 4] = codes_of_words(words, i / 4, i % 4);
        codes[at] = {rows[0][0], rows[0][1], rows[0][2], rows[0][3]};
        codes[at + 8 * (K / 16)] = {rows[1][0], rows[1][1], rows[1][2], rows[1][3]};
    }
}
