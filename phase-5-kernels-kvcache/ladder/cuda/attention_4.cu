// Rung 4, vectorised: 16 bytes per access, and an online softmax, so that a key and its value are met together.
//
// No score is stored any more, whatever the length. But a block still has a whole head: 32 of them on a card with 132
// multiprocessors leave most of it idle; and query heads that share keys read them one after the other.
#include "device.cuh"
#include "ladder.h"
#include "walk.cuh"

constexpr int WARPS = 16;

template <int D>
static __global__ void __launch_bounds__(WARPS * 32) kernel(const bf16* query, const bf16* keys, const bf16* values, bf16* out, int H, int HK, int n, int64_t slots) {
    __shared__ float records[WARPS * (D + 2)];
    using Mine = Walker<D, 1>;
    int h = blockIdx.x;
    int64_t base = h / (H / HK) * slots * D;
    Mine walker;
    walker.start(query + h * D, 1);
    for (int p = threadIdx.x / 32 * Mine::KEYS; p < n; p += WARPS * Mine::KEYS) walker.step(keys + base, values + base, p, n);
    walker.join(0, records);
    __syncthreads();
    if (threadIdx.x < D) {
        float top, total, acc = joined<D>(records, WARPS, threadIdx.x, top, total);
        out[h * D + threadIdx.x] = from_float<bf16>(acc / total);
    }
}

void attention_4(const AttentionRung& c, int64_t stream) {
    auto chosen = c.D == 64 ? kernel<64> : kernel<128>;
    launch(chosen, dim3(c.H), WARPS * 32, 0, stream, at_address<const bf16>(c.query), at_address<const bf16>(c.keys),
           at_address<const bf16>(c.values), at_address<bf16>(c.out), c.H, c.HK, c.n, c.slots);
}
