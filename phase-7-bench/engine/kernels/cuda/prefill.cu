// flash_prefill: attention of many queries, in tiles that stay on the chip (Dao et al. 2022).
//
// A block computes 64 queries of a head, 16 per warp. It loads the keys in tiles of 64 to shared memory, for all four
// warps; int8 is converted during the load. A warp stops after the last key that one of its queries sees.
#include "attend.cuh"

namespace {

constexpr int WARPS = 4, KEYS = 64, QUERIES = 16 * WARPS;

template <class T, class Stored, int F, bool ALIGNED>
__global__ void __launch_bounds__(WARPS * 32, 2) prefill(Attention call, float scale) {
    constexpr int K_LINE = F + 32, V_LINE = F + 8;  // padded against bank conflicts of 16-byte accesses
    DYNAMIC_SHARED(memory);
    T* k_tile = reinterpret_cast<T*>(memory);                                 // [KEYS, K_LINE]
    T* v_tile = k_tile + KEYS * K_LINE;                                       // [KEYS, V_LINE]
    float* k_scale = reinterpret_cast<float*>(v_tile + KEYS * V_LINE);        // [KEYS]
    float* v_scale = k_scale + KEYS;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, D = call.D;
    int head = blockIdx.y, r = blockIdx.z, h = head / (call.H / call.HK);
    int w0 = blockIdx.x * QUERIES, mine = w0 + 16 * warp;
    const int *lo = at_address<const int>(call.lo) + int64_t(r) * call.W, *end = at_address<const int>(call.end) + int64_t(r) * call.W;
    SlotMapping slots = slots_of(call);
    const Stored *keys = at_address<const Stored>(call.keys), *values = at_address<const Stored>(call.values);

    int earliest = 0x7fffffff, furthest = 0, my_earliest = 0x7fffffff, my_furthest = 0;
    for (int w = w0 + lane; w < min(w0 + QUERIES, call.W); w += 32) {
        earliest = min(earliest, lo[w]), furthest = max(furthest, end[w]);
        if (w >= mine && w < mine + 16) my_earliest = min(my_earliest, lo[w]), my_furthest = max(my_furthest, end[w]);
    }
    for (int by = 16; by; by /= 2) {
        earliest = min(earliest, __shfl_xor_sync(~0u, earliest, by));
        furthest = max(furthest, __shfl_xor_sync(~0u, furthest, by));
        my_earliest = min(my_earliest, __shfl_xor_sync(~0u, my_earliest, by));
        my_furthest = max(my_furthest, __shfl_xor_sync(~0u, my_furthest, by));
    }
    Rows<T, F> rows;
    rows.reset();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int w = mine + g + 8 * i;
        bool real = w < call.W;
        rows.begin[i] = real ? lo[w] : 0x7fffffff;
        rows.stop[i] = real ? end[w] : 0;
        const T* query = at_address<const T>(call.query) + r * call.q_row + w * call.q_token + head * call.q_head;
        rows.template load<ALIGNED>(i, query, real, D);
    }

    for (int p0 = earliest / KEYS * KEYS; p0 < furthest; p0 += KEYS) {
        __syncthreads();  // all warps have read the last tile
        for (int e = threadIdx.x; e < KEYS * (F / 8); e += WARPS * 32) {
            int key = e / (F / 8), f = e % (F / 8) * 8, p = p0 + key;
            bool live = p >= earliest && p < furthest;
            int64_t at = live ? slots.number(r, p, h) : 0;
            uint4 none{0, 0, 0, 0};
            *reinterpret_cast<uint4*>(k_tile + key * K_LINE + f) = live ? eight<T, Stored, ALIGNED>(keys + at * D, f, D) : none;
            *reinterpret_cast<uint4*>(v_tile + key * V_LINE + f) = live ? eight<T, Stored, ALIGNED>(values + at * D, f, D) : none;
            if (f == 0) {
                bool scaled = live && std::is_same_v<Stored, int8_t>;
                k_scale[key] = scaled ? to_float(at_address<const bf16>(call.key_scales)[at]) : 1.0f;
                v_scale[key] = scaled ? to_float(at_address<const bf16>(call.value_scales)[at]) : 1.0f;
            }
        }
        __syncthreads();
        for (int k0 = 0; k0 < KEYS; k0 += 16) {
            if (p0 + k0 + 16 <= my_earliest || p0 + k0 >= my_furthest) continue;
            auto number_of = [&](int i) { return k0 + 2 * t + i % 2 + 8 * (i / 2); };
            rows.attend(
                p0 + k0, scale,
                [&](int j, int c) { return *reinterpret_cast<const uint4*>(k_tile + (k0 + 8 * j + g) * K_LINE + c * 32 + t * 8); },
                [&](int i, int c) { return *reinterpret_cast<const uint4*>(v_tile + number_of(i) * V_LINE + c * 64 + g * 8); },
                [&](int j, int e) { return k_scale[number_of(2 * j + e)]; },
                [&](int j, int e) { return v_scale[number_of(2 * j + e)]; });
        }
    }
    rows.each([&](int i, int f, float x) {
        int w = mine + g + 8 * i;
        if (w < call.W && f < D)
            at_address<T>(call.out)[((int64_t(r) * call.W + w) * call.H + head) * D + f] =
                from_float<T>(rows.total[i] > 0 ? x / rows.total[i] : 0.0f);
    });
}

template <class T, class Stored, int F, bool ALIGNED> void start(const Attention& call, int64_t stream) {
    size_t shared = sizeof(T) * KEYS * (2 * F + 40) + sizeof(float) * 2 * KEYS;
    launch(prefill<T, Stored, F, ALIGNED>, dim3(blocks_of(call.W, QUERIES), call.H, call.R), WARPS * 32, shared, stream, call,
           1.4426950408889634f / sqrtf(float(call.D)));
}

template <class T, class Stored> void run(const Attention& call, int64_t stream) {
    bool aligned = call.D % 8 == 0 && call.query % 16 == 0 && call.keys % 16 == 0 && call.values % 16 == 0 &&
                   (call.q_row | call.q_token | call.q_head) % 8 == 0;
    !aligned        ? start<T, Stored, 128, false>(call, stream)
    : call.D <= 64 ? start<T, Stored, 64, true>(call, stream)
                   : start<T, Stored, 128, true>(call, stream);
}

}  // namespace

void flash_prefill(const Attention& call, int64_t stream) {
    if (call.format == BFLOAT16)
        call.stored == INT8 ? run<bf16, int8_t>(call, stream) : run<bf16, bf16>(call, stream);
    else
        call.stored == INT8 ? run<f16, int8_t>(call, stream) : run<f16, f16>(call, stream);
}
