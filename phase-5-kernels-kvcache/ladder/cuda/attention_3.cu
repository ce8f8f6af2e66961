// Rung 3, shared memory and shuffles: one kernel, and scores that never leave the chip.
//
// A block has a head. A warp takes a key, lanes its features, and adds up by shuffles; the scores of all keys wait in
// shared memory, which ends at about 55,000 of them. For the values, groups of D threads take every so-manyeth key.
#include "device.cuh"
#include "ladder.h"

constexpr int WARPS = 16, THREADS = WARPS * 32;

static __global__ void kernel(const bf16* query, const bf16* keys, const bf16* values, bf16* out, int H, int HK, int D, int n, int64_t slots) {
    DYNAMIC_SHARED(memory);
    __shared__ float space[WARPS];
    float* scores = reinterpret_cast<float*>(memory);  // [n], then [THREADS]
    float* mixed = scores + n;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = blockIdx.x;
    int64_t base = h / (H / HK) * slots * D;
    float q[4];
    for (int i = 0; i < D / 32; i++) q[i] = to_float(query[h * D + i * 32 + lane]) / sqrtf(float(D));
    float top = -INFINITY, total = 0;
    for (int p = warp; p < n; p += WARPS) {
        float sum = 0;
        for (int i = 0; i < D / 32; i++) sum += q[i] * to_float(keys[base + int64_t(p) * D + i * 32 + lane]);
        sum = warp_sum(sum);
        if (lane == 0) scores[p] = sum;
        top = fmaxf(top, sum);
    }
    top = block_max(top, space);
    for (int p = threadIdx.x; p < n; p += THREADS) {
        scores[p] = expf(scores[p] - top);
        total += scores[p];
    }
    total = block_sum(total, space);  // its barriers: all scores are there
    int d = threadIdx.x % D, groups = THREADS / D;
    float sum = 0;
    for (int p = threadIdx.x / D; p < n; p += groups) sum += scores[p] * to_float(values[base + int64_t(p) * D + d]);
    mixed[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < D) {
        for (int group = 1; group < groups; group++) sum += mixed[group * D + d];
        out[h * D + d] = from_float<bf16>(sum / total);
    }
}

void attention_3(const AttentionRung& c, int64_t stream) {
    launch(kernel, dim3(c.H), THREADS, sizeof(float) * (c.n + THREADS), stream, at_address<const bf16>(c.query),
           at_address<const bf16>(c.keys), at_address<const bf16>(c.values), at_address<bf16>(c.out), c.H, c.HK, c.D, c.n,
           c.slots);
}
