// Tensor cores and what feeds them: mma.sync, ldmatrix, cp.async, clusters, dependent launch. sm_80 and newer.
//
// Without a CUDA compiler the same functions come from tests/kernels/host/simt.h, which runs kernels lane by lane.
#pragma once

#include "numbers.cuh"

#if defined(__CUDACC__)

// All of a kernel's dynamic shared memory, as an array of `type`, aligned for bulk copies and swizzles.
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]

// Fragments of m16n8k16, lane l, r = l / 4, t = l % 4 (PTX ISA): a0 row r, k 2t and 2t+1; a1 row r+8, same k; a2, a3
// the same with k+8. b0 column r, k 2t and 2t+1; b1 with k+8. c0, c1 row r, columns 2t and 2t+1; c2, c3 row r+8.
DEVICE void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#endif
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// s8 x s8 -> s32, fragments of m16n8k32: four bytes where m16n8k16 has two halves (k 4t..4t+3, and k+16 in a2, a3, b1).
DEVICE void mma_16x8x32_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

DEVICE unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

// Four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 (16 bytes, aligned) of matrix l / 8, and
// gets in register i row l / 4, columns 2 (l % 4) and the next, of matrix i.
DEVICE void load_matrices(unsigned* d, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// The same with each matrix transposed: lane l gets column l / 4, rows 2 (l % 4) and the next.
DEVICE void load_matrices_transposed(unsigned* d, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// 16 bytes that are read once: past L1, and in program order, so that loads stay where a pipeline puts them.
DEVICE uint4 load_streaming(const uint4* pointer) {
    uint4 d;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "l"(pointer) : "memory");
    return d;
}

// Into L2 only. A hint: it makes nothing stale, so it may run before the kernel ahead has ended.
DEVICE void prefetch_l2(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

// 16 bytes from global to shared memory, past L1, not waiting.
DEVICE void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same, or 16 zero bytes where `valid` is false; the address must be one that may be read all the same.
DEVICE void copy_async_or_zero(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's last groups are still under way. A barrier must follow for other threads.
template <int pending> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Programmatic dependent launch (sm_90; nothing before). Wait: until the kernel ahead has ended and what it wrote is
// seen. Trigger: from now on the next kernel may start; only after our own wait, so that it does not overtake the
// kernel ahead of us.
DEVICE void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
DEVICE unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of all blocks of the cluster; shared memory written before, in any of them, is seen after.
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Write a float into the shared memory of another block of the cluster, at the place that `pointer` has in ours.
DEVICE void store_in_cluster(float* pointer, unsigned rank, float value) {
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(pointer)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}
#endif

#else
#include "simt.h"
#endif
