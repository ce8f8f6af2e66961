// A model that is ready to run: its matrices, its threads, and memory for a block of tokens.
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

// What one step is asked for. Tokens of one row stand together; parents are numbers within the row's tokens, -1 for
// what follows the row's held tokens.
struct Request {
    std::vector<int> tokens, positions;
    std::vector<int> rows, counts, held;  // of every row: its number, its tokens here, what it holds
    std::vector<int> parents;             // empty: each row's tokens follow one another
    std::vector<int> wanted;              // ascending
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
    void finish();  // everything is there: memory for the steps is taken

    // std::invalid_argument for what cannot be; nothing has been written then. Where tokens are drawn,
    // std::overflow_error for logits that are not finite.
    void step(const View& view, const Request& request);

    struct Text {
        int row, held;
        std::vector<int> known;  // tokens that the cache does not hold yet; at least one
        int sample, position;    // of the next token, for the keyed noise
    };
    // A request for what follows a text: all tokens it has, the last one's logits.
    static Request following(const Text& text, float* logits);
    // The next token of plain decoding, from its logits [vocab].
    int choose_plain(const float* logits, const Sampling& how, int sample, int position);
    // Rows [count, vocab] of logits become what is sampled from.
    void to_probabilities(float* rows, int count, const Sampling& how);

    // `count` tokens, each drawn with one uniform number; probs [count, vocab] is what each was drawn from.
    std::vector<int> draft(const View& view, const Text& text, int count, const Sampling& how, uint32_t purpose, float* probs);
    // What the target's heads read of every forward, one row after the other; null: nothing.
    struct States {
        float* hidden = nullptr;  // [count, width]
        float* tapped = nullptr;  // [count, taps * width]
        std::vector<int> taps;
    };
    // Plain decoding until `count` tokens or one of `ends`; `states` are of the token before each.
    std::vector<int> generate(
        const View& view, const Text& text, int count, const Sampling& how, const std::vector<int>& ends,
        const States& states
    );

    // A layer that continues a target's features (EAGLE) reads every token beside the feature [width] that it was drawn
    // from: here of the known tokens, of which `held` are in the layer's cache. `predicted` [width] is written: the
    // feature behind the text. Otherwise as draft().
    std::vector<int> continue_features(
        const View& view, const Text& text, const float* features, int count, const Sampling& how, uint32_t purpose,
        float* predicted, float* probs
    );
    // What such a layer is fed: tokens, each beside its feature -> out [tokens, width].
    void join(const std::vector<int>& tokens, const float* features, float* out);
    void set_join(std::shared_ptr<Packed> join) { join_ = std::move(join); }

    // One matrix alone: x [count, inputs] -> out [count, outputs of the model's shape].
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
    void check(const Text& text, int count, const Sampling& how) const;
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
    std::recursive_mutex mutex_;  // one caller at a time: Python lets others run meanwhile
    size_t acts_floats_ = 0;
    int capacity_ = 0;
    bool finished_ = false;
    std::shared_ptr<Pool> pool_;
};

}  // namespace lab
