// A step of speculative decoding with nothing but C++ in it: one model drafts, the other looks at the whole draft at
// once, and the rule of acceptance says which of it stands.
#pragma once

#include "engine.h"

namespace lab {

struct Speculation {
    int count;  // draft tokens, at least one
    Sampling how;
    bool own;          // a token stands while the target draws the same (policies.py, OwnChoice); else by rejection
    uint32_t purpose;  // of the draft's random numbers
};

struct Speculated {
    std::vector<int> draft;
    int accepted, next;
    double draft_ms, verify_ms;
};

// `text` as the target holds it, `behind` as the drafter does. Written: tokens [count], the draft; draft_probs [count, vocab], what each token was
// drawn from; target_probs [count + 1, vocab], what is sampled from behind the text and each token; ratios [count], the
// probability with which each was to stand. Afterwards the target's row has keys and values of the text and of the whole
// draft, the drafter's of all of it but the last.
Speculated speculate(
    Engine& target, const View& seen, const Engine::Text& text, Engine& drafter, const View& drafting,
    const Engine::Text& behind, const Speculation& what, int64_t* tokens, float* draft_probs, float* target_probs, float* ratios
);

}  // namespace lab
