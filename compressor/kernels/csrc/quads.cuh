// Four neighbouring lanes as a 4x4 matrix of words: what packing and unpacking T16x64 exchange.
#pragma once

#include "mma.cuh"

// The i-th of four registers, for an i that only the running lane knows: no array that would go to local memory.
HOST_DEVICE unsigned pick(const unsigned (&words)[4], int i) {
    const unsigned low = i & 1 ? words[1] : words[0], high = i & 1 ? words[3] : words[2];
    return i & 2 ? high : low;
}

HOST_DEVICE void put(unsigned (&words)[4], int i, unsigned word) {
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] = i == j ? word : words[j];
}

// Lane t's word s becomes lane s's word t. All lanes of the warp take part.
DEVICE void transpose_quad(unsigned (&words)[4], int t) {
    unsigned turned[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const int other = t ^ step;
        put(turned, other, __shfl_xor_sync(0xffffffffu, pick(words, other), step));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = turned[i];
}
