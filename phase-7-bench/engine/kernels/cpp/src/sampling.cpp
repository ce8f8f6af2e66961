#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace lab {

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

void softmax(const Isa& isa, float* x, int count) {
    const float most = x[isa.largest(x, count)];
    const float share = float(1 / isa.exponentials(x, count, most));
    for (int i = 0; i < count; ++i) x[i] *= share;
}

}  // namespace

void Sampling::check() const {
    const bool good = temperature >= 0 && temperature <= std::numeric_limits<double>::max() && top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
    if (!good) throw std::invalid_argument("no such way of sampling");
}

bool is_finite(const float* x, int count) {
    bool broken = false, any = false;
    for (int i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        broken |= (bits & 0x7fffffff) > 0x7f800000 || bits == 0x7f800000;  // NaN, infinity
        any |= bits != 0xff800000;                                        // not -infinity, which excludes a token
    }
    return any && !broken;
}

void need_finite(const float* logits, int count) {
    if (!is_finite(logits, count)) throw std::overflow_error("the logits are not finite");
}

float uniform(uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose, uint32_t index) {
    uint32_t a = index / 4, b = position, c = sample, d = purpose;
    uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t(a) * 0xD2511F53u, second = uint64_t(c) * 0xCD9E8D57u;
        a = uint32_t(second >> 32) ^ b ^ low;
        b = uint32_t(second);
        c = uint32_t(first >> 32) ^ d ^ high;
        d = uint32_t(first);
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    const uint32_t words[4] = {a, b, c, d};
    return (float(words[index % 4] >> 9) + 0.5f) * 1.1920928955078125e-7f;
}

void probabilities(const Isa& isa, float* x, int vocab, const Sampling& how) {
    need_finite(x, vocab);
    if (how.temperature == 0) {
        const int best = isa.largest(x, vocab);
        std::fill(x, x + vocab, 0.0f);
        x[best] = 1;
        return;
    }
    const float temperature = float(how.temperature);
    if (temperature != 1)
        for (int i = 0; i < vocab; ++i) x[i] /= temperature;
    if (how.top_k > 0 && how.top_k < vocab) {
        std::vector<float> sorted(x, x + vocab);
        std::nth_element(sorted.begin(), sorted.begin() + how.top_k - 1, sorted.end(), std::greater<float>());
        const float smallest = sorted[size_t(how.top_k) - 1];
        auto room = how.top_k - std::count_if(x, x + vocab, [smallest](float y) { return y > smallest; });
        for (int i = 0; i < vocab; ++i)  // ties at the edge: the lower ids stay
            if (x[i] < smallest || (x[i] == smallest && room-- <= 0)) x[i] = NEVER;
    }
    if (how.top_p < 1) {
        std::vector<int> order(static_cast<size_t>(vocab));
        std::iota(order.begin(), order.end(), 0);
        // Ties: the higher id comes first, and is dropped first.
        std::sort(order.begin(), order.end(), [x](int a, int b) { return x[a] < x[b] || (x[a] == x[b] && a > b); });
        std::vector<float> probs(x, x + vocab);
        softmax(isa, probs.data(), vocab);
        const float limit = float(1 - how.top_p);
        double sum = 0;
        for (int i = 0; i < vocab - 1; ++i) {  // the most likely token always stays
            sum += probs[size_t(order[size_t(i)])];
            if (float(sum) > limit) break;
            x[order[size_t(i)]] = NEVER;
        }
    }
    if (how.min_p <= 0) return softmax(isa, x, vocab);
    std::vector<float> logits(x, x + vocab);
    softmax(isa, x, vocab);
    const float least = float(how.min_p) * x[isa.largest(x, vocab)];
    for (int i = 0; i < vocab; ++i)
        if (x[i] < least) logits[size_t(i)] = NEVER;
    std::copy(logits.begin(), logits.end(), x);
    softmax(isa, x, vocab);
}

int draw_gumbel(
    const Isa& isa, const float* probs, int vocab, uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose
) {
    std::vector<float> logs(static_cast<size_t>(vocab));
    for (int i = 0; i < vocab; ++i) logs[size_t(i)] = probs[i] > 0 ? std::log(probs[i]) : NEVER;
    const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)}, counter[3] = {position, sample, purpose};
    float best;
    return isa.gumbel(logs.data(), 0, vocab, 1, key, counter, &best);
}

int draw_inverse(const float* probs, int vocab, uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose) {
    // Sum by blocks: one sequential sum would wait for every addition.
    constexpr int BLOCK = 32;
    std::vector<double> sums;
    double total = 0;
    for (int from = 0; from < vocab; from += BLOCK) {
        double lanes[8] = {};
        const int until = std::min(vocab, from + BLOCK);
        for (int i = from; i < until; ++i) lanes[(i - from) % 8] += probs[i];
        sums.push_back(((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7])));
        total += sums.back();
    }
    const double wanted = double(uniform(seed, sample, position, purpose, 0)) * total;
    double sum = 0;
    size_t block = 0;
    while (block + 1 < sums.size() && sum + sums[block] <= wanted) sum += sums[block++];
    int last = vocab - 1;  // if rounding leaves no mass: the last token with a probability
    for (int i = int(block) * BLOCK; i < vocab; ++i) {
        if (probs[i] > 0) last = i;
        sum += probs[i];
        if (sum > wanted) return i;
    }
    return last;
}

int choose(
    const Isa& isa, const float* logits, int vocab, const Sampling& how, uint32_t sample, uint32_t position, float* spare
) {
    need_finite(logits, vocab);
    if (how.temperature == 0) return isa.largest(logits, vocab);
    if (how.filtered(vocab)) {
        std::copy(logits, logits + vocab, spare);
        probabilities(isa, spare, vocab, how);
        return draw_gumbel(isa, spare, vocab, how.seed, sample, position, SAMPLE);
    }
    // argmax(log p + noise) = argmax(logit / temperature + noise): a common offset does not change the argmax.
    const uint32_t key[2] = {uint32_t(how.seed), uint32_t(how.seed >> 32)}, counter[3] = {position, sample, SAMPLE};
    float best;
    return isa.gumbel(logits, 0, vocab, float(1 / how.temperature), key, counter, &best);
}

int count_accepted(
    const int64_t* draft, int count, const float* draft_probs, const float* target_probs, int vocab, uint64_t seed,
    uint32_t sample, uint32_t position, bool certain, float* ratios
) {
    int accepted = count;
    for (int i = 0; i < count; ++i) {
        const size_t row = size_t(i) * size_t(vocab);
        ratios[i] = acceptance(target_probs + row, draft_probs == nullptr ? nullptr : draft_probs + row, draft[i]);
        const float least = certain ? 0.5f : uniform(seed, sample, position + uint32_t(i), ACCEPT, 0);
        if (!(least < ratios[i]) && accepted == count) accepted = i;
    }
    return accepted;
}

int draw_residual(
    const Isa& isa, const float* target, const float* draft, int64_t rejected, int vocab, uint64_t seed, uint32_t sample,
    uint32_t position, bool certain, float* spare
) {
    std::copy(target, target + vocab, spare);
    if (draft == nullptr) spare[rejected] = 0;
    else
        for (int i = 0; i < vocab; ++i) spare[i] = std::max(0.0f, spare[i] - draft[i]);
    // Rounding can reject a token whose ratio differs from 1 in the last bit; the residual is then empty.
    const float* residual = spare[isa.largest(spare, vocab)] > 0 ? spare : target;
    if (certain) return isa.largest(residual, vocab);
    return draw_inverse(residual, vocab, seed, sample, position, RESIDUAL);
}

Accepted verify(
    const Isa& isa, const int64_t* draft, int count, const float* draft_probs, const float* target_probs, int vocab,
    uint64_t seed, uint32_t sample, uint32_t position, bool certain, float* ratios, float* spare
) {
    const int accepted = count_accepted(draft, count, draft_probs, target_probs, vocab, seed, sample, position, certain, ratios);
    const size_t row = size_t(accepted) * size_t(vocab);
    const float* following = target_probs + row;
    const uint32_t at = position + uint32_t(accepted);
    if (accepted < count) {
        const float* own = draft_probs == nullptr ? nullptr : draft_probs + row;
        return {accepted, draw_residual(isa, following, own, draft[accepted], vocab, seed, sample, at, certain, spare)};
    }
    if (certain) return {accepted, isa.largest(following, vocab)};
    return {accepted, draw_gumbel(isa, following, vocab, seed, sample, at, SAMPLE)};
}

}  // namespace lab
