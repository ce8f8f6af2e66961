#include "speculate.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace lab {

namespace {

double ms_since(std::chrono::steady_clock::time_point& last) {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double, std::milli> took = now - last;
    last = now;
    return took.count();
}

// Append `tokens` to the sequence; the first `held` of them are in the model's row.
void advance(Engine::Sequence& sequence, const std::vector<int>& tokens, int held) {
    sequence.held += int(sequence.new_tokens.size()) + held;
    sequence.new_tokens.assign(tokens.begin() + held, tokens.end());
    sequence.position += int(tokens.size());
}

Speculated one(
    Engine& target, const View& seen, const Engine::Sequence& sequence, Engine& drafter, const View& drafting,
    const Engine::Sequence& draft_sequence, const Speculation& what, int64_t* tokens, float* draft_probs,
    float* target_probs, float* ratios
) {
    const size_t vocab = size_t(target.model.vocab), count = size_t(what.count);
    auto last = std::chrono::steady_clock::now();
    Speculated done{};
    done.draft = drafter.draft(drafting, draft_sequence, what.count, what.how, what.purpose, draft_probs);
    std::copy(done.draft.begin(), done.draft.end(), tokens);
    done.draft_ms = ms_since(last);

    Request request = Engine::following(sequence, target_probs);
    const int held = request.held[0] + request.counts[0];
    for (size_t i = 0; i < count; ++i) {
        request.tokens.push_back(done.draft[i]);
        request.positions.push_back(held + int(i));
        request.wanted.push_back(request.counts[0] + int(i));
    }
    request.counts[0] += what.count;
    done.computed = request.counts[0];
    target.step(seen, request);
    done.verify_ms = ms_since(last);

    // Choose the target's own tokens from logits, as plain decoding does, to get the same bits.
    const bool greedy = what.how.temperature == 0;
    auto own = [&](int i) { return target.choose_plain(target_probs + size_t(i) * vocab, what.how, sequence.sample, sequence.position + i); };
    if (what.own || greedy) {
        while (done.next = own(done.accepted), done.accepted < what.count && done.next == done.draft[size_t(done.accepted)])
            done.accepted += 1;
        target.to_probabilities(target_probs, what.count + 1, what.how);
        for (size_t i = 0; i < count; ++i) ratios[i] = target_probs[i * vocab + size_t(done.draft[i])];
    } else {
        const float* last_row = target_probs + count * vocab;
        const std::vector<float> bonus(last_row, last_row + vocab);
        target.to_probabilities(target_probs, what.count + 1, what.how);
        const uint32_t sample = uint32_t(sequence.sample), position = uint32_t(sequence.position);
        const int V = int(vocab);
        done.accepted = count_accepted(tokens, what.count, draft_probs, target_probs, V, what.how.seed, sample, position, false, ratios);
        if (done.accepted == what.count) {
            done.next = target.choose_plain(bonus.data(), what.how, sequence.sample, sequence.position + what.count);
        } else {
            std::vector<float> residual(vocab);
            const size_t row = size_t(done.accepted);
            done.next = draw_residual(
                *target.isa, target_probs + row * vocab, draft_probs + row * vocab, tokens[row], V, what.how.seed, sample,
                position + uint32_t(done.accepted), false, residual.data()
            );
        }
    }
    done.accept_ms = ms_since(last);
    return done;
}

}  // namespace

std::vector<Speculated> speculate(
    Engine& target, const View& seen, Engine::Sequence sequence, Engine& drafter, const View& drafting,
    Engine::Sequence draft_sequence, const Speculation& what, int64_t* tokens, float* draft_probs, float* target_probs, float* ratios
) {
    if (what.count < 1 || what.steps < 1) throw std::invalid_argument("a draft has at least one token, and there is at least one step");
    if (target.model.vocab != drafter.model.vocab) throw std::invalid_argument("the models have different vocabularies");
    if (what.count > 1 << 20 || what.steps > 1 << 20) throw std::invalid_argument("that many tokens or steps are absurd");
    if (&target == &drafter || seen.keys == drafting.keys) throw std::invalid_argument("each model has a cache of its own");
    if (tokens == nullptr || draft_probs == nullptr || target_probs == nullptr || ratios == nullptr)
        throw std::invalid_argument("tokens or distributions have no memory");
    const size_t vocab = size_t(target.model.vocab), count = size_t(what.count);
    std::vector<Speculated> steps;
    for (int step = 0; step < what.steps; ++step) {
        steps.push_back(one(target, seen, sequence, drafter, drafting, draft_sequence, what, tokens, draft_probs, target_probs, ratios));
        const Speculated& done = steps.back();
        std::vector<int> gained(done.draft.begin(), done.draft.begin() + done.accepted);
        gained.push_back(done.next);
        advance(sequence, gained, done.accepted);
        advance(draft_sequence, gained, std::min(done.accepted, what.count - 1));
        tokens += count, ratios += count, draft_probs += count * vocab, target_probs += (count + 1) * vocab;
    }
    return steps;
}

}  // namespace lab
