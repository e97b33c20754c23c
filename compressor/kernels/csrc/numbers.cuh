// Numbers: bfloat16 and float16 as bits, and four-bit codes as either, exactly.
//
// Activations are bfloat16 or float16, chosen by the constant BF16 (1 or 0); two of them share a 32-bit register, the
// lower half first. Codes are unsigned nibbles, q = code + 8. All of it also compiles for the host, where tests try
// every value.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#else
#define HOST_DEVICE inline
#define DEVICE inline
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
#endif

#ifndef BF16
#error "BF16 is not defined: 1 for bfloat16 activations, 0 for float16"
#endif

HOST_DEVICE float float_of_bits(unsigned bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    union { unsigned u; float f; } both = {bits};
    return both.f;
#endif
}

HOST_DEVICE unsigned bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    union { float f; unsigned u; } both = {value};
    return both.u;
#endif
}

// (a & b) | c in one instruction.
HOST_DEVICE unsigned and_or(unsigned a, unsigned b, unsigned c) {
#if defined(__CUDA_ARCH__)
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return (a & b) | c;
#endif
}

// ---- bfloat16 ----

HOST_DEVICE float bf16_to_float(unsigned bits) { return float_of_bits(bits << 16); }

// Rounded to the nearest, ties to even; the result in the lower 16 bits.
HOST_DEVICE unsigned float_to_bf16(float value) {
#if defined(__CUDA_ARCH__)
    unsigned short d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(value));
    return d;
#else
    unsigned bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#endif
}

// ---- float16 ----

HOST_DEVICE float fp16_to_float(unsigned bits) {
#if defined(__CUDA_ARCH__)
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"((unsigned short)bits));
    return d;
#else
    unsigned sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1fu, fraction = bits & 0x3ffu;
    if (exponent == 0x1f) return float_of_bits(sign | 0x7f800000u | (fraction << 13));
    if (exponent) return float_of_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
    float small = (float)fraction / 16777216.0f;  // subnormal: fraction * 2^-24
    return sign ? -small : small;
#endif
}

HOST_DEVICE unsigned float_to_fp16(float value) {
#if defined(__CUDA_ARCH__)
    unsigned short d;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(value));
    return d;
#else
    unsigned bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fff;
    if (size >= 0x47800000u) return sign | 0x7c00u;
    if (size < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
        return sign | (bits_of_float(float_of_bits(size) + 0.5f) - 0x3f000000u);
    }
    unsigned rounded = size + 0xfffu + ((size >> 13) & 1u) - (112u << 23);
    return sign | (rounded >> 13);
#endif
}

// ---- the activations' dtype ----

HOST_DEVICE float to_float(unsigned bits) { return BF16 ? bf16_to_float(bits) : fp16_to_float(bits); }
HOST_DEVICE unsigned from_float(float value) { return BF16 ? float_to_bf16(value) : float_to_fp16(value); }

// Two floats, rounded, in one register: the first in the lower half.
HOST_DEVICE unsigned pack_floats(float low, float high) {
#if defined(__CUDA_ARCH__)
    unsigned d;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
    return d;
#else
    return from_float(low) | (from_float(high) << 16);
#endif
}

// a * b + c in both halves, rounded once.
HOST_DEVICE unsigned fma_pair(unsigned a, unsigned b, unsigned c) {
#if defined(__CUDA_ARCH__)
    unsigned d;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
#else
    // In double the product is exact, and the sums that we make of it are too.
    unsigned halves[2];
    for (int i = 0; i < 2; i++) {
        double sum = (double)to_float((a >> 16 * i) & 0xffffu) * to_float((b >> 16 * i) & 0xffffu)
                     + to_float((c >> 16 * i) & 0xffffu);
        halves[i] = from_float((float)sum);
    }
    return halves[0] | (halves[1] << 16);
#endif
}

// ---- four-bit codes ----
//
// One lane's part of a 16x16 tile of weights is eight nibbles in a 32-bit word: pair j (MMA register a_j) in bits
// 4j..4j+3 (its lower half) and 4j+16..4j+19 (its upper half). Pairs 0 and 2 are of row lane / 4, pairs 1 and 3 of the
// row eight below. Zeros are unsigned like the codes: u = zero + 8, so 8 stands for symmetric.

// What has to be added to a code's number to subtract its zero; made once for many codes of a row.
struct Zero {
    unsigned near;  // of a code in bits 0..3 of a half-word
#if !BF16
    unsigned far;   // of a code in bits 4..7, seen as sixteenths
#endif
};

HOST_DEVICE Zero make_zero(unsigned u) {
#if BF16
    return {(0xC300u + u) * 0x00010001u};  // -(128 + u), for u < 128
#else
    return {(0xE400u + u) * 0x00010001u, (0xD400u + 16 * u) * 0x00010001u};  // -(1024 + u), -(64 + u), for u < 64
#endif
}

// The eight numbers code - zero, exactly, as the MMA's operand A. `low` is the zero of row lane / 4, `high` of the row
// eight below. bfloat16: q | 0x4300 is 128 + q. float16: q | 0x6400 is 1024 + q, and a nibble higher 1024 + 16 q, a
// sixteenth of which is 64 + q.
HOST_DEVICE void dequantize(unsigned q, Zero low, Zero high, unsigned (&a)[4]) {
#if BF16
    const unsigned one = 0x3F803F80u, magic = 0x43004300u, mask = 0x000F000Fu;
    a[0] = fma_pair(and_or(q, mask, magic), one, low.near);
    a[1] = fma_pair(and_or(q >> 4, mask, magic), one, high.near);
    a[2] = fma_pair(and_or(q >> 8, mask, magic), one, low.near);
    a[3] = fma_pair(and_or(q >> 12, mask, magic), one, high.near);
#else
    const unsigned one = 0x3C003C00u, sixteenth = 0x2C002C00u, magic = 0x64006400u;
    const unsigned near = 0x000F000Fu, far = 0x00F000F0u;
    a[0] = fma_pair(and_or(q, near, magic), one, low.near);
    a[1] = fma_pair(and_or(q, far, magic), sixteenth, high.far);
    a[2] = fma_pair(and_or(q >> 8, near, magic), one, low.near);
    a[3] = fma_pair(and_or(q >> 8, far, magic), sixteenth, high.far);
#endif
}
