// rope, kv_append, and both fused. A warp rotates one query head, or rotates one key head and writes it to the cache,
// or writes one value head. For an int8 cache it also quantises.
#include "cache.cuh"
#include "ops.h"

namespace {

constexpr int WARPS = 4;

// Tensors [R, T, heads, D] with a contiguous last dimension; tables [R or 1, T, D].
template <class T> struct Strided {
    const T* data;
    int64_t row, token, head;
    __device__ __forceinline__ const T* at(int64_t r, int64_t t, int64_t h) const {
        return data + r * row + t * token + h * head;
    }
};

// (a, b) -> (a cos - b sin, b cos + a sin) for features half a head apart; every operation rounded as in torch.
template <class T> __device__ __forceinline__ float rotated(const T* x, const T* cos, const T* sin, int i, int D) {
    int partner = i < D / 2 ? i + D / 2 : i - D / 2;
    float first = to_float(from_float<T>(to_float(x[i]) * to_float(cos[i])));
    return to_float(from_float<T>(first + to_float(x[partner]) * to_float(sin[i])));
}

// Heads are numbered: H of queries, then HK of keys, then HK of values. `out` [R, T, H, D] receives the queries.
template <class T, class Stored, bool ROTATE>
__global__ void __launch_bounds__(WARPS * 32)
append(Strided<T> query, Strided<T> key, Strided<T> value, const T* cos, const T* sin, int64_t t_row, int64_t t_token,
       T* out, Stored* keys, Stored* values, bf16* key_scales, bf16* value_scales, SlotMapping slots, const int* starts,
       const int* counts, int T_, int H, int HK, int D) {
    int lane = threadIdx.x % 32, h = blockIdx.x * WARPS + threadIdx.x / 32, t = blockIdx.y, r = blockIdx.z;
    const T *c = cos + r * t_row + t * t_token, *s = sin + r * t_row + t * t_token;
    if (h < H) {
        const T* x = query.at(r, t, h);
        T* to = out + ((int64_t(r) * T_ + t) * H + h) * D;
        for (int i = lane; i < D; i += 32) to[i] = from_float<T>(rotated(x, c, s, i, D));
        return;
    }
    h -= H;
    if (h >= 2 * HK || t >= counts[r]) return;  // tokens after a row's count are padding
    int of = h % HK;
    int64_t at = slots.number(r, starts[r] + t, of);
    if (h >= HK) {
        const T* x = value.at(r, t, of);
        put([&](int i) { return to_float(x[i]); }, values, value_scales, at, D);
    } else {
        const T* x = key.at(r, t, of);
        put([&](int i) { return ROTATE ? rotated(x, c, s, i, D) : to_float(x[i]); }, keys, key_scales, at, D);
    }
}

}  // namespace

void rope(int format, int64_t x, int64_t cos, int64_t sin, int64_t out, int R, int T_, int H, int D, int64_t s_row,
          int64_t s_token, int64_t s_head, int64_t t_row, int64_t t_token, int64_t stream) {
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        Strided<T> query{at_address<const T>(x), s_row, s_token, s_head}, none{nullptr, 0, 0, 0};
        launch(append<T, T, true>, dim3(blocks_of(H, WARPS), T_, R), WARPS * 32, 0, stream, query, none, none,
               at_address<const T>(cos), at_address<const T>(sin), t_row, t_token, at_address<T>(out), nullptr, nullptr,
               nullptr, nullptr, SlotMapping{}, nullptr, nullptr, T_, H, 0, D);
    });
}

void rope_append(int format, int stored, int64_t query, int64_t key, int64_t value, int64_t cos, int64_t sin, int64_t out,
                 int64_t keys, int64_t values, int64_t key_scales, int64_t value_scales, int64_t rows, int64_t starts,
                 int64_t counts, int64_t tables, int width, int shift, int64_t wrap, const std::vector<int64_t>& strides, int R,
                 int T_, int H, int HK, int D, bool rotate, int64_t stream) {
    SlotMapping slots{at_address<const int>(rows), at_address<const int>(tables), width, shift, unsigned(wrap),
                      strides[11], strides[12], strides[13]};
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        Strided<T> q{at_address<const T>(query), strides[0], strides[1], strides[2]};
        Strided<T> k{at_address<const T>(key), strides[3], strides[4], strides[5]};
        Strided<T> v{at_address<const T>(value), strides[6], strides[7], strides[8]};
        with_stored(stored, [&](auto other) {
            using S = decltype(other);
            auto kernel = rotate ? append<T, S, true> : append<T, S, false>;
            launch(kernel, dim3(blocks_of(H + 2 * HK, WARPS), T_, R), WARPS * 32, 0, stream, q, k, v,
                   at_address<const T>(cos), at_address<const T>(sin), strides[9], strides[10], at_address<T>(out),
                   at_address<S>(keys), at_address<S>(values), at_address<bf16>(key_scales), at_address<bf16>(value_scales),
                   slots, at_address<const int>(starts), at_address<const int>(counts), T_, H, HK, D);
        });
    });
}
