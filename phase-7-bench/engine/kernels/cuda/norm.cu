// rms_norm and add_rms_norm: one block per row, so a row's bits do not depend on other rows.
#include "device.cuh"
#include "ops.h"

namespace {

constexpr int THREADS = 256;

template <class T, bool ADD>
__global__ void __launch_bounds__(THREADS)
norm(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t x_stride, int64_t r_stride, int D, float eps) {
    __shared__ float space[THREADS / 32];
    int64_t row = blockIdx.x;
    x += row * x_stride;
    residual += row * r_stride;
    out += row * D;
    total += row * D;
    float sum = 0;
    for (int i = threadIdx.x; i < D; i += THREADS) {
        float wide = to_float(x[i]);
        if (ADD) {
            T stored = from_float<T>(wide + to_float(residual[i]));
            total[i] = stored;
            wide = to_float(stored);  // normalise the rounded sum
        }
        sum += wide * wide;
    }
    sum = block_sum(sum, space);
    float scale = 1.0f / sqrtf(sum / D + eps);
    for (int i = threadIdx.x; i < D; i += THREADS) {
        float wide = to_float(ADD ? total[i] : x[i]);  // each thread reads what it wrote itself
        out[i] = from_float<T>(wide * scale * to_float(weight[i]));
    }
}

}  // namespace

void rms_norm(int format, int64_t x, int64_t residual, int64_t weight, int64_t out, int64_t total, int64_t rows, int D,
              int64_t x_stride, int64_t r_stride, float eps, int64_t stream) {
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        auto kernel = residual ? norm<T, true> : norm<T, false>;
        launch(kernel, dim3(rows), THREADS, 0, stream, at_address<const T>(x), at_address<const T>(residual),
               at_address<const T>(weight), at_address<T>(out), at_address<T>(total), x_stride, r_stride, D, eps);
    });
}
