#include "drafters.h"

#include <algorithm>
#include <cmath>

#include "need.h"

namespace lab {

float* Drafter::memory(float* given, const std::vector<int>& counts) {
    if (given != nullptr) return given;
    size_t total = 0;
    for (int count : counts) {
        need(count >= 0 && count <= 1 << 20, "a number of draft tokens is below 0 or absurd");
        total += size_t(count);
    }
    total *= size_t(engine().model.vocab);
    if (own_.size() < total) own_.resize(total);
    return own_.data();
}

const void* ModelDrafter::keys() const {
    for (const Sequence& sequence : batch_)
        if (sequence.row.view != nullptr) return sequence.row.view->keys.front();
    return nullptr;
}

std::vector<Drafted> ModelDrafter::propose(const std::vector<int>& counts, float* probs) {
    counts_ = counts;
    return model_.draft(batch_, counts, purposes_, memory(probs, counts));
}

// The row holds the new tokens and the draft but its last token.
void ModelDrafter::observe(const std::vector<Outcome>& outcomes) {
    for (size_t r = 0; r < batch_.size(); ++r) {
        const int accepted = int(outcomes[r].tokens.size()) - 1;
        if (counts_[r] > 0) batch_[r].append(outcomes[r].tokens, std::min(accepted, counts_[r] - 1));
    }
}

EagleDrafter::EagleDrafter(
    Engine& layer, Batch batch, std::vector<uint32_t> purposes, std::shared_ptr<Packed> reduce, int states, std::vector<std::vector<float>> read
)
    : ModelDrafter(layer, std::move(batch), std::move(purposes)), reduce_(std::move(reduce)), states_(states) {
    const int width = model_.model.width;
    need(read.size() == batch_.size(), "sequences and states differ in number");
    need(states_ >= width && (reduce_ == nullptr || (reduce_->matrix.inputs == states_ && reduce_->shape.outputs == width)),
         "the matrix that reduces states has another shape");
    for (const auto& of_row : read) {
        need(of_row.size() % size_t(states_) == 0, "a state has another size");
        features_.push_back(features(of_row.data(), int(of_row.size() / size_t(states_))));
    }
}

std::vector<float> EagleDrafter::features(const float* states, int count) {
    const size_t width = size_t(model_.model.width);
    std::vector<float> found(size_t(count) * width);
    if (reduce_ != nullptr && count > 0) model_.product(reduce_->matrix, int(width), states, count, found.data());
    for (int i = 0; reduce_ == nullptr && i < count; ++i) std::copy_n(states + size_t(i) * size_t(states_), width, &found[size_t(i) * width]);
    return found;
}

std::vector<Drafted> EagleDrafter::propose(const std::vector<int>& counts, float* probs) {
    counts_ = counts;
    return model_.draft(batch_, counts, purposes_, memory(probs, counts), &features_);
}

// The row keeps the sequence's inputs. Those of the draft were the layer's own predictions.
void EagleDrafter::observe(const std::vector<Outcome>& outcomes) {
    for (size_t r = 0; r < batch_.size(); ++r) {
        if (counts_[r] == 0) continue;
        const Outcome& outcome = outcomes[r];
        const int gained = int(outcome.tokens.size());
        need(outcome.states != nullptr && outcome.state_count >= gained, "the target gave no states");
        batch_[r].append(outcome.tokens, 0);
        features_[r] = features(outcome.states + size_t(outcome.state_count - gained) * size_t(states_), gained);
    }
}

void Medusa::check() const {
    const int width = target.model.width;
    auto square = [&](const std::shared_ptr<Packed>& packed, int inputs) {
        need(packed != nullptr && packed->matrix.inputs == inputs && packed->shape.outputs == width, "a matrix of the heads has another shape");
    };
    need(heads > 0 && states >= width && mix.size() == size_t(heads) && blocks.size() % size_t(heads) == 0, "the heads are incomplete");
    if (reduce != nullptr) square(reduce, states);
    if (token != nullptr) square(token, width);
    for (const auto& packed : blocks) square(packed, width);
    for (const auto& packed : mix) square(packed, width);
    need(head != nullptr && head->matrix.inputs == width && head->shape.outputs == target.model.vocab, "the output matrix has another shape");
}

void Medusa::logits(const float* states_of, const std::vector<int>& tokens, int count, float* out) const {
    const int width = target.model.width, rows = int(tokens.size());
    need(count >= 0 && count <= heads, "a draft has at most one token for each head");
    const size_t size = size_t(rows) * size_t(width);
    std::vector<float> x(size), change(size), embedded(size);
    for (size_t r = 0; r < tokens.size(); ++r) std::copy_n(states_of + r * size_t(states), width, &x[r * size_t(width)]);
    auto add = [&](const Packed& packed, const float* from) {
        target.product(packed.matrix, width, from, rows, change.data());
        for (size_t i = 0; i < size; ++i) x[i] += change[i];
    };
    if (reduce != nullptr) add(*reduce, states_of);
    if (token != nullptr) {
        const Norm norm{token_norm.data(), nullptr, eps, true};
        for (size_t r = 0; r < tokens.size(); ++r) {
            need(tokens[r] >= 0 && tokens[r] < target.model.vocab, "a token is not in the vocabulary");
            float* row = &embedded[r * size_t(width)];
            target.embed(tokens[r], row);
            target.isa->normalise(norm, row, width, row);
        }
        add(*token, embedded.data());
    }
    std::vector<float> mixed(size * size_t(count)), y;
    for (int head = 0; head < count; ++head) {
        y = x;
        for (size_t block = size_t(head); block < blocks.size(); block += size_t(heads)) {
            target.product(blocks[block]->matrix, width, y.data(), rows, change.data());
            for (size_t i = 0; i < size; ++i) y[i] += change[i] / (1 + std::exp(-change[i]));  // SiLU
        }
        target.product(mix[size_t(head)]->matrix, width, y.data(), rows, change.data());
        for (int r = 0; r < rows; ++r)
            std::copy_n(&change[size_t(r) * size_t(width)], width, &mixed[(size_t(r) * size_t(count) + size_t(head)) * size_t(width)]);
    }
    target.product(head->matrix, target.model.vocab, mixed.data(), rows * count, out);
}

MedusaDrafter::MedusaDrafter(std::shared_ptr<const Medusa> medusa, Batch batch, std::vector<uint32_t> purposes, std::vector<float> read)
    : medusa_(std::move(medusa)), batch_(std::move(batch)), purposes_(std::move(purposes)), states_(std::move(read)) {
    need(medusa_ != nullptr && states_.size() == batch_.size() * size_t(medusa_->states), "each sequence has one state");
    need(purposes_.size() == batch_.size(), "sequences and purposes differ in number");
    for (const Sequence& sequence : batch_) need(!sequence.new_tokens.empty(), "the token after the state is missing");
}

std::vector<Drafted> MedusaDrafter::propose(const std::vector<int>& counts, float* probs) {
    Engine& target = engine();
    const size_t vocab = size_t(target.model.vocab);
    need(counts.size() == batch_.size(), "sequences and counts differ in number");
    std::vector<Drafted> drafts(batch_.size());
    std::vector<int> tokens;
    for (size_t r = 0; r < batch_.size(); ++r) {
        need(counts[r] >= 0, "a number of draft tokens is below 0");
        tokens.push_back(batch_[r].new_tokens.back());
    }
    const int most = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
    need(most <= medusa_->heads, "a draft has at most one token for each head");
    if (most == 0) return drafts;
    float* rows = probs;  // given memory has a row for every token, position by position; the own one `most` per sequence
    logits_.resize(batch_.size() * size_t(most) * vocab);
    medusa_->logits(states_.data(), tokens, most, logits_.data());
    for (int i = 0; i < most; ++i)
        for (size_t r = 0; r < batch_.size(); ++r) {
            if (counts[r] <= i) continue;
            float* row = &logits_[(r * size_t(most) + size_t(i)) * vocab];
            if (probs != nullptr) row = std::copy_n(row, vocab, rows) - vocab, rows += vocab;
            drafts[r].probs.push_back(row);
        }
    target.each(int(batch_.size()), [&](int r, float* spare) {
        Drafted& mine = drafts[size_t(r)];
        const Sequence& sequence = batch_[size_t(r)];
        for (const float* row : mine.probs)
            mine.tokens.push_back(target.draw(const_cast<float*>(row), sequence, sequence.position + int(mine.tokens.size()), purposes_[size_t(r)], spare));
        if (sequence.how.temperature == 0) mine.probs.clear();
    });
    return drafts;
}

void MedusaDrafter::observe(const std::vector<Outcome>& outcomes) {
    const size_t size = size_t(medusa_->states);
    for (size_t r = 0; r < batch_.size(); ++r) {
        need(outcomes[r].states != nullptr && outcomes[r].state_count > 0, "the target gave no states");
        batch_[r].append(outcomes[r].tokens, 0);
        std::copy_n(outcomes[r].states + size_t(outcomes[r].state_count - 1) * size, size, &states_[r * size]);
    }
}

std::vector<Drafted> GivenDrafter::propose(const std::vector<int>& counts, float*) {
    need(counts.size() == tokens_.size(), "sequences and counts differ in number");
    std::vector<Drafted> drafts;
    for (size_t r = 0; r < tokens_.size(); ++r) {
        need(counts[r] >= 0 && size_t(counts[r]) <= tokens_[r].size(), "a draft has fewer tokens than were asked for");
        for (int token : tokens_[r]) need(token >= 0 && token < target_.model.vocab, "a draft token is not in the vocabulary");
        drafts.push_back({{tokens_[r].begin(), tokens_[r].begin() + counts[r]}, {}});
    }
    return drafts;
}

void GivenDrafter::observe(const std::vector<Outcome>&) { tokens_.assign(tokens_.size(), {}); }

}  // namespace lab
