// Where what lies in a block of 32 quantized tokens: the layout of kernels/kv_cache.py, which is its definition.
//
// Codes of a block: keys, then values, 4 D BITS bytes each; lane l reads uint4 number `chunk * 32 + l` of a half. Numbers
// of a block, float16: D + 32 scales, and in 4 bits as many minima; D of keys, 32 of values. All arithmetic with them is
// float16 and float32 (BF16 = 0); what models and rings hold is bfloat16 or float16 by the constant MODEL_BF16.
#pragma once
#include "mma.cuh"
#if !defined(__CUDACC__)
#include <cmath>
#endif

static_assert(!BF16, "codes of 8 bits are exact in float16 only; MODEL_BF16 is the model's dtype");
static_assert(D % 32 == 0 && D <= 256 && (BITS == 4 || BITS == 8), "what the layout takes");

constexpr int KV_BLOCK = 32;
constexpr int PLACES = D + KV_BLOCK;                  // scales of a block, or minima
constexpr int NUMBERS = PLACES * (BITS == 8 ? 1 : 2);  // of a block
constexpr int HALF_CODES = D * BITS / 4;               // uint4 of keys in a block, and of values
constexpr int TILES_AT_ONCE = 16 / BITS;               // tiles of 16 x 16 whose part of a lane is one uint4

HOST_DEVICE float from_model(unsigned bits) { return MODEL_BF16 ? bf16_to_float(bits) : fp16_to_float(bits); }
HOST_DEVICE unsigned to_model(float value) { return MODEL_BF16 ? float_to_bf16(value) : float_to_fp16(value); }

// How many of the first `length` tokens, the newest included, are held as codes.
HOST_DEVICE int kv_coded(int length, int ring) {
    return length < ring ? 0 : (length - ring + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
}

struct alignas(8) Pair {
    float x, y;
};

struct KvPlace {
    int token, channel;
};

// Token and channel of code `code` among those that `lane` reads at once (16 of 8 bits, 32 of 4): pair by pair as in an
// A fragment of mma.m16n8k16, whose rows are tokens for keys and channels for values.
HOST_DEVICE KvPlace kv_place(bool keys, int chunk, int lane, int code) {
    const int tile = chunk * TILES_AT_ONCE + code / 8, pair = code % 8 / 2;
    const int row = 8 * (pair & 1) + lane / 4, column = 8 * (pair >> 1) + 2 * (lane % 4) + (code & 1);
    const int outer = 16 * (tile / 2), inner = 16 * (tile % 2);
    return keys ? KvPlace{inner + row, outer + column} : KvPlace{inner + column, outer + row};
}

// Channel whose scale is number `place` among those of the keys, and token of number `place` among those of the values.
HOST_DEVICE int kv_channel(int place) {
    return place / 32 * 32 + (place & 4) * 4 + (place & 2) * 4 + place % 32 / 8 * 2 + (place & 1);
}
HOST_DEVICE int kv_token(int place) { return place / 4 + 8 * (place % 4); }

// The four pairs of a tile as the MMA's operand A, exactly: signed codes in 8 bits (two words), 0..15 in 4 bits (one).
HOST_DEVICE void kv_codes(const unsigned* words, unsigned (&a)[4]) {
    const unsigned one = 0x3C003C00u, magic = 0x64006400u;  // code | magic is 1024 + code
#if BITS == 4
    const unsigned sixteenth = 0x2C002C00u;  // of 1024 + 16 code
    const unsigned near = 0x000F000Fu, far = 0x00F000F0u, minus_1024 = 0xE400E400u, minus_64 = 0xD400D400u;
    const unsigned q = words[0];
    a[0] = fma_pair(and_or(q, near, magic), one, minus_1024);
    a[1] = fma_pair(and_or(q, far, magic), sixteenth, minus_64);
    a[2] = fma_pair(and_or(q >> 8, near, magic), one, minus_1024);
    a[3] = fma_pair(and_or(q >> 8, far, magic), sixteenth, minus_64);
#else
    const unsigned minus_1152 = 0xE480E480u;  // 1024 + 128
    for (int pair = 0; pair < 4; ++pair) {
#if defined(__CUDA_ARCH__)
        const unsigned number = __byte_perm(words[pair / 2], magic, pair % 2 ? 0x7372 : 0x7170);
#else
        const unsigned two = words[pair / 2] >> (pair % 2 * 16);
        const unsigned number = (two & 0xFFu) | (two & 0xFF00u) << 8 | magic;
#endif
        a[pair] = fma_pair(number, one, minus_1152);
    }
#endif
}
