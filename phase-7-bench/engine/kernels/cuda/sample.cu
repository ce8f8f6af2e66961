// sample: chooses a token from logits on the device: temperature, top-k, top-p, min-p, Gumbel-max with keyed noise.
// probabilities: the distributions that are sampled.
//
// One block per row. Nothing is sorted: radix selection finds the threshold of a filter eight bits at a time, from
// histograms of the numbers with the prefix found so far. Masses are integers, exp(x - highest) in units of 2^-40, so
// the order of atomic additions does not change their sum. Of equal logits at a threshold, the lowest ids stay.
#include "choice.cuh"
#include "ops.h"
#include "philox.cuh"

namespace {

constexpr int THREADS = 1024, BINS = 256;
using Count = unsigned long long;

template <class T> struct Row {
    const T* logits;
    float temperature;
    int V;
    float top;

    // Adding 0 turns -0 into 0.
    __device__ __forceinline__ float operator()(int at) const { return divide(to_float(logits[at]), temperature) + 0.0f; }
    __device__ __forceinline__ float weight(float x) const { return expf(x - top); }
    __device__ __forceinline__ Count mass(float x) const { return Count(double(weight(x)) * 1099511627776.0); }
};

// Map float32 to integers of the same order.
__device__ __forceinline__ uint32_t ordered(float x) {
    uint32_t bits = as_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Visit the numbers from `least` on in ascending (UP) or descending order. Return the first number at which the sum of
// their `worth`s exceeds (UP) or reaches `limit`; `before` receives the sum before it.
template <bool UP, class T, class Worth>
__device__ uint32_t select(const Row<T>& row, uint32_t least, Count limit, Count* before, Count* bins, const Worth& worth) {
    __shared__ uint32_t found_bin;
    __shared__ Count found_sum;
    uint32_t prefix = 0;
    Count sum = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
        __syncthreads();
#pragma unroll 4
        for (int at = threadIdx.x; at < row.V; at += THREADS) {
            float x = row(at);
            uint32_t whole = ordered(x);
            bool same = shift == 24 || whole >> (shift + 8) == prefix >> (shift + 8);
            if (same && whole >= least) atomicAdd(&bins[whole >> shift & 255], Count(worth(x)));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = UP ? 0 : 255, last = UP ? 255 : 0, filled = bin;
            for (;; bin += UP ? 1 : -1) {
                if (bins[bin]) filled = bin;
                bool there = UP ? sum + bins[bin] > limit : sum + bins[bin] >= limit;
                if (there && bins[bin]) break;
                if (bin == last) {  // rounding: take the last filled bin
                    bin = filled;
                    sum -= bins[bin];
                    break;
                }
                sum += bins[bin];
            }
            found_bin = bin, found_sum = sum;
        }
        __syncthreads();
        prefix |= found_bin << shift;
        sum = found_sum;
    }
    *before = sum;
    return prefix;
}

template <class T> __device__ Count equal_to(const Row<T>& row, uint32_t edge, Count* space) {
    __syncthreads();
    if (threadIdx.x == 0) *space = 0;
    __syncthreads();
    Count mine = 0;
#pragma unroll 8
    for (int at = threadIdx.x; at < row.V; at += THREADS) mine += ordered(row(at)) == edge;
    atomicAdd(space, mine);
    __syncthreads();
    return *space;
}

// The inverse of `ordered`.
__device__ __forceinline__ float number_of(uint32_t whole) {
    return bits_as<float>(whole & 0x80000000u ? whole & 0x7fffffffu : ~whole);
}

// The filters of row r are those of sequence r / each. DRAW: a token of each row goes to `out`; otherwise its
// probabilities go to `probs`.
template <class T, bool DRAW>
__global__ void __launch_bounds__(THREADS)
choose(const T* logits, int64_t stride, const Key* keys, const int64_t* positions, int64_t* out, int V, const double* params,
       int each, float* probs, int64_t out_stride) {
    __shared__ Best bests[THREADS / 32];
    __shared__ float floats[THREADS / 32];
    __shared__ Count bins[BINS];
    __shared__ int ties[THREADS / 32];
    int64_t r = blockIdx.x;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    params += r / each * 4;
    const double top_k = params[1], top_p = params[2];
    const float min_p = float(params[3]);
    Row<T> row{logits + r * stride, float(params[0]), V, 0};
    float top = -INFINITY;
#pragma unroll 8
    for (int at = threadIdx.x; at < V; at += THREADS) top = fmaxf(top, row(at));
    row.top = block_max(top, floats);

    uint32_t least = 0;  // the smallest kept logit, as an ordered integer
    Count sum = 0;
    __shared__ Count all;
    const bool counted = top_k > 0 && top_k < V;
    if (counted) least = select<false>(row, 0, Count(top_k), &sum, bins, [](float) { return 1; });
    uint32_t edge = least;
    Count stay = counted ? Count(top_k) - sum : V;  // how many logits at the edge stay
    if (top_p < 1) {
        auto mass = [&](float x) { return row.mass(x); };
        // Logits that top-k drops at its edge come first in ascending order: add their mass to the limit.
        Count excess = counted ? (equal_to(row, least, &all) - stay) * mass(number_of(least)) : 0;
        __syncthreads();
        if (threadIdx.x == 0) all = 0;
        __syncthreads();
        Count mine = 0;
#pragma unroll 4
        for (int at = threadIdx.x; at < V; at += THREADS) {
            float x = row(at);
            if (ordered(x) >= least) mine += row.mass(x);
        }
        atomicAdd(&all, mine);
        __syncthreads();
        Count drop = Count((1.0 - top_p) * double(all - excess));
        edge = select<true>(row, least, drop + excess, &sum, bins, mass);
        Count each = mass(number_of(edge));
        if (!counted || edge != least) stay = equal_to(row, edge, &all);
        Count before = edge == least ? 0 : sum - excess;
        Count leave = each && drop > before ? (drop - before) / each : 0;
        stay -= min(leave, stay - 1);  // at least one stays
    }
    const bool limited = counted || top_p < 1;

    // Two passes over the kept tokens: first their mass, then the draw.
    float total = 0;
    Best best = Best::none();
    for (int pass = 0; pass < 2; pass++) {
        int passed = 0;
        float part = 0;
        for (int first = 0; first < V; first += THREADS * 4) {  // a thread has four tokens, which share one Philox block
            Words noise{};
            if (DRAW && pass) noise = words(keys[r], positions[r], SAMPLE, first / 4 + threadIdx.x);
            float x[4];
            uint32_t whole[4];
            int mine = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int at = first + threadIdx.x * 4 + i;
                x[i] = at < V ? row(at) : -INFINITY;
                whole[i] = at < V ? ordered(x[i]) : 0;
                mine += at < V && whole[i] == edge;
            }
            int before = 0;  // ties with a lower id
            if (limited) {
                int sums = mine;
                for (int by = 1; by < 32; by *= 2) {
                    int other = __shfl_up_sync(~0u, sums, by);
                    if (lane >= by) sums += other;
                }
                __syncthreads();
                if (lane == 31) ties[warp] = sums;
                __syncthreads();
                before = passed + sums - mine;
                for (int w = 0; w < THREADS / 32; w++) {
                    if (w < warp) before += ties[w];
                    passed += ties[w];
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int at = first + threadIdx.x * 4 + i;
                if (at >= V) break;
                bool keep = whole[i] > edge || (whole[i] == edge && (!limited || before < int64_t(stay)));
                before += whole[i] == edge;
                float weight = row.weight(x[i]);
                if (!keep || weight < min_p || weight <= 0) weight = 0;
                if (!pass)
                    part += weight;
                else if (!DRAW)
                    probs[r * out_stride + at] = divide(weight, total);
                else if (weight > 0)
                    best.offer(logf(divide(weight, total)) + gumbel(noise.at[i]), at);
            }
        }
        if (!pass) total = block_sum(part, floats);
    }
    if (!DRAW) return;
    best = block_best(best, bests);
    if (threadIdx.x == 0) out[r * out_stride] = best.index < V ? best.index : 0;
}

}  // namespace

void sample(int format, int64_t logits, int64_t stride, int64_t keys, int64_t positions, int64_t out, int64_t out_stride,
            int R, int64_t V, int64_t params, int64_t stream) {
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        launch(choose<T, true>, dim3(R), THREADS, 0, stream, at_address<const T>(logits), stride,
               at_address<const Key>(keys), at_address<const int64_t>(positions), at_address<int64_t>(out), V,
               at_address<const double>(params), 1, nullptr, out_stride);
    });
}

void probabilities(int format, int64_t logits, int64_t stride, int64_t out, int64_t out_stride, int N, int64_t V,
                   int64_t params, int each, int64_t stream) {
    with_float(format, [&](auto zero) {
        using T = decltype(zero);
        launch(choose<T, false>, dim3(N), THREADS, 0, stream, at_address<const T>(logits), stride, nullptr, nullptr, nullptr,
               V, at_address<const double>(params), each, at_address<float>(out), out_stride);
    });
}
