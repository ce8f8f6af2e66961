// draw: a token from each distribution. verify_sample: the acceptance rule of ../../verify.py. One block per row, keyed
// random numbers.
//
// All threads visit the draft tokens up to the first rejected one. The next token is then sampled: from the target by
// Gumbel-max if all were accepted, else from the residual by one uniform and the inverse distribution function in
// float64.
#include "choice.cuh"
#include "ops.h"
#include "philox.cuh"

namespace {

constexpr int THREADS = 512;

// The residual after a rejected token: max(0, target - draft); a draft without probabilities is one-hot.
struct Residual {
    const float *target, *draft;
    int64_t token;
    __device__ __forceinline__ float operator()(int at) const {
        if (draft) return fmaxf(target[at] - draft[at], 0.0f);
        return at == token ? 0.0f : target[at];
    }
};

// Gumbel-max: argmax of log p plus noise keyed by position and token; four tokens share one Philox block.
__device__ int drawn(const float* probs, const Key& key, int64_t position, int V, Best* space) {
    Best best = Best::none();
    for (int block = threadIdx.x; block * 4 < V; block += THREADS) {
        Words noise = words(key, position, SAMPLE, block);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = block * 4 + i;
            if (at < V && probs[at] > 0) best.offer(logf(probs[at]) + gumbel(noise.at[i]), at);
        }
    }
    best = block_best(best, space);
    return best.index < V ? best.index : 0;
}

// The inverse distribution function: the number of the V sums p(0) + .. + p(i) that are at most `limit`.
template <class P> __device__ int below(const P& p, double limit, int V, double* space) {
    __shared__ int counts[THREADS / 32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = 0;
    double before = 0;
    for (int first = 0; first < V; first += THREADS) {
        int at = first + threadIdx.x;
        double sum = at < V ? double(p(at)) : 0.0;
        for (int by = 1; by < 32; by *= 2) {
            double other = __shfl_up_sync(~0u, sum, by);
            if (lane >= by) sum += other;
        }
        __syncthreads();
        if (lane == 31) space[warp] = sum;
        __syncthreads();
        double all = before;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w == warp) sum += all;
            all += space[w];
        }
        if (at < V && sum <= limit) number++;
        before = all;
    }
    number = warp_sum(number);
    __syncthreads();
    if (lane == 0) counts[warp] = number;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < THREADS / 32; w++) total += counts[w];
    return total;
}

template <class P> __device__ double mass_of(const P& p, int V, double* space) {
    double sum = 0;
    for (int at = threadIdx.x; at < V; at += THREADS) sum += double(p(at));
    return block_sum(sum, space);
}

template <class P> __device__ int most(const P& p, int V, Best* space) {
    Best best = Best::none();
    for (int at = threadIdx.x; at < V; at += THREADS) best.offer(p(at), at);
    return block_best(best, space).index;
}

__global__ void __launch_bounds__(THREADS)
verify(const int64_t* tokens, const float* draft, const float* target, const int64_t* widths, const Key* keys,
       const int64_t* positions, int64_t* accepted, int64_t* following, float* ratios, int K, int V, bool certain) {
    __shared__ Best bests[THREADS / 32];
    __shared__ double sums[THREADS / 32];
    int64_t r = blockIdx.x, width = min(widths[r], int64_t(K));
    Key key = keys[r];
    int64_t position = positions[r];
    int count = 0;
    bool accepting = true;
    for (int k = 0; k < K; k++) {
        int64_t token = tokens[r * K + k];
        float ratio = target[(r * (K + 1) + k) * V + token];
        if (draft) {
            ratio = divide(ratio, draft[(r * K + k) * V + token]);
            if (ratio > 1) ratio = 1;
        }
        if (threadIdx.x == 0) ratios[r * K + k] = ratio;
        float chance = certain ? 0.5f : uniform(words(key, position + k, ACCEPT, 0).at[0]);
        accepting = accepting && k < width && chance < ratio;
        count += accepting;
    }
    const float* here = target + (r * (K + 1) + count) * V;
    auto whole = [&](int at) { return here[at]; };
    int next;
    if (count == width) {
        next = certain ? most(whole, V, bests) : drawn(here, key, position + count, V, bests);
    } else {
        Residual residual{here, draft ? draft + (r * K + count) * V : nullptr, tokens[r * K + count]};
        double mass = mass_of(residual, V, sums);
        // Rounding can reject a token whose ratio differs from 1 in the last bit. The residual is then empty, and the
        // next token is sampled from the target.
        bool empty = mass <= 0;
        if (empty) mass = mass_of(whole, V, sums);
        if (certain) {
            next = empty ? most(whole, V, bests) : most(residual, V, bests);
        } else {
            double limit = mass * double(uniform(words(key, position + count, RESIDUAL, 0).at[0]));
            next = min(empty ? below(whole, limit, V, sums) : below(residual, limit, V, sums), V - 1);
        }
    }
    if (threadIdx.x == 0) accepted[r] = count, following[r] = next;
}

// Row n draws at position n % each + first after the one of its sequence, n / each.
__global__ void __launch_bounds__(THREADS)
draw_rows(const float* probs, int64_t stride, const Key* keys, const int64_t* positions, int64_t* out, int64_t out_stride,
          int V, int each, int first, int purpose) {
    __shared__ Best bests[THREADS / 32];
    __shared__ double sums[THREADS / 32];
    int64_t n = blockIdx.x;
    const float* here = probs + n * stride;
    auto whole = [&](int at) { return here[at]; };
    Key key = keys[n / each];
    int64_t position = positions[n / each] + first + n % each;
    int token;
    if (purpose == SAMPLE) {
        token = drawn(here, key, position, V, bests);
    } else {
        double limit = mass_of(whole, V, sums) * double(uniform(words(key, position, purpose, 0).at[0]));
        token = min(below(whole, limit, V, sums), V - 1);
    }
    if (threadIdx.x == 0) out[n * out_stride] = token;
}

}  // namespace

void draw(int64_t probs, int64_t stride, int64_t keys, int64_t positions, int64_t out, int64_t out_stride, int N, int64_t V,
          int each, int first, int purpose, int64_t stream) {
    launch(draw_rows, dim3(N), THREADS, 0, stream, at_address<const float>(probs), stride, at_address<const Key>(keys),
           at_address<const int64_t>(positions), at_address<int64_t>(out), out_stride, V, each, first, purpose);
}

void verify_sample(int64_t tokens, int64_t draft, int64_t target, int64_t widths, int64_t keys, int64_t positions,
                   int64_t accepted, int64_t following, int64_t ratios, int R, int K, int64_t V, bool certain, int64_t stream) {
    launch(verify, dim3(R), THREADS, 0, stream, at_address<const int64_t>(tokens), at_address<const float>(draft),
           at_address<const float>(target), at_address<const int64_t>(widths), at_address<const Key>(keys),
           at_address<const int64_t>(positions), at_address<int64_t>(accepted), at_address<int64_t>(following),
           at_address<float>(ratios), K, V, certain);
}
