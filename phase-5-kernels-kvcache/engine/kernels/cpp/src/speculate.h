// Speculative steps entirely in C++: one model drafts, the target computes the whole draft in one forward pass, and the
// acceptance rule says how many tokens are accepted.
#pragma once

#include "engine.h"

namespace lab {

struct Speculation {
    int count;  // draft tokens, at least one
    Sampling how;
    bool own;          // accept while the target samples the same token (policies.py, SampleMatch); else rejection
    uint32_t purpose;  // of the draft's random numbers
    int steps;         // steps in this call, at least one
};

struct Speculated {
    std::vector<int> draft;
    int accepted, next;
    int computed;  // tokens that the target computed
    double draft_ms, verify_ms, accept_ms;
};

// `sequence` is the sequence in the target's cache, `draft_sequence` in the drafter's. Writes for every step: tokens
// [count], the draft; draft_probs [count, vocab], the distributions of the draft tokens; target_probs [count + 1, vocab],
// the target's distributions after the sequence and after each draft token; ratios [count], the acceptance
// probabilities.
// Afterwards the target's row holds all tokens but the last, followed by rejected draft tokens. The drafter's row is
// the same, without the last draft token if all were accepted.
std::vector<Speculated> speculate(
    Engine& target, const View& seen, Engine::Sequence sequence, Engine& drafter, const View& drafting,
    Engine::Sequence draft_sequence, const Speculation& what, int64_t* tokens, float* draft_probs, float* target_probs, float* ratios
);

}  // namespace lab
