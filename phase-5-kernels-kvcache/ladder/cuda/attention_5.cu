// Rung 5, fused and split: a block has 256 positions of a key head, and all query heads that share it.
//
// Every key is read once. A long text keeps the whole card busy (Flash-Decoding); a small second kernel joins the parts.
// What the engine uses (engine/kernels/cuda/attention.cu) does this with the tensor cores, for up to 16 query rows at
// once, over any kind of cache.
#include "device.cuh"
#include "ladder.h"
#include "walk.cuh"

constexpr int WARPS = 4, PART = 256, SHARED_HEADS = 8;

template <int D, int HEADS>
static __global__ void __launch_bounds__(WARPS * 32) parts(const bf16* query, const bf16* keys, const bf16* values, float* scratch, int G, int n, int64_t slots) {
    __shared__ float records[WARPS * (D + 2)];
    using Mine = Walker<D, HEADS>;
    int kv = blockIdx.y, begin = blockIdx.x * PART, end = min(begin + PART, n), count = gridDim.x;
    int64_t base = kv * slots * D;
    Mine walker;
    walker.start(query + kv * G * D, G);
    for (int p = begin + threadIdx.x / 32 * Mine::KEYS; p < end; p += WARPS * Mine::KEYS)
        walker.step(keys + base, values + base, p, end);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        __syncthreads();
        walker.join(h, records);
        __syncthreads();
        if (h >= G || threadIdx.x >= D) continue;
        float top, total, acc = joined<D>(records, WARPS, threadIdx.x, top, total);
        float* to = scratch + (int64_t(kv * G + h) * count + blockIdx.x) * (D + 2);
        to[threadIdx.x] = acc;
        if (threadIdx.x == 0) to[D] = top, to[D + 1] = total;
    }
}

template <int D> static __global__ void finish(const float* scratch, bf16* out, int count) {
    float top, total, acc = joined<D>(scratch + int64_t(blockIdx.x) * count * (D + 2), count, threadIdx.x, top, total);
    out[blockIdx.x * D + threadIdx.x] = from_float<bf16>(acc / total);
}

template <int D> static void run(const AttentionRung& c, int64_t stream) {
    int G = c.H / c.HK, count = blocks_of(c.n, PART);
    if (G > SHARED_HEADS) throw std::invalid_argument("more than 8 query heads share a key head");
    auto chosen = G == 1 ? parts<D, 1> : G <= 4 ? parts<D, 4> : parts<D, SHARED_HEADS>;
    launch(chosen, dim3(count, c.HK), WARPS * 32, 0, stream, at_address<const bf16>(c.query), at_address<const bf16>(c.keys),
           at_address<const bf16>(c.values), at_address<float>(c.scratch), G, c.n, c.slots);
    launch(finish<D>, dim3(c.H), D, 0, stream, at_address<const float>(c.scratch), at_address<bf16>(c.out), count);
}

void attention_5(const AttentionRung& c, int64_t stream) { c.D == 64 ? run<64>(c, stream) : run<128>(c, stream); }
