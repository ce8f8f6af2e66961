// A model that can run: its matrices, its threads, and scratch memory for a block of tokens.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "pack.h"
#include "sampling.h"

namespace lab {

// The pointers of a KV cache.
struct View {
    Cache cache;
    std::vector<void*> keys, values;
    std::vector<uint16_t*> key_scales, value_scales;
    std::shared_ptr<void> owner;  // keeps the memory
    void bind();
};

// A row of a KV cache, and how many tokens it holds.
struct Row {
    std::shared_ptr<const View> view;
    std::vector<int> pages;  // the block table
    int held = 0;
};

// The inputs of one step. The tokens of a row are contiguous; a parent is an index into the row's tokens, or -1 for a
// token that follows the row's cached tokens.
struct Request {
    std::vector<int> tokens, positions;
    std::vector<Row> rows;
    std::vector<int> counts;   // per row: its tokens in this step
    std::vector<int> parents;  // empty: each row's tokens are a chain
    std::vector<int> wanted;   // tokens whose outputs are returned, ascending
    std::vector<int> taps;
    const float* inputs = nullptr;  // [tokens, width] in place of the tokens' embeddings
    float* hidden = nullptr;
    float* logits = nullptr;
    float* tapped = nullptr;
};

// A sequence in the cache of one model, and how its next token is drawn.
struct Sequence {
    Row row;
    std::vector<int> new_tokens;  // those that are not cached yet; at least one
    Sampling how;
    int sample = 0, position = 0;  // of the next token, for its random number

    // Append tokens; the first `cached` of them are in the row already, after the new tokens.
    void append(const std::vector<int>& tokens, int cached);
};
using Batch = std::vector<Sequence>;

// The draft of a sequence, and the distributions [vocab] that its tokens were drawn from; none at temperature 0, where
// every token is certain.
struct Drafted {
    std::vector<int> tokens;
    std::vector<const float*> probs;
};

class Engine {
public:
    Engine(const Model& model, int threads, const Isa* isa);

    void set_matrix(int layer, const std::string& which, std::shared_ptr<Packed> matrix);
    void set_vector(int layer, const std::string& which, std::vector<float> values);
    void set_window(int layer, int window);
    void set_rotation(std::vector<float> cos, std::vector<float> sin);
    void finish();  // call after all setters: allocates memory for the steps

    // Throws std::invalid_argument for inputs that are not valid, before anything is written. Functions that sample
    // throw std::overflow_error for logits that are not finite.
    void step(const Request& request);

    // A request over all uncached tokens of these sequences, for the logits of the last token of each.
    static Request following(const Batch& batch, const std::vector<int>& which);
    // Choose the next token as plain decoding does, from its logits [vocab]. `spare`: scratch memory [vocab] of the
    // calling thread; null: no thread is running, and all share a large vocabulary.
    int choose_plain(const float* logits, const Sequence& sequence, int position, float* spare);
    // Draw a token from logits [vocab], which become the probabilities that it was drawn from; at temperature 0 they stay.
    int draw(float* logits, const Sequence& sequence, int position, uint32_t purpose, float* spare);
    // Draft counts[r] tokens after sequence r, a step for every token, with random numbers of purposes[r]. Writes
    // distributions to probs [sum of counts, vocab], all of the first position first; at temperature 0 logits.
    // `features`: of a layer that continues features, those of each sequence's uncached tokens [n, width].
    std::vector<Drafted> draft(
        const Batch& batch, const std::vector<int>& counts, const std::vector<uint32_t>& purposes, float* probs,
        const std::vector<std::vector<float>>* features = nullptr
    );

    // EAGLE's inputs: each token's embedding joined with its feature -> out [tokens, width].
    void join(const std::vector<int>& tokens, const float* features, float* out);
    void set_join(std::shared_ptr<Packed> join) { join_ = std::move(join); }

    // Multiply by one matrix: x [count, inputs] -> out [count, outputs].
    void product(const Matrix& matrix, int outputs, const float* x, int count, float* out);
    void embed(int token, float* to) const;
    // Call body(item, spare) for every item, on all threads; spare: null, or scratch memory [vocab] of the thread.
    // Throws the overflow_error that a call threw.
    template <class Body>
    void each(int items, const Body& body);
    double read_speed(const float* from, size_t count, int repeats);  // bytes per second, all threads

    Model model;
    const Isa* isa;
    std::recursive_mutex mutex;  // one caller at a time: the bindings release Python's lock
    int threads() const { return pool_->size(); }

private:
    void fit(int keys);
    static const Model& checked(const Model& model);
    void check(const Request& request) const;
    void check(const Row& row, int count) const;
    void place(const Request& request);
    float* memory(size_t floats);

    std::vector<Layer> layers_;
    std::vector<std::shared_ptr<Packed>> matrices_;
    std::shared_ptr<Packed> join_;     // EAGLE: [embedding, feature] -> input
    Norm token_norm_, state_norm_;
    std::vector<std::vector<float>> vectors_;
    std::vector<float> cos_, sin_, spare_;
    std::vector<std::unique_ptr<float[]>> owned_, scores_owned_;
    std::vector<float*> normed_, scores_;
    std::vector<uint8_t*> acts_;
    std::vector<Token> tokens_;
    std::vector<int> entries_, lines_;
    Block block_;
    size_t acts_floats_ = 0;
    int keys_ = 0;
    bool finished_ = false;
    std::shared_ptr<Pool> pool_;
};

template <class Body>
void Engine::each(int items, const Body& body) {
    if (items == 1) return body(0, nullptr);
    struct With {
        const Body& body;
        float* spare;
        size_t vocab;
        int items, threads;
        std::atomic<bool> broken{false};
    };
    With with{body, spare_.data(), size_t(model.vocab), items, pool_->size()};
    pool_->run([](void* given, int thread) {
        auto& with = *static_cast<With*>(given);
        try {
            for (int item = thread; item < with.items; item += with.threads)
                with.body(item, with.spare + size_t(thread) * with.vocab);
        } catch (const std::overflow_error&) {
            with.broken = true;
        }
    }, &with);
    if (with.broken) throw std::overflow_error("the logits are not finite");
}

}  // namespace lab
