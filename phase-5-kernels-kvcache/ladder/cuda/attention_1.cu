// Rung 1, naive: scores, softmax and mixture as they stand in the formula, a kernel each, through global memory.
//
// A thread per score reads a key of its own, two bytes at a time; a thread per head makes the softmax all alone.
#include "device.cuh"
#include "ladder.h"

static __global__ void scores(const bf16* query, const bf16* keys, float* out, int H, int HK, int D, int n, int64_t slots) {
    int p = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y;
    if (p >= n) return;
    const bf16* key = keys + (h / (H / HK) * slots + p) * D;
    float sum = 0;
    for (int d = 0; d < D; d++) sum += to_float(query[h * D + d]) * to_float(key[d]);
    out[int64_t(h) * n + p] = sum / sqrtf(float(D));
}

static __global__ void softmax(float* scores, int H, int n) {
    int h = blockIdx.x * blockDim.x + threadIdx.x;
    if (h >= H) return;
    float *mine = scores + int64_t(h) * n, top = mine[0], total = 0;
    for (int p = 1; p < n; p++) top = fmaxf(top, mine[p]);
    for (int p = 0; p < n; p++) total += expf(mine[p] - top);
    for (int p = 0; p < n; p++) mine[p] = expf(mine[p] - top) / total;
}

static __global__ void mix(const float* weights, const bf16* values, bf16* out, int H, int HK, int D, int n, int64_t slots) {
    int d = threadIdx.x, h = blockIdx.x;
    float sum = 0;
    for (int p = 0; p < n; p++)
        sum += weights[int64_t(h) * n + p] * to_float(values[(h / (H / HK) * slots + p) * D + d]);
    out[h * D + d] = from_float<bf16>(sum);
}

void attention_1(const AttentionRung& c, int64_t stream) {
    float* space = at_address<float>(c.scratch);
    launch(scores, dim3(blocks_of(c.n, 128), c.H), 128, 0, stream, at_address<const bf16>(c.query),
           at_address<const bf16>(c.keys), space, c.H, c.HK, c.D, c.n, c.slots);
    launch(softmax, dim3(blocks_of(c.H, 32)), 32, 0, stream, space, c.H, c.n);
    launch(mix, dim3(c.H), c.D, 0, stream, space, at_address<const bf16>(c.values), at_address<bf16>(c.out), c.H, c.HK, c.D,
           c.n, c.slots);
}
