// Hopper's own instructions (sm_90a): warpgroup MMA, mbarriers, bulk copies, clusters. Source: PTX ISA 8.0 and later.
//
// A warpgroup is 4 warps from a warp index divisible by 4. m64nNk: A has 64 rows, B has N columns, both K-major.
// Accumulator of warp w (0..3), lane l, r = l / 4, t = l % 4: d[4 j + 0, 1] is row 16 w + r, columns 8 j + 2 t, + 1;
// d[4 j + 2, 3] is row 16 w + r + 8, the same columns.
#pragma once
#include "mma.cuh"

// ---- Shared-memory operands: rows of 128 bytes, 128-byte swizzle -----------------------------------------------------

// Byte of 16-byte chunk `chunk` (0..7) of row `row` in a tile whose base is a multiple of 1024 bytes.
HOST_DEVICE constexpr int swizzled_chunk(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Descriptor of a K-major operand in that layout, 8 rows apart by 1024 bytes (the stride; the leading offset is not used).
// The next 32 bytes of K are `descriptor + 2`: addresses count in 16 bytes, and the hardware XORs address bits 4..6 with
// bits 7..9 after the addition.
HOST_DEVICE constexpr unsigned long long swizzled_descriptor(unsigned address) {
    return (unsigned long long)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#if defined(__CUDACC__)

// ---- mbarrier --------------------------------------------------------------------------------------------------------
// Addresses are 32-bit shared-memory addresses. `parity` is that of the phase waited for: the first phase has parity 0,
// and waiting for parity 1 on a new barrier returns at once.

DEVICE void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to bulk copies and to the cluster; a block or cluster barrier must follow.
DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void barrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// One arrival that also announces `bytes` of bulk copies to this barrier.
DEVICE void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives on the same barrier of block `rank` of the cluster. Without `.release.cluster`, which costs a fence of the whole
// memory: it orders what wgmma has read, not what this thread wrote.
DEVICE void barrier_arrive_remote(unsigned barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// ---- Bulk copies: contiguous, 16-byte aligned, a multiple of 16 bytes -------------------------------------------------

DEVICE void bulk_copy(unsigned shared, const void* global, int bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

// To the same offset of every block in `mask`; each one's barrier at the same offset counts the bytes.
DEVICE void bulk_copy_multicast(
    unsigned shared, const void* global, int bytes, unsigned barrier, unsigned short mask) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
            shared),
        "l"(global), "r"(bytes), "r"(barrier), "h"(mask)
        : "memory");
}

// Ordinary stores to shared memory (cp.async too) that wgmma or a bulk copy reads next: each writing thread, then a barrier.
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void trap() { asm volatile("trap;"); }

// Barrier `id` (1..15) among `threads` threads of the block, a multiple of 32.
DEVICE void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- wgmma -----------------------------------------------------------------------------------------------------------

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving what it does with accumulators (or with A in registers) across this line: once before
// the first `wgmma_fence`, and once after the `wgmma_wait` that ends the products, before the sums are read.
template <int R>
DEVICE void wgmma_pin(int (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int R>
DEVICE void wgmma_pin(unsigned (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int R>
DEVICE void wgmma_pin(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define WGMMA_REGS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define WGMMA_REGS_16 WGMMA_REGS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_REGS_32 WGMMA_REGS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_REGS_64                                                                                              \
    WGMMA_REGS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
                  "%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_REGS_128                                                                                              \
    WGMMA_REGS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,"  \
                  "%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,"   \
                  "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126," \
                  "%127"
#define WGMMA_OUT_8(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define WGMMA_OUT_16(c, d, i) WGMMA_OUT_8(c, d, i), WGMMA_OUT_8(c, d, i + 8)
#define WGMMA_OUT_32(c, d, i) WGMMA_OUT_16(c, d, i), WGMMA_OUT_16(c, d, i + 16)
#define WGMMA_OUT_64(c, d, i) WGMMA_OUT_32(c, d, i), WGMMA_OUT_32(c, d, i + 32)
#define WGMMA_OUT_128(c, d, i) WGMMA_OUT_64(c, d, i), WGMMA_OUT_64(c, d, i + 64)

// Three forms for N columns, R = N / 2 registers; P0..P5 are the numbers of the operands after them.
// d = A B (+ d where accumulate is not 0). wgmma_s8: both from shared memory, K = 32. wgmma_bf16 and wgmma_f16: A from
// four registers (pairs as in mma.m16n8k16, warp w holding rows 16 w .. 16 w + 15), B from shared memory, K = 16.
#define WGMMA_DEFINE(N, R, P0, P1, P2, P3, P4, P5)                                                                   \
    DEVICE void wgmma_s8(                                                                        \
        int (&d)[R], unsigned long long a, unsigned long long b, int accumulate) {                                   \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" WGMMA_REGS_##R "}, " P0 ", " P1        \
                     ", p;\n}\n"                                                                                     \
                     : WGMMA_OUT_##R("+r", d, 0)                                                                     \
                     : "l"(a), "l"(b), "r"(accumulate));                                                             \
    }                                                                                                                \
    WGMMA_DEFINE_RS(wgmma_bf16, "bf16.bf16", N, R, P0, P1, P2, P3, P4, P5)                                           \
    WGMMA_DEFINE_RS(wgmma_f16, "f16.f16", N, R, P0, P1, P2, P3, P4, P5)
#define WGMMA_DEFINE_RS(NAME, TYPES, N, R, P0, P1, P2, P3, P4, P5)                                                   \
    DEVICE void NAME(                                                                            \
        float (&d)[R], unsigned (&a)[4], unsigned long long b, int accumulate) {                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" WGMMA_REGS_##R "}, {" P0 ", " P1   \
                     ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 0;\n}\n"                                                   \
                     : WGMMA_OUT_##R("+f", d, 0)                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                         \
    }

WGMMA_DEFINE(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
WGMMA_DEFINE(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WGMMA_DEFINE(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_DEFINE(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_DEFINE(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

#else
#include "hopper.h"  // tests/kernels/host: the same on the host, for tests
#endif
