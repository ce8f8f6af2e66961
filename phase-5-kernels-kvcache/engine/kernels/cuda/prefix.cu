// verify_prefix and verify_greedy: the longest prefix of a draft that the target would have written itself, straight
// from the logits: a block looks for the highest of a vocabulary, of equal ones the first; then a warp counts.
#include "choice.cuh"
#include "ops.h"

namespace {

constexpr int THREADS = 512, AT_ONCE = 4;

template <class T> __global__ void __launch_bounds__(THREADS) highest(const T* scores, int64_t stride, int V, int64_t* out) {
    __shared__ Best space[THREADS / 32];
    scores += int64_t(blockIdx.x) * stride;
    Best best = Best::none();
    for (int first = threadIdx.x; first < V; first += THREADS * AT_ONCE) {
        float x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int at = first + i * THREADS;
            x[i] = at < V ? to_float(scores[at]) : -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i * THREADS < V) best.offer(x[i], first + i * THREADS);
    }
    best = block_best(best, space);
    if (threadIdx.x == 0) out[blockIdx.x] = best.index < V ? best.index : 0;
}

// draft [R, K], choices [R, K + 1]; `following` may be null.
__global__ void __launch_bounds__(32)
count(const int64_t* draft, const int64_t* choices, const int64_t* widths, int64_t* accepted, int64_t* following, int K) {
    int64_t r = blockIdx.x;
    int stands = 0x7fffffff, width = int(min(widths[r], int64_t(K)));
    for (int k = threadIdx.x; k < K; k += 32)
        if (k >= width || draft[r * K + k] != choices[r * (K + 1) + k]) stands = min(stands, k);
    for (int by = 16; by; by /= 2) stands = min(stands, __shfl_xor_sync(~0u, stands, by));
    stands = min(stands, K);
    if (threadIdx.x != 0) return;
    accepted[r] = stands;
    if (following) following[r] = choices[r * (K + 1) + stands];
}

}  // namespace

void choices(int format, int64_t scores, int64_t stride, int64_t rows, int64_t V, int64_t out, int64_t stream) {
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        launch(highest<T>, dim3(rows), THREADS, 0, stream, at_address<const T>(scores), stride, V, at_address<int64_t>(out));
    });
}

void prefix(int64_t draft, int64_t choices, int64_t widths, int64_t accepted, int64_t following, int R, int K,
            int64_t stream) {
    launch(count, dim3(R), 32, 0, stream, at_address<const int64_t>(draft), at_address<const int64_t>(choices),
           at_address<const int64_t>(widths), at_address<int64_t>(accepted), at_address<int64_t>(following), K);
}
