// Attention of one warp: 16 query rows over 16 keys at a time. Decoding and prefill share this code.
//
// Scores are the product of queries (16 x features) and keys (features x 8 keys). An online softmax (Milakov and
// Gimelshein 2018) turns them into weights, whose register layout fits the next product, by values (16 keys x 8
// features; Dao 2023, FlashAttention-2). Each lane loads 8 contiguous features: mma.cuh explains why that is valid.
#pragma once

#include "cache.cuh"
#include "mma.cuh"
#include "ops.h"

constexpr float NEVER = -INFINITY;

// Load eight features of a head from f on as T; zeros from D on. Int8 levels are not scaled here.
template <class T, class Stored, bool ALIGNED>
__device__ __forceinline__ uint4 eight(const Stored* head, int f, int D) {
    if constexpr (ALIGNED && std::is_same_v<T, Stored>) {
        return f < D ? *reinterpret_cast<const uint4*>(head + f) : uint4{0, 0, 0, 0};
    } else if constexpr (ALIGNED) {
        uint2 raw = f < D ? *reinterpret_cast<const uint2*>(head + f) : uint2{0, 0};
        uint4 wide;
        widen_int8<T>(raw.x, wide.x, wide.y);
        widen_int8<T>(raw.y, wide.z, wide.w);
        return wide;
    } else {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = f + i < D ? to_float(head[f + i]) : 0.0f;
        return uint4{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
    }
}

// State of a warp's 16 query rows; F: features of a head, padded to 64 or 128. A lane holds rows g and g + 8.
template <class T, int F> struct Rows {
    uint32_t q[F / 16][4];
    float acc[F / 8][4];
    float top[2], total[2];
    int begin[2], stop[2];  // visible positions of the rows

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int i = 0; i < F / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = 0;
        top[0] = top[1] = NEVER;
        total[0] = total[1] = 0;
    }

    // Load row i (0: g, 1: g + 8) of the queries; zeros if it is padding.
    template <bool ALIGNED> __device__ __forceinline__ void load(int i, const T* query, bool real, int D) {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int c = 0; c < F / 32; c++) {
            uint4 x = real ? eight<T, T, ALIGNED>(query, c * 32 + t * 8, D) : uint4{0, 0, 0, 0};
            q[2 * c][i] = x.x, q[2 * c][2 + i] = x.y;
            q[2 * c + 1][i] = x.z, q[2 * c + 1][2 + i] = x.w;
        }
    }

    // Attend to keys p0 .. p0 + 15. key(j, c): features 32 c + 8 t .. of key 8 j + g; value(i, c): features 64 c + 8 g
    // .. of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9; the int8 scales (else 1) are those of key 8 j + 2 t + e.
    template <class Key, class Value, class KeyScale, class ValueScale>
    __device__ __forceinline__ void attend(int p0, float scale, const Key& key, const Value& value,
                                           const KeyScale& key_scale, const ValueScale& value_scale) {
        int t = threadIdx.x % 4;
        float s[2][4] = {};
#pragma unroll
        for (int c = 0; c < F / 32; c++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint4 k = key(j, c);
                uint32_t first[2] = {k.x, k.y}, second[2] = {k.z, k.w};
                mma<T>(s[j], q[2 * c], first);
                mma<T>(s[j], q[2 * c + 1], second);
            }
        float higher[2], shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float most = NEVER;
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int number = 8 * j + 2 * t + e;
                    bool seen = p0 + number >= begin[i] && p0 + number < stop[i];
                    float& x = s[j][2 * i + e];
                    x = seen ? x * (scale * key_scale(j, e)) : NEVER;
                    most = fmaxf(most, x);
                }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            higher[i] = fmaxf(top[i], most);
            float finite = higher[i] == NEVER ? 0.0f : higher[i];
            shrink[i] = power_of_2(top[i] - finite);
            top[i] = higher[i];
            float sum = 0;
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[j][2 * i + e];
                    x = power_of_2(x - finite);
                    sum += x;
                    x *= value_scale(j, e);
                }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            total[i] = total[i] * shrink[i] + sum;
        }
        uint32_t weights[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]), pack<T>(s[1][0], s[1][1]),
                               pack<T>(s[1][2], s[1][3])};
#pragma unroll
        for (int c = 0; c < F / 64; c++) {
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = value(i, c);
            const uint32_t words[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w},
                                          {v[1].x, v[1].y, v[1].z, v[1].w},
                                          {v[2].x, v[2].y, v[2].z, v[2].w},
                                          {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                unsigned which = j % 2 ? 0x7632 : 0x5410;  // feature j of two keys in one word
                uint32_t pairs[2] = {choose_bytes(words[0][j / 2], words[1][j / 2], which),
                                     choose_bytes(words[2][j / 2], words[3][j / 2], which)};
                float(&to)[4] = acc[8 * c + j];
                to[0] *= shrink[0], to[1] *= shrink[0], to[2] *= shrink[1], to[3] *= shrink[1];
                mma<T>(to, weights, pairs);
            }
        }
    }

    // Call body(i, feature, number) for the lane's numbers of both rows, features in ascending order.
    template <class Body> __device__ __forceinline__ void each(const Body& body) const {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int c = 0; c < F / 64; c++)
#pragma unroll
                for (int f = 0; f < 16; f++) body(i, c * 64 + t * 16 + f, acc[8 * c + f % 8][2 * i + f / 8]);
    }
};

// Merges the partial softmaxes of one row: rescales their sums by the common maximum.
struct Joined {
    float top = NEVER, total = 0, mine, theirs;
    __device__ __forceinline__ void add(float its_top, float its_total) {
        float higher = fmaxf(top, its_top), finite = higher == NEVER ? 0.0f : higher;
        mine = power_of_2(top - finite);
        theirs = power_of_2(its_top - finite);
        total = total * mine + its_total * theirs;
        top = higher;
    }
};

// Which query heads a tile of 16 holds. In a tree (lines) a tile holds the heads of one query.
struct Tile {
    int r, h, G, W, one, first;  // row, key head; query heads per key head; queries; in trees the query, and the first head
    bool tree;
    __device__ __forceinline__ int w(int i) const { return tree ? one : (first + i) / G; }
    __device__ __forceinline__ int g(int i) const { return tree ? first + i : (first + i) % G; }
    __device__ __forceinline__ bool real(int i) const { return tree ? first + i < G : (first + i) / G < W; }
};

__device__ __forceinline__ Tile tile_of(const Attention& call, int number, int row_head, int rows) {
    Tile tile;
    tile.G = call.H / call.HK, tile.W = call.W, tile.tree = call.lines != 0;
    tile.r = row_head / call.HK, tile.h = row_head % call.HK;
    int tiles = blocks_of(tile.G, rows);
    tile.one = tile.tree ? number / tiles : 0;
    tile.first = (tile.tree ? number % tiles : number) * rows;
    return tile;
}

__device__ __forceinline__ SlotMapping slots_of(const Attention& call) {
    return SlotMapping{at_address<const int>(call.rows), at_address<const int>(call.tables), call.width, call.shift,
                       unsigned(call.wrap), call.s_page, call.s_head, call.s_slot};
}

// The token at a position as a query sees it: the position itself, or in a tree the entry of the query's path.
__device__ __forceinline__ unsigned token_of(const Attention& call, const Tile& tile, int position) {
    if (!tile.tree) return position;
    int listed = position - at_address<const int>(call.base)[tile.r];
    if (listed < 0) return position;
    return at_address<const int>(call.lines)[(int64_t(tile.r) * call.W + tile.one) * call.line_width + listed];
}
