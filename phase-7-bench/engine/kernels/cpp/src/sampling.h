// Sampling from logits, and the acceptance rule of speculative sampling: engine/sampling.py and engine/verify.py for
// one row, with the same keyed random numbers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace lab {

struct Sampling {
    double temperature = 0;
    int top_k = 0;
    double top_p = 1, min_p = 0;
    uint64_t seed = 0;

    void check() const;  // std::invalid_argument for values out of range
    bool filtered(int vocab) const { return (top_k > 0 && top_k < vocab) || top_p < 1 || min_p > 0; }
};

enum Purpose : uint32_t { SAMPLE = 0, DRAFT = 1, ACCEPT = 2, RESIDUAL = 3 };

// A uniform number in (0, 1): word `index` of common/philox.py's output for these keys.
float uniform(uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose, uint32_t index);

// is_finite: true without NaN and +infinity, and with at least one finite logit. need_finite and all functions below
// that read logits throw std::overflow_error otherwise.
bool is_finite(const float* logits, int count);
void need_finite(const float* logits, int count);

// Convert x [vocab] in place from logits to probabilities.
void probabilities(const Isa& isa, float* x, int vocab, const Sampling& how);

// Sample by Gumbel-max over probabilities.
int draw_gumbel(const Isa& isa, const float* probs, int vocab, uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose);
// Sample with one uniform number and the inverse distribution function.
int draw_inverse(const float* probs, int vocab, uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose);

// Choose the next token of plain decoding from logits; `spare` [vocab] is scratch memory.
int choose(const Isa& isa, const float* logits, int vocab, const Sampling& how, uint32_t sample, uint32_t position, float* spare);

// The probability with which a draft token is accepted, from rows [vocab]; `draft` null for one-hot.
inline float acceptance(const float* target, const float* draft, int64_t token) {
    return draft == nullptr ? target[token] : std::min(target[token] / draft[token], 1.0f);
}

// Return how many draft tokens are accepted by rejection sampling; writes their acceptance probabilities to ratios
// [count].
int count_accepted(
    const int64_t* draft, int count, const float* draft_probs, const float* target_probs, int vocab, uint64_t seed,
    uint32_t sample, uint32_t position, bool certain, float* ratios
);

// Sample the token that replaces `rejected`, from max(0, target - draft), both [vocab]; `draft` null for one-hot. spare
// [vocab] is scratch memory.
int draw_residual(
    const Isa& isa, const float* target, const float* draft, int64_t rejected, int vocab, uint64_t seed, uint32_t sample,
    uint32_t position, bool certain, float* spare
);

struct Accepted {
    int accepted, next;  // number of accepted draft tokens, and the token that follows them
};

// Apply the acceptance rule to a draft. draft_probs [count, vocab], null for one-hot; target_probs [count + 1, vocab];
// `certain`: temperature 0. Writes ratios [count]; spare [vocab] is scratch memory.
Accepted verify(
    const Isa& isa, const int64_t* draft, int count, const float* draft_probs, const float* target_probs, int vocab,
    uint64_t seed, uint32_t sample, uint32_t position, bool certain, float* ratios, float* spare
);

}  // namespace lab
