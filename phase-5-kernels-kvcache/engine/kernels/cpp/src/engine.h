// A model that can run: its matrices, its threads, and scratch memory for a block of tokens.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "isa.h"
#include "pack.h"
#include "sampling.h"

namespace lab {

// The inputs of one step. The tokens of a row are contiguous; a parent is an index into the row's tokens, or -1 for a
// token that follows the row's cached tokens.
struct Request {
    std::vector<int> tokens, positions;
    std::vector<int> rows, counts, held;  // per row: its number, its tokens in this step, its cached tokens
    std::vector<int> parents;             // empty: each row's tokens are a chain
    std::vector<int> wanted;              // tokens whose outputs are returned, ascending
    std::vector<int> taps;
    const float* inputs = nullptr;  // [tokens, width] in place of the tokens' embeddings
    float* hidden = nullptr;
    float* logits = nullptr;
    float* tapped = nullptr;
};

// The pointers of a StaticCache.
struct View {
    Cache cache;
    std::vector<void*> keys, values;
    std::vector<uint16_t*> key_scales, value_scales;
    void bind();
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
    void step(const View& view, const Request& request);

    struct Sequence {
        int row, held;                // its row of the cache, and how many tokens the row holds
        std::vector<int> new_tokens;  // those that are not cached yet; at least one
        int sample, position;         // of the next token, for the keyed noise
    };
    // A request over all uncached tokens of a sequence, for the logits of the last one.
    static Request following(const Sequence& sequence, float* logits);
    // Choose the next token as plain decoding does, from its logits [vocab].
    int choose_plain(const float* logits, const Sampling& how, int sample, int position);
    // Convert rows [count, vocab] of logits, in place, to the distributions that are sampled.
    void to_probabilities(float* rows, int count, const Sampling& how);

    // Draft `count` tokens, each with one uniform number; writes their distributions to probs [count, vocab].
    std::vector<int> draft(const View& view, const Sequence& sequence, int count, const Sampling& how, uint32_t purpose, float* probs);
    // The hidden states that draft heads read, one row per forward pass; null: none.
    struct States {
        float* hidden = nullptr;  // [count, width]
        float* tapped = nullptr;  // [count, taps * width]
        std::vector<int> taps;
    };
    // Decode plainly until `count` tokens or one of `ends`; `states` are those of the token before each new token.
    std::vector<int> generate(
        const View& view, const Sequence& sequence, int count, const Sampling& how, const std::vector<int>& ends,
        const States& states
    );

    // draft() with EAGLE's layer, whose input joins each token with the feature [width] that the token was drawn from.
    // `features` are those of the uncached tokens. Writes the feature predicted after the sequence to `predicted`
    // [width].
    std::vector<int> continue_features(
        const View& view, const Sequence& sequence, const float* features, int count, const Sampling& how, uint32_t purpose,
        float* predicted, float* probs
    );
    // EAGLE's inputs: each token's embedding joined with its feature -> out [tokens, width].
    void join(const std::vector<int>& tokens, const float* features, float* out);
    void set_join(std::shared_ptr<Packed> join) { join_ = std::move(join); }

    // Multiply by one matrix: x [count, inputs] -> out [count, outputs].
    void product(const Packed& packed, const float* x, int count, float* out);
    double read_speed(const float* from, size_t count, int repeats);  // bytes per second, all threads

    Model model;
    const Isa* isa;
    int threads() const { return pool_->size(); }

private:
    int draw(float* of_token, const Sampling& how, int sample, int position, uint32_t purpose);
    void embed(int token, float* to) const;
    void fit(int capacity);
    static const Model& checked(const Model& model);
    void check(const View& view, const Request& request) const;
    void check(const Sequence& sequence, int count, const Sampling& how) const;
    float* memory(size_t floats);

    std::vector<Layer> layers_;
    std::vector<std::shared_ptr<Packed>> matrices_;
    std::shared_ptr<Packed> join_;     // EAGLE: [embedding, feature] -> input
    Norm token_norm_, state_norm_;
    std::vector<std::vector<float>> vectors_;
    std::vector<float> cos_, sin_, spare_, one_;
    std::vector<std::unique_ptr<float[]>> owned_, scores_owned_;
    std::vector<float*> normed_, scores_;
    std::vector<uint8_t*> acts_;
    std::vector<Token> tokens_;
    std::vector<int> lines_;
    Block block_;
    std::recursive_mutex mutex_;  // one caller at a time: the bindings release Python's lock
    size_t acts_floats_ = 0;
    int capacity_ = 0;
    bool finished_ = false;
    std::shared_ptr<Pool> pool_;
};

}  // namespace lab
