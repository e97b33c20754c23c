// Which pairs each expert gets, in blocks of TOKENS, without the host: pairs in the order of their experts, every expert
// beginning a new block.
//
//   index    [pairs] the router's experts (moe_pairs.cuh)
//   order    [blocks, TOKENS] pairs; -1 where an expert's last block is not full. Not written in blocks without expert
//   experts  [blocks] the expert of each block; -1 for blocks that are left over
//
// The order of pairs within an expert differs from run to run; what is computed of a pair does not depend on it.
//
// Constants: those of moe_pairs.cuh, TOKENS. `blocks` is at least the sum over experts of their pairs / TOKENS, rounded
// up. Launch: one block of 1024 threads; shared memory: two numbers an expert.
#include "moe_pairs.cuh"

static_assert(EXPERTS <= 1024, "a thread for each expert");

extern "C" __global__ void __launch_bounds__(1024)
moe_route(const void* index, int* order, int* experts, int pairs, int blocks) {
    DYNAMIC_SHARED(int, shared);
    int* const counts = shared;           // of pairs; later where the next one goes
    int* const ends = shared + EXPERTS;   // of an expert's blocks
    const int expert = threadIdx.x;

    if (expert < EXPERTS) counts[expert] = 0;
    wait_for_kernel_ahead();
    let_next_kernel_start();
    __syncthreads();
    for (int pair = threadIdx.x; pair < pairs; pair += 1024) {
        const int chosen = expert_of(index, pair);
        if (chosen >= 0) atomicAdd(&counts[chosen], 1);
    }
    __syncthreads();
    const int count = expert < EXPERTS ? counts[expert] : 0, needed = (count + TOKENS - 1) / TOKENS;
    if (expert < EXPERTS) ends[expert] = needed;
    __syncthreads();
    for (int step = 1; step < EXPERTS; step *= 2) {
        const int earlier = expert >= step && expert < EXPERTS ? ends[expert - step] : 0;
        __syncthreads();
        if (expert < EXPERTS) ends[expert] += earlier;
        __syncthreads();
    }
    if (expert < EXPERTS) {
        const int end = ends[expert], begin = end - needed;
        for (int block = begin; block < end; block++) experts[block] = expert;
        for (int at = begin * TOKENS + count; at < end * TOKENS; at++) order[at] = -1;
        counts[expert] = begin * TOKENS;
    }
    for (int block = ends[EXPERTS - 1] + threadIdx.x; block < blocks; block += 1024) experts[block] = -1;
    __syncthreads();
    for (int pair = threadIdx.x; pair < pairs; pair += 1024) {
        const int chosen = expert_of(index, pair);
        if (chosen >= 0) order[atomicAdd(&counts[chosen], 1)] = pair;
    }
}
