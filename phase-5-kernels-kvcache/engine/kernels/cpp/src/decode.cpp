// Several tokens in one call, each drawn after the one before: plain decoding, drafts, and EAGLE's layer.
#include "engine.h"

#include <algorithm>
#include <stdexcept>

#include "need.h"

#define SIMD_NAME plain_code
#include "simd.h"

namespace lab {

Request Engine::following(const Sequence& sequence, float* logits) {
    Request request;
    const int count = int(sequence.new_tokens.size());
    request.tokens = sequence.new_tokens;
    for (int i = 0; i < count; ++i) request.positions.push_back(sequence.held + i);
    request.rows = {sequence.row};
    request.counts = {count};
    request.held = {sequence.held};
    request.wanted = {count - 1};
    request.logits = logits;
    return request;
}

namespace {

// The same request for the next token.
void go_on(Request& request, int token) {
    const int position = request.held[0] + request.counts[0];
    request.tokens.assign(1, token);
    request.positions.assign(1, position);
    request.held[0] = position;
    request.counts[0] = 1;
    request.wanted[0] = 0;
}

}  // namespace

// A token from logits [vocab], which become the probabilities that it was drawn from; at temperature 0 they stay.
int Engine::draw(float* of_token, const Sampling& how, int sample, int position, uint32_t purpose) {
    need_finite(of_token, model.vocab);
    if (how.temperature == 0) return isa->largest(of_token, model.vocab);
    if (purpose == SAMPLE) {
        const int token = choose_plain(of_token, how, sample, position);
        probabilities(*isa, of_token, model.vocab, how);
        return token;
    }
    probabilities(*isa, of_token, model.vocab, how);
    return draw_inverse(of_token, model.vocab, how.seed, uint32_t(sample), uint32_t(position), purpose);
}

void Engine::join(const std::vector<int>& tokens, const float* features, float* out) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    need(finished_ && join_ != nullptr, "this model continues no features");
    need(features != nullptr && out != nullptr, "features or inputs have no memory");
    const size_t width = size_t(model.width);
    std::vector<float> pairs(tokens.size() * 2 * width), embedded(width);
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i] < 0 || tokens[i] >= model.vocab) throw std::invalid_argument("a token is not in the vocabulary");
        embed(tokens[i], embedded.data());
        isa->normalise(token_norm_, embedded.data(), model.width, &pairs[i * 2 * width]);
        isa->normalise(state_norm_, features + i * width, model.width, &pairs[i * 2 * width] + width);
    }
    product(*join_, pairs.data(), int(tokens.size()), out);
}

std::vector<int> Engine::continue_features(
    const View& view, const Sequence& sequence, const float* features, int count, const Sampling& how, uint32_t purpose,
    float* predicted, float* probs
) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    const size_t width = size_t(model.width);
    check(sequence, count, how);
    need(features != nullptr && predicted != nullptr && probs != nullptr, "features or distributions have no memory");
    std::vector<float> inputs(sequence.new_tokens.size() * width), state(width);
    std::vector<int> drawn;
    Request request = following(sequence, nullptr);
    join(sequence.new_tokens, features, inputs.data());
    for (int i = 0; i < count; ++i) {
        float* of_token = probs + size_t(i) * size_t(model.vocab);
        request.inputs = inputs.data(), request.logits = of_token;
        request.hidden = i == 0 ? predicted : state.data();
        step(view, request);
        const int token = draw(of_token, how, sequence.sample, sequence.position + i, purpose);
        drawn.push_back(token);
        go_on(request, token);
        if (i + 1 < count) join({token}, request.hidden, inputs.data());
    }
    return drawn;
}

std::vector<int> Engine::draft(
    const View& view, const Sequence& sequence, int count, const Sampling& how, uint32_t purpose, float* probs
) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    check(sequence, count, how);
    need(probs != nullptr, "the distributions have no memory");
    std::vector<int> drawn;
    Request request = following(sequence, nullptr);
    for (int i = 0; i < count; ++i) {
        float* of_token = probs + size_t(i) * size_t(model.vocab);
        request.logits = of_token;
        step(view, request);
        const int token = draw(of_token, how, sequence.sample, sequence.position + i, purpose);
        drawn.push_back(token);
        go_on(request, token);
    }
    return drawn;
}

// Splits the noise of a large vocabulary over the threads.
int Engine::choose_plain(const float* logits, const Sampling& how, int sample, int position) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    need_finite(logits, model.vocab);
    constexpr int WORDS = 64;  // a thread's share begins at a multiple
    const bool alone = how.temperature == 0 || how.filtered(model.vocab) || pool_->size() == 1 || model.vocab < 16 * WORDS;
    if (alone) return choose(*isa, logits, model.vocab, how, uint32_t(sample), uint32_t(position), spare_.data());
    struct With { Engine* engine; const float* logits; float scale; uint32_t key[2], counter[3]; std::vector<std::pair<float, int>> best; };
    With with{
        this, logits, float(1 / how.temperature), {uint32_t(how.seed), uint32_t(how.seed >> 32)},
        {uint32_t(position), uint32_t(sample), SAMPLE}, std::vector<std::pair<float, int>>(size_t(pool_->size()))
    };
    pool_->run([](void* given, int thread) {
        auto& with = *static_cast<With*>(given);
        const Engine& engine = *with.engine;
        const int vocab = engine.model.vocab, units = (vocab + WORDS - 1) / WORDS, threads = engine.pool_->size();
        const int begin = units * thread / threads * WORDS, end = std::min(vocab, units * (thread + 1) / threads * WORDS);
        auto& [value, at] = with.best[size_t(thread)];
        at = engine.isa->gumbel(with.logits, begin, end, with.scale, with.key, with.counter, &value);
    }, &with);
    auto best = with.best.front();
    for (const auto& other : with.best)
        if (other.first > best.first) best = other;
    return best.second;
}

void Engine::to_probabilities(float* rows, int count, const Sampling& how) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    for (int row = 0; row < count; ++row)  // the threads must not throw
        need_finite(rows + size_t(row) * size_t(model.vocab), model.vocab);
    struct With { Engine* engine; float* rows; int count; const Sampling* how; };
    With with{this, rows, count, &how};
    pool_->run([](void* given, int thread) {
        const auto& with = *static_cast<With*>(given);
        const int vocab = with.engine->model.vocab;
        for (int row = thread; row < with.count; row += with.engine->pool_->size())
            probabilities(*with.engine->isa, with.rows + size_t(row) * size_t(vocab), vocab, *with.how);
    }, &with);
}

std::vector<int> Engine::generate(
    const View& view, const Sequence& sequence, int count, const Sampling& how, const std::vector<int>& ends, const States& states
) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    check(sequence, count, how);
    std::vector<int> made;
    Request request = following(sequence, one_.data());
    request.taps = states.taps;
    for (int i = 0; i < count; ++i) {
        const size_t row = size_t(i) * size_t(model.width);
        if (states.hidden != nullptr) request.hidden = states.hidden + row;
        if (states.tapped != nullptr) request.tapped = states.tapped + row * states.taps.size();
        step(view, request);
        const int token = choose_plain(one_.data(), how, sequence.sample, sequence.position + i);
        made.push_back(token);
        if (std::find(ends.begin(), ends.end(), token) != ends.end()) break;
        go_on(request, token);
    }
    return made;
}

void Engine::embed(int token, float* to) const {
    const size_t width = size_t(model.width), at = size_t(token) * width;
    if (model.embedding.kind == Kind::f32) {
        std::copy_n(static_cast<const float*>(model.embedding.data) + at, width, to);
        return;
    }
    const auto* from = static_cast<const uint16_t*>(model.embedding.data) + at;
    for (size_t k = 0; k < width; ++k)
        to[k] = model.embedding.kind == Kind::bf16 ? plain_code::float_of_bf16(from[k]) : plain_code::float_of_half(from[k]);
}

}  // namespace lab
