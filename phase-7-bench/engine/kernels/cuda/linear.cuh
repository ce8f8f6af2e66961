// `linear` for a few rows of x. A decoding step reads every weight once with little arithmetic, so memory bandwidth is
// the limit.
//
// A block computes 16 outputs; its 8 warps share the inputs, in runs of four chunks that begin at fixed positions.
// Weights are the 16 x 16 operand of the tensor cores, rows of x the 16 x 8 one. Weights are loaded from global memory
// to registers in accesses of 16 bytes, without shared memory; missing rows of x are zeros. The order of a sum depends
// only on the shape of the matrix, so a row has the same bits in any batch.
#pragma once

#include "weights.cuh"

namespace linear_kernel {

constexpr int WARPS = 8, RUN = 4;  // consecutive chunks of a warp

template <class T> struct Call {
    const T* x;
    int64_t x_stride;
    int M;
    const void* values;
    Grid grid;
    const f16* factor;
    const void* bias;
    int bias_format, shift;  // int4: a group has 1 << shift inputs
    int64_t columns, K, inner;  // outputs (gated: pairs), inputs, chunks of a part
    float* sums;                // of the parts; null for one part
    T* out;
};

__device__ __forceinline__ float any_float(const void* numbers, int format, int64_t at) {
    if (format == FLOAT32) return static_cast<const float*>(numbers)[at];
    if (format == BFLOAT16) return to_float(static_cast<const bf16*>(numbers)[at]);
    return to_float(static_cast<const f16*>(numbers)[at]);
}

// Apply the int8 scale and the bias to a sum.
template <class T, int BITS> __device__ __forceinline__ float finished(const Call<T>& call, float sum, int64_t n) {
    if (BITS == 8) sum = multiply(sum, to_float(call.grid.scales[n]));
    if (call.bias) sum = add(sum, any_float(call.bias, call.bias_format, n));
    return sum;
}

__device__ __forceinline__ float silu(float x) { return divide(x, 1.0f + expf(-x)); }

template <class T> __device__ __forceinline__ uint4 times_factor(uint4 x, const f16* factor, int64_t k, int64_t K) {
    if (!factor) return x;
    uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float first = k + 2 * i < K ? to_float(factor[k + 2 * i]) : 0.0f;
        float second = k + 2 * i + 1 < K ? to_float(factor[k + 2 * i + 1]) : 0.0f;
        words[i] = mul2<T>(words[i], pack<T>(first, second));
    }
    return uint4{words[0], words[1], words[2], words[3]};
}

// NT: tiles of 8 rows of x. HALVES: 2 if gated; the two outputs of a pair are `columns` apart.
template <class T, int BITS, int NT, int HALVES, bool ALIGNED>
__global__ void __launch_bounds__(WARPS * 32, NT > 2 ? 1 : 2) linear(Call<T> call) {
    using W = Weights<BITS, T>;
    constexpr int TOKENS = 8 * NT;
    // Chunks whose weights are loaded at once, limited by registers.
    constexpr int TOGETHER = NT > 2 || (HALVES == 2 && BITS == 4) ? 1 : HALVES == 2 || BITS == 4 ? 2 : 4;
    DYNAMIC_SHARED(memory);
    float* space = reinterpret_cast<float*>(memory);  // [HALVES, WARPS, TOKENS, 16]
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int64_t n0 = int64_t(blockIdx.y) * 16, m0 = int64_t(blockIdx.x) * TOKENS;
    int64_t K = call.K, chunks = blocks_of(K, 4 * W::INPUTS);
    int64_t first = int64_t(blockIdx.z) * call.inner, last = min(first + call.inner, chunks);
    int64_t row[HALVES][2];  // padding outputs repeat the last one
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int i = 0; i < 2; i++) row[half][i] = half * call.columns + min(n0 + g + 8 * i, call.columns - 1);

    float acc[HALVES][NT][4] = {};
    for (int64_t run = first + warp * RUN; run < last; run += WARPS * RUN) {
#pragma unroll
        for (int part = 0; part < RUN; part += TOGETHER) {
            uint4 raw[TOGETHER][HALVES][2];
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                int64_t chunk = run + part + c, unit = chunk * 4 + t;
#pragma unroll
                for (int half = 0; half < HALVES; half++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        raw[c][half][i] = chunk < last
                                              ? W::template load<ALIGNED>(call.values, row[half][i], unit, K)
                                              : uint4{0, 0, 0, 0};
            }
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                int64_t chunk = run + part + c, unit = chunk * 4 + t;
                if (chunk >= last) break;
                bool inside = unit * W::INPUTS < K;
                Group group[HALVES][2];
#pragma unroll
                for (int half = 0; half < HALVES; half++)
#pragma unroll
                    for (int i = 0; i < 2; i++) group[half][i] = W::group(call.grid, row[half][i], unit, K, call.shift);
#pragma unroll
                for (int p = 0; p < W::PIECES; p++) {
                    uint32_t words[HALVES][2][4];
#pragma unroll
                    for (int half = 0; half < HALVES; half++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            W::expand(raw[c][half][i], p, call.grid.zeros, group[half][i], words[half][i]);
                    int64_t k = W::piece(unit, p, call.shift);
#pragma unroll
                    for (int tile = 0; tile < NT; tile++) {
                        int64_t m = m0 + tile * 8 + g;
                        uint4 x{0, 0, 0, 0};
                        if (m < call.M && inside)
                            x = times_factor<T>(load8<ALIGNED>(call.x + m * call.x_stride, k, K), call.factor, k, K);
                        uint32_t both[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
                        for (int s = 0; s < 2; s++)
#pragma unroll
                            for (int half = 0; half < HALVES; half++) {
                                uint32_t a[4] = {words[half][0][2 * s], words[half][1][2 * s], words[half][0][2 * s + 1],
                                                 words[half][1][2 * s + 1]};
                                mma<T>(acc[half][tile], a, both[s]);
                            }
                    }
                }
            }
        }
    }

#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int tile = 0; tile < NT; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                space[((half * WARPS + warp) * TOKENS + tile * 8 + 2 * t + i % 2) * 16 + g + 8 * (i / 2)] = acc[half][tile][i];
    __syncthreads();
    for (int e = threadIdx.x; e < TOKENS * 16; e += WARPS * 32) {
        int64_t m = m0 + e / 16, n = n0 + e % 16;
        if (m >= call.M || n >= call.columns) continue;
        float sum[HALVES] = {};
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum[half] += space[(half * WARPS + w) * TOKENS * 16 + e];
        if (call.sums) {
            call.sums[(int64_t(blockIdx.z) * call.M + m) * call.columns + n] = sum[0];
            continue;
        }
        float y = finished<T, BITS>(call, sum[0], n);
        if (HALVES == 2) y = multiply(silu(y), finished<T, BITS>(call, sum[HALVES - 1], n + call.columns));
        call.out[m * call.columns + n] = from_float<T>(y);
    }
}

// Add the parts of split inputs, in order.
template <class T, int BITS> __global__ void add_up(Call<T> call, int parts) {
    int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, all = call.M * call.columns;
    if (at >= all) return;
    float sum = 0;
    for (int part = 0; part < parts; part++) sum += call.sums[part * all + at];
    call.out[at] = from_float<T>(finished<T, BITS>(call, sum, at % call.columns));
}

template <class T, int BITS, int NT, int HALVES, bool ALIGNED>
void start(const Call<T>& call, int parts, int64_t stream) {
    dim3 grid(blocks_of(call.M, 8 * NT), blocks_of(call.columns, 16), parts);
    size_t shared = sizeof(float) * HALVES * WARPS * 8 * NT * 16;
    launch(linear<T, BITS, NT, HALVES, ALIGNED>, grid, WARPS * 32, shared, stream, call);
}

inline int log_2(int group) {
    int shift = 0;
    while (2 << shift <= group) shift++;
    return shift;
}

template <class T, int BITS>
void run(int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int parts, int64_t sums, int64_t out,
         int64_t stream) {
    using W = Weights<BITS, T>;
    int64_t chunks = blocks_of(matrix.K, 4 * W::INPUTS);
    Grid grid{at_address<const bf16>(matrix.scales), at_address<const f16>(matrix.zeros)};
    Call<T> call{at_address<const T>(x), x_stride, M, at_address<const void>(matrix.values), grid,
                 at_address<const f16>(matrix.factor), at_address<const void>(matrix.bias), matrix.bias_format,
                 log_2(matrix.group), gated ? matrix.N / 2 : matrix.N, matrix.K, blocks_of(blocks_of(chunks, parts), RUN) * RUN,
                 parts > 1 ? at_address<float>(sums) : nullptr, at_address<T>(out)};
    if (!M || !call.columns) return;
    bool aligned = x % 16 == 0 && x_stride % 8 == 0 && matrix.values % 16 == 0 && matrix.K % W::INPUTS == 0;
    if (gated)
        !aligned ? start<T, BITS, 2, 2, false>(call, parts, stream)
        : M <= 8 ? start<T, BITS, 1, 2, true>(call, parts, stream)
                 : start<T, BITS, 2, 2, true>(call, parts, stream);
    else
        !aligned  ? start<T, BITS, 2, 1, false>(call, parts, stream)
        : M <= 8  ? start<T, BITS, 1, 1, true>(call, parts, stream)
        : M <= 32 ? start<T, BITS, 2, 1, true>(call, parts, stream)
                  : start<T, BITS, 8, 1, true>(call, parts, stream);
    if (parts > 1)
        launch(add_up<T, BITS>, dim3(blocks_of(M * call.columns, 256)), 256, 0, stream, call, parts);
}

}  // namespace linear_kernel

void linear_16(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int parts, int64_t sums,
               int64_t out, int64_t stream);
void linear_8(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int parts, int64_t sums,
              int64_t out, int64_t stream);
void linear_4(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int parts, int64_t sums,
              int64_t out, int64_t stream);

// Each of the three has its own file, so that they compile in parallel.
#define LINEAR_OF(BITS)                                                                                               \
    void linear_##BITS(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int parts,    \
                       int64_t sums, int64_t out, int64_t stream) {                                                    \
        auto run = format == BFLOAT16 ? linear_kernel::run<bf16, BITS> : linear_kernel::run<f16, BITS>;                \
        run(x, x_stride, M, matrix, gated, parts, sums, out, stream);                                                  \
    }
