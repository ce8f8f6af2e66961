// How matrices are stored, and how 16 bytes of a row become operands of the tensor cores.
//
//     16 bits   in T           8 inputs side by side
//     8 bits    whole numbers  16 inputs side by side; the output's scale multiplies the finished sum
//     4 bits    levels 0 .. 15 of groups: byte j of a group holds inputs j (low four bits) and j + group / 2; 32 inputs
//               in two runs of 16; (level - zero) * scale is formed here, and rounded to T as quantize.py does
#pragma once

#include "mma.cuh"
#include "ops.h"

struct Grid {  // scales, zeros [N, K / group] float16; zeros may be null, and is then 8
    const f16 *scales, *zeros;
};

// Eight numbers in 16 bytes from a row of K, zeros behind its end; ALIGNED: one access.
template <bool ALIGNED, class T> __device__ __forceinline__ uint4 load8(const T* row, int64_t k, int64_t K) {
    static_assert(sizeof(T) == 2, "eight of two bytes");
    if constexpr (ALIGNED) return k < K ? *reinterpret_cast<const uint4*>(row + k) : uint4{0, 0, 0, 0};
    uint32_t words[4] = {0, 0, 0, 0};
    for (int i = 0; i < 8; i++)
        if (k + i < K) words[i / 2] |= uint32_t(bits_as<uint16_t>(row[k + i])) << 16 * (i % 2);
    return uint4{words[0], words[1], words[2], words[3]};
}

// Sixteen bytes from a row of `bytes`.
template <bool ALIGNED> __device__ __forceinline__ uint4 load16(const uint8_t* row, int64_t at, int64_t bytes) {
    if constexpr (ALIGNED) return at < bytes ? *reinterpret_cast<const uint4*>(row + at) : uint4{0, 0, 0, 0};
    uint32_t words[4] = {0, 0, 0, 0};
    for (int i = 0; i < 16; i++)
        if (at + i < bytes) words[i / 4] |= uint32_t(row[at + i]) << 8 * (i % 4);
    return uint4{words[0], words[1], words[2], words[3]};
}

template <int BITS, class T> struct Weights;

// INPUTS: of a unit, which is what a lane loads at once. STEPS: products of 16 inputs that a quad's four units make;
// words 2s and 2s + 1 of `expand` belong to step s, and so do words 2 (s % 2) and the next of x's piece s / 2.
template <class T> struct Weights<16, T> {
    static constexpr int INPUTS = 8, STEPS = 2;
    template <bool ALIGNED>
    static __device__ __forceinline__ uint4 load(const void* values, int64_t n, int64_t unit, int64_t K) {
        return load8<ALIGNED>(static_cast<const T*>(values) + n * K, unit * INPUTS, K);
    }
    static __device__ __forceinline__ int64_t piece(int64_t unit, int, int) { return unit * INPUTS; }
    static __device__ __forceinline__ void expand(uint4 raw, const Grid&, int64_t, int64_t, int64_t, int,
                                                  uint32_t (&words)[2 * STEPS]) {
        words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
    }
};

template <class T> struct Weights<8, T> {
    static constexpr int INPUTS = 16, STEPS = 4;
    template <bool ALIGNED>
    static __device__ __forceinline__ uint4 load(const void* values, int64_t n, int64_t unit, int64_t K) {
        return load16<ALIGNED>(static_cast<const uint8_t*>(values) + n * K, unit * INPUTS, K);
    }
    static __device__ __forceinline__ int64_t piece(int64_t unit, int p, int) { return unit * INPUTS + 8 * p; }
    static __device__ __forceinline__ void expand(uint4 raw, const Grid&, int64_t, int64_t, int64_t, int,
                                                  uint32_t (&words)[2 * STEPS]) {
        widen_int8<T>(raw.x, words[0], words[1]);
        widen_int8<T>(raw.y, words[2], words[3]);
        widen_int8<T>(raw.z, words[4], words[5]);
        widen_int8<T>(raw.w, words[6], words[7]);
    }
};

// The inputs of a unit of 4 bits: from `first` on in its low halves, from first + group / 2 on in the high ones.
__device__ __forceinline__ int64_t first_of_int4(int64_t unit, int bytes, int group) {
    int64_t byte = unit * bytes;
    int half = group / 2;
    return byte / half * group + byte % half;
}

template <class T> struct Weights<4, T> {
    static constexpr int INPUTS = 32, STEPS = 8;
    template <bool ALIGNED>
    static __device__ __forceinline__ uint4 load(const void* values, int64_t n, int64_t unit, int64_t K) {
        return load16<ALIGNED>(static_cast<const uint8_t*>(values) + n * (K / 2), unit * 16, K / 2);
    }
    static __device__ __forceinline__ int64_t piece(int64_t unit, int p, int group) {
        return first_of_int4(unit, 16, group) + p / 2 * (group / 2) + 8 * (p % 2);
    }
    static __device__ __forceinline__ void expand(uint4 raw, const Grid& grid, int64_t n, int64_t unit, int64_t K,
                                                  int group, uint32_t (&words)[2 * STEPS]) {
        constexpr uint32_t MAGIC = std::is_same_v<T, f16> ? 0x64646464u : 0x43434343u;   // 1024 or 128, and a level
        constexpr uint32_t MIDDLE = std::is_same_v<T, f16> ? 0x64086408u : 0x43084308u;  // and 8
        int64_t at = n * (K / group) + unit * INPUTS / group;
        bool inside = unit * INPUTS < K;
        float scale = inside ? to_float(grid.scales[at]) : 0.0f;
        uint32_t high, low;
        split<T>(scale, high, low);
        uint32_t raws[4] = {raw.x, raw.y, raw.z, raw.w};
        float shift = grid.zeros && inside ? 8.0f - to_float(grid.zeros[at]) : 0.0f;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            uint32_t levels = (s < 4 ? raws[s % 4] : raws[s % 4] >> 4) & 0x0f0f0f0fu;
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                uint32_t q = sub2<T>(choose_bytes(levels, MAGIC, pair ? 0x4342 : 0x4140), MIDDLE);  // level - 8, exact
                if (grid.zeros)
                    q = pack<T>((low_of<T>(q) + shift) * scale, (high_of<T>(q) + shift) * scale);
                else if (std::is_same_v<T, f16>)
                    q = mul2<T>(q, high);
                else
                    q = fma2<T>(q, high, mul2<T>(q, low));
                words[2 * s + pair] = q;
            }
        }
    }
};
