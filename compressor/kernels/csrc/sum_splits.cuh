// y[i] = sum over s of parts[s, i]: float32 partial results [SPLITS, count] to bfloat16 or float16, in the order of s.
//
// Constants: BF16, SPLITS. Launch: enough blocks of 256 threads for count elements.
#include "mma.cuh"

extern "C" __global__ void __launch_bounds__(256) sum_splits(const float* parts, unsigned short* y, int count) {
    wait_for_kernel_ahead();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    float sum = 0.f;
    for (int s = 0; s < SPLITS; s++) sum += parts[(size_t)s * count + i];
    y[i] = (unsigned short)from_float(sum);
}
