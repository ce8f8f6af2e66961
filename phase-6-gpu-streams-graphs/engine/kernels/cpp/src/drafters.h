// What drafts within a call: a draft model, EAGLE's layer, Medusa's heads, or the caller, which gives the tokens.
#pragma once

#include "engine.h"

namespace lab {

// The outcome of a step for one sequence.
struct Outcome {
    std::vector<int> tokens;  // the accepted draft tokens, and the token after them
    // The target's states, for drafters that read them: up to that of the last accepted token, or of the token before the
    // draft if none was accepted.
    const float* states;
    int state_count;
};

class Drafter {
public:
    virtual ~Drafter() = default;
    // Draft counts[r] tokens after sequence r. Distributions go to `probs`, as in Engine::draft, or to memory of the
    // drafter's own if it is null; they are valid until the next call.
    virtual std::vector<Drafted> propose(const std::vector<int>& counts, float* probs) = 0;
    // Every sequence of the last proposal has new tokens.
    virtual void observe(const std::vector<Outcome>& outcomes) = 0;
    virtual Engine& engine() = 0;  // whose memory it uses
    virtual const void* keys() const { return nullptr; }  // the first tensor of its cache
    virtual int sequences() const = 0;

protected:
    float* memory(float* given, const std::vector<int>& counts);

private:
    std::vector<float> own_;
};

class ModelDrafter : public Drafter {
public:
    ModelDrafter(Engine& model, Batch batch, std::vector<uint32_t> purposes)
        : model_(model), batch_(std::move(batch)), purposes_(std::move(purposes)) {}
    std::vector<Drafted> propose(const std::vector<int>& counts, float* probs) override;
    void observe(const std::vector<Outcome>& outcomes) override;
    Engine& engine() override { return model_; }
    const void* keys() const override;
    int sequences() const override { return int(batch_.size()); }

protected:
    Engine& model_;
    Batch batch_;
    std::vector<uint32_t> purposes_;  // per sequence: of the random numbers that its tokens are drawn with
    std::vector<int> counts_;  // of the last proposal
};

// EAGLE's layer over each sequence. A sequence's new tokens come with features: what the target's states are reduced to
// by a matrix, or their first `width` numbers without one.
class EagleDrafter : public ModelDrafter {
public:
    EagleDrafter(Engine& layer, Batch batch, std::vector<uint32_t> purposes, std::shared_ptr<Packed> reduce, int states, std::vector<std::vector<float>> read);
    std::vector<Drafted> propose(const std::vector<int>& counts, float* probs) override;
    void observe(const std::vector<Outcome>& outcomes) override;

private:
    std::vector<float> features(const float* states, int count);
    std::shared_ptr<Packed> reduce_;
    int states_;  // numbers of a state
    std::vector<std::vector<float>> features_;
};

// Medusa's heads (drafters/medusa.py), multiplied by the target's threads.
struct Medusa {
    Engine& target;
    int heads, states;                          // number of heads; numbers of a state
    std::shared_ptr<Packed> reduce, token;      // null: without
    std::vector<float> token_norm;              // [width]
    float eps;
    std::vector<std::shared_ptr<Packed>> blocks, mix;  // [blocks * heads], [heads]
    std::shared_ptr<Packed> head;                      // the output matrix

    void check() const;
    // Logits [R, count, vocab] of the first `count` heads, from R states and the tokens that were drawn from them.
    void logits(const float* states, const std::vector<int>& tokens, int count, float* out) const;
};

class MedusaDrafter : public Drafter {
public:
    // read: the last state of each sequence; its new tokens are the one after it.
    MedusaDrafter(std::shared_ptr<const Medusa> medusa, Batch batch, std::vector<uint32_t> purposes, std::vector<float> read);
    std::vector<Drafted> propose(const std::vector<int>& counts, float* probs) override;
    void observe(const std::vector<Outcome>& outcomes) override;
    Engine& engine() override { return medusa_->target; }
    int sequences() const override { return int(batch_.size()); }

private:
    std::shared_ptr<const Medusa> medusa_;
    Batch batch_;
    std::vector<uint32_t> purposes_;
    std::vector<float> states_;  // [R, states]
    std::vector<float> logits_;
};

// Certain tokens that the caller found, for one step.
class GivenDrafter : public Drafter {
public:
    GivenDrafter(Engine& target, std::vector<std::vector<int>> tokens) : target_(target), tokens_(std::move(tokens)) {}
    std::vector<Drafted> propose(const std::vector<int>& counts, float* probs) override;
    void observe(const std::vector<Outcome>& outcomes) override;
    Engine& engine() override { return target_; }
    int sequences() const override { return int(tokens_.size()); }

private:
    Engine& target_;
    std::vector<std::vector<int>> tokens_;
};

}  // namespace lab
