// Number formats, conversions and launches, for all kernels. Compiled by nvcc for a GPU, or with EMULATED by any C++
// compiler for tests (emulator.h). All differences between the two are in this file and in mma.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Number formats; kernels.py has the same values.
enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

#ifdef EMULATED
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
#else
using bf16 = __nv_bfloat16;
using f16 = __half;
#endif

// Reinterpret bits as another type of the same size.
template <class To, class From> __device__ __forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class T> __device__ __forceinline__ float to_float(T x);
template <> __device__ __forceinline__ float to_float(float x) { return x; }
template <> __device__ __forceinline__ float to_float(int8_t x) { return x; }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }

#ifdef EMULATED
template <> inline float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
template <> inline float to_float(f16 x) { return bits_as<_Float16>(x.bits); }
template <> inline bf16 from_float(float x) {
    uint32_t bits = bits_as<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <> inline f16 from_float(float x) { return {bits_as<uint16_t>(_Float16(x))}; }
inline float divide(float a, float b) { return a / b; }
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float power_of_2(float x) { return std::exp2(x); }
inline float round_even(float x) { return std::nearbyint(x); }
inline uint32_t as_bits(float x) { return bits_as<uint32_t>(x); }
#else
template <> __device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <> __device__ __forceinline__ bf16 from_float(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float(float x) { return __float2half_rn(x); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
// Never contracted to an fma: a compiler might do that in one kernel, but not in its variant for more rows.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
__device__ __forceinline__ float round_even(float x) { return rintf(x); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }
#endif

// Two numbers of 16 bits in a word, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
    return bits_as<uint16_t>(from_float<T>(low)) | uint32_t(bits_as<uint16_t>(from_float<T>(high))) << 16;
}
template <class T> __device__ __forceinline__ float low_of(uint32_t both) {
    return to_float(bits_as<T>(uint16_t(both)));
}
template <class T> __device__ __forceinline__ float high_of(uint32_t both) {
    return to_float(bits_as<T>(uint16_t(both >> 16)));
}

// Dynamic shared memory, aligned for accesses of 16 bytes.
#ifdef EMULATED
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::machine.shared
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// Launch on a stream; throws on an error. An empty grid is not an error.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int64_t stream, Arguments... arguments) {
    if (!grid.x || !grid.y || !grid.z) return;
#ifdef EMULATED
    (void)stream;
    if (shared > emulated::SHARED) throw std::runtime_error("more shared memory than a block has");
    emulated::run(grid, dim3(threads), [=] { kernel(Parameters(arguments)...); });  // by value: it may be recorded
#else
    cudaError_t status = cudaSuccess;
    if (shared > 48 << 10)
        status = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (status == cudaSuccess) {
        kernel<<<grid, threads, shared, reinterpret_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
        status = cudaGetLastError();
    }
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
#endif
}

template <class T> __device__ __host__ __forceinline__ T* at_address(int64_t address) {
    return reinterpret_cast<T*>(address);
}

__device__ __host__ __forceinline__ int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Call body with a value of the C++ type of a floating format: with_float(code, [&](auto zero) {...}).
template <class Do> void with_float(int format, const Do& body) {
    switch (format) {
        case FLOAT32: body(float{}); break;
        case BFLOAT16: body(bf16{}); break;
        case FLOAT16: body(f16{}); break;
        default: throw std::invalid_argument("no such format to compute in: " + std::to_string(format));
    }
}

// The same for the formats of a cache.
template <class Do> void with_stored(int format, const Do& body) {
    if (format == INT8)
        body(int8_t{});
    else
        with_float(format, body);
}

template <class T> __device__ __forceinline__ T warp_sum(T x) {
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int by = 16; by; by /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, by));
    return x;
}

// Returns the sum over a block to all its threads. The order of the sum depends only on the block size. `space` holds
// one number per warp.
template <class T> __device__ __forceinline__ T block_sum(T x, T* space) {
    int lane = threadIdx.x % 32, warps = blocks_of(blockDim.x, 32);
    x = warp_sum(x);
    __syncthreads();  // other warps may still read the old content
    if (lane == 0) space[threadIdx.x / 32] = x;
    __syncthreads();
    T total = space[0];
    for (int warp = 1; warp < warps; warp++) total += space[warp];
    return total;
}

__device__ __forceinline__ float block_max(float x, float* space) {
    int warps = blocks_of(blockDim.x, 32);
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) space[threadIdx.x / 32] = x;
    __syncthreads();
    float most = space[0];
    for (int warp = 1; warp < warps; warp++) most = fmaxf(most, space[warp]);
    return most;
}
