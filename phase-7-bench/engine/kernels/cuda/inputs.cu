// embed and advance: the inputs of a forward, formed on the device.
#include "device.cuh"
#include "ops.h"

namespace {

constexpr int THREADS = 128;

// tokens [R, T]: an id, or -1 - j for token j of the row's draft [R, K]. A block copies one row of the table.
template <class T>
__global__ void __launch_bounds__(THREADS)
copy_rows(const int* tokens, const int64_t* draft, const T* table, T* out, int T_, int K, int D) {
    int64_t n = blockIdx.x, id = tokens[n];
    if (id < 0) id = draft[n / T_ * K - 1 - id];
    for (int i = threadIdx.x; i < D; i += THREADS) out[n * D + i] = table[id * D + i];
}

// A thread computes one query of one row; the first of a row also writes its length. lo: [windows, R, W].
__global__ void __launch_bounds__(THREADS)
next(const int* at, const int* counts, const int* windows, int* after, int* positions, int* end, int* lo, int R, int W,
     int N) {
    int i = blockIdx.x * THREADS + threadIdx.x, r = i / W, w = i % W;
    if (r >= R) return;
    int start = at[R + r] + at[2 * R + r], count = counts[r], stop = start + min(w + 1, count);
    if (w == 0) after[r] = at[r], after[R + r] = start, after[2 * R + r] = count;
    positions[i] = max(stop - 1, 0), end[i] = stop;
    for (int n = 0; n < N; n++) lo[n * R * W + i] = max(stop - windows[n], 0);
}

}  // namespace

void embed(int format, int64_t tokens, int64_t draft, int64_t table, int64_t out, int R, int T_, int K, int D,
           int64_t stream) {
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        launch(copy_rows<T>, dim3(R * T_), THREADS, 0, stream, at_address<const int>(tokens), at_address<const int64_t>(draft),
               at_address<const T>(table), at_address<T>(out), T_, K, D);
    });
}

void advance(int64_t at, int64_t counts, int64_t windows, int64_t after, int64_t positions, int64_t end, int64_t lo, int R,
             int W, int N, int64_t stream) {
    launch(next, dim3(blocks_of(int64_t(R) * W, THREADS)), THREADS, 0, stream, at_address<const int>(at),
           at_address<const int>(counts), at_address<const int>(windows), at_address<int>(after),
           at_address<int>(positions), at_address<int>(end), at_address<int>(lo), R, W, N);
}
