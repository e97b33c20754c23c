// What wgmma.cuh offers, on the host, on top of simt.h: mbarriers, bulk copies and wgmma as asynchronous as they may be.
//
// A bulk copy lands at some time while somebody waits on a barrier, in any order. A wgmma reads its operands twice, when
// it is issued and when it is waited for, and ends the run if they differ: then something was multiplied before it
// arrived, or overwritten while in use.
#pragma once
#include <map>
#include <random>

namespace simt {

struct Barrier {
    int arrivals, pending;
    long bytes = 0;
    unsigned phase = 0;
    void settle() {
        if (pending < 0) fprintf(stderr, "more arrivals at a barrier than it was made for\n"), abort();
        if (pending == 0 && bytes == 0) pending = arrivals, phase++, moved = true;
    }
};
struct Product {
    std::function<std::vector<double>()> compute;
    std::vector<double> at_issue;
    std::function<void(const std::vector<double>&)> add;
};
struct Products {
    std::vector<Product> open;
    std::vector<std::vector<Product>> committed;
};

inline std::map<std::pair<Block*, unsigned>, Barrier> barriers;
inline std::map<std::pair<Block*, int>, Meeting> named;
inline std::map<Thread*, Products> products;
inline std::vector<std::function<void()>> flying;
inline std::mt19937 dice(0);

inline Block* block_at(int rank) { return (*cluster)[rank].get(); }
inline Barrier& barrier_at(Block* block, unsigned address) {
    auto found = barriers.find({block, address});
    if (found == barriers.end()) fprintf(stderr, "no barrier at %u\n", address), abort();
    return found->second;
}
inline void fly(Block* to, unsigned shared, const void* global, int bytes, unsigned barrier) {
    if (shared % 16 || bytes % 16 || (size_t)global % 16) fprintf(stderr, "a bulk copy is not aligned\n"), abort();
    flying.push_back([=] {
        memcpy(to->shared + shared, global, bytes);
        barrier_at(to, barrier).bytes -= bytes;
        barrier_at(to, barrier).settle();
    });
}

// Byte `byte` of row `row` of an operand: rows of 128 bytes, eight of them `stride` apart, address bits 4..6 XOR 7..9.
inline const char* operand(Block* block, unsigned long long descriptor, int row, int byte) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fprintf(stderr, "not a 128-byte swizzle\n"), abort();
    const unsigned start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    const unsigned address = start + row / 8 * stride + row % 8 * 128 + byte;
    return block->shared + (address ^ (address >> 3 & 0x70));
}

template <class Number, int R>
void issue(Number (&d)[R], int accumulate, std::function<std::vector<double>()> compute) {
    if (!accumulate) fprintf(stderr, "the host adds always\n"), abort();
    Number* sums = d;
    auto add = [sums](const std::vector<double>& values) { for (int i = 0; i < R; i++) sums[i] += (Number)values[i]; };
    products[&now()].open.push_back({compute, compute(), add});
}

// Row `upper` or `upper` + 8 and column of accumulator register i.
inline int column_of(int i) { return i / 4 * 8 + now().lane % 4 * 2 + i % 2; }

// A from registers: 16-bit numbers, rows as in mma.m16n8k16.
template <int R, class ToFloat>
void issue_from_registers(float (&d)[R], unsigned (&a)[4], unsigned long long b, int accumulate, ToFloat to_number) {
    struct Lane { unsigned a[4]; } mine = {{a[0], a[1], a[2], a[3]}};
    std::vector<double> left(32);  // rows r and r + 8
    together(mine, [&](auto lane) {
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 16; k++) {
                const unsigned word = lane(now().lane / 4 * 4 + k % 8 / 2).a[i + 2 * (k / 8)];
                left[16 * i + k] = to_number(word >> (k % 2 * 16) & 0xffffu);
            }
        return 0;
    });
    Block* block = now().block;
    const int first = column_of(0);
    issue(d, accumulate, [=] {
        std::vector<double> sums(R, 0.0);
        for (int i = 0; i < R; i++)
            for (int k = 0; k < 16; k++) {
                unsigned short bits;
                memcpy(&bits, operand(block, b, first + i / 4 * 8 + i % 2, 2 * k), 2);
                sums[i] += left[i / 2 % 2 * 16 + k] * to_number(bits);
            }
        return sums;
    });
}

}  // namespace simt

inline void trap() { fprintf(stderr, "trap\n"), abort(); }
inline void barrier_init(unsigned barrier, int arrivals) {
    simt::barriers[{simt::now().block, barrier}] = {arrivals, arrivals};
}
inline void barrier_init_fence() {}
inline void barrier_wait(unsigned barrier, int parity) {
    simt::Barrier& mine = simt::barrier_at(simt::now().block, barrier);
    while ((mine.phase & 1) == (unsigned)parity) {
        auto& flying = simt::flying;
        if (!flying.empty()) {
            simt::moved = true;
            if (simt::dice() % 4 == 0) {
                std::swap(flying[simt::dice() % flying.size()], flying.back());
                auto land = flying.back();
                flying.pop_back(), land();
            }
        }
        swapcontext(&simt::now().context, &simt::scheduler);
    }
    simt::moved = true;
}
inline void barrier_arrive_at(simt::Block* block, unsigned barrier) {
    auto& at = simt::barrier_at(block, barrier);
    at.pending--, at.settle();
}
inline void barrier_arrive(unsigned barrier) { barrier_arrive_at(simt::now().block, barrier); }
inline void barrier_arrive_remote(unsigned barrier, int rank) { barrier_arrive_at(simt::block_at(rank), barrier); }
inline void barrier_expect(unsigned barrier, int bytes) {
    simt::barrier_at(simt::now().block, barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void bulk_copy(unsigned shared, const void* global, int bytes, unsigned barrier) {
    simt::fly(simt::now().block, shared, global, bytes, barrier);
}
inline void bulk_copy_multicast(unsigned shared, const void* global, int bytes, unsigned barrier, unsigned short mask) {
    for (int rank = 0; mask >> rank; rank++)
        if (mask >> rank & 1) simt::fly(simt::block_at(rank), shared, global, bytes, barrier);
}
inline void async_proxy_fence() {}
inline void named_barrier(int id, int threads) { simt::meet(simt::named[{simt::now().block, id}], threads); }

inline void wgmma_fence() {}
template <class Number, int R> void wgmma_pin(Number (&)[R]) {}
inline void wgmma_commit() {
    auto& mine = simt::products[&simt::now()];
    mine.committed.push_back(std::move(mine.open)), mine.open.clear();
}
template <int PENDING> void wgmma_wait() {
    auto& groups = simt::products[&simt::now()].committed;
    for (; (int)groups.size() > PENDING; groups.erase(groups.begin()))
        for (auto& product : groups.front()) {
            if (product.compute() != product.at_issue) {
                fprintf(stderr, "the operands of a wgmma changed while it ran\n"), abort();
            }
            product.add(product.at_issue);
        }
}
template <int R> void wgmma_s8(int (&d)[R], unsigned long long a, unsigned long long b, int accumulate) {
    simt::Block* block = simt::now().block;
    const int row = simt::now().thread.x % 128 / 32 * 16 + simt::now().lane / 4, first = simt::column_of(0);
    simt::issue(d, accumulate, [=] {
        std::vector<double> sums(R, 0.0);
        for (int i = 0; i < R; i++)
            for (int k = 0; k < 32; k++)
                sums[i] += (double)*(const signed char*)simt::operand(block, a, row + i / 2 % 2 * 8, k)
                           * *(const signed char*)simt::operand(block, b, first + i / 4 * 8 + i % 2, k);
        return sums;
    });
}
template <int R> void wgmma_bf16(float (&d)[R], unsigned (&a)[4], unsigned long long b, int accumulate) {
    simt::issue_from_registers(d, a, b, accumulate, bf16_to_float);
}
template <int R> void wgmma_f16(float (&d)[R], unsigned (&a)[4], unsigned long long b, int accumulate) {
    simt::issue_from_registers(d, a, b, accumulate, fp16_to_float);
}
