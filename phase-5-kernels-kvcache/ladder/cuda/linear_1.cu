// Rung 1, naive: a thread per output walks its row of the matrix.
//
// Neighbouring threads read addresses that are a whole row apart, two bytes at a time: of the 32 bytes that memory sends
// for each, 30 are thrown away, or must wait in a cache until the thread comes back for them.
#include "device.cuh"
#include "ladder.h"

static __global__ void kernel(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int N, int K) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    float sum = 0;
    for (int k = 0; k < K; k++) sum += to_float(x[k]) * to_float(w[int64_t(n) * K + k]);
    out[n] = from_float<bf16>(sum + to_float(bias[n]));
}

void linear_1(const LinearRung& c, int64_t stream) {
    launch(kernel, dim3(blocks_of(c.N, 128)), 128, 0, stream, at_address<const bf16>(c.x), at_address<const bf16>(c.w),
           at_address<const bf16>(c.bias), at_address<bf16>(c.out), c.N, c.K);
}
