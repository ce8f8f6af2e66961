// The location of a token in a cache, for every kind of cache: keys of a layer are [pages, kv_heads, slots, D].
//
//     static, ring   page = row,                    slot = p; ring: p modulo slots
//     paged          page = block table[p / slots],  slot = p modulo slots
#pragma once

#include "device.cuh"

struct SlotMapping {
    const int* rows;    // [R] cache row of every row of the forward pass
    const int* tables;  // [R, width] pages of 1 << shift positions, or null
    int width, shift;
    unsigned wrap;                    // slots of a ring, or 0
    int64_t s_page, s_head, s_slot;  // strides in heads of D features

    // The index of a position's head in memory: its features begin at D times this index, its int8 scale is at the
    // index. Avoids divisions, which are slow.
    __device__ __forceinline__ int64_t number(int r, unsigned position, int head) const {
        if (tables) {
            int64_t page = tables[int64_t(r) * width + (position >> shift)];
            return page * s_page + head * s_head + (position & ((1u << shift) - 1)) * s_slot;
        }
        return rows[r] * s_page + head * s_head + (wrap ? position % wrap : position) * s_slot;
    }
};

// Write one head to index `at` of a layer's keys or values; lane l of a warp writes features l, l + 32, ... Int8 is
// rounded to nearest, ties to even, with scale = max |x| / 127, as in kv_cache/storage.py. x(i) is feature i.
template <class Stored, class X>
__device__ __forceinline__ void put(const X& x, Stored* cache, bf16* scales, int64_t at, int D) {
    int lane = threadIdx.x % 32;
    cache += at * D;
    if constexpr (std::is_same_v<Stored, int8_t>) {
        float most = 0;
        for (int i = lane; i < D; i += 32) most = fmaxf(most, fabsf(x(i)));
        most = warp_max(most);
        bf16 scale = from_float<bf16>(fmaxf(divide(most, 127.0f), 1e-30f));
        float divisor = to_float(scale);
        for (int i = lane; i < D; i += 32)
            cache[i] = int8_t(fminf(fmaxf(round_even(divide(x(i), divisor)), -127.0f), 127.0f));
        if (lane == 0) scales[at] = scale;
    } else {
        for (int i = lane; i < D; i += 32) cache[i] = from_float<Stored>(x(i));
    }
}
