// The decoding loop in C++: several steps of several sequences in one call.
#pragma once

#include "drafters.h"

namespace lab {

struct Plan {
    std::vector<int> counts;  // draft tokens after each sequence; 0: plain decoding
    int steps = 1;            // at most so many
    std::vector<int> limits;  // of the tokens that each sequence gains; a step that could give more is not made
    double budget_ms = 0;     // return after the step that uses it up, or once the target is hurried; 0: without limit
    // Per sequence: accept while the target samples the same token (policies.py, SampleMatch); otherwise rejection.
    std::vector<bool> own;
    // Per sequence: from 0 on, accept every draft token with this probability, whatever it is (synthetic.py).
    std::vector<double> synthetic;
    std::vector<int> ends;    // return after the step in which a sequence gains one of these tokens
};

struct Result {  // of a step, for one sequence
    std::vector<int> draft;
    int accepted, next;
    int computed;  // tokens that the target computed
};

struct Decoded {  // a step
    std::vector<Result> results;
    double draft_ms, verify_ms, accept_ms;
};

// The target's hidden states, for drafters that read them.
struct States {
    float* to = nullptr;  // written one after the other, [.., (1 + taps) * width]: the last layer, then the tapped ones
    size_t room = 0;      // numbers that fit
    std::vector<int> taps;
};

// Decode. Every step drafts, computes all new tokens and all drafts in one forward, accepts, and appends.
// Afterwards the target's row of a sequence holds all its tokens but the last, followed by rejected draft tokens.
// States are those of a step's new tokens and accepted draft tokens, step by step, sequence by sequence.
std::vector<Decoded> decode(Engine& target, Batch batch, Drafter* drafter, const Plan& plan, const States& states);

}  // namespace lab
