// Argmax over a block; ties: the lowest index. The result does not depend on the order of threads.
#pragma once

#include "device.cuh"

struct Best {
    float value;
    int index;
    static __device__ __forceinline__ Best none() { return {-INFINITY, 0x7fffffff}; }
    __device__ __forceinline__ void offer(float its, int at) {  // NaN never wins
        if (its > value || (its == value && at < index)) value = its, index = at;
    }
};

// Returns the block's argmax to all threads; `space` holds one entry per warp.
__device__ __forceinline__ Best block_best(Best mine, Best* space) {
    for (int by = 16; by; by /= 2) {
        float value = __shfl_xor_sync(~0u, mine.value, by);
        int index = __shfl_xor_sync(~0u, mine.index, by);
        mine.offer(value, index);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) space[threadIdx.x / 32] = mine;
    __syncthreads();
    Best best = space[0];
    for (int warp = 1; warp < int(blockDim.x / 32); warp++) best.offer(space[warp].value, space[warp].index);
    return best;
}
