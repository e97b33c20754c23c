// Pairs of a token and an expert: pair m * SLOTS + s is what slot s of token m's routing says.
//
// Constants: WIDE (indices are int64; else int32), EXPERTS, SLOTS.
#pragma once

#include "mma.cuh"

static_assert(EXPERTS >= 1 && SLOTS >= 1, "experts");

// The pair's expert, or -1 where there is none: transformers marks dropped slots with EXPERTS.
DEVICE int expert_of(const void* index, int pair) {
    const long long expert = WIDE ? ((const long long*)index)[pair] : ((const int*)index)[pair];
    return expert >= 0 && expert < EXPERTS ? (int)expert : -1;
}
