// Storage formats of matrices, and the conversion of 16 bytes of a row to operands of the tensor cores.
//
//     16 bits   T              8 contiguous inputs
//     8 bits    int8           16 contiguous inputs; the sum is multiplied with the output's scale
//     4 bits    levels 0 .. 15 of groups: byte j of a group holds inputs j (low four bits) and j + group / 2; 32 inputs
//               in two runs of 16; (level - zero) * scale is computed here, and rounded to T as in quantize.py
#pragma once

#include "mma.cuh"
#include "ops.h"

struct Grid {  // scales, zeros [N, K / group] of bfloat16 and float16; zeros may be null, and is then 8
    const bf16* scales;
    const f16* zeros;
};

// Load eight numbers (16 bytes) from a row of K, zeros after its end; ALIGNED: one access.
template <bool ALIGNED, class T> __device__ __forceinline__ uint4 load8(const T* row, int64_t k, int64_t K) {
    static_assert(sizeof(T) == 2, "eight of two bytes");
    if constexpr (ALIGNED) return k < K ? *reinterpret_cast<const uint4*>(row + k) : uint4{0, 0, 0, 0};
    uint32_t words[4] = {0, 0, 0, 0};
    for (int i = 0; i < 8; i++)
        if (k + i < K) words[i / 2] |= uint32_t(bits_as<uint16_t>(row[k + i])) << 16 * (i % 2);
    return uint4{words[0], words[1], words[2], words[3]};
}

// Load sixteen bytes from a row of `bytes`.
template <bool ALIGNED> __device__ __forceinline__ uint4 load16(const uint8_t* row, int64_t at, int64_t bytes) {
    if constexpr (ALIGNED) return at < bytes ? *reinterpret_cast<const uint4*>(row + at) : uint4{0, 0, 0, 0};
    uint32_t words[4] = {0, 0, 0, 0};
    for (int i = 0; i < 16; i++)
        if (at + i < bytes) words[i / 4] |= uint32_t(row[at + i]) << 8 * (i % 4);
    return uint4{words[0], words[1], words[2], words[3]};
}

// The shared scale of a unit's weights; int4: the scale as two numbers of T, or, with zeros, as float32 and 8 - zero.
struct Group {
    uint32_t first, second;
};

template <int BITS, class T> struct Weights;

// A lane loads a unit of INPUTS inputs at once. A quad's four units give PIECES times two products of 16 inputs.
// `expand` returns the operands of piece p, two words for each product; the matching eight numbers of x begin at input
// piece(unit, p).
template <class T> struct Weights<16, T> {
    static constexpr int INPUTS = 8, PIECES = 1;
    template <bool ALIGNED>
    static __device__ __forceinline__ uint4 load(const void* values, int64_t n, int64_t unit, int64_t K) {
        return load8<ALIGNED>(static_cast<const T*>(values) + n * K, unit * INPUTS, K);
    }
    static __device__ __forceinline__ int64_t piece(int64_t unit, int, int) { return unit * INPUTS; }
    static __device__ __forceinline__ Group group(const Grid&, int64_t, int64_t, int64_t, int) { return {0, 0}; }
    static __device__ __forceinline__ void expand(uint4 raw, int, bool, const Group&, uint32_t (&words)[4]) {
        words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
    }
};

template <class T> struct Weights<8, T> {
    static constexpr int INPUTS = 16, PIECES = 2;
    template <bool ALIGNED>
    static __device__ __forceinline__ uint4 load(const void* values, int64_t n, int64_t unit, int64_t K) {
        return load16<ALIGNED>(static_cast<const uint8_t*>(values) + n * K, unit * INPUTS, K);
    }
    static __device__ __forceinline__ int64_t piece(int64_t unit, int p, int) { return unit * INPUTS + 8 * p; }
    static __device__ __forceinline__ Group group(const Grid&, int64_t, int64_t, int64_t, int) { return {0, 0}; }
    static __device__ __forceinline__ void expand(uint4 raw, int p, bool, const Group&, uint32_t (&words)[4]) {
        widen_int8<T>(p ? raw.z : raw.x, words[0], words[1]);
        widen_int8<T>(p ? raw.w : raw.y, words[2], words[3]);
    }
};

// The first input of an int4 unit: its low nibbles hold inputs from `first` on, its high nibbles from first + group / 2
// on. A group has 1 << shift inputs: shifts replace slow divisions.
__device__ __forceinline__ int64_t first_of_int4(int64_t unit, int bytes, int shift) {
    int64_t byte = unit * bytes;
    return (byte >> (shift - 1) << shift) + (byte & ((1 << (shift - 1)) - 1));
}

template <class T> struct Weights<4, T> {
    static constexpr int INPUTS = 32, PIECES = 4;
    template <bool ALIGNED>
    static __device__ __forceinline__ uint4 load(const void* values, int64_t n, int64_t unit, int64_t K) {
        return load16<ALIGNED>(static_cast<const uint8_t*>(values) + n * (K / 2), unit * 16, K / 2);
    }
    static __device__ __forceinline__ int64_t piece(int64_t unit, int p, int shift) {
        return first_of_int4(unit, 16, shift) + (p / 2 << (shift - 1)) + 8 * (p % 2);
    }
    static __device__ __forceinline__ Group group(const Grid& grid, int64_t n, int64_t unit, int64_t K, int shift) {
        if (unit * INPUTS >= K) return {0, 0};
        int64_t at = n * (K >> shift) + (unit * INPUTS >> shift);
        float scale = to_float(grid.scales[at]);
        if (grid.zeros) return {as_bits(scale), as_bits(8.0f - to_float(grid.zeros[at]))};
        Group made;
        split<T>(scale, made.first, made.second);
        return made;
    }
    static __device__ __forceinline__ void expand(uint4 raw, int p, bool zeros, const Group& group, uint32_t (&words)[4]) {
        constexpr uint32_t MAGIC = std::is_same_v<T, f16> ? 0x64646464u : 0x43434343u;   // 1024 or 128, and a level
        constexpr uint32_t MIDDLE = std::is_same_v<T, f16> ? 0x64086408u : 0x43084308u;  // and 8
        uint32_t both[2] = {p % 2 ? raw.z : raw.x, p % 2 ? raw.w : raw.y};
#pragma unroll
        for (int s = 0; s < 2; s++) {
            uint32_t levels = (p / 2 ? both[s] >> 4 : both[s]) & 0x0f0f0f0fu;
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                uint32_t q = sub2<T>(choose_bytes(levels, MAGIC, pair ? 0x4342 : 0x4140), MIDDLE);  // level - 8, exact
                if (zeros) {
                    float scale = bits_as<float>(group.first), shift = bits_as<float>(group.second);
                    q = pack<T>((low_of<T>(q) + shift) * scale, (high_of<T>(q) + shift) * scale);
                } else if (std::is_same_v<T, f16>) {
                    q = mul2<T>(q, group.first);
                } else {
                    q = fma2<T>(q, group.first, mul2<T>(q, group.second));
                }
                words[2 * s + pair] = q;
            }
        }
    }
};
