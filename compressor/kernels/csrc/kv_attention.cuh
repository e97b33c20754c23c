// Attention of the newest token of each sequence over a quantized cache: a decode step. Layout: kernels/kv_cache.py.
//
// Grid (splits + 1, heads * HEAD_TILES, sequences). Block 0 of x does the ring of exact tokens, the others share the blocks
// of codes, a warp at a time each: S^T = K (q scale)^T and O^T = V^T P^T on tensor cores in float16, with codes as operand
// A straight from where they lie, up to 8 query heads as columns, key scales folded into the query and value scales into
// P. Every warp keeps its own running softmax; kv_combine.cuh adds up. No atomics: the same bits in every run.
//
// Constants: D, BITS, MODEL_BF16, BF16 = 0, RING, GROUP (query heads a key/value head), STAGES (blocks under way a warp).
#pragma once
#include "kv_ring.cuh"

constexpr int CODES = 2 * HALF_CODES;       // uint4 in a block
constexpr int STAGE = CODES + NUMBERS / 8;  // uint4 in a stage: codes, then numbers
constexpr int BOOST = 15;                   // P is at most 2^15: small weights keep float16's full precision
static_assert(NUMBERS % 8 == 0 && STAGES >= 1, "numbers of a block are copied in 16 bytes");

struct Share {
    int begin, end;
};

// Which of `held` blocks after `first` split `split` (0..splits - 1) does.
HOST_DEVICE Share kv_share(int first, int held, int split, int splits) {
    const int each = (held + splits - 1) / splits, begin = split * each, end = begin + each;
    return {first + (begin < held ? begin : held), first + (end < held ? end : held)};
}

DEVICE Pair heads_max(Pair x) {
    for (int other = 4; other < 32; other *= 2) {
        x.x = fmaxf(x.x, __shfl_xor_sync(0xFFFFFFFFu, x.x, other));
        x.y = fmaxf(x.y, __shfl_xor_sync(0xFFFFFFFFu, x.y, other));
    }
    return x;
}

DEVICE Pair heads_sum(Pair x) {
    for (int other = 4; other < 32; other *= 2) {
        x.x += __shfl_xor_sync(0xFFFFFFFFu, x.x, other);
        x.y += __shfl_xor_sync(0xFFFFFFFFu, x.y, other);
    }
    return x;
}

DEVICE bool any_lane(bool found) {
#if defined(__CUDACC__)
    return __any_sync(0xFFFFFFFFu, found);
#else
    int any = found;
    for (int other = 1; other < 32; other *= 2) any |= __shfl_xor_sync(0xFFFFFFFFu, any, other);
    return any;
#endif
}

DEVICE void copy_block(uint4* stage, const uint4* codes, const uint4* numbers, long long block, int lane) {
#pragma unroll
    for (int i = 0; i < CODES / 32; ++i) copy_async(stage + i * 32 + lane, codes + block * CODES + i * 32 + lane);
    for (int i = lane; i < NUMBERS / 8; i += 32) copy_async(stage + CODES + i, numbers + block * (NUMBERS / 8) + i);
}

// This warp's fragments of the query, as operand B: scaled by a power of two so that the largest of a head is 1 to 2.
// Returns that power's inverse for head lane / 4; heads past `queries` are zero.
DEVICE float load_query(const unsigned short* query, int queries, int lane, unsigned (&q)[D / 16][2]) {
    const int head = lane / 4, t = lane % 4;
    float largest = 0;
    const unsigned* pairs = reinterpret_cast<const unsigned*>(query + head * D) + t;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
        const unsigned pair = head < queries ? pairs[i * 4] : 0;
        q[i / 2][i % 2] = pair;
        largest = fmaxf(largest, fmaxf(fabsf(from_model(pair & 0xFFFFu)), fabsf(from_model(pair >> 16))));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
    const unsigned exponent = bits_of_float(fmaxf(largest, 1e-30f)) & 0x7F800000u;
    const float scale = float_of_bits(0x7F000000u - exponent);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
        const unsigned pair = q[i / 2][i % 2];
        q[i / 2][i % 2] = pack_floats(from_model(pair & 0xFFFFu) * scale, from_model(pair >> 16) * scale);
    }
    return float_of_bits(exponent);
}

// S^T of a block, times nothing yet: tokens 16 m + r and 8 further, heads 2t and 2t + 1.
DEVICE void block_logits(const uint4* stage, const unsigned (&q)[D / 16][2], int lane, float (&s)[2][4]) {
    const uint4* scales = stage + CODES + lane % 4;
    float least[4] = {0, 0, 0, 0};  // q times the minima: the same for every token
    if (BITS == 4) {
#pragma unroll
        for (int k = 0; k < D / 16; k += 2) {
            const uint4 z = scales[PLACES / 8 + k * 2];
            const unsigned a[4] = {z.x, z.x, z.y, z.y}, b[4] = {z.z, z.z, z.w, z.w};
            mma_16x8x16(least, a, q[k][0], q[k][1], least);
            mma_16x8x16(least, b, q[k + 1][0], q[k + 1][1], least);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[0][i] = s[1][i] = least[i];
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) {
        const uint4 scale = scales[k * 2];
        const unsigned four[4] = {scale.x, scale.y, scale.z, scale.w};
        const uint4 w0 = stage[k / 2 * (BITS / 4) * 32 + lane], w1 = BITS == 8 ? stage[(k + 1) * 32 + lane] : w0;
        const unsigned words[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // tiles k, k + 1 by rows 0, 16
            unsigned a[4];
            kv_codes(words + i * (BITS / 4), a);
            const unsigned b0 = fma_pair(q[k + i / 2][0], four[i / 2 * 2], 0x80008000u);
            const unsigned b1 = fma_pair(q[k + i / 2][1], four[i / 2 * 2 + 1], 0x80008000u);
            mma_16x8x16(s[i % 2], a, b0, b1, s[i % 2]);
        }
    }
}

// O^T += V^T P^T of a block; P's fragments of tokens 0..15 and 16..31.
DEVICE void block_outputs(const uint4* stage, const unsigned (&p)[4], int lane, float (&out)[D / 16][4]) {
#pragma unroll
    for (int m = 0; m < D / 16; m += 2) {
        const uint4 w0 = stage[HALF_CODES + m / 2 * (BITS / 4) * 32 + lane];
        const uint4 w1 = BITS == 8 ? stage[HALF_CODES + (m + 1) * 32 + lane] : w0;
        const unsigned words[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // tiles m, m + 1 by tokens 0, 16
            unsigned a[4];
            kv_codes(words + i * (BITS / 4), a);
            mma_16x8x16(out[m + i / 2], a, p[i % 2 * 2], p[i % 2 * 2 + 1], out[m + i / 2]);
        }
    }
}

// Running softmax of a warp: lanes hold heads 2t and 2t + 1. l and shift are of this lane's tokens only.
struct Softmax {
    Pair m, l, shift;
};

// Logits to weights of the value codes, as fragments of P; older sums are brought to the new maximum.
DEVICE void block_weights(
    const uint4* stage, unsigned short* p_rows, int first_token, int start, Pair factor, int lane, float (&s)[2][4],
    Softmax& state, float (&out)[D / 16][4], unsigned (&p)[4]) {
    const int r = lane / 4, t = lane % 4;
    const uint2 four = *reinterpret_cast<const uint2*>(reinterpret_cast<const unsigned short*>(stage + CODES) + D + 4 * r);
    const float scale[4] = {fp16_to_float(four.x & 0xFFFFu), fp16_to_float(four.x >> 16),
                            fp16_to_float(four.y & 0xFFFFu), fp16_to_float(four.y >> 16)};
    // Scales become at most 1 by a power of two of the block, which the maximum takes over
    float largest = fmaxf(fmaxf(scale[0], scale[1]), fmaxf(scale[2], scale[3]));
    for (int other = 4; other < 32; other *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, other));
    const int exponent = static_cast<int>(bits_of_float(largest) >> 23) - 126;
    const float unit = float_of_bits(static_cast<unsigned>(127 - exponent) << 23);  // 2^-exponent
    Pair x[4], m = {NOTHING, NOTHING};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // token r + 8 i
        const bool padding = first_token + r + 8 * i < start;
        x[i].x = padding ? NOTHING : s[i / 2][i % 2 * 2] * factor.x + exponent;
        x[i].y = padding ? NOTHING : s[i / 2][i % 2 * 2 + 1] * factor.y + exponent;
        m.x = fmaxf(m.x, x[i].x);
        m.y = fmaxf(m.y, x[i].y);
    }
    m = heads_max(m);
    m.x = fmaxf(m.x, state.m.x);
    m.y = fmaxf(m.y, state.m.y);
    if (any_lane(m.x != state.m.x || m.y != state.m.y)) {
        const Pair older = {exp2f(state.m.x - m.x), exp2f(state.m.y - m.y)};
        state.l.x *= older.x, state.l.y *= older.y, state.shift.x *= older.x, state.shift.y *= older.y;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            out[i][0] *= older.x, out[i][2] *= older.x;
            out[i][1] *= older.y, out[i][3] *= older.y;
        }
        state.m = m;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Pair weight = {exp2f(x[i].x - m.x + BOOST), exp2f(x[i].y - m.y + BOOST)};
        const Pair share = {weight.x * unit, weight.y * unit};
        state.l.x += share.x, state.l.y += share.y;
        if (BITS == 4) {
            const unsigned short* minima = reinterpret_cast<const unsigned short*>(stage + CODES) + PLACES + D;
            const float least = fp16_to_float(minima[4 * r + i]);
            state.shift.x += share.x * least, state.shift.y += share.y * least;
        }
        const unsigned pair = pack_floats(weight.x * (scale[i] * unit), weight.y * (scale[i] * unit));
        *reinterpret_cast<unsigned*>(p_rows + (r + 8 * i) * HEADS + 2 * t) = pair;
    }
    __syncwarp();
    load_matrices_transposed(p, shared_address(p_rows + lane * HEADS));
    __syncwarp();
}

// The blocks of a share, by all warps in turn.
DEVICE void attend_blocks(
    const unsigned short* query, int queries, const uint4* codes, const uint4* numbers, Share share, int start, float scaling,
    uint4* shared, float* part, Pair* part_sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    uint4* stages = shared + warp * STAGES * STAGE;
    unsigned short* p_rows = reinterpret_cast<unsigned short*>(shared + WARPS * STAGES * STAGE) + warp * KV_BLOCK * HEADS;
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        const int block = share.begin + warp + i * WARPS;
        if (block < share.end) copy_block(stages + i * STAGE, codes, numbers, block, lane);
        copy_async_commit();
    }
    unsigned q[D / 16][2];
    const float unscale = load_query(query, queries, lane, q) * scaling * LOG2_E;
    const Pair factor = {__shfl_sync(0xFFFFFFFFu, unscale, 8 * t), __shfl_sync(0xFFFFFFFFu, unscale, 8 * t + 4)};
    Softmax state = {{NOTHING, NOTHING}, {0, 0}, {0, 0}};
    float out[D / 16][4] = {};
    int stage = 0;
    for (int block = share.begin + warp; block < share.end; block += WARPS) {
        uint4* here = stages + stage * STAGE;
        copy_async_wait<STAGES - 1>();
        __syncwarp();
        float s[2][4];
        unsigned p[4];
        block_logits(here, q, lane, s);
        block_weights(here, p_rows, block * KV_BLOCK, start, factor, lane, s, state, out, p);
        block_outputs(here, p, lane, out);
        __syncwarp();
        if (block + STAGES * WARPS < share.end) copy_block(here, codes, numbers, block + STAGES * WARPS, lane);
        copy_async_commit();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    __syncthreads();  // stages become room for the warps' results
    float* outs = reinterpret_cast<float*>(shared);
    Pair* sums = reinterpret_cast<Pair*>(outs + WARPS * HEADS * OUT_ROW);
    const Pair l = heads_sum(state.l), shift = heads_sum(state.shift);
    float* mine = outs + (warp * HEADS + 2 * t) * OUT_ROW + r;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        mine[16 * i] = out[i][0] + shift.x, mine[OUT_ROW + 16 * i] = out[i][1] + shift.y;
        mine[16 * i + 8] = out[i][2] + shift.x, mine[OUT_ROW + 16 * i + 8] = out[i][3] + shift.y;
    }
    if (r == 0) {
        sums[warp * HEADS + 2 * t] = {state.m.x - BOOST, l.x};
        sums[warp * HEADS + 2 * t + 1] = {state.m.y - BOOST, l.y};
    }
    __syncthreads();
    store_part(outs, sums, WARPS, part, part_sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, D == 256 ? 3 : 4) kv_attention(
    const unsigned short* query, const uint4* codes, const uint4* numbers, const unsigned short* ring_keys,
    const unsigned short* ring_values, const int* starts, const int* lengths, float* parts, Pair* sums, int capacity,
    float scaling) {
    DYNAMIC_SHARED(uint4, shared);
    const int sequence = blockIdx.z, tile = blockIdx.y % HEAD_TILES, heads = gridDim.y / HEAD_TILES;
    const long long head = static_cast<long long>(sequence) * heads + blockIdx.y / HEAD_TILES;
    const int queries = GROUP - tile * HEADS < HEADS ? GROUP - tile * HEADS : HEADS;
    const int start = starts[sequence], length = lengths[sequence], coded = kv_coded(length, RING);
    const long long place = (static_cast<long long>(sequence) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    query += (head * GROUP + tile * HEADS) * D;
    parts += place * HEADS * D;
    sums += place * HEADS;
    let_next_kernel_start();
    if (blockIdx.x == 0) {
        const int first = start > coded ? start : coded;
        attend_ring(query, queries, ring_keys + head * RING * D, ring_values + head * RING * D, first, length - first, scaling,
                    reinterpret_cast<float*>(shared), parts, sums);
        return;
    }
    const int first = start / KV_BLOCK, held = coded / KV_BLOCK > first ? coded / KV_BLOCK - first : 0;
    const Share share = kv_share(first, held, blockIdx.x - 1, gridDim.x - 1);
    if (share.begin >= share.end) {
        if (threadIdx.x < HEADS) sums[threadIdx.x] = {NOTHING, 0};
        return;
    }
    attend_blocks(query, queries, codes + head * capacity * CODES, numbers + head * capacity * (NUMBERS / 8), share, start,
                  scaling, shared, parts, sums);
}
