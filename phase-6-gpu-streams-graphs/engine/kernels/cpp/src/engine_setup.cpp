// Makes a model ready to run: takes its parts, checks that they fit together, allocates memory for a block of tokens.
#include "engine.h"

#include <algorithm>
#include <stdexcept>

#include "need.h"

namespace lab {

namespace {

bool fits(const Matrix& w, int inputs, int outputs) { return w.data != nullptr && w.inputs == inputs && w.outputs >= outputs; }

}  // namespace

const Model& Engine::checked(const Model& m) {
    constexpr int MOST = 1 << 24;
    for (int number : {m.width, m.heads, m.kv_heads, m.head_dim, m.ffn, m.vocab})
        need(number > 0 && number <= MOST, "a size of the model is below 1 or absurd");
    need(m.layers >= 0, "the number of layers is below 0");  // 0: an embedding and an output matrix, for draft heads
    need(m.heads % m.kv_heads == 0, "the heads cannot share the key-value heads evenly");
    need(int64_t(m.heads) * m.head_dim <= MOST && int64_t(m.layers) <= MOST / 64, "a size of the model is absurd");
    need(m.position_offset >= 0, "the position offset is at least 0");
    return m;
}

Engine::Engine(const Model& m, int threads, const Isa* set)
    : model(checked(m)), isa(set), layers_(static_cast<size_t>(m.layers)), pool_(Pool::of(threads)) {
    model.layer = layers_.data();
    model.split.vocab = m.vocab;
}

void Engine::set_split(const Split& split, Exchanger exchange) {
    need(split.ranks >= 2 && split.ranks <= 4096 && split.rank >= 0 && split.rank < split.ranks, "no such rank");
    need(split.vocab > 0 && int64_t(split.vocab) * split.ranks >= model.vocab, "the vocabulary is not covered");
    need(!split.by_outputs || model.width % split.ranks == 0, "the width is not a multiple of the ranks");
    model.split = split;
    exchange_ = std::move(exchange);
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
        need(fits(layer.output, model.mixed(), model.columns()), "a layer's output has no matrix of its shape");
        need(fits(layer.up, model.width, model.gated ? 2 * model.ffn_padded() : model.ffn), "a layer's first product has no matrix of its shape");
        need(fits(layer.down, model.inner(), model.columns()), "a layer's last product has no matrix of its shape");
        need((layer.query_norm == nullptr) == (layer.key_norm == nullptr), "queries and keys are both normed, or neither");
    }
    const Split& split = model.split;
    const int vocab = std::min(split.vocab, model.vocab - split.rank * split.vocab);  // of this process
    need(vocab > 0 && model.norm.weight != nullptr, "the last norm is missing");
    // Of a model whose layers are split, the first process has the embedding, and the last one the output matrix.
    need(model.head.data == nullptr || fits(model.head, model.width, vocab), "the output matrix has another shape");
    need(model.embedding.data == nullptr || model.embedding.rows >= vocab, "the embedding has too few rows");
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
    int widest = std::max({model.width, round_up(model.inner(), PANEL), model.mixed()});
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
    const Layer first = layers_.empty() ? Layer{} : layers_.front();
    block_.x = memory(rows * size_t(model.width));
    block_.qkv = memory(rows * size_t(first.qkv.outputs));
    block_.my_mixed = block_.mixed = memory(rows * size_t(model.mixed()));
    block_.up = memory(rows * size_t(first.up.outputs));
    block_.my_inner = block_.inner = memory(rows * size_t(round_up(model.inner(), PANEL)));
    if (exchange_ != nullptr) {
        const size_t most = rows * size_t(std::max({model.columns(), model.heads * model.head_dim, model.ffn, split.vocab}));
        block_.exchange = [](void* engine, How how, float* mine, float* all, size_t count) {
            static_cast<Engine*>(engine)->exchange_(how, mine, all, count);
        };
        block_.with = this;
        block_.my_logits = memory(rows * size_t(split.vocab));
        block_.sent = memory(most);
        block_.received = memory(most * size_t(split.ranks));
        if (split.by_outputs) {
            block_.my_mixed = memory(rows * size_t(model.heads * model.head_dim));
            block_.my_inner = memory(rows * size_t(model.ffn_padded()));
        } else {
            block_.partial = memory(rows * size_t(model.width));
        }
    }
    for (int thread = 0; thread < pool_->size(); ++thread) {
        normed_.push_back(memory(rows * size_t(widest)));
        acts_.push_back(reinterpret_cast<uint8_t*>(memory(acts_floats_)));
    }
    block_.normed = normed_.data();
    block_.acts = acts_.data();
    block_.widest = widest;
    spare_.resize(size_t(model.vocab) * size_t(pool_->size()));
    finished_ = true;
}

}  // namespace lab
