// From logits to a token, and the acceptance rule of speculative sampling: engine/sampling.py and engine/verify.py for
// one row, with the same keyed random numbers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace lab {

struct Sampling {
    double temperature = 0;
    int top_k = 0;
    double top_p = 1, min_p = 0;
    uint64_t seed = 0;

    void check() const;  // std::invalid_argument for what cannot be
    bool filtered(int vocab) const { return (top_k > 0 && top_k < vocab) || top_p < 1 || min_p > 0; }
};

enum Purpose : uint32_t { SAMPLE = 0, DRAFT = 1, ACCEPT = 2, RESIDUAL = 3 };

// A uniform number in (0, 1): word `index` of what common/philox.py gives for these keys.
float uniform(uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose, uint32_t index);

// Whether logits hold no NaN and no infinity; -infinity is allowed beside finite ones. The other throws
// std::overflow_error, as everything here does that is given such logits.
bool is_finite(const float* logits, int count);
void need_finite(const float* logits, int count);

// x [vocab]: logits in, probabilities out.
void probabilities(const Isa& isa, float* x, int vocab, const Sampling& how);

// Gumbel-max over probabilities.
int draw_gumbel(const Isa& isa, const float* probs, int vocab, uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose);
// One uniform number and the inverse distribution function.
int draw_inverse(const float* probs, int vocab, uint64_t seed, uint32_t sample, uint32_t position, uint32_t purpose);

// The next token of plain decoding from logits; `spare` [vocab] is written only where probabilities are needed.
int choose(const Isa& isa, const float* logits, int vocab, const Sampling& how, uint32_t sample, uint32_t position, float* spare);

// Of a draft, how many tokens stand by rejection; ratios [count] is written: the probability with which each was to.
int stand(
    const int64_t* draft, int count, const float* draft_probs, const float* target_probs, int vocab, uint64_t seed,
    uint32_t sample, uint32_t position, bool certain, float* ratios
);

// What follows in place of `fallen`, the first that fell: from max(0, target - draft), both [vocab]; `draft` null for
// one-hot. spare [vocab] is written.
int draw_residual(
    const Isa& isa, const float* target, const float* draft, int64_t fallen, int vocab, uint64_t seed, uint32_t sample,
    uint32_t position, bool certain, float* spare
);

struct Stood {
    int accepted, next;
};

// draft_probs [count, vocab], null for one-hot; target_probs [count + 1, vocab]; `certain`: temperature 0. ratios
// [count] and spare [vocab] are written.
Stood verify(
    const Isa& isa, const int64_t* draft, int count, const float* draft_probs, const float* target_probs, int vocab,
    uint64_t seed, uint32_t sample, uint32_t position, bool certain, float* ratios, float* spare
);

}  // namespace lab
