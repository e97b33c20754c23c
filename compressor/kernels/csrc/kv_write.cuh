// Keys and values into blocks of codes: `kv_write` whole blocks of a prompt, `kv_append` one new token of each sequence.
//
// Source numbers are bfloat16 or float16, the D of a token contiguous. Codes are bit for bit those of
// kernels/kv_cache.py: reciprocals and products in float32, ties to even. One block of threads does one block of tokens.
// Constants: D, BITS, MODEL_BF16, BF16 = 0; for kv_append also RING.
#pragma once
#include "kv_blocks.cuh"

constexpr int THREADS = 128;
constexpr int ROW = D + 8;  // 16 bytes of padding: no bank conflicts, down a column or along a row

struct Shared {
    unsigned short rows[2][KV_BLOCK * ROW];  // keys, values
    float reciprocals[2][D];                 // of keys by channel, of values by token
    float minima[2][D];
};

// Scale (and minimum) of numbers between low and high, as stored; what `code_of` needs of them is left in `shared`.
DEVICE void choose_grid(
    Shared& shared, int half, int index, float low, float high, unsigned short* numbers, int place) {
    float range = fmaxf(-low, high) * (1.0f / 127.0f);
    if (BITS == 4) {
        const unsigned least = float_to_fp16(low);
        numbers[PLACES + place] = least;
        shared.minima[half][index] = fp16_to_float(least);
        range = (high - fp16_to_float(least)) * (1.0f / 15.0f);
    }
    const unsigned scale = float_to_fp16(fmaxf(range, 5.9604644775390625e-8f));  // 2^-24
    numbers[place] = scale;
    shared.reciprocals[half][index] = 1.0f / fp16_to_float(scale);
}

// The unsigned code of a number. Adding 1.5 * 2^23 rounds to an integer, ties to even, in the last bits.
DEVICE unsigned code_of(const Shared& shared, int half, int index, unsigned number) {
    const float x = from_model(number), reciprocal = shared.reciprocals[half][index];
    if (BITS == 8) return bits_of_float(fminf(fmaxf(x * reciprocal, -127.0f), 127.0f) + (12582912.0f + 128)) & 0xFF;
    return bits_of_float(fminf(fmaxf((x - shared.minima[half][index]) * reciprocal, 0.0f), 15.0f) + 12582912.0f) & 0xF;
}

// Sixteen bytes of codes of one lane.
DEVICE uint4 pack(const Shared& shared, int half, int chunk, int lane) {
    unsigned int words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int code = 0; code < 128 / BITS; ++code) {
        const KvPlace at = kv_place(half == 0, chunk, lane, code);
        const int index = half == 0 ? at.channel : at.token;
        const unsigned int value = code_of(shared, half, index, shared.rows[half][at.token * ROW + at.channel]);
        const int within = code % 8;
        if (BITS == 8) {
            words[code / 4] |= value << (code % 4 * 8);
        } else {
            words[code / 8] |= value << (within / 2 * 4 + (within & 1) * 16);
        }
    }
    return {words[0], words[1], words[2], words[3]};
}

// 32 tokens, each `stride` numbers after the one before, into one block.
DEVICE void write_block(
    Shared& shared, const unsigned short* keys, const unsigned short* values, long long stride, uint4* codes,
    unsigned short* numbers) {
    const int tid = threadIdx.x;
    for (int i = tid; i < KV_BLOCK * D / 8; i += THREADS) {
        const int token = i / (D / 8), part = i % (D / 8) * 8;
        *reinterpret_cast<uint4*>(&shared.rows[0][token * ROW + part]) =
            *reinterpret_cast<const uint4*>(keys + token * stride + part);
        *reinterpret_cast<uint4*>(&shared.rows[1][token * ROW + part]) =
            *reinterpret_cast<const uint4*>(values + token * stride + part);
    }
    __syncthreads();
    for (int place = tid; place < D; place += THREADS) {
        const int channel = kv_channel(place);
        float low = from_model(shared.rows[0][channel]), high = low;
        for (int token = 1; token < KV_BLOCK; ++token) {
            const float x = from_model(shared.rows[0][token * ROW + channel]);
            low = fminf(low, x), high = fmaxf(high, x);
        }
        choose_grid(shared, 0, channel, low, high, numbers, place);
    }
    {  // four threads a token
        const int place = tid / 4, token = kv_token(place);
        float low = from_model(shared.rows[1][token * ROW + tid % 4]), high = low;
        for (int channel = tid % 4 + 4; channel < D; channel += 4) {
            const float x = from_model(shared.rows[1][token * ROW + channel]);
            low = fminf(low, x), high = fmaxf(high, x);
        }
        for (int other = 1; other < 4; other *= 2) {
            low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, other));
            high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, other));
        }
        if (tid % 4 == 0) choose_grid(shared, 1, token, low, high, numbers + D, place);
    }
    __syncthreads();
    for (int i = tid; i < 2 * HALF_CODES; i += THREADS) {
        codes[i] = pack(shared, i / HALF_CODES, i % HALF_CODES / 32, i % 32);
    };
}

// keys, values [B, H, T, D] contiguous; codes [B, H, N, ...] and numbers [B, H, N, ...] with N = gridDim.x = T / 32.
extern "C" __global__ void __launch_bounds__(THREADS) kv_write(
    const unsigned short* keys, const unsigned short* values, uint4* codes, unsigned short* numbers) {
    DYNAMIC_SHARED(Shared, room);
    Shared& shared = room[0];
    const long long block = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x, first = block * KV_BLOCK * D;
    write_block(shared, keys + first, values + first, D, codes + block * 2 * HALF_CODES,
                numbers + block * NUMBERS);
}

#ifdef RING
static_assert(RING % KV_BLOCK == 0 && RING > 0, "blocks are contiguous in the ring");

// One token a sequence into its slot of the ring, after the oldest 32 tokens have become a block where the ring is full.
// keys, values [B, H, 1, D]; ring [B, H, RING, D]; lengths [B] with the new token; grid (H, B); `capacity` blocks are held.
extern "C" __global__ void __launch_bounds__(THREADS) kv_append(
    const unsigned short* keys, const unsigned short* values, uint4* codes, unsigned short* numbers,
    unsigned short* ring_keys, unsigned short* ring_values, const int* lengths, int capacity) {
    DYNAMIC_SHARED(Shared, room);
    Shared& shared = room[0];
    const int before = lengths[blockIdx.y] - 1;
    const long long head = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x, ring = head * RING * D;
    if (before >= RING && (before - RING) % KV_BLOCK == 0) {
        const int oldest = before - RING;
        const long long from = ring + oldest % RING * D, block = head * capacity + oldest / KV_BLOCK;
        write_block(shared, ring_keys + from, ring_values + from, D, codes + block * 2 * HALF_CODES,
                    numbers + block * NUMBERS);
    }
    const int part = threadIdx.x * 8;  // the tokens of the block are in shared memory since its barriers
    if (part < D) {
        const long long to = ring + before % RING * D + part, from = head * D + part;
        *reinterpret_cast<uint4*>(ring_keys + to) = *reinterpret_cast<const uint4*>(keys + from);
        *reinterpret_cast<uint4*>(ring_values + to) = *reinterpret_cast<const uint4*>(values + from);
    }
}
#endif
