// Steps of speculative decoding with nothing but C++ in them: one model drafts, the other looks at the whole draft at
// once, and the rule of acceptance says which of it stands.
#pragma once

#include "engine.h"

namespace lab {

struct Speculation {
    int count;  // draft tokens, at least one
    Sampling how;
    bool own;          // a token stands while the target draws the same (policies.py, OwnChoice); else by rejection
    uint32_t purpose;  // of the draft's random numbers
    int steps;         // one after the other, at least one
};

struct Speculated {
    std::vector<int> draft;
    int accepted, next;
    int computed;  // tokens that went through the target
    double draft_ms, verify_ms, accept_ms;
};

// `text` as the target holds it, `behind` as the drafter does. Written, for every step: tokens [count], the draft;
// draft_probs [count, vocab], what each was drawn from; target_probs [count + 1, vocab], what is sampled from behind the
// text and each token; ratios [count], the probability with which each was to stand. Afterwards the target's row has
// keys and values of all that stood but the last token, and behind them of a draft; the drafter's row likewise, without
// the last token of a draft that stood as a whole.
std::vector<Speculated> speculate(
    Engine& target, const View& seen, Engine::Text text, Engine& drafter, const View& drafting, Engine::Text behind,
    const Speculation& what, int64_t* tokens, float* draft_probs, float* target_probs, float* ratios
);

}  // namespace lab
