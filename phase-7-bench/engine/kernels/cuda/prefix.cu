// verify_prefix and verify_greedy: the longest prefix of a draft that equals the target's argmax tokens, computed from
// the logits. A block finds the argmax of 8,192 scores (ties: the lowest id); a second kernel finds the best of the
// blocks; a third counts accepted tokens.
#include "choice.cuh"
#include "ops.h"

namespace {

constexpr int THREADS = 512, AT_ONCE = 8, PART = 8192;

// The argmax of part blockIdx.y of a row; written to `found` [rows, parts], or to `out` if there is a single part.
template <class T>
__global__ void __launch_bounds__(THREADS) highest(const T* scores, int64_t stride, int V, Best* found, int64_t* out) {
    __shared__ Best space[THREADS / 32];
    scores += int64_t(blockIdx.x) * stride;
    int begin = blockIdx.y * PART, end = min(begin + PART, V);
    Best best = Best::none();
    for (int first = begin + threadIdx.x; first < end; first += THREADS * AT_ONCE) {
        float x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = first + i * THREADS < end ? to_float(scores[first + i * THREADS]) : -INFINITY;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i * THREADS < end) best.offer(x[i], first + i * THREADS);
    }
    best = block_best(best, space);
    if (threadIdx.x != 0) return;
    if (gridDim.y == 1)
        out[blockIdx.x] = best.index < V ? best.index : 0;
    else
        found[int64_t(blockIdx.x) * gridDim.y + blockIdx.y] = best;
}

__global__ void __launch_bounds__(32) pick(const Best* found, int parts, int V, int64_t* out) {
    Best best = Best::none();
    for (int part = threadIdx.x; part < parts; part += 32) {
        Best its = found[int64_t(blockIdx.x) * parts + part];
        best.offer(its.value, its.index);
    }
    for (int by = 16; by; by /= 2) {
        float value = __shfl_xor_sync(~0u, best.value, by);
        int index = __shfl_xor_sync(~0u, best.index, by);
        best.offer(value, index);
    }
    if (threadIdx.x == 0) out[blockIdx.x] = best.index < V ? best.index : 0;
}

// draft [R, K], choices [R, K + 1].
__global__ void __launch_bounds__(32)
count(const int64_t* draft, const int64_t* choices, const int64_t* widths, int64_t* accepted, int64_t* following, int K) {
    int64_t r = blockIdx.x;
    int first_rejected = 0x7fffffff, width = int(min(widths[r], int64_t(K)));
    for (int k = threadIdx.x; k < K; k += 32)
        if (k >= width || draft[r * K + k] != choices[r * (K + 1) + k]) first_rejected = min(first_rejected, k);
    for (int by = 16; by; by /= 2) first_rejected = min(first_rejected, __shfl_xor_sync(~0u, first_rejected, by));
    first_rejected = min(first_rejected, K);
    if (threadIdx.x != 0) return;
    accepted[r] = first_rejected;
    following[r] = choices[r * (K + 1) + first_rejected];
}

}  // namespace

int choice_parts(int64_t V) { return blocks_of(V, PART); }

void choices(int format, int64_t scores, int64_t stride, int64_t rows, int64_t V, int64_t found, int64_t out,
             int64_t stream) {
    int parts = choice_parts(V);
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        launch(highest<T>, dim3(rows, parts), THREADS, 0, stream, at_address<const T>(scores), stride, V,
               at_address<Best>(found), at_address<int64_t>(out));
    });
    if (parts > 1)
        launch(pick, dim3(rows), 32, 0, stream, at_address<const Best>(found), parts, V, at_address<int64_t>(out));
}

void prefix(int64_t draft, int64_t choices, int64_t widths, int64_t accepted, int64_t following, int R, int K,
            int64_t stream) {
    launch(count, dim3(R), 32, 0, stream, at_address<const int64_t>(draft), at_address<const int64_t>(choices),
           at_address<const int64_t>(widths), at_address<int64_t>(accepted), at_address<int64_t>(following), K);
}
