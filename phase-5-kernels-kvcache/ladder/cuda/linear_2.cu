// Rung 2, coalesced: a block per output, whose neighbouring threads read neighbouring inputs.
//
// Now every byte that memory sends is used. The threads' sums are added up in shared memory, by halves: seven barriers,
// at each of which half of the threads that still worked have nothing left to do.
#include "device.cuh"
#include "ladder.h"

constexpr int THREADS = 128;

static __global__ void kernel(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int K) {
    __shared__ float sums[THREADS];
    int64_t n = blockIdx.x;
    float sum = 0;
    for (int k = threadIdx.x; k < K; k += THREADS) sum += to_float(x[k]) * to_float(w[n * K + k]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[n] = from_float<bf16>(sums[0] + to_float(bias[n]));
}

void linear_2(const LinearRung& c, int64_t stream) {
    launch(kernel, dim3(c.N), THREADS, 0, stream, at_address<const bf16>(c.x), at_address<const bf16>(c.w),
           at_address<const bf16>(c.bias), at_address<bf16>(c.out), c.K);
}
