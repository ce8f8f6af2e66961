// What rungs 4 and 5 share: part of a warp walks keys with 16 bytes per lane, by an online softmax.
#pragma once

#include "mma.cuh"

// D / 8 lanes hold a key; so a warp has 2 keys at once of 128 features, 4 of 64. HEADS: query heads that meet each key.
template <int D, int HEADS> struct Walker {
    static constexpr int LANES = D / 8, KEYS = 32 / LANES;
    float q[HEADS][8], acc[HEADS][8], top[HEADS], total[HEADS];

    static __device__ __forceinline__ void widen(uint4 from, float (&to)[8]) {
        uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
        for (int i = 0; i < 4; i++) to[2 * i] = low_of<bf16>(words[i]), to[2 * i + 1] = high_of<bf16>(words[i]);
    }

    __device__ __forceinline__ void start(const bf16* query, int heads) {
        int at = threadIdx.x % LANES * 8;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            widen(*reinterpret_cast<const uint4*>(query + min(h, heads - 1) * D + at), q[h]);
#pragma unroll
            for (int i = 0; i < 8; i++) q[h][i] *= 1.4426950408889634f / sqrtf(float(D)), acc[h][i] = 0;
            top[h] = -INFINITY, total[h] = 0;
        }
    }

    // The keys from p on that this warp has at once, of those before `end`.
    __device__ __forceinline__ void step(const bf16* keys, const bf16* values, int p, int end) {
        int lane = threadIdx.x % 32, at = lane % LANES * 8, mine = p + lane / LANES;
        bool live = mine < end;
        int64_t place = int64_t(live ? mine : p) * D + at;
        uint4 raw_key = *reinterpret_cast<const uint4*>(keys + place);
        uint4 raw_value = *reinterpret_cast<const uint4*>(values + place);
        float k[8], v[8];
        widen(raw_key, k);
        widen(raw_value, v);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) score += q[h][i] * k[i];
            for (int by = LANES / 2; by; by /= 2) score += __shfl_xor_sync(~0u, score, by);
            if (!live) score = -INFINITY;
            float higher = fmaxf(top[h], score), finite = higher == -INFINITY ? 0.0f : higher;
            float shrink = power_of_2(top[h] - finite), weight = power_of_2(score - finite);
            top[h] = higher;
            total[h] = total[h] * shrink + weight;
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] = acc[h][i] * shrink + weight * v[i];
        }
    }

    // Join what the lanes with the same features have of head h, then what the warps have: shared [warps, D + 2].
    __device__ __forceinline__ void join(int h, float* shared) {
        int lane = threadIdx.x % 32;
        for (int by = LANES; by < 32; by *= 2) {
            float its_top = __shfl_xor_sync(~0u, top[h], by), its_total = __shfl_xor_sync(~0u, total[h], by);
            float higher = fmaxf(top[h], its_top), finite = higher == -INFINITY ? 0.0f : higher;
            float a = power_of_2(top[h] - finite), b = power_of_2(its_top - finite);
            total[h] = total[h] * a + its_total * b;
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] = acc[h][i] * a + __shfl_xor_sync(~0u, acc[h][i], by) * b;
            top[h] = higher;
        }
        float* mine = shared + threadIdx.x / 32 * (D + 2);
        if (lane < LANES) {
#pragma unroll
            for (int i = 0; i < 8; i++) mine[lane * 8 + i] = acc[h][i];
            if (lane == 0) mine[D] = top[h], mine[D + 1] = total[h];
        }
    }
};

// Feature f of `count` such records, joined in order; its sum still to be divided by `total`.
template <int D> __device__ __forceinline__ float joined(const float* records, int count, int f, float& top, float& total) {
    float acc = 0;
    top = -INFINITY, total = 0;
    for (int i = 0; i < count; i++) {
        const float* its = records + int64_t(i) * (D + 2);
        float higher = fmaxf(top, its[D]), finite = higher == -INFINITY ? 0.0f : higher;
        float a = power_of_2(top - finite), b = power_of_2(its[D] - finite);
        acc = acc * a + its[f] * b;
        total = total * a + its[D + 1] * b;
        top = higher;
    }
    return acc;
}
