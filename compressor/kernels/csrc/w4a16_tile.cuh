// What the products of four-bit weights with more than 8 tokens share: a slice of operands in shared memory, and how the
// sums of a tile leave. Operands and results are those of w4a16_gemv.cuh, scales and zeros 16-byte aligned as well.
//
// A slice is 64 columns of a tile's operands: TOKENS rows of x, 128 bytes each in the 128-byte swizzle (what ldmatrix
// reads without bank conflicts and wgmma as operand B); ROWS / 16 tiles of T16x64 as they lie in memory, so that a lane's
// 16 bytes are operand A of four MMAs; and the scales and zeros of the ROWS rows.
// The kernel's header says before it includes this: ROWS and THREADS of a block; WAYS, how many groups of warps share K;
// COPIERS, the threads of such a group, which copy its slices.
#pragma once
#include "wgmma.cuh"

constexpr int SLICES = K / 64;
constexpr bool GROUPED = GROUP < K;
constexpr int PARTS = GROUP == 32 ? 2 : 1;  // groups in a slice

static_assert(N % 16 == 0 && K % 64 == 0, "T16x64");
static_assert(GROUP == 32 || GROUP == 64 || GROUP == 128 || GROUP == K, "GROUP is 32, 64, 128 or K");
static_assert(K % GROUP == 0, "groups fill the row");

struct Operands {
    const unsigned short* x;
    const uint4* packed;
    const unsigned short* scales;
    const signed char* zeros;
    int tokens;
};

// Byte offsets in a slice; the next slice begins at a multiple of 1024, as the swizzle of wgmma needs.
constexpr int WEIGHTS_AT = TOKENS * 128;
constexpr int SCALES_AT = WEIGHTS_AT + ROWS * 32;
constexpr int ZEROS_AT = SCALES_AT + (GROUPED ? PARTS * ROWS * 2 : 0);
constexpr int SLICE_BYTES = (ZEROS_AT + (ZEROS ? PARTS * ROWS : 0) + 1023) / 1024 * 1024;

// The thread's number, of which the compiler keeps nothing for later: addresses of copies are made again for each slice,
// because the registers that would hold them are needed for sums.
DEVICE unsigned thread_number() {
    unsigned thread = threadIdx.x;
#if defined(__CUDACC__)
    asm volatile("" : "+r"(thread));
#endif
    return thread;
}

// Start the copies of slice `slice`, tokens from m and rows from n on. Tokens and rows past the last repeat it: what is
// made of them is not stored.
DEVICE void copy_slice(char* target, const Operands& in, unsigned m, unsigned n, unsigned slice) {
    const unsigned thread = thread_number() % COPIERS, chunk = thread % 8, last = in.tokens - 1;
#pragma unroll
    for (unsigned i = 0; i < TOKENS; i += COPIERS / 8) {  // eight threads a token
        const unsigned token = i + thread / 8;
        if (TOKENS % (COPIERS / 8) && token >= TOKENS) break;
        const unsigned row = min(m + token, last);
        copy_async(target + swizzled_chunk(token, chunk), in.x + (row * K + slice * 64 + chunk * 8));
    }
#pragma unroll
    for (unsigned i = 0; i < ROWS / 16; i += COPIERS / 32) {  // a warp 16 rows
        const unsigned block = i + thread / 32, lane = thread % 32;
        if (ROWS / 16 % (COPIERS / 32) && block >= ROWS / 16) break;
        const unsigned tile = min(n / 16 + block, N / 16 - 1u) * SLICES + slice;
        copy_async(target + WEIGHTS_AT + block * 512 + lane * 16, in.packed + (tile * 32 + lane));
    }
    const unsigned group = GROUPED ? slice * 64 / GROUP : 0;
    static_assert(PARTS * ROWS / 8 <= COPIERS, "a thread copies eight scales");
    if (GROUPED && thread < PARTS * ROWS / 8) {
        const unsigned part = thread / (ROWS / 8), row = min(n + thread % (ROWS / 8) * 8, N - 8u);
        copy_async(target + SCALES_AT + thread * 16, in.scales + ((group + part) * N + row));
    }
    if (ZEROS && thread < PARTS * ROWS / 16) {
        const unsigned part = thread / (ROWS / 16), row = min(n + thread % (ROWS / 16) * 16, N - 16u);
        copy_async(target + ZEROS_AT + thread * 16, in.zeros + ((group + part) * N + row));
    }
}

// The i-th of a lane's four words, of columns 16 i .. 16 i + 15.
HOST_DEVICE unsigned word_of(const uint4& q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

// Bits of the scale of a row in a slice; 1 a row where it is applied to the whole sum.
DEVICE unsigned scale_in(const char* slice, int part, int row) {
    return ((const unsigned short*)(slice + SCALES_AT))[part * ROWS + row];
}
DEVICE Zero zero_in(const char* slice, int part, int row) {
    return make_zero(ZEROS ? 8 + ((const signed char*)(slice + ZEROS_AT))[part * ROWS + row] : 8);
}

// ---- sums ----

struct alignas(16) Four {
    float v[4];
};

#if !defined(__CUDACC__)
inline Four load_in_cluster(const float* pointer, unsigned rank) {
    return *(Four*)((*simt::cluster)[rank]->shared + shared_address(pointer));
}
#elif __CUDA_ARCH__ >= 900
// Read the shared memory of another block of the cluster, at the place that `pointer` has in ours.
DEVICE Four load_in_cluster(const float* pointer, unsigned rank) {
    Four d;
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(pointer)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3]) : "r"(remote) : "memory");
    return d;
}
#endif

// Sums lie in shared memory as [WAYS, TOKENS, SUM_PITCH] float32: 4 more than ROWS, so that the lanes of a warp, which hold
// rows lane / 4 of tokens 2 (lane % 4), write to different banks.
constexpr int SUM_PITCH = ROWS + 4;
constexpr int SUM_BYTES = WAYS * TOKENS * SUM_PITCH * 4;

DEVICE void put_sums(float* sums, int token, int row, const float* d) {
    float* const at = sums + token * SUM_PITCH + row;
    at[0] = d[0];
    at[SUM_PITCH] = d[1];
    at[8] = d[2];
    at[SUM_PITCH + 8] = d[3];
}

// Add the WAYS parts of each sum, in a cluster those of all its blocks (each adds its share of the rows), and write y; in
// float32 [SPLITS, tokens, N] for sum_splits where K is split without a cluster. All threads take part.
DEVICE void write_sums(const float* sums, void* y, const Operands& in, int m, int n, int split) {
    constexpr int SHARE = CLUSTER ? ROWS / SPLITS : ROWS;
    constexpr int FOURS = SHARE / 4;
    static_assert(SHARE % 4 == 0, "each block of the cluster adds fours of rows");
#if CLUSTER
    cluster_barrier();
    const int first = split * SHARE;
#else
    __syncthreads();
    const int first = 0;
#endif
    for (int i = threadIdx.x; i < TOKENS * FOURS; i += THREADS) {
        const int token = i / FOURS, row = first + i % FOURS * 4;
        if (m + token >= in.tokens || n + row >= N) continue;
        Four sum = {{0.f, 0.f, 0.f, 0.f}};
#pragma unroll
        for (int part = 0; part < (CLUSTER ? SPLITS : 1) * WAYS; part++) {
            const float* const at = sums + (part % WAYS * TOKENS + token) * SUM_PITCH + row;
#if CLUSTER
            const Four other = load_in_cluster(at, part / WAYS);
#else
            const Four other = *(const Four*)at;
#endif
#pragma unroll
            for (int j = 0; j < 4; j++) sum.v[j] += other.v[j];
        }
        if (!GROUPED) {
#pragma unroll
            for (int j = 0; j < 4; j++) sum.v[j] *= to_float(in.scales[n + row + j]);
        }
        const size_t at = (size_t)(m + token) * N + n + row;
        if (SPLITS > 1 && !CLUSTER) {
            *(Four*)((float*)y + (size_t)split * in.tokens * N + at) = sum;
        } else {
            *(uint2*)((unsigned short*)y + at) = {pack_floats(sum.v[0], sum.v[1]), pack_floats(sum.v[2], sum.v[3])};
        }
    }
#if CLUSTER
    __syncwarp();
    cluster_barrier();  // no block leaves while another still reads its sums
#endif
}
