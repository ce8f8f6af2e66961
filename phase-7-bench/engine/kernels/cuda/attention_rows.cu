// decode_attention without tensor cores: for float32, for heads of more than 128 features, and for a cache whose format
// differs from the model's. A warp computes one query head and one part: first one key per lane, then some features per
// lane.
#include "attend.cuh"

namespace {

constexpr int WIDEST = 256, EACH = WIDEST / 32;

template <class T, class Stored>
__global__ void __launch_bounds__(32)
by_rows(Attention call, float* mixed, float* tops, float* sums, int part, int parts, float scale) {
    __shared__ float query[WIDEST];
    int lane = threadIdx.x, D = call.D, G = call.H / call.HK;
    int64_t number = blockIdx.x;  // index of the query head
    int head = number % call.H, w = number / call.H % call.W, r = number / call.H / call.W;
    Tile tile{r, head / G, G, call.W, w, 0, call.lines != 0};
    SlotMapping slots = slots_of(call);
    const Stored *keys = at_address<const Stored>(call.keys), *values = at_address<const Stored>(call.values);
    const T* q = at_address<const T>(call.query) + r * call.q_row + w * call.q_token + head * call.q_head;
    for (int i = lane; i < D; i += 32) query[i] = to_float(q[i]);
    __syncwarp();
    int begin = at_address<const int>(call.lo)[int64_t(r) * call.W + w];
    int stop = at_address<const int>(call.end)[int64_t(r) * call.W + w];
    int here = blockIdx.y * part, end = min(here + part, stop);
    if (here >= stop) return;
    float acc[EACH] = {}, top = NEVER, total = 0;
    for (int p0 = here; p0 < end; p0 += 32) {
        if (p0 + 32 <= begin) continue;
        int p = p0 + lane;
        bool seen = p >= begin && p < end;
        int64_t at = seen ? slots.number(r, token_of(call, tile, p), tile.h) : 0;
        float score = NEVER, value_scale = 1;
        if (seen) {
            float sum = 0;
            for (int i = 0; i < D; i++) sum = fmaf(query[i], to_float(keys[at * D + i]), sum);
            if (std::is_same_v<Stored, int8_t>) {
                sum *= to_float(at_address<const bf16>(call.key_scales)[at]);
                value_scale = to_float(at_address<const bf16>(call.value_scales)[at]);
            }
            score = sum * scale;
        }
        float higher = fmaxf(top, warp_max(score)), finite = higher == NEVER ? 0.0f : higher;
        float shrink = power_of_2(top - finite), weight = power_of_2(score - finite);
        top = higher;
        total = total * shrink + warp_sum(weight);
        weight *= value_scale;
#pragma unroll
        for (int e = 0; e < EACH; e++) acc[e] *= shrink;
        for (int key = 0; key < 32; key++) {
            float mine = __shfl_sync(~0u, weight, key);
            int64_t its = __shfl_sync(~0u, at, key);
            if (!__shfl_sync(~0u, int(seen), key)) continue;
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (e * 32 + lane < D) acc[e] = fmaf(mine, to_float(values[its * D + e * 32 + lane]), acc[e]);
        }
    }
    int64_t at = number * parts + blockIdx.y;
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (e * 32 + lane < D) mixed[at * D + e * 32 + lane] = acc[e];
    if (lane == 0) tops[at] = top, sums[at] = total;
}

}  // namespace

void attention_rows(const Attention& call, int part, int parts, int64_t mixed, int64_t tops, int64_t sums, int64_t stream) {
    with_float(call.format, [&](auto zero) {
        using T = decltype(zero);
        with_stored(call.stored, [&](auto other) {
            using S = decltype(other);
            launch(by_rows<T, S>, dim3(call.R * call.W * call.H, parts), 32, 0, stream, call, at_address<float>(mixed),
                   at_address<float>(tops), at_address<float>(sums), part, parts,
                   1.4426950408889634f / sqrtf(float(call.D)));
        });
    });
}
