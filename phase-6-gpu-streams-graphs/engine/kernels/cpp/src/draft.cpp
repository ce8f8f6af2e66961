// Chooses tokens: the next token of plain decoding, and drafts, each token drawn after the one before.
#include "engine.h"

#include <algorithm>

#include "need.h"

#define SIMD_NAME plain_code
#include "simd.h"

namespace lab {

void Sequence::append(const std::vector<int>& tokens, int cached) {
    row.held += int(new_tokens.size()) + cached;
    new_tokens.assign(tokens.begin() + cached, tokens.end());
    position += int(tokens.size());
}

Request Engine::following(const Batch& batch, const std::vector<int>& which) {
    Request request;
    for (int r : which) {
        const Sequence& sequence = batch[size_t(r)];
        const int count = int(sequence.new_tokens.size());
        need(count > 0, "every token of the sequence is cached already");
        need(count < 1 << 30 && sequence.row.held >= 0 && sequence.row.held < 1 << 30, "a row's length or count is below 0 or absurd");
        request.tokens.insert(request.tokens.end(), sequence.new_tokens.begin(), sequence.new_tokens.end());
        for (int i = 0; i < count; ++i) request.positions.push_back(sequence.row.held + i);
        request.rows.push_back(sequence.row);
        request.counts.push_back(count);
        request.wanted.push_back(int(request.tokens.size()) - 1);
    }
    return request;
}

int Engine::draw(float* logits, const Sequence& sequence, int position, uint32_t purpose, float* spare) {
    const Sampling& how = sequence.how;
    need_finite(logits, model.vocab);
    if (how.temperature == 0) return isa->largest(logits, model.vocab);
    if (purpose == SAMPLE) {
        const int token = choose_plain(logits, sequence, position, spare);
        probabilities(*isa, logits, model.vocab, how);
        return token;
    }
    probabilities(*isa, logits, model.vocab, how);
    return draw_inverse(logits, model.vocab, how.seed, uint32_t(sequence.sample), uint32_t(position), purpose);
}

void Engine::join(const std::vector<int>& tokens, const float* features, float* out) {
    const std::lock_guard<std::recursive_mutex> hold(mutex);
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
    product(join_->matrix, join_->shape.outputs, pairs.data(), int(tokens.size()), out);
}

std::vector<Drafted> Engine::draft(
    const Batch& batch, const std::vector<int>& counts, const std::vector<uint32_t>& purposes, float* probs,
    const std::vector<std::vector<float>>* features
) {
    const std::lock_guard<std::recursive_mutex> hold(mutex);
    need(counts.size() == batch.size(), "sequences and counts differ in number");
    need(purposes.size() == batch.size(), "sequences and purposes differ in number");
    need(features == nullptr || features->size() == batch.size(), "sequences and features differ in number");
    Batch growing = batch;
    std::vector<Drafted> drafts(batch.size());
    std::vector<float> entering, inputs, states;  // of EAGLE's layer: features and inputs of this step's tokens
    const size_t width = size_t(model.width), vocab = size_t(model.vocab);
    std::vector<int> active, before;
    for (int i = 0;; ++i) {
        before = active, active.clear();
        for (int r = 0; r < int(batch.size()); ++r)
            if (counts[size_t(r)] > i) active.push_back(r);
        if (active.empty()) return drafts;
        need(probs != nullptr, "the distributions have no memory");
        Request request = following(growing, active);
        request.logits = probs;
        if (features != nullptr) {
            entering.clear();
            for (size_t at = 0, from = 0; from < active.size(); ++from) {
                const auto& mine = (*features)[size_t(active[from])];
                if (i == 0) {
                    need(mine.size() == size_t(request.counts[from]) * width, "tokens and features differ in number");
                    entering.insert(entering.end(), mine.begin(), mine.end());
                    continue;
                }
                while (before[at] != active[from]) ++at;  // sequences whose draft is complete drop out
                entering.insert(entering.end(), states.begin() + long(at * width), states.begin() + long((at + 1) * width));
            }
            inputs.resize(entering.size());
            join(request.tokens, entering.data(), inputs.data());
            states.resize(active.size() * width);
            request.inputs = inputs.data(), request.hidden = states.data();
        }
        step(request);
        each(int(active.size()), [&](int item, float* spare) {
            const size_t r = size_t(active[size_t(item)]);
            const Sequence& sequence = batch[r];
            float* row = probs + size_t(item) * vocab;
            Drafted& mine = drafts[r];
            mine.tokens.push_back(draw(row, sequence, sequence.position + i, purposes[r], spare));
            if (sequence.how.temperature > 0) mine.probs.push_back(row);
        });
        for (int r : active) growing[size_t(r)].append({drafts[size_t(r)].tokens.back()}, 0);
        probs += active.size() * vocab;
    }
}

int Engine::choose_plain(const float* logits, const Sequence& sequence, int position, float* spare) {
    constexpr int WORDS = 64;  // a thread's share begins at a multiple
    const Sampling& how = sequence.how;
    const bool alone = how.temperature == 0 || how.filtered(model.vocab) || pool_->size() == 1 || model.vocab < 16 * WORDS;
    if (spare != nullptr || alone) {
        float* memory = spare != nullptr ? spare : spare_.data();
        return choose(*isa, logits, model.vocab, how, uint32_t(sequence.sample), uint32_t(position), memory);
    }
    need_finite(logits, model.vocab);
    struct With { Engine* engine; const float* logits; float scale; uint32_t key[2], counter[3]; std::vector<std::pair<float, int>> best; };
    With with{
        this, logits, float(1 / how.temperature), {uint32_t(how.seed), uint32_t(how.seed >> 32)},
        {uint32_t(position), uint32_t(sequence.sample), SAMPLE}, std::vector<std::pair<float, int>>(size_t(pool_->size()))
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
