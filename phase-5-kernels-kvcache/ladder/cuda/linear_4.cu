// Rung 4, vectorised: 16 bytes per access, four of them on their way before the first is needed.
//
// Memory answers after several hundred cycles. What keeps the bus busy is how many bytes have been asked for meanwhile:
// a lane that asks for two and waits cannot, one that asks for 64 can. K must be a multiple of 8.
#include "device.cuh"
#include "mma.cuh"
#include "ladder.h"

constexpr int WARPS = 8, AHEAD = 4;

static __device__ __forceinline__ float dot8(const float* x, uint4 w) {
    return x[0] * low_of<bf16>(w.x) + x[1] * high_of<bf16>(w.x) + x[2] * low_of<bf16>(w.y) + x[3] * high_of<bf16>(w.y) +
           x[4] * low_of<bf16>(w.z) + x[5] * high_of<bf16>(w.z) + x[6] * low_of<bf16>(w.w) + x[7] * high_of<bf16>(w.w);
}

static __global__ void kernel(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int N, int K) {
    DYNAMIC_SHARED(memory);
    float* wide = reinterpret_cast<float*>(memory);
    for (int k = threadIdx.x; k < K; k += WARPS * 32) wide[k] = to_float(x[k]);
    __syncthreads();
    int lane = threadIdx.x % 32, units = K / 8;
    int64_t n = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (n >= N) return;
    const uint4* row = reinterpret_cast<const uint4*>(w + n * K);
    float sum = 0;
    for (int first = lane; first < units; first += 32 * AHEAD) {
        uint4 loaded[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            loaded[i] = first + 32 * i < units ? row[first + 32 * i] : uint4{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + 32 * i < units) sum += dot8(wide + 8 * (first + 32 * i), loaded[i]);
    }
    sum = warp_sum(sum);
    if (lane == 0) out[n] = from_float<bf16>(sum + to_float(bias[n]));
}

void linear_4(const LinearRung& c, int64_t stream) {
    launch(kernel, dim3(blocks_of(c.N, WARPS)), WARPS * 32, sizeof(float) * c.K, stream, at_address<const bf16>(c.x),
           at_address<const bf16>(c.w), at_address<const bf16>(c.bias), at_address<bf16>(c.out), c.N, c.K);
}
