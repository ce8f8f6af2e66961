// Rung 2, coalesced: the features of a key are read by neighbouring threads.
//
// Four keys per block, a thread per feature, sums by halves in shared memory. Values were read in order before: a thread
// per feature there. The softmax has a block per head now. Scores still go through global memory, three times.
#include "device.cuh"
#include "ladder.h"

constexpr int KEYS = 4, THREADS = 256;

static __global__ void scores(const bf16* query, const bf16* keys, float* out, int H, int HK, int D, int n, int64_t slots) {
    __shared__ float sums[KEYS * 128];
    int d = threadIdx.x % D, key = threadIdx.x / D, p = blockIdx.x * KEYS + key, h = blockIdx.y;
    float x = p < n ? to_float(query[h * D + d]) * to_float(keys[(h / (H / HK) * slots + p) * D + d]) : 0.0f;
    sums[threadIdx.x] = x;
    __syncthreads();
    for (int half = D / 2; half; half /= 2) {
        if (d < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (d == 0 && p < n) out[int64_t(h) * n + p] = sums[threadIdx.x] / sqrtf(float(D));
}

static __global__ void softmax(float* scores, int n) {
    __shared__ float sums[THREADS];
    float* mine = scores + int64_t(blockIdx.x) * n;
    int t = threadIdx.x;
    float top = -INFINITY, total = 0;
    for (int p = t; p < n; p += THREADS) top = fmaxf(top, mine[p]);
    sums[t] = top;
    __syncthreads();
    for (int half = THREADS / 2; half; half /= 2) {
        if (t < half) sums[t] = fmaxf(sums[t], sums[t + half]);
        __syncthreads();
    }
    top = sums[0];
    __syncthreads();
    for (int p = t; p < n; p += THREADS) total += expf(mine[p] - top);
    sums[t] = total;
    __syncthreads();
    for (int half = THREADS / 2; half; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
        __syncthreads();
    }
    for (int p = t; p < n; p += THREADS) mine[p] = expf(mine[p] - top) / sums[0];
}

static __global__ void mix(const float* weights, const bf16* values, bf16* out, int H, int HK, int D, int n, int64_t slots) {
    int d = threadIdx.x, h = blockIdx.x;
    float sum = 0;
    for (int p = 0; p < n; p++)
        sum += weights[int64_t(h) * n + p] * to_float(values[(h / (H / HK) * slots + p) * D + d]);
    out[h * D + d] = from_float<bf16>(sum);
}

void attention_2(const AttentionRung& c, int64_t stream) {
    float* space = at_address<float>(c.scratch);
    launch(scores, dim3(blocks_of(c.n, KEYS), c.H), KEYS * c.D, 0, stream, at_address<const bf16>(c.query),
           at_address<const bf16>(c.keys), space, c.H, c.HK, c.D, c.n, c.slots);
    launch(softmax, dim3(c.H), THREADS, 0, stream, space, c.n);
    launch(mix, dim3(c.H), c.D, 0, stream, space, at_address<const bf16>(c.values), at_address<bf16>(c.out), c.H, c.HK, c.D,
           c.n, c.slots);
}
