// Rung 5, split: the warps of a block share the inputs of its outputs.
//
// A warp of rung 4 walks a whole row, and the last rows end late: of a matrix with few outputs there are too few warps.
// Here a block has four outputs and eight warps, each with an eighth of the inputs, and every 16 bytes of x that a lane
// holds meet four rows. What the engine uses (engine/kernels/cuda/linear.cuh) does this with the tensor cores, for 16
// outputs and up to 16 rows of x at once.
#include "device.cuh"
#include "mma.cuh"
#include "ladder.h"

constexpr int WARPS = 8, OUTPUTS = 4;

static __global__ void __launch_bounds__(WARPS * 32) kernel(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int N, int K) {
    __shared__ float sums[WARPS][OUTPUTS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = K / 8;
    int64_t n0 = int64_t(blockIdx.x) * OUTPUTS;
    float sum[OUTPUTS] = {};
    for (int unit = warp * 32 + lane; unit < units; unit += WARPS * 32) {
        uint4 loaded[OUTPUTS];
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++)
            loaded[i] = reinterpret_cast<const uint4*>(w + min(n0 + i, int64_t(N - 1)) * K)[unit];
        uint4 of_x = reinterpret_cast<const uint4*>(x)[unit];
        uint32_t xs[4] = {of_x.x, of_x.y, of_x.z, of_x.w};
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) {
            uint32_t ws[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum[i] += low_of<bf16>(xs[j]) * low_of<bf16>(ws[j]) + high_of<bf16>(xs[j]) * high_of<bf16>(ws[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
        sum[i] = warp_sum(sum[i]);
        if (lane == 0) sums[warp][i] = sum[i];
    }
    __syncthreads();
    if (threadIdx.x < OUTPUTS && n0 + threadIdx.x < N) {
        float total = 0;
        for (int i = 0; i < WARPS; i++) total += sums[i][threadIdx.x];
        out[n0 + threadIdx.x] = from_float<bf16>(total + to_float(bias[n0 + threadIdx.x]));
    }
}

void linear_5(const LinearRung& c, int64_t stream) {
    launch(kernel, dim3(blocks_of(c.N, OUTPUTS)), WARPS * 32, 0, stream, at_address<const bf16>(c.x),
           at_address<const bf16>(c.w), at_address<const bf16>(c.bias), at_address<bf16>(c.out), c.N, c.K);
}
