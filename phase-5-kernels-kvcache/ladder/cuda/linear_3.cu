// Rung 3, shared memory and shuffles: x is fetched once per block, and a warp adds up without a barrier.
//
// Eight outputs of a block share x, widened to float32. A warp per output: its lanes hand their sums to each other
// directly, in five steps.
#include "device.cuh"
#include "ladder.h"

constexpr int WARPS = 8;

static __global__ void kernel(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int N, int K) {
    DYNAMIC_SHARED(memory);
    float* wide = reinterpret_cast<float*>(memory);  // [K]
    for (int k = threadIdx.x; k < K; k += WARPS * 32) wide[k] = to_float(x[k]);
    __syncthreads();
    int lane = threadIdx.x % 32;
    int64_t n = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (n >= N) return;
    float sum = 0;
    for (int k = lane; k < K; k += 32) sum += wide[k] * to_float(w[n * K + k]);
    sum = warp_sum(sum);
    if (lane == 0) out[n] = from_float<bf16>(sum + to_float(bias[n]));
}

void linear_3(const LinearRung& c, int64_t stream) {
    launch(kernel, dim3(blocks_of(c.N, WARPS)), WARPS * 32, sizeof(float) * c.K, stream, at_address<const bf16>(c.x),
           at_address<const bf16>(c.w), at_address<const bf16>(c.bias), at_address<bf16>(c.out), c.N, c.K);
}
