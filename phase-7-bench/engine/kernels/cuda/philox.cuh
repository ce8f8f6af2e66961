// The keyed random numbers of common/philox.py, bit for bit: Philox 4x32-10 (Salmon et al. 2011).
//
// Number `index` of (sample, position, purpose) is word index % 4 of the block with counter (index / 4, position,
// sample, purpose) under the seed's two halves.
#pragma once

#include "device.cuh"

enum Purpose : uint32_t { SAMPLE = 0, DRAFT = 1, ACCEPT = 2, RESIDUAL = 3 };

struct Key {
    int64_t seed, sample;
};

struct Words {
    uint32_t at[4];
};

__device__ __forceinline__ Words words(const Key& key, int64_t position, uint32_t purpose, uint32_t block) {
    uint32_t a = block, b = uint32_t(position), c = uint32_t(key.sample), d = purpose;
    uint32_t low = uint32_t(key.seed), high = uint32_t(uint64_t(key.seed) >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64_t first = uint64_t(a) * 0xD2511F53u, second = uint64_t(c) * 0xCD9E8D57u;
        a = uint32_t(second >> 32) ^ b ^ low;
        b = uint32_t(second);
        c = uint32_t(first >> 32) ^ d ^ high;
        d = uint32_t(first);
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

// The midpoint of one of 2**23 equal cells of (0, 1), exact in float32.
__device__ __forceinline__ float uniform(uint32_t word) { return (float(word >> 9) + 0.5f) * 1.1920928955078125e-07f; }

__device__ __forceinline__ float gumbel(uint32_t word) { return -logf(-logf(uniform(word))); }
