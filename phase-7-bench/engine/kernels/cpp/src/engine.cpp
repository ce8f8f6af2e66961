// One forward over new tokens of some rows, and single products.
#include "engine.h"

#include <algorithm>
#include <chrono>

#include "need.h"

namespace lab {

void View::bind() {
    const bool scaled = cache.kind == Kind::i8;
    need(cache.kind != Kind::i4, "a cache has no levels of four bits");
    need(cache.pages > 0 && cache.kv_heads > 0 && cache.slots > 0 && cache.head_dim > 0, "a cache has at least one of everything");
    need(double(cache.pages) * cache.kv_heads * cache.slots < double(1 << 30), "a cache has fewer than 2^30 entries");
    need(keys.size() == values.size(), "keys and values have different numbers of layers");
    need(key_scales.size() == (scaled ? keys.size() : 0) && value_scales.size() == key_scales.size(), "int8 has scales in every layer, and nothing else has");
    auto there = [](const auto& pointers) { return std::find(pointers.begin(), pointers.end(), nullptr) == pointers.end(); };
    need(there(keys) && there(values) && there(key_scales) && there(value_scales), "a tensor of the cache is not there");
    cache.keys = keys.data();
    cache.values = values.data();
    cache.key_scales = key_scales.data();
    cache.value_scales = value_scales.data();
}

void Engine::fit(int keys) {
    if (keys <= keys_) return;
    keys_ = round_up(keys, 256);
    block_.score_stride = round_up(keys_ + 64, 16);
    scores_owned_.clear();
    scores_.clear();
    const size_t size = size_t(block_.score_stride) * size_t(std::max(SCORE_ROWS, model.heads / model.kv_heads));
    for (int thread = 0; thread < pool_->size(); ++thread) {
        scores_owned_.emplace_back(new float[size]());
        scores_.push_back(scores_owned_.back().get());
    }
    block_.scores = scores_.data();
}

void Engine::check(const Row& row, int count) const {
    need(row.view != nullptr, "a row has no cache");
    const Cache& cache = row.view->cache;
    need(cache.kv_heads == model.kv_heads && cache.head_dim == model.head_dim, "the cache has another shape");
    need(row.view->keys.size() == size_t(model.layers), "the cache has another number of layers");
    need(row.held >= 0 && row.held < 1 << 30 && count >= 0 && count < 1 << 30, "a row's length or count is below 0 or absurd");
    for (int page : row.pages) need(page >= 0 && page < cache.pages, "no such row or page in the cache");
    if (!cache.ring) {
        need(row.held + count <= int64_t(row.pages.size()) * cache.slots, "the cache has no room for the tokens");
        return;
    }
    need(row.pages.size() == 1, "a row of a ring has one page");
    for (const Layer& layer : layers_)
        need(layer.window > 0 && layer.window + count <= cache.slots + 1, "the ring is smaller than the window and the tokens");
}

void Engine::check(const Request& request) const {
    need(finished_, "the model is not finished");
    const size_t count = request.tokens.size();
    need(request.positions.size() == count, "tokens and positions differ in number");
    need(request.rows.size() == request.counts.size(), "rows and counts differ in number");
    need(request.parents.empty() || request.parents.size() == count, "tokens and parents differ in number");
    std::vector<std::pair<const void*, int>> written;
    size_t total = 0;
    for (size_t r = 0; r < request.rows.size(); ++r) {
        const Row& row = request.rows[r];
        check(row, request.counts[r]);
        const Cache& cache = row.view->cache;
        if (request.counts[r] > 0) {
            const int last = cache.ring ? 0 : (row.held + request.counts[r] - 1) / cache.slots;
            for (int at = cache.ring ? 0 : row.held / cache.slots; at <= last; ++at)
                written.emplace_back(cache.keys[0], row.pages[size_t(at)]);
        }
        need(size_t(request.counts[r]) <= count - total, "the rows' counts are not the number of tokens");
        for (int i = 0; i < request.counts[r]; ++i)
            need(request.parents.empty() || (request.parents[total + size_t(i)] >= -1 && request.parents[total + size_t(i)] < i),
                 "a token's parent must come before it");
        total += size_t(request.counts[r]);
    }
    need(total == count, "the rows' counts are not the number of tokens");
    std::sort(written.begin(), written.end());
    need(std::adjacent_find(written.begin(), written.end()) == written.end(), "a row or page occurs twice in a step");
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
    need(request.inputs != nullptr || model.embedding.data != nullptr, "without an embedding a model is fed its inputs");
    need(request.logits == nullptr || model.head.data != nullptr, "the output matrix is missing");
}

namespace {

// The earliest position of a row that it still has after `count` new tokens.
int first_listed(const Row& row, int count) {
    return row.view->cache.ring ? std::max(0, row.held + count - row.view->cache.slots) : 0;
}

}  // namespace

// Fill tokens_: where each token's key and value go, and which entries it sees.
void Engine::place(const Request& request) {
    tokens_.assign(request.tokens.size(), Token{});
    size_t listed = 0, lines = 0;
    for (size_t r = 0; r < request.rows.size(); ++r) {
        listed += size_t(request.rows[r].held + request.counts[r] - first_listed(request.rows[r], request.counts[r]));
        lines += size_t(request.counts[r]) * size_t(request.counts[r]);
    }
    entries_.clear(), lines_.clear();  // pointers into them must stay valid
    entries_.reserve(listed);
    if (!request.parents.empty()) lines_.reserve(lines);
    size_t m = 0;
    int longest = 0;
    for (size_t r = 0; r < request.rows.size(); ++r) {
        const Row& row = request.rows[r];
        const Cache& cache = row.view->cache;
        const int held = row.held, end = held + request.counts[r];
        const int from = first_listed(row, request.counts[r]);
        const int* entries = entries_.data() + entries_.size();
        longest = std::max(longest, end - from);
        for (int position = from; position < end;) {  // page by page
            const int stop = std::min(end, (position / cache.slots + 1) * cache.slots);
            for (int entry = cache.entry(row.pages.data(), position); position < stop; ++position) entries_.push_back(entry++);
        }
        const size_t first = m;
        for (int i = 0; i < request.counts[r]; ++i, ++m) {
            Token& token = tokens_[m];
            token.id = request.tokens[m];
            token.position = request.positions[m];
            token.cache = &cache;
            token.entries = entries;
            token.from = from;
            token.entry = entries[held + i - from];
            token.held = held + i + 1;
            if (request.parents.empty()) continue;
            const size_t begin = lines_.size();
            for (int at = i; at >= 0; at = request.parents[first + size_t(at)]) lines_.push_back(entries[held + at - from]);
            std::reverse(lines_.begin() + long(begin), lines_.end());
            token.held = held;
            token.line = lines_.data() + begin;
            token.line_length = int(lines_.size() - begin);
        }
    }
    fit(longest);
}

void Engine::step(const Request& request) {
    const std::lock_guard<std::recursive_mutex> hold(mutex);
    check(request);
    place(request);
    const size_t count = request.tokens.size();
    for (size_t w = 0; w < request.wanted.size(); ++w) tokens_[size_t(request.wanted[w])].wanted = int(w);
    block_.model = &model;
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

void Engine::product(const Matrix& w, int outputs, const float* x, int count, float* out) {
    const std::lock_guard<std::recursive_mutex> hold(mutex);
    need(count >= 0 && x != nullptr && out != nullptr, "a product has inputs and outputs");
    const size_t groups = size_t(w.padded / std::max(1, w.group));
    const size_t spare = size_t(MAX_BLOCK) * size_t(w.padded), acts = spare + size_t(MAX_BLOCK) * groups * 2;
    // A finished model's own memory will do for its own matrices; others need some for the time of the call.
    const bool own = block_.widest >= w.padded && acts_floats_ >= acts;
    std::vector<float> memory(own ? 0 : size_t(pool_->size()) * (spare + acts));
    struct With { Engine* engine; const Matrix* w; const float* x; int count; float* out; int limit; float* memory; size_t spare, each; };
    With with{this, &w, x, count, out, outputs, own ? nullptr : memory.data(), spare, spare + acts};
    pool_->run([](void* given, int thread) {
        const auto& with = *static_cast<With*>(given);
        Engine& engine = *with.engine;
        float* mine = with.memory == nullptr ? engine.normed_[size_t(thread)] : with.memory + size_t(thread) * with.each;
        uint8_t* acts = with.memory == nullptr ? engine.acts_[size_t(thread)] : reinterpret_cast<uint8_t*>(mine + with.spare);
        engine.isa->product(*with.w, with.x, with.count, with.out, with.limit, mine, acts, thread, engine.pool_->size());
    }, &with);
}

double Engine::read_speed(const float* from, size_t count, int repeats) {
    const std::lock_guard<std::recursive_mutex> hold(mutex);
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
