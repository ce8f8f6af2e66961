#include "decode.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "need.h"

namespace lab {

namespace {

double ms_since(std::chrono::steady_clock::time_point& last) {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double, std::milli> took = now - last;
    last = now;
    return took.count();
}

// A forward of the target over all sequences and their drafts.
struct Forward {
    Request request;
    std::vector<int> first;          // per sequence: the number of its first new token
    std::vector<const float*> rows;  // per sequence: logits after its last new token, then after each draft token
};

Forward forward(Engine& target, const Batch& batch, const std::vector<Drafted>& drafts, const std::vector<int>* taps, std::vector<float>* memory) {
    const size_t vocab = size_t(target.model.vocab), width = size_t(target.model.width);
    Forward made;
    Request& request = made.request;
    std::vector<size_t> at;
    for (size_t r = 0; r < batch.size(); ++r) {
        Request mine = Engine::following(batch, {int(r)});
        const int first = int(request.tokens.size()), count = mine.counts[0];
        for (size_t i = 0; i < drafts[r].tokens.size(); ++i) {
            mine.tokens.push_back(drafts[r].tokens[i]);
            mine.positions.push_back(mine.rows[0].held + count + int(i));
        }
        made.first.push_back(first);
        at.push_back(request.wanted.size() + size_t(taps != nullptr ? count - 1 : 0));
        for (int i = taps != nullptr ? 0 : count - 1; i < int(mine.tokens.size()); ++i) request.wanted.push_back(first + i);
        request.tokens.insert(request.tokens.end(), mine.tokens.begin(), mine.tokens.end());
        request.positions.insert(request.positions.end(), mine.positions.begin(), mine.positions.end());
        request.counts.push_back(int(mine.tokens.size()));
        request.rows.push_back(std::move(mine.rows[0]));
    }
    auto room = [&](int of, size_t each) {
        if (memory[of].size() < request.wanted.size() * each) memory[of].resize(request.wanted.size() * each);
        return memory[of].data();
    };
    request.logits = room(0, vocab);
    if (taps != nullptr) {
        request.hidden = room(1, width);
        request.taps = *taps;
        if (!taps->empty()) request.tapped = room(2, width * taps->size());
    }
    target.step(request);
    for (size_t from : at) made.rows.push_back(request.logits + from * vocab);
    return made;
}

// Accept the drafts. Target rows of rejection become probabilities, but for the last, which plain decoding chooses from.
void accept(Engine& target, const Batch& batch, const std::vector<Drafted>& drafts, const std::vector<const float*>& rows, const std::vector<bool>& own, std::vector<Result>& results) {
    const int vocab = target.model.vocab;
    auto by_choice = [&](size_t r) { return own[r] || batch[r].how.temperature == 0; };
    std::vector<std::pair<float*, const Sampling*>> converted;
    for (size_t r = 0; r < batch.size(); ++r)
        for (size_t i = 0; !by_choice(r) && i < drafts[r].tokens.size(); ++i)
            converted.emplace_back(const_cast<float*>(rows[r]) + i * size_t(vocab), &batch[r].how);
    target.each(int(converted.size()), [&](int item, float*) {
        probabilities(*target.isa, converted[size_t(item)].first, vocab, *converted[size_t(item)].second);
    });
    target.each(int(batch.size()), [&](int item, float* spare) {
        const size_t r = size_t(item);
        const Sequence& sequence = batch[r];
        const std::vector<int>& draft = drafts[r].tokens;
        Result& result = results[r];
        const int count = int(draft.size());
        auto chosen = [&](int i) { return target.choose_plain(rows[r] + size_t(i) * size_t(vocab), sequence, sequence.position + i, spare); };
        if (by_choice(r)) {
            while (result.next = chosen(result.accepted), result.accepted < count && result.next == draft[size_t(result.accepted)])
                result.accepted += 1;
            return;
        }
        const uint32_t sample = uint32_t(sequence.sample), position = uint32_t(sequence.position);
        const bool certain = drafts[r].probs.empty();  // one-hot: the caller's tokens
        for (int& i = result.accepted; i < count; ++i) {
            const float* target_row = rows[r] + size_t(i) * size_t(vocab);
            const float* draft_row = certain ? nullptr : drafts[r].probs[size_t(i)];
            const int token = draft[size_t(i)];
            if (uniform(sequence.how.seed, sample, position + uint32_t(i), ACCEPT, 0) < acceptance(target_row, draft_row, token)) continue;
            std::vector<float> residual(static_cast<size_t>(vocab));
            result.next = draw_residual(
                *target.isa, target_row, draft_row, token, vocab, sequence.how.seed, sample, position + uint32_t(i), false, residual.data()
            );
            return;
        }
        result.next = chosen(count);
    });
}

// Copy the states of a sequence's new and accepted tokens; return how many.
int copy_states(const Request& request, int first, int count, int width, float* to) {
    const size_t D = size_t(width), size = D * (1 + request.taps.size());
    for (int i = 0; i < count; ++i, to += size) {
        std::copy_n(request.hidden + size_t(first + i) * D, D, to);
        if (!request.taps.empty()) std::copy_n(request.tapped + size_t(first + i) * (size - D), size - D, to + D);
    }
    return count;
}

void check(Engine& target, const Batch& batch, Drafter* drafter, const Plan& plan) {
    need(!batch.empty(), "there are no sequences");
    need(plan.counts.size() == batch.size(), "sequences and counts differ in number");
    need(plan.own.size() == batch.size(), "sequences and rules differ in number");
    need(plan.limits.size() == batch.size(), "sequences and limits differ in number");
    need(plan.budget_ms >= 0, "the time of a call is below 0 or not a number");
    need(plan.steps >= 1 && plan.steps <= 1 << 20, "there is at least one step, and no absurd number of them");
    for (int count : plan.counts) need(count >= 0 && count <= 1 << 20, "a number of draft tokens is below 0 or absurd");
    for (size_t r = 0; r < batch.size(); ++r) need(plan.limits[r] > plan.counts[r], "a limit is below what a step may give");
    if (drafter == nullptr) {
        need(std::accumulate(plan.counts.begin(), plan.counts.end(), 0) == 0, "nobody drafts");
        return;
    }
    need(drafter->sequences() == int(batch.size()), "the drafter has other sequences");
    need(target.model.vocab == drafter->engine().model.vocab, "the models have different vocabularies");
    for (const Sequence& sequence : batch) {
        need(sequence.row.view != nullptr, "a row has no cache");
        need(drafter->keys() != sequence.row.view->keys.front(), "each model has a cache of its own");
    }
}

}  // namespace

std::vector<Decoded> decode(Engine& target, Batch batch, Drafter* drafter, const Plan& plan, const States& states) {
    check(target, batch, drafter, plan);
    std::unique_lock<std::recursive_mutex> mine(target.mutex, std::defer_lock), its(drafter == nullptr ? target.mutex : drafter->engine().mutex, std::defer_lock);
    if (mine.mutex() == its.mutex()) mine.lock();
    else std::lock(mine, its);
    const size_t size = size_t(target.model.width) * (1 + states.taps.size());
    float* to = states.to;
    std::vector<float> memory[3];
    std::vector<Decoded> steps;
    std::vector<int> left = plan.limits;
    bool ended = false;  // a sequence has ended, or has no room for another step
    double spent = 0;
    auto time_left = [&] { return spent < plan.budget_ms || plan.budget_ms == 0; };
    while (!ended && int(steps.size()) < plan.steps && (steps.empty() || time_left())) {
        Decoded step{std::vector<Result>(batch.size()), 0, 0, 0};
        auto last = std::chrono::steady_clock::now();
        std::vector<Drafted> drafts(batch.size());
        if (drafter != nullptr) drafts = drafter->propose(plan.counts, nullptr);
        step.draft_ms = ms_since(last);
        const Forward done = forward(target, batch, drafts, states.to == nullptr ? nullptr : &states.taps, memory);
        step.verify_ms = ms_since(last);
        accept(target, batch, drafts, done.rows, plan.own, step.results);
        std::vector<Outcome> outcomes;
        for (size_t r = 0; r < batch.size(); ++r) {
            Result& result = step.results[r];
            result.draft = drafts[r].tokens;
            result.computed = done.request.counts[r];
            Outcome outcome{{result.draft.begin(), result.draft.begin() + result.accepted}, nullptr, 0};
            outcome.tokens.push_back(result.next);
            if (states.to != nullptr) {
                const int count = int(batch[r].new_tokens.size()) + result.accepted;
                need(size_t(to - states.to) + size_t(count) * size <= states.room, "the states have no room");
                outcome.states = to;
                outcome.state_count = copy_states(done.request, done.first[r], count, target.model.width, to);
                to += size_t(count) * size;
            }
            for (int token : outcome.tokens) ended |= std::find(plan.ends.begin(), plan.ends.end(), token) != plan.ends.end();
            left[r] -= result.accepted + 1;
            ended |= left[r] <= plan.counts[r];
            batch[r].append(outcome.tokens, result.accepted);
            outcomes.push_back(std::move(outcome));
        }
        if (drafter != nullptr) drafter->observe(outcomes);
        step.accept_ms = ms_since(last);
        spent += step.draft_ms + step.verify_ms + step.accept_ms;
        steps.push_back(std::move(step));
    }
    return steps;
}

}  // namespace lab
