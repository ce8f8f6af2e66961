// One forward over new tokens of some rows, and single products.
#include "engine.h"

#include <algorithm>
#include <chrono>

#include "need.h"

namespace lab {

void View::bind() {
    const bool scaled = cache.kind == Kind::i8;
    need(cache.kind != Kind::i4, "a cache has no levels of four bits");
    need(cache.rows > 0 && cache.kv_heads > 0 && cache.capacity > 0 && cache.head_dim > 0, "a cache has at least one of everything");
    need(keys.size() == values.size(), "keys and values have different numbers of layers");
    need(key_scales.size() == (scaled ? keys.size() : 0) && value_scales.size() == key_scales.size(), "int8 has scales in every layer, and nothing else has");
    auto there = [](const auto& pointers) { return std::find(pointers.begin(), pointers.end(), nullptr) == pointers.end(); };
    need(there(keys) && there(values) && there(key_scales) && there(value_scales), "a tensor of the cache is not there");
    cache.keys = keys.data();
    cache.values = values.data();
    cache.key_scales = key_scales.data();
    cache.value_scales = value_scales.data();
}

void Engine::fit(int capacity) {
    if (capacity <= capacity_) return;
    capacity_ = capacity;
    block_.score_stride = round_up(capacity + 64, 16);
    scores_owned_.clear();
    scores_.clear();
    const size_t size = size_t(block_.score_stride) * size_t(model.heads / model.kv_heads);
    for (int thread = 0; thread < pool_->size(); ++thread) {
        scores_owned_.emplace_back(new float[size]());
        scores_.push_back(scores_owned_.back().get());
    }
    block_.scores = scores_.data();
}

void Engine::check(const View& view, const Request& request) const {
    need(finished_, "the model is not finished");
    const Cache& cache = view.cache;
    const size_t count = request.tokens.size();
    need(cache.kv_heads == model.kv_heads && cache.head_dim == model.head_dim, "the cache has another shape");
    need(view.keys.size() == size_t(model.layers), "the cache has another number of layers");
    need(request.positions.size() == count, "tokens and positions differ in number");
    need(request.rows.size() == request.counts.size() && request.rows.size() == request.held.size(), "rows and counts differ in number");
    need(request.parents.empty() || request.parents.size() == count, "tokens and parents differ in number");
    size_t total = 0;
    for (size_t r = 0; r < request.rows.size(); ++r) {
        need(request.rows[r] >= 0 && request.rows[r] < cache.rows, "no such row in the cache");
        need(std::find(request.rows.begin(), request.rows.begin() + long(r), request.rows[r]) == request.rows.begin() + long(r), "a row occurs twice in a step");
        need(request.held[r] >= 0 && request.counts[r] >= 0, "a row's length or count is below 0");
        need(request.held[r] <= cache.capacity - request.counts[r], "the cache has no room for the tokens");
        need(size_t(request.counts[r]) <= count - total, "the rows' counts are not the number of tokens");
        for (int i = 0; i < request.counts[r]; ++i)
            need(request.parents.empty() || (request.parents[total + size_t(i)] >= -1 && request.parents[total + size_t(i)] < i),
                 "a token's parent must come before it");
        total += size_t(request.counts[r]);
    }
    need(total == count, "the rows' counts are not the number of tokens");
    const int positions = model.rope ? model.rotations : model.positions.rows - model.position_offset;
    for (size_t m = 0; m < count; ++m) {
        need(request.tokens[m] >= 0 && request.tokens[m] < model.vocab, "a token is not in the vocabulary");
        need(request.positions[m] >= 0 && request.positions[m] < positions, "a position is past the model's");
    }
    for (size_t w = 0; w < request.wanted.size(); ++w) {
        need(request.wanted[w] >= 0 && size_t(request.wanted[w]) < count, "a wanted token is not there");
        need(w == 0 || request.wanted[w] > request.wanted[w - 1], "wanted tokens must be ascending");
    }
    for (int tap : request.taps) need(tap >= 0 && tap < model.layers, "a tapped layer is not there");
    need(request.taps.empty() || request.tapped != nullptr, "tapped layers have no memory to go to");
    need(join_ == nullptr || request.inputs != nullptr, "a model that continues features is fed its inputs");
}

void Engine::check(const Sequence& sequence, int count, const Sampling& how) const {
    need(finished_, "the model is not finished");
    need(!sequence.new_tokens.empty(), "every token of the sequence is cached already");
    need(sequence.new_tokens.size() < size_t(1) << 30 && count >= 0 && count < 1 << 30, "a number of tokens is below 0 or absurd");
    need(sequence.held >= 0 && sequence.held < 1 << 30, "a row's length is below 0 or absurd");
    how.check();
}

void Engine::step(const View& view, const Request& request) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    check(view, request);
    fit(view.cache.capacity);
    const size_t count = request.tokens.size();
    tokens_.assign(count, Token{});
    lines_.clear();
    if (!request.parents.empty()) {
        size_t longest = 0;
        for (int c : request.counts) longest += size_t(c) * size_t(c);
        lines_.reserve(longest);  // pointers into it must stay valid
    }
    size_t m = 0;
    for (size_t r = 0; r < request.rows.size(); ++r) {
        const int held = request.held[r];
        const size_t first = m;
        for (int i = 0; i < request.counts[r]; ++i, ++m) {
            Token& token = tokens_[m];
            token.id = request.tokens[m];
            token.position = request.positions[m];
            token.row = request.rows[r];
            token.slot = held + i;
            token.held = held + i + 1;
            if (request.parents.empty()) continue;
            const size_t begin = lines_.size();
            for (int at = i; at >= 0; at = request.parents[first + size_t(at)]) lines_.push_back(held + at);
            std::reverse(lines_.begin() + long(begin), lines_.end());
            token.held = held;
            token.line = lines_.data() + begin;
            token.line_length = int(lines_.size() - begin);
        }
    }
    for (size_t w = 0; w < request.wanted.size(); ++w) tokens_[size_t(request.wanted[w])].wanted = int(w);
    block_.model = &model;
    block_.cache = &view.cache;
    block_.hidden = request.hidden;
    block_.logits = request.logits;
    block_.tapped = request.tapped;
    block_.taps = request.taps.data();
    block_.tap_count = int(request.taps.size());
    for (size_t from = 0; from < count; from += MAX_BLOCK) {
        block_.tokens = tokens_.data() + from;
        block_.count = int(std::min(count - from, size_t(MAX_BLOCK)));
        block_.wanted = 0;
        block_.embedded = request.inputs != nullptr;
        if (block_.embedded) {
            const size_t width = size_t(model.width);
            std::copy_n(request.inputs + from * width, size_t(block_.count) * width, block_.x);
        }
        for (int i = 0; i < block_.count; ++i) block_.wanted += block_.tokens[i].wanted >= 0;
        pool_->run([](void* with, int thread) {
            auto* engine = static_cast<Engine*>(with);
            engine->isa->step(engine->block_, thread, engine->pool_->size(), engine->pool_->barrier);
        }, this);
    }
}

void Engine::product(const Packed& packed, const float* x, int count, float* out) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    need(count >= 0 && x != nullptr && out != nullptr, "a product has inputs and outputs");
    const Matrix& w = packed.matrix;
    const size_t groups = size_t(w.padded / std::max(1, w.group));
    const size_t spare = size_t(MAX_BLOCK) * size_t(w.padded), acts = spare + size_t(MAX_BLOCK) * groups * 2;
    // A finished model's own memory will do for its own matrices; others need some for the time of the call.
    const bool own = block_.widest >= w.padded && acts_floats_ >= acts;
    std::vector<float> memory(own ? 0 : size_t(pool_->size()) * (spare + acts));
    struct With { Engine* engine; const Matrix* w; const float* x; int count; float* out; int limit; float* memory; size_t spare, each; };
    With with{this, &w, x, count, out, packed.shape.outputs, own ? nullptr : memory.data(), spare, spare + acts};
    pool_->run([](void* given, int thread) {
        const auto& with = *static_cast<With*>(given);
        Engine& engine = *with.engine;
        float* mine = with.memory == nullptr ? engine.normed_[size_t(thread)] : with.memory + size_t(thread) * with.each;
        uint8_t* acts = with.memory == nullptr ? engine.acts_[size_t(thread)] : reinterpret_cast<uint8_t*>(mine + with.spare);
        engine.isa->product(*with.w, with.x, with.count, with.out, with.limit, mine, acts, thread, engine.pool_->size());
    }, &with);
}

double Engine::read_speed(const float* from, size_t count, int repeats) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    need(from != nullptr && repeats > 0, "there is nothing to read");
    struct With { Engine* engine; const float* from; size_t count; int repeats; std::vector<double> sums; };
    With with{this, from, count, repeats, std::vector<double>(size_t(pool_->size()) * 8)};
    const auto began = std::chrono::steady_clock::now();
    pool_->run([](void* given, int thread) {
        auto& with = *static_cast<With*>(given);
        const size_t n = size_t(with.engine->pool_->size()), t = size_t(thread);
        const size_t begin = with.count * t / n, end = with.count * (t + 1) / n;
        for (int i = 0; i < with.repeats; ++i) with.sums[t * 8] += with.engine->isa->read(with.from + begin, end - begin);
    }, &with);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    return double(count) * 4 * repeats / took.count();
}

}  // namespace lab
