// `linear` without tensor cores: a warp computes one output, in float32.
//
// Used for float32, and as the bench's baseline for the padding of the tensor cores: a single row needs no tile of
// eight. Every row of x has its own sum, so its bits do not depend on other rows.
#include "linear.cuh"

namespace {

constexpr int WARPS = 4, EACH = 8;  // inputs per load of a lane

template <class T, int BITS> struct Loaded {
    float w[EACH];
    int64_t k[2];  // indices of the first four and of the last four inputs
};

template <class T, int BITS>
__device__ __forceinline__ void load(Loaded<T, BITS>& to, const linear_kernel::Call<T>& call, int64_t n, int64_t unit) {
    int64_t K = call.K;
    to.k[0] = unit * EACH, to.k[1] = unit * EACH + 4;
    if constexpr (BITS == 4) {
        to.k[0] = first_of_int4(unit, 4, call.shift);
        to.k[1] = to.k[0] + (1 << (call.shift - 1));
        int64_t at = n * (K >> call.shift) + (unit * EACH >> call.shift);
        float scale = to_float(call.grid.scales[at]), zero = call.grid.zeros ? to_float(call.grid.zeros[at]) : 8.0f;
        uint32_t word = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(call.values) + n * (K / 2) + unit * 4);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint32_t level = word >> (8 * (i % 4) + 4 * (i / 4)) & 15;
            to.w[i] = to_float(from_float<T>((float(level) - zero) * scale));
        }
    } else {
        using Stored = std::conditional_t<BITS == 8, int8_t, T>;
        const Stored* row = static_cast<const Stored*>(call.values) + n * K;
        if constexpr (sizeof(Stored) * EACH >= 16)
            if (K * sizeof(Stored) % 16 == 0 && unit * EACH + EACH <= K) {
                alignas(16) Stored each[EACH];
#pragma unroll
                for (int i = 0; i < int(sizeof each / 16); i++)
                    reinterpret_cast<uint4*>(each)[i] = reinterpret_cast<const uint4*>(row + unit * EACH)[i];
#pragma unroll
                for (int i = 0; i < EACH; i++) to.w[i] = to_float(each[i]);
                return;
            }
#pragma unroll
        for (int i = 0; i < EACH; i++) to.w[i] = unit * EACH + i < K ? to_float(row[unit * EACH + i]) : 0.0f;
    }
}

template <class T, int BITS, int ROWS, int HALVES>
__global__ void __launch_bounds__(WARPS * 32) by_rows(linear_kernel::Call<T> call) {
    int lane = threadIdx.x % 32;
    int64_t n = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, m0 = int64_t(blockIdx.y) * ROWS;
    if (n >= call.columns) return;
    float acc[HALVES][ROWS] = {};
    for (int64_t unit = lane; unit * EACH < call.K; unit += 32) {
        Loaded<T, BITS> weights[HALVES];
#pragma unroll
        for (int half = 0; half < HALVES; half++) load(weights[half], call, n + half * call.columns, unit);
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            if (m0 + m >= call.M) break;
            const T* x = call.x + (m0 + m) * call.x_stride;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int64_t k = weights[0].k[i / 4] + i % 4;
                float of_x = k < call.K ? to_float(x[k]) : 0.0f;
                if (call.factor && k < call.K)
                    of_x = to_float(from_float<T>(of_x * to_float(from_float<T>(to_float(call.factor[k])))));
#pragma unroll
                for (int half = 0; half < HALVES; half++) acc[half][m] = fmaf(weights[half].w[i], of_x, acc[half][m]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        float sum[HALVES];
#pragma unroll
        for (int half = 0; half < HALVES; half++) sum[half] = warp_sum(acc[half][m]);
        if (lane != 0 || m0 + m >= call.M) continue;
        float y = linear_kernel::finished<T, BITS>(call, sum[0], n);
        if (HALVES == 2)
            y = multiply(linear_kernel::silu(y), linear_kernel::finished<T, BITS>(call, sum[HALVES - 1], n + call.columns));
        call.out[(m0 + m) * call.columns + n] = from_float<T>(y);
    }
}

template <class T, int BITS>
void run(int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int64_t out, int64_t stream) {
    Grid grid{at_address<const bf16>(matrix.scales), at_address<const f16>(matrix.zeros)};
    linear_kernel::Call<T> call{at_address<const T>(x), x_stride, M, at_address<const void>(matrix.values), grid,
                                at_address<const f16>(matrix.factor), at_address<const void>(matrix.bias),
                                matrix.bias_format, linear_kernel::log_2(matrix.group), gated ? matrix.N / 2 : matrix.N, matrix.K, 0, nullptr,
                                at_address<T>(out)};
    auto one = gated ? by_rows<T, BITS, 1, 2> : by_rows<T, BITS, 1, 1>;
    auto four = gated ? by_rows<T, BITS, 4, 2> : by_rows<T, BITS, 4, 1>;
    int rows = M == 1 ? 1 : 4;
    launch(M == 1 ? one : four, dim3(blocks_of(call.columns, WARPS), blocks_of(M, rows)), WARPS * 32, 0, stream, call);
}

}  // namespace

void linear_rows(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int64_t out,
                 int64_t stream) {
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        auto chosen = matrix.bits == 8 ? run<T, 8> : matrix.bits == 4 ? run<T, 4> : run<T, 16>;
        chosen(x, x_stride, M, matrix, gated, out, stream);
    });
}

void linear(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int parts, int64_t sums,
            int64_t out, int64_t stream) {
    auto chosen = matrix.bits == 8 ? linear_8 : matrix.bits == 4 ? linear_4 : linear_16;
    chosen(format, x, x_stride, M, matrix, gated, parts, sums, out, stream);
}
