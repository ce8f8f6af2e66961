#include "engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#define SIMD_NAME plain_code
#include "simd.h"

namespace lab {

namespace {

void need(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

bool fits(const Matrix& w, int inputs, int outputs) { return w.data != nullptr && w.inputs == inputs && w.outputs >= outputs; }

}  // namespace

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

const Model& Engine::checked(const Model& m) {
    constexpr int MOST = 1 << 24;
    for (int number : {m.layers, m.width, m.heads, m.kv_heads, m.head_dim, m.ffn, m.vocab})
        need(number > 0 && number <= MOST, "a size of the model is below 1 or absurd");
    need(m.heads % m.kv_heads == 0, "the heads cannot share the key-value heads evenly");
    need(int64_t(m.heads) * m.head_dim <= MOST && int64_t(m.layers) <= MOST / 64, "a size of the model is absurd");
    need(m.position_offset >= 0, "the position offset is at least 0");
    return m;
}

Engine::Engine(const Model& m, int threads, const Isa* set)
    : model(checked(m)), isa(set), layers_(static_cast<size_t>(m.layers)), pool_(Pool::of(threads)) {
    model.layer = layers_.data();
}

void Engine::set_matrix(int layer, const std::string& which, std::shared_ptr<Packed> packed) {
    need(packed != nullptr, "there is no matrix");
    matrices_.push_back(packed);
    if (which == "head") {
        model.head = packed->matrix;
        return;
    }
    Layer& to = layers_.at(size_t(layer));
    if (which == "qkv") to.qkv = packed->matrix;
    else if (which == "output") to.output = packed->matrix;
    else if (which == "up") to.up = packed->matrix;
    else if (which == "down") to.down = packed->matrix;
    else throw std::invalid_argument("no matrix " + which);
}

void Engine::set_vector(int layer, const std::string& which, std::vector<float> values) {
    const bool of_head = which == "query_norm" || which == "key_norm";
    need(values.size() == size_t(of_head ? model.head_dim : model.width), "a vector is not as long as what it is for");
    vectors_.push_back(std::move(values));
    const float* data = vectors_.back().data();
    if (which == "norm.weight") model.norm.weight = data;
    else if (which == "norm.bias") model.norm.bias = data;
    else if (which == "token_norm.weight") token_norm_.weight = data;
    else if (which == "token_norm.bias") token_norm_.bias = data;
    else if (which == "state_norm.weight") state_norm_.weight = data;
    else if (which == "state_norm.bias") state_norm_.bias = data;
    else {
        Layer& to = layers_.at(size_t(layer));
        if (which == "attention_norm.weight") to.attention_norm.weight = data;
        else if (which == "attention_norm.bias") to.attention_norm.bias = data;
        else if (which == "ffn_norm.weight") to.ffn_norm.weight = data;
        else if (which == "ffn_norm.bias") to.ffn_norm.bias = data;
        else if (which == "query_norm") to.query_norm = data;
        else if (which == "key_norm") to.key_norm = data;
        else throw std::invalid_argument("no vector " + which);
    }
}

void Engine::set_window(int layer, int window) {
    need(window >= 0, "a window is at least 0");
    layers_.at(size_t(layer)).window = window;
}

void Engine::set_rotation(std::vector<float> cos, std::vector<float> sin) {
    need(cos.size() == sin.size(), "cosines and sines differ in number");
    cos_ = std::move(cos);
    sin_ = std::move(sin);
    model.cos = cos_.data();
    model.sin = sin_.data();
    model.rotations = int(cos_.size() / size_t(std::max(1, model.head_dim / 2)));
}

float* Engine::memory(size_t floats) {
    constexpr size_t EXTRA = ALIGNMENT / sizeof(float);
    owned_.emplace_back(new float[floats + EXTRA]());
    const size_t at = reinterpret_cast<size_t>(owned_.back().get());
    return reinterpret_cast<float*>((at + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

void Engine::finish() {
    for (const Layer& layer : layers_) {
        need(layer.attention_norm.weight != nullptr && layer.ffn_norm.weight != nullptr, "a norm is missing");
        need(fits(layer.qkv, model.width, model.qkv_width()), "a layer's queries, keys and values have no matrix of their shape");
        need(fits(layer.output, model.heads * model.head_dim, model.width), "a layer's output has no matrix of its shape");
        need(fits(layer.up, model.width, model.gated ? 2 * model.ffn_padded() : model.ffn), "a layer's first product has no matrix of its shape");
        need(fits(layer.down, model.ffn, model.width), "a layer's last product has no matrix of its shape");
        need((layer.query_norm == nullptr) == (layer.key_norm == nullptr), "queries and keys are both normed, or neither");
    }
    need(model.norm.weight != nullptr && fits(model.head, model.width, model.vocab), "the last norm or the output matrix is missing");
    need(model.embedding.data != nullptr && model.embedding.rows >= model.vocab, "the embedding has too few rows");
    need(model.embedding.kind < Kind::i8 && model.positions.kind < Kind::i8, "tables are of floating formats");
    need(model.rope || join_ != nullptr || model.positions.data != nullptr, "the table of positions is missing");
    if (join_ != nullptr) {
        need(fits(join_->matrix, 2 * model.width, model.width), "the matrix that joins token and feature has another shape");
        need(token_norm_.weight != nullptr && state_norm_.weight != nullptr, "a norm of the joined inputs is missing");
    }
    for (Layer& layer : layers_)
        for (Norm* norm : {&layer.attention_norm, &layer.ffn_norm}) {
            norm->eps = model.norm_eps;
            norm->rms = norm->bias == nullptr;
        }
    for (Norm* norm : {&model.norm, &token_norm_, &state_norm_}) {
        norm->eps = model.norm_eps;
        norm->rms = norm->bias == nullptr;
    }
    int widest = std::max({model.width, model.ffn_padded(), model.heads * model.head_dim});
    size_t acts = 0;
    std::vector<std::shared_ptr<Packed>> all = matrices_;
    if (join_ != nullptr) all.push_back(join_);
    for (const auto& packed : all) {
        const Matrix& w = packed->matrix;
        widest = std::max(widest, w.padded);
        const size_t groups = size_t(w.padded / std::max(1, w.group));
        acts = std::max(acts, size_t(w.padded) * 4 + groups * 8);
    }
    acts_floats_ = MAX_BLOCK * acts / 4 + 64;
    const size_t rows = MAX_BLOCK;
    const Layer& first = layers_.front();
    block_.x = memory(rows * size_t(model.width));
    block_.qkv = memory(rows * size_t(first.qkv.outputs));
    block_.mixed = memory(rows * size_t(model.heads * model.head_dim));
    block_.up = memory(rows * size_t(first.up.outputs));
    block_.inner = memory(rows * size_t(model.ffn_padded()));
    for (int thread = 0; thread < pool_->size(); ++thread) {
        normed_.push_back(memory(rows * size_t(widest)));
        acts_.push_back(reinterpret_cast<uint8_t*>(memory(acts_floats_)));
    }
    block_.normed = normed_.data();
    block_.acts = acts_.data();
    block_.widest = widest;
    spare_.resize(size_t(model.vocab));
    one_.resize(size_t(model.vocab));
    finished_ = true;
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
    const int places = model.rope ? model.rotations : model.positions.rows - model.position_offset;
    for (size_t m = 0; m < count; ++m) {
        need(request.tokens[m] >= 0 && request.tokens[m] < model.vocab, "a token is not in the vocabulary");
        need(request.positions[m] >= 0 && request.positions[m] < places, "a position is past the model's");
    }
    for (size_t w = 0; w < request.wanted.size(); ++w) {
        need(request.wanted[w] >= 0 && size_t(request.wanted[w]) < count, "a wanted token is not there");
        need(w == 0 || request.wanted[w] > request.wanted[w - 1], "wanted tokens must be ascending");
    }
    for (int tap : request.taps) need(tap >= 0 && tap < model.layers, "a tapped layer is not there");
    need(request.taps.empty() || request.tapped != nullptr, "tapped layers have no memory to go to");
    need(join_ == nullptr || request.inputs != nullptr, "a model that continues features is fed its inputs");
}

void Engine::check(const Text& text, int count, const Sampling& how) const {
    need(finished_, "the model is not finished");
    need(!text.known.empty(), "the text has no token that the cache does not hold");
    need(text.known.size() < size_t(1) << 30 && count >= 0 && count < 1 << 30, "a number of tokens is below 0 or absurd");
    need(text.held >= 0 && text.held < 1 << 30, "a row's length is below 0 or absurd");
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
        lines_.reserve(longest);  // pointers into it must stand
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

Request Engine::following(const Text& text, float* logits) {
    Request request;
    const int count = int(text.known.size());
    request.tokens = text.known;
    for (int i = 0; i < count; ++i) request.positions.push_back(text.held + i);
    request.rows = {text.row};
    request.counts = {count};
    request.held = {text.held};
    request.wanted = {count - 1};
    request.logits = logits;
    return request;
}

namespace {

// The same request for the next token.
void go_on(Request& request, int token) {
    const int place = request.held[0] + request.counts[0];
    request.tokens.assign(1, token);
    request.positions.assign(1, place);
    request.held[0] = place;
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
    const View& view, const Text& text, const float* features, int count, const Sampling& how, uint32_t purpose,
    float* predicted, float* probs
) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    const size_t width = size_t(model.width);
    check(text, count, how);
    need(features != nullptr && predicted != nullptr && probs != nullptr, "features or distributions have no memory");
    std::vector<float> inputs(text.known.size() * width), state(width);
    std::vector<int> drawn;
    Request request = following(text, nullptr);
    join(text.known, features, inputs.data());
    for (int i = 0; i < count; ++i) {
        float* of_token = probs + size_t(i) * size_t(model.vocab);
        request.inputs = inputs.data(), request.logits = of_token;
        request.hidden = i == 0 ? predicted : state.data();
        step(view, request);
        const int token = draw(of_token, how, text.sample, text.position + i, purpose);
        drawn.push_back(token);
        go_on(request, token);
        if (i + 1 < count) join({token}, request.hidden, inputs.data());
    }
    return drawn;
}

std::vector<int> Engine::draft(
    const View& view, const Text& text, int count, const Sampling& how, uint32_t purpose, float* probs
) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    check(text, count, how);
    need(probs != nullptr, "the distributions have no memory");
    std::vector<int> drawn;
    Request request = following(text, nullptr);
    for (int i = 0; i < count; ++i) {
        float* of_token = probs + size_t(i) * size_t(model.vocab);
        request.logits = of_token;
        step(view, request);
        const int token = draw(of_token, how, text.sample, text.position + i, purpose);
        drawn.push_back(token);
        go_on(request, token);
    }
    return drawn;
}

// Noise for a whole vocabulary is worth sharing out.
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
    const View& view, const Text& text, int count, const Sampling& how, const std::vector<int>& ends, const States& states
) {
    const std::lock_guard<std::recursive_mutex> hold(mutex_);
    check(text, count, how);
    std::vector<int> made;
    Request request = following(text, one_.data());
    request.taps = states.taps;
    for (int i = 0; i < count; ++i) {
        const size_t row = size_t(i) * size_t(model.width);
        if (states.hidden != nullptr) request.hidden = states.hidden + row;
        if (states.tapped != nullptr) request.tapped = states.tapped + row * states.taps.size();
        step(view, request);
        const int token = choose_plain(one_.data(), how, text.sample, text.position + i);
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
