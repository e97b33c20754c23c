// Runs our CUDA kernels on the host, thread by thread, from their own source: mma.cuh includes this without nvcc.
//
// A CUDA thread is a fiber. At a barrier, a shuffle or a tensor-core instruction it waits for the others that take part;
// if nobody can go on, that is a deadlock and the run ends with a message. Shared memory begins as NaNs, copies by
// cp.async arrive only when they are waited for, and the blocks of a cluster run together. Warps advance unevenly
// (the same way each time), which shows some missing barriers, not all.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define threadIdx (simt::now().thread)
#define blockIdx (simt::now().block->index)
#define gridDim (simt::grid)
#define blockDim (simt::block_size)
#define DYNAMIC_SHARED(type, name) type* const name = (type*)simt::now().block->shared
using std::max;
using std::min;

namespace simt {

struct Three { unsigned x, y, z; };
struct Copy { void* to; const void* from; bool valid; };
struct Meeting { int arrived = 0; unsigned times = 0; };  // of all that take part
struct Warp {
    Meeting meeting;
    unsigned char words[32][64];  // what each lane brings
    int lanes;
};
struct Block {
    Three index;
    char* shared;
    unsigned rank;  // in its cluster
    Meeting meeting;
    std::vector<Warp> warps;
};
struct Thread {
    Three thread;
    Block* block;
    Warp* warp;
    int lane;
    bool done = false;
    std::vector<std::vector<Copy>> committed;
    std::vector<Copy> open;
    ucontext_t context;
    std::vector<char> stack;
};

inline Three grid, block_size;
inline Thread* running;
inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Block>>* cluster;
inline Meeting cluster_meeting;
inline bool moved;  // whether any fiber got further in this round
inline const std::function<void()>* body;

inline Thread& now() { return *running; }
inline int threads() { return block_size.x * block_size.y * block_size.z; }

inline void meet(Meeting& meeting, int members) {
    moved = true;
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        meeting.times++;
        return;
    }
    const unsigned before = meeting.times;
    while (meeting.times == before) swapcontext(&now().context, &scheduler);
    moved = true;
}

// Bring a value to the warp, look at what all 32 brought, and go on when all have looked.
template <class Value, class Look> auto together(const Value& value, Look look) {
    static_assert(sizeof(Value) <= 64, "too much for a lane");
    Warp& warp = *now().warp;
    memcpy(warp.words[now().lane], &value, sizeof(Value));
    meet(warp.meeting, warp.lanes);
    auto found = look([&](int lane) {
        Value other;
        memcpy(&other, warp.words[lane], sizeof(Value));
        return other;
    });
    meet(warp.meeting, warp.lanes);
    return found;
}

inline void enter() {
    (*body)();
    now().done = moved = true;
    swapcontext(&now().context, &scheduler);
}

inline void run_cluster(Three first, int blocks, size_t shared_bytes) {
    std::vector<std::unique_ptr<Block>> members;
    std::vector<std::unique_ptr<Thread>> fibers;
    cluster = &members;
    cluster_meeting = {};
    for (int rank = 0; rank < blocks; rank++) {
        auto block = std::make_unique<Block>();
        block->index = {first.x + rank, first.y, first.z};
        block->rank = rank;
        block->shared = (char*)aligned_alloc(1024, (shared_bytes / 1024 + 2) * 1024);
        memset(block->shared, 0xff, (shared_bytes / 1024 + 2) * 1024);
        block->warps.resize((threads() + 31) / 32);
        for (int i = 0; i < threads(); i++) {
            auto fiber = std::make_unique<Thread>();
            fiber->thread = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
            fiber->block = block.get();
            fiber->warp = &block->warps[i / 32];
            fiber->warp->lanes = min(32, threads() - i / 32 * 32);
            fiber->lane = i % 32;
            fiber->stack.resize(1 << 16);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.data();
            fiber->context.uc_stack.ss_size = fiber->stack.size();
            fiber->context.uc_link = nullptr;
            makecontext(&fiber->context, (void (*)())enter, 0);
            fibers.push_back(std::move(fiber));
        }
        members.push_back(std::move(block));
    }
    unsigned draw = 0, rounds = 0, stuck = 0;
    for (size_t left = fibers.size(); left;) {
        moved = false;
        for (size_t i = 0; i < fibers.size(); i++) {
            auto& fiber = fibers[i];
            // Half of the warps are held back until the others are stuck: these run ahead as far as barriers let them.
            const unsigned warp = i / 32 + 1, chance = (warp * 2654435761u ^ draw * 40503u) * 2246822519u;
            if (fiber->done || chance >> 31) continue;
            running = fiber.get();
            swapcontext(&scheduler, &fiber->context);
            left -= fiber->done;
        }
        stuck = moved ? 0 : stuck + 1;
        if (!moved || ++rounds % 256 == 0) draw++;
        if (stuck == 1000) {  // whoever was let go
            fprintf(stderr, "deadlock: %zu threads of block %u wait for others that do not come\n", left, first.x);
            abort();
        }
    }
    for (auto& block : members) {
        for (size_t i = shared_bytes; i < (shared_bytes / 1024 + 2) * 1024; i++)
            if (block->shared[i] != (char)0xff) fprintf(stderr, "written past %zu bytes of shared memory\n", shared_bytes), abort();
        free(block->shared);
    }
}

inline void launch(Three blocks, Three block, size_t shared_bytes, int cluster_size, const std::function<void()>& kernel) {
    grid = blocks, block_size = block, body = &kernel;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x += cluster_size) run_cluster({x, y, z}, cluster_size, shared_bytes);
}

// Call a kernel with pointers to its arguments, as the driver does.
template <class... A, size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(A*)args[I]...);
}
template <class... A> void call(void (*kernel)(A...), void** args) { call(kernel, args, std::index_sequence_for<A...>{}); }

inline void finish(std::vector<Copy>& copies) {
    for (auto& copy : copies)
        if (copy.valid) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
}

}  // namespace simt

inline void __syncthreads() { simt::meet(simt::now().block->meeting, simt::threads()); }
inline void __syncwarp(unsigned = 0xffffffffu) { simt::meet(simt::now().warp->meeting, simt::now().warp->lanes); }
template <class T> T __shfl_sync(unsigned, T value, int from) {
    return simt::together(value, [&](auto lane) { return lane(from % 32); });
}
template <class T> T __shfl_xor_sync(unsigned, T value, int bits) {
    return simt::together(value, [&](auto lane) { return lane(simt::now().lane ^ bits); });
}
template <class T> T __shfl_down_sync(unsigned, T value, int by) {
    return simt::together(value, [&](auto lane) { return lane(min(simt::now().lane + by, 31)); });
}
inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }

// Fragments as in mma.cuh; products and sums in double.
inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
    struct Lane { unsigned a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    double sums[4] = {c[0], c[1], c[2], c[3]};
    simt::together(mine, [&](auto lane) {
        const int r = simt::now().lane / 4, t = simt::now().lane % 4;
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 16; k++) {  // of k: lane k % 8 / 2, register k / 8, half k % 2
                const unsigned left = lane(4 * r + k % 8 / 2).a[i / 2 + 2 * (k / 8)] >> (k % 2 * 16);
                const unsigned right = lane(4 * (2 * t + i % 2) + k % 8 / 2).b[k / 8] >> (k % 2 * 16);
                sums[i] += (double)to_float(left & 0xffffu) * to_float(right & 0xffffu);
            }
        return 0;
    });
    for (int i = 0; i < 4; i++) d[i] = (float)sums[i];
}
inline void mma_16x8x32_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&c)[4]) {
    struct Lane { unsigned a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    int sums[4] = {c[0], c[1], c[2], c[3]};
    simt::together(mine, [&](auto lane) {
        const int r = simt::now().lane / 4, t = simt::now().lane % 4;
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 32; k++) {
                const unsigned left = lane(4 * r + k % 16 / 4).a[i / 2 + 2 * (k / 16)] >> (k % 4 * 8);
                const unsigned right = lane(4 * (2 * t + i % 2) + k % 16 / 4).b[k / 16] >> (k % 4 * 8);
                sums[i] += (int)(signed char)left * (int)(signed char)right;
            }
        return 0;
    });
    for (int i = 0; i < 4; i++) d[i] = sums[i];
}

inline unsigned shared_address(const void* pointer) { return (unsigned)((char*)pointer - simt::now().block->shared); }
inline void load_matrices(unsigned* d, unsigned address) {
    simt::together(address, [&](auto lane) {
        for (int i = 0; i < 4; i++) {
            const unsigned row = lane(8 * i + simt::now().lane / 4);
            if (row % 16) fprintf(stderr, "ldmatrix from an address that is not a multiple of 16\n"), abort();
            memcpy(d + i, simt::now().block->shared + row + simt::now().lane % 4 * 4, 4);
        }
        return 0;
    });
}
inline void load_matrices_transposed(unsigned* d, unsigned address) {
    simt::together(address, [&](auto lane) {
        const char* shared = simt::now().block->shared;
        const int column = simt::now().lane / 4, pair = simt::now().lane % 4 * 2;
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                memcpy((char*)(d + i) + 2 * half, shared + lane(8 * i + pair + half) + 2 * column, 2);
        return 0;
    });
}

inline uint4 load_streaming(const uint4* pointer) { return *pointer; }
inline void prefetch_l2(const void*) {}
inline void copy_async_or_zero(void* shared, const void* global, bool valid) {
    if ((size_t)shared % 16 || (size_t)global % 16) fprintf(stderr, "cp.async of 16 bytes that are not aligned\n"), abort();
    simt::now().open.push_back({shared, global, valid});
}
inline void copy_async(void* shared, const void* global) { copy_async_or_zero(shared, global, true); }
inline void copy_async_commit() { simt::now().committed.push_back(std::move(simt::now().open)), simt::now().open.clear(); }
template <int pending> void copy_async_wait() {
    auto& groups = simt::now().committed;
    while ((int)groups.size() > pending) simt::finish(groups.front()), groups.erase(groups.begin());
}

inline void wait_for_kernel_ahead() {}
inline void let_next_kernel_start() {}
inline unsigned cluster_rank() { return simt::now().block->rank; }
inline void cluster_barrier() { simt::meet(simt::cluster_meeting, simt::cluster->size() * simt::threads()); }
inline void store_in_cluster(float* pointer, unsigned rank, float value) {
    *(float*)((*simt::cluster)[rank]->shared + shared_address(pointer)) = value;
}
