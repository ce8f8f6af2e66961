// decode_attention: a few queries over a long cache, split over the sequence (Flash-Decoding, Dao et al. 2023).
//
// A block computes 16 query heads that share a key head over `part` positions. Its four warps take groups of 16 keys in
// turn. A second kernel merges the parts of a query in order. Parts and groups begin at fixed positions, a query is
// always one of 16 rows, and hidden keys add an exact zero. So the bits of a query depend neither on the number of
// queries nor on other cache entries. In a tree, a block visits the keys of one query's path. Keys and values are
// loaded from global memory to registers, 16 bytes at a time (int8: 8), without shared memory.
#include "attend.cuh"

void attention_rows(const Attention& call, int part, int parts, int64_t mixed, int64_t tops, int64_t sums, int64_t stream);

namespace {

constexpr int WARPS = 4;

struct Parts {
    float *mixed, *tops, *sums;
    int part, parts;
    float scale;
};

template <class T, class Stored, int F, bool ALIGNED>
__global__ void __launch_bounds__(WARPS * 32, 2) decode(Attention call, Parts to) {
    DYNAMIC_SHARED(memory);
    float* mixed = reinterpret_cast<float*>(memory);  // [WARPS, 16, F + 4]
    float* tops = mixed + WARPS * 16 * (F + 4);       // [WARPS, 16]
    float* sums = tops + WARPS * 16;
    __shared__ int64_t queries[16];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, D = call.D;
    Tile tile = tile_of(call, blockIdx.x, blockIdx.z, 16);
    SlotMapping slots = slots_of(call);
    const Stored *keys = at_address<const Stored>(call.keys), *values = at_address<const Stored>(call.values);
    const bf16 *key_scales = at_address<const bf16>(call.key_scales), *value_scales = at_address<const bf16>(call.value_scales);

    Rows<T, F> rows;
    rows.reset();
    // Lane i computes the range of row i; the lanes that hold the row read it by shuffle.
    int row = lane % 16, w = tile.w(row);
    bool real = tile.real(row);
    int64_t query = (int64_t(tile.r) * call.W + w) * call.H + tile.h * tile.G + tile.g(row);
    int begin = real ? at_address<const int>(call.lo)[int64_t(tile.r) * call.W + w] : 0x7fffffff;
    int stop = real ? at_address<const int>(call.end)[int64_t(tile.r) * call.W + w] : 0;
    if (warp == 0 && lane < 16) queries[row] = real ? query : -1;
    int64_t offset = tile.r * call.q_row + w * call.q_token + (tile.h * tile.G + tile.g(row)) * call.q_head;
    int earliest = begin, furthest = stop;  // of all 16
    for (int by = 8; by; by /= 2) {
        earliest = min(earliest, __shfl_xor_sync(~0u, earliest, by));
        furthest = max(furthest, __shfl_xor_sync(~0u, furthest, by));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        rows.begin[i] = __shfl_sync(~0u, begin, g + 8 * i);
        rows.stop[i] = __shfl_sync(~0u, stop, g + 8 * i);
        int64_t its = __shfl_sync(~0u, offset, g + 8 * i);
        bool there = __shfl_sync(~0u, int(real), g + 8 * i);
        rows.template load<ALIGNED>(i, at_address<const T>(call.query) + its, there, D);
    }

    int here = blockIdx.y * to.part, end = min(here + to.part, furthest);
    if (here >= furthest && blockIdx.y) return;  // the grid has parts for the longest row that the cache holds
    for (int p0 = here + 16 * warp; p0 < end; p0 += 16 * WARPS) {
        if (p0 + 16 <= earliest) continue;
        // Keys that no row sees are not read: they may be uninitialised.
        auto head_at = [&](int number) -> int64_t {
            int p = p0 + number;
            return p < earliest || p >= furthest ? -1
                                                 : slots.number(tile.r, token_of(call, tile, p), tile.h);
        };
        int64_t of_keys[2] = {head_at(g), head_at(8 + g)};
        int64_t of_values[4] = {head_at(2 * t), head_at(2 * t + 1), head_at(2 * t + 8), head_at(2 * t + 9)};
        uint4 k[2][F / 32], v[4][F / 64];  // issue all loads before the first use
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int c = 0; c < F / 32; c++)
                k[j][c] = of_keys[j] < 0 ? uint4{0, 0, 0, 0} : eight<T, Stored, ALIGNED>(keys + of_keys[j] * D, c * 32 + t * 8, D);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int c = 0; c < F / 64; c++)
                v[i][c] = of_values[i] < 0 ? uint4{0, 0, 0, 0}
                                           : eight<T, Stored, ALIGNED>(values + of_values[i] * D, c * 64 + g * 8, D);
        auto scale_of = [&](const bf16* scales, int j, int e) {
            if (!std::is_same_v<Stored, int8_t>) return 1.0f;
            int64_t at = of_values[2 * j + e];
            return at < 0 ? 0.0f : to_float(scales[at]);
        };
        rows.attend(p0, to.scale, [&](int j, int c) { return k[j][c]; }, [&](int i, int c) { return v[i][c]; },
                    [&](int j, int e) { return scale_of(key_scales, j, e); },
                    [&](int j, int e) { return scale_of(value_scales, j, e); });
    }

    rows.each([&](int i, int f, float x) { mixed[(warp * 16 + g + 8 * i) * (F + 4) + f] = x; });
    if (t == 0)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tops[warp * 16 + g + 8 * i] = rows.top[i];
            sums[warp * 16 + g + 8 * i] = rows.total[i];
        }
    __syncthreads();
    for (int e = threadIdx.x; e < 16 * F; e += WARPS * 32) {
        int row = e / F, f = e % F;
        int64_t query = queries[row];
        if (query < 0 || f >= D) continue;
        Joined joined;
        float acc = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            joined.add(tops[w * 16 + row], sums[w * 16 + row]);
            acc = acc * joined.mine + mixed[(w * 16 + row) * (F + 4) + f] * joined.theirs;
        }
        if (to.parts == 1) {
            at_address<T>(call.out)[query * D + f] = from_float<T>(joined.total > 0 ? acc / joined.total : 0.0f);
            continue;
        }
        int64_t at = query * to.parts + blockIdx.y;
        to.mixed[at * D + f] = acc;
        if (f == 0) to.tops[at] = joined.top, to.sums[at] = joined.total;
    }
}

// Merge the parts of one query head in order, up to the last that it sees. A head that sees no key gives zeros.
template <class T>
__global__ void join(const float* mixed, const float* tops, const float* sums, const int* ends, T* out, int part_size, int parts, int H, int D) {
    int64_t query = blockIdx.x;
    int used = min(parts, int(blocks_of(ends[query / H], part_size)));
    for (int f = threadIdx.x; f < D; f += blockDim.x) {
        Joined joined;
        float acc = 0;
        for (int part = 0; part < used; part++) {
            int64_t at = query * parts + part;
            joined.add(tops[at], sums[at]);
            acc = acc * joined.mine + mixed[at * D + f] * joined.theirs;
        }
        out[query * D + f] = from_float<T>(joined.total > 0 ? acc / joined.total : 0.0f);
    }
}

template <class T, class Stored, int F, bool ALIGNED> void start(const Attention& call, const Parts& to, int64_t stream) {
    int G = call.H / call.HK;
    int tiles = call.lines ? call.W * blocks_of(G, 16) : blocks_of(call.W * G, 16);
    size_t shared = sizeof(float) * WARPS * 16 * (F + 4 + 2);
    launch(decode<T, Stored, F, ALIGNED>, dim3(tiles, to.parts, call.R * call.HK), WARPS * 32, shared, stream, call, to);
}

template <class T, class Stored> void run(const Attention& call, const Parts& to, int64_t stream) {
    bool aligned = call.D % 8 == 0 && call.query % 16 == 0 && call.keys % 16 == 0 && call.values % 16 == 0 &&
                   (call.q_row | call.q_token | call.q_head) % 8 == 0;
    !aligned        ? start<T, Stored, 128, false>(call, to, stream)
    : call.D <= 64 ? start<T, Stored, 64, true>(call, to, stream)
                   : start<T, Stored, 128, true>(call, to, stream);
}

}  // namespace

void decode_attention(const Attention& call, int part, int parts, int64_t mixed, int64_t tops, int64_t sums,
                      int64_t stream) {
    if (!call.W || !call.H) return;
    bool cores = call.format != FLOAT32 && call.D <= 128 && (call.stored == call.format || call.stored == INT8);
    Parts to{at_address<float>(mixed), at_address<float>(tops), at_address<float>(sums), part, parts,
             1.4426950408889634f / sqrtf(float(call.D))};
    if (!cores)
        attention_rows(call, part, parts, mixed, tops, sums, stream);
    else if (call.format == BFLOAT16)
        call.stored == INT8 ? run<bf16, int8_t>(call, to, stream) : run<bf16, bf16>(call, to, stream);
    else
        call.stored == INT8 ? run<f16, int8_t>(call, to, stream) : run<f16, f16>(call, to, stream);
    if (cores && parts == 1) return;
    with_float(call.format, [&](auto zero) {
        using T = decltype(zero);
        launch(join<T>, dim3(call.R * call.W * call.H), 64, 0, stream, to.mixed, to.tops, to.sums,
               at_address<const int>(call.end), at_address<T>(call.out), part, parts, call.H, call.D);
    });
}
