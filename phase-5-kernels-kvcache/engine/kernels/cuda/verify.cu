// verify_sample: the whole rule of ../../verify.py for a row in one block, with the keyed uniforms.
//
// All threads walk the draft until a token falls; then they draw what follows: from the target by Gumbel-max if all
// stand, else from the residual by one uniform and the inverse distribution function, added up in float64 as there.
#include "choice.cuh"
#include "ops.h"
#include "philox.cuh"

namespace {

constexpr int THREADS = 512;

// What is left of the target where a token fell: max(0, target - draft); a draft without probabilities is one-hot.
struct Residual {
    const float *target, *draft;
    int64_t token;
    __device__ __forceinline__ float operator()(int at) const {
        if (draft) return fmaxf(target[at] - draft[at], 0.0f);
        return at == token ? 0.0f : target[at];
    }
};

// argmax of log p plus noise, keyed by the position and the token: four tokens share a block of the cipher.
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

// How many of the V sums p(0) + .. + p(i) are at most `limit`: the place that the inverse distribution function gives.
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
       int64_t* accepted, int64_t* following, float* ratios, int K, int V, bool certain) {
    __shared__ Best bests[THREADS / 32];
    __shared__ double sums[THREADS / 32];
    int64_t r = blockIdx.x, width = min(widths[r], int64_t(K));
    Key key = keys[r];
    int stood = 0;
    bool standing = true;
    for (int k = 0; k < K; k++) {
        int64_t token = tokens[r * K + k];
        float ratio = target[(r * (K + 1) + k) * V + token];
        if (draft) {
            ratio = divide(ratio, draft[(r * K + k) * V + token]);
            if (ratio > 1) ratio = 1;
        }
        if (threadIdx.x == 0) ratios[r * K + k] = ratio;
        float chance = certain ? 0.5f : uniform(words(key, key.position + k, ACCEPT, 0).at[0]);
        standing = standing && k < width && chance < ratio;
        stood += standing;
    }
    const float* here = target + (r * (K + 1) + stood) * V;
    auto whole = [&](int at) { return here[at]; };
    int next;
    if (stood == width) {
        next = certain ? most(whole, V, bests) : drawn(here, key, key.position + stood, V, bests);
    } else {
        Residual residual{here, draft ? draft + (r * K + stood) * V : nullptr, tokens[r * K + stood]};
        double mass = mass_of(residual, V, sums);
        // Rounding can reject a token whose ratio is 1 but for the last bit; the residual is then empty, and the target
        // is drawn from.
        bool empty = mass <= 0;
        if (empty) mass = mass_of(whole, V, sums);
        if (certain) {
            next = empty ? most(whole, V, bests) : most(residual, V, bests);
        } else {
            double limit = mass * double(uniform(words(key, key.position + stood, RESIDUAL, 0).at[0]));
            next = min(empty ? below(whole, limit, V, sums) : below(residual, limit, V, sums), V - 1);
        }
    }
    if (threadIdx.x == 0) accepted[r] = stood, following[r] = next;
}

}  // namespace

void verify_sample(int64_t tokens, int64_t draft, int64_t target, int64_t widths, int64_t keys, int64_t accepted,
                   int64_t following, int64_t ratios, int R, int K, int64_t V, bool certain, int64_t stream) {
    launch(verify, dim3(R), THREADS, 0, stream, at_address<const int64_t>(tokens), at_address<const float>(draft),
           at_address<const float>(target), at_address<const int64_t>(widths), at_address<const Key>(keys),
           at_address<int64_t>(accepted), at_address<int64_t>(following), at_address<float>(ratios), K, V, certain);
}
