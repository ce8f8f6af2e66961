// Tests the kernels without Python; the sanitizers run this program (see sanitize.py). Random models, formats,
// caches and trees: every token's logits must have the same bits alone and in a batch, on one thread and on several.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "speculate.h"

using namespace lab;

namespace {

std::mt19937 random_bits(7);

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

std::vector<float> normals(size_t count, float scale, float mean = 0) {
    std::normal_distribution<float> normal(mean, scale);
    std::vector<float> found(count);
    for (float& x : found) x = normal(random_bits);
    return found;
}

void need(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "selftest: %s\n", what);
    std::exit(1);
}

struct Made {
    Model model;
    std::shared_ptr<Arena> arena = std::make_shared<Arena>(size_t(1) << 24);
    std::vector<std::tuple<int, std::string, std::shared_ptr<Packed>>> matrices;
    std::vector<std::tuple<int, std::string, std::vector<float>>> vectors;
    std::vector<float> embedding, positions, cos, sin;
    std::vector<int> windows;

    std::shared_ptr<Packed> matrix(Kind kind, int outputs, int inputs, bool wide, bool pair, bool bias) {
        const int group = 32;
        const bool zeros = kind == Kind::i4 && between(0, 1) == 1;
        auto packed = std::make_shared<Packed>(arena, Shape{kind, outputs, inputs, wide, pair, group, zeros, false, bias});
        if (kind == Kind::i8 || kind == Kind::i4) {
            const size_t groups = kind == Kind::i4 ? size_t(inputs / group) : 1;
            const size_t size = kind == Kind::i4 ? size_t(inputs) / 2 : size_t(inputs);
            std::vector<uint8_t> levels(size_t(outputs) * size);
            for (uint8_t& level : levels) level = uint8_t(random_bits());
            const std::vector<uint16_t> scales(size_t(outputs) * groups, 0x3c00), middles(size_t(outputs) * groups, 0x4800);
            packed->fill_levels(0, outputs, levels.data(), scales.data(), zeros ? middles.data() : nullptr);
        } else {
            const std::vector<float> rows = normals(size_t(outputs) * size_t(inputs), 0.2f);
            packed->fill(0, outputs, rows.data(), Kind::f32);
        }
        if (bias) packed->set_bias(normals(size_t(outputs), 0.1f).data());
        return packed;
    }

    explicit Made(Kind kind, int vocab = 0) {
        Model& m = model;
        m.layers = between(1, 2), m.kv_heads = between(1, 3), m.heads = m.kv_heads * between(1, 5);
        m.head_dim = 2 * between(1, 20);
        const bool groups = kind == Kind::i4;
        if (groups) m.head_dim = 32;
        m.width = groups ? 32 * between(1, 3) : between(1, 70), m.ffn = groups ? 32 * between(1, 3) : between(1, 90);
        m.vocab = vocab ? vocab : between(2, 90);
        m.gated = between(0, 1) == 1, m.rope = between(0, 1) == 1, m.activation = Activation(between(0, 3));
        const bool wide = between(0, 1) == 1, layer_norm = between(0, 1) == 1, qk = between(0, 1) == 1;
        auto vector = [&](int layer, const char* name, int count) {
            vectors.emplace_back(layer, name, normals(size_t(count), 0.2f, 1));
        };
        for (int layer = 0; layer < m.layers; ++layer) {
            windows.push_back(between(0, 2) == 0 ? between(1, 15) : 0);
            matrices.emplace_back(layer, "qkv", matrix(kind, m.qkv_width(), m.width, wide, false, true));
            matrices.emplace_back(layer, "output", matrix(kind, m.width, m.heads * m.head_dim, wide, false, false));
            matrices.emplace_back(layer, "up", matrix(kind, m.gated ? 2 * m.ffn : m.ffn, m.width, wide, m.gated, true));
            matrices.emplace_back(layer, "down", matrix(kind, m.width, m.ffn, wide, false, true));
            for (const char* norm : {"attention_norm", "ffn_norm"}) {
                vector(layer, (std::string(norm) + ".weight").c_str(), m.width);
                if (layer_norm) vector(layer, (std::string(norm) + ".bias").c_str(), m.width);
            }
            if (qk) vector(layer, "query_norm", m.head_dim), vector(layer, "key_norm", m.head_dim);
        }
        matrices.emplace_back(-1, "head", matrix(kind, m.vocab, m.width, wide, false, false));
        vector(-1, "norm.weight", m.width);
        embedding = normals(size_t(m.vocab) * size_t(m.width), 1);
        positions = normals(64 * size_t(m.width), 0.3f);
        m.embedding = {embedding.data(), Kind::f32, m.vocab};
        m.positions = {positions.data(), Kind::f32, 64};
        const size_t angles = 64 * size_t(m.head_dim / 2);
        cos = normals(angles, 0.7f), sin = normals(angles, 0.7f);
    }

    std::unique_ptr<Engine> engine(int threads, const Isa* isa) {
        auto made = std::make_unique<Engine>(model, threads, isa);
        for (auto& [layer, name, packed] : matrices) made->set_matrix(layer, name, packed);
        for (auto& [layer, name, values] : vectors) made->set_vector(layer, name, values);
        for (int layer = 0; layer < model.layers; ++layer) made->set_window(layer, windows[size_t(layer)]);
        made->set_rotation(cos, sin);
        made->finish();
        return made;
    }
};

struct Memory {  // a cache of two rows
    std::vector<std::vector<uint8_t>> owned;
    std::vector<std::vector<uint16_t>> scales;
    View view;

    Memory(const Model& m, Kind kind, int capacity) {
        Cache& cache = view.cache;
        cache.kind = kind, cache.rows = 2, cache.kv_heads = m.kv_heads;
        cache.capacity = capacity, cache.head_dim = m.head_dim;
        const size_t entries = size_t(2) * size_t(m.kv_heads) * size_t(capacity);
        const size_t bytes = entries * size_t(m.head_dim) * (kind == Kind::f32 ? 4 : kind == Kind::i8 ? 1 : 2);
        for (int i = 0; i < 2 * m.layers; ++i) owned.emplace_back(bytes, 0xff), scales.emplace_back(entries, 0xffff);
        for (int i = 0; i < m.layers; ++i) {
            view.keys.push_back(owned[size_t(2 * i)].data()), view.values.push_back(owned[size_t(2 * i + 1)].data());
            view.key_scales.push_back(scales[size_t(2 * i)].data());
            view.value_scales.push_back(scales[size_t(2 * i + 1)].data());
        }
        view.bind();
    }
};

Request request_of(const std::vector<int>& tokens, int held, int row, float* logits) {
    Request request;
    request.tokens = tokens;
    for (size_t i = 0; i < tokens.size(); ++i) {
        request.positions.push_back(held + int(i));
        request.wanted.push_back(int(i));
    }
    request.rows = {row}, request.counts = {int(tokens.size())}, request.held = {held};
    request.logits = logits;
    return request;
}

void one_model(Kind weights, Kind kind, const Isa* isa) {
    Made made(weights);
    const size_t vocab = size_t(made.model.vocab), count = 21;
    std::vector<int> tokens(count);
    for (int& token : tokens) token = between(0, made.model.vocab - 1);
    std::vector<float> alone(count * vocab), together(count * vocab), tree(count * vocab);
    {
        auto engine = made.engine(1, isa);
        Memory memory(made.model, kind, 40);
        for (size_t i = 0; i < count; ++i) engine->step(memory.view, request_of({tokens[i]}, int(i), 1, &alone[i * vocab]));
    }
    for (int threads = 1; threads <= 3; ++threads) {
        auto engine = made.engine(threads, isa);
        Memory memory(made.model, kind, 40);
        const size_t first = size_t(between(1, 20));
        const std::vector<int> head(tokens.begin(), tokens.begin() + long(first)), tail(tokens.begin() + long(first), tokens.end());
        engine->step(memory.view, request_of(head, 0, 0, together.data()));
        engine->step(memory.view, request_of(tail, int(first), 0, &together[first * vocab]));
        need(std::memcmp(alone.data(), together.data(), alone.size() * 4) == 0, "a token among others has other bits");
        // The same tokens as one path of a tree: every second node is a leaf.
        Request branched = request_of({}, int(first), 0, tree.data());
        std::vector<int> path;
        int parent = -1;
        for (size_t i = 0; i < tail.size(); ++i) {
            branched.tokens.push_back(tokens[0]), branched.positions.push_back(int(first + i)), branched.parents.push_back(parent);
            branched.tokens.push_back(tail[i]), branched.positions.push_back(int(first + i)), branched.parents.push_back(parent);
            parent = int(branched.tokens.size()) - 1;
            path.push_back(parent);
        }
        if (first + branched.tokens.size() <= 40) {
            branched.counts = {int(branched.tokens.size())};
            branched.wanted = path;
            engine->step(memory.view, branched);
            need(std::memcmp(&alone[first * vocab], tree.data(), tail.size() * vocab * 4) == 0, "a tree's line has other bits");
        }
        Sampling how;
        how.temperature = between(0, 1), how.top_k = between(0, 5), how.top_p = between(0, 1) ? 0.9 : 1, how.seed = 3;
        std::vector<float> probs(4 * vocab), ratios(3), spare(vocab), target(4 * vocab);
        const Engine::Sequence text{1, 0, tokens, 0, int(count)};
        const std::vector<int> drawn = engine->draft(memory.view, text, 4, how, DRAFT, probs.data());
        const std::vector<int> plain = engine->generate(memory.view, text, 8, how, {}, {});
        need(drawn.size() == 4 && plain.size() == 8, "a chain has another length");
        std::vector<int64_t> ids(drawn.begin(), drawn.begin() + 3);
        if (how.temperature != 0) {
            const Accepted verdict =
                verify(*isa, ids.data(), 3, probs.data(), probs.data(), int(vocab), 1, 2, 3, false, ratios.data(), spare.data());
            need(verdict.accepted == 3, "a draft by the target itself must be accepted");
        }
    }
}

// Speculative decoding of a sequence by two models in `steps` steps, with all distributions.
struct Run {
    std::vector<Speculated> steps;
    std::vector<float> draft_probs, target_probs;
    std::vector<int> text;  // the new tokens

    Run(Engine& target, Engine& drafter, const std::vector<int>& known, int at_once, int steps_, int count, const Sampling& how, bool own, uint32_t purpose) {
        const size_t vocab = size_t(target.model.vocab), k = size_t(count), all = size_t(steps_);
        const int room = int(known.size()) + steps_ * (count + 1);
        Memory seen(target.model, Kind::f32, room), drafting(drafter.model, Kind::f32, room);
        draft_probs.resize(all * k * vocab), target_probs.resize(all * (k + 1) * vocab);
        std::vector<int64_t> tokens(all * k);
        std::vector<float> ratios(all * k);
        Engine::Sequence mine{1, 0, known, 0, int(known.size())}, its = mine;
        its.row = 0;
        for (size_t done = 0; done < all; done += size_t(at_once)) {
            const auto some = speculate(
                target, seen.view, mine, drafter, drafting.view, its, {count, how, own, purpose, at_once}, &tokens[done * k],
                &draft_probs[done * k * vocab], &target_probs[done * (k + 1) * vocab], &ratios[done * k]
            );
            for (const Speculated& step : some) {
                need(step.accepted >= 0 && step.accepted <= count && int(step.draft.size()) == count, "a step has another size");
                for (size_t i = 0; i < size_t(step.accepted); ++i) text.push_back(step.draft[i]);
                text.push_back(step.next);
                steps.push_back(step);
            }
            // As in Python: each model keeps the accepted tokens, and computes the others in the next step.
            const Speculated& last = steps.back();
            std::vector<int> whole(known);
            whole.insert(whole.end(), text.begin(), text.end());
            mine.position = its.position = int(whole.size());
            mine.held = int(whole.size()) - 1, its.held = mine.held - (last.accepted == count ? 1 : 0);
            mine.new_tokens.assign(whole.begin() + mine.held, whole.end());
            its.new_tokens.assign(whole.begin() + its.held, whole.end());
        }
    }
};

bool same(const Run& a, const Run& b) {
    if (a.text != b.text || a.steps.size() != b.steps.size()) return false;
    for (size_t i = 0; i < a.steps.size(); ++i)
        if (a.steps[i].draft != b.steps[i].draft || a.steps[i].accepted != b.steps[i].accepted) return false;
    return std::memcmp(a.draft_probs.data(), b.draft_probs.data(), a.draft_probs.size() * 4) == 0 &&
           std::memcmp(a.target_probs.data(), b.target_probs.data(), a.target_probs.size() * 4) == 0;
}

// Speculative steps: several in a call equal single ones, a draft by the target itself is accepted, and the target's
// own choice gives plain decoding, on one thread and on several. Two host threads that share the pool decode at the
// same time.
void speculation(Kind weights, const Isa* isa) {
    Made made(weights), other(weights, made.model.vocab);
    std::vector<int> known(size_t(between(1, 20)));
    for (int& token : known) token = between(0, made.model.vocab - 1);
    const int count = between(1, 5), steps = 4;
    for (int way = 0; way < 4; ++way) {
        const bool own = way == 1 || way == 2;
        const uint32_t purpose = way == 2 ? SAMPLE : DRAFT;
        Sampling how;
        how.temperature = way == 3 ? 0 : 0.8, how.top_k = way == 0 ? 7 : 0, how.seed = uint64_t(between(0, 1 << 30));
        std::unique_ptr<Run> first;
        for (int threads = 1; threads <= 3; ++threads) {
            auto target = made.engine(threads, isa), drafter = other.engine(threads, isa);
            const Run single(*target, *drafter, known, 1, steps, count, how, own, purpose);
            std::unique_ptr<Run> at_once, itself;
            std::thread elsewhere([&] {
                at_once = std::make_unique<Run>(*target, *drafter, known, steps, steps, count, how, own, purpose);
            });
            auto twin = made.engine(threads, isa);
            itself = std::make_unique<Run>(*target, *twin, known, 1, steps, count, how, own, own ? uint32_t(SAMPLE) : purpose);
            elsewhere.join();
            need(same(single, *at_once), "several steps in a call are not single ones");
            need(first == nullptr || same(*first, single), "on other threads speculation has other bits");
            if (first == nullptr) first = std::make_unique<Run>(single);
            for (const Speculated& step : itself->steps)
                need(step.accepted == count, "a draft by the target itself must be accepted");
            if (own || how.temperature == 0) {
                Memory memory(made.model, Kind::f32, int(known.size() + single.text.size()));
                const auto plain = target->generate(
                    memory.view, {0, 0, known, 0, int(known.size())}, int(single.text.size()), how, {}, {}
                );
                need(plain == single.text, "the target's own choice is not plain decoding");
            }
        }
    }
}

}  // namespace

extern "C" int processor_has(const char* name);

int main() {
    int cases = 0;
    const Isa* every[] = {
#if defined(__x86_64__)
        &lab_isa_avx512_dot, &lab_isa_avx512, &lab_isa_avx2,
#endif
        &lab_isa_portable,
    };
    for (const Isa* isa : every) {
        if (!processor_has(isa->name)) continue;
        for (Kind weights : {Kind::f32, Kind::bf16, Kind::f16, Kind::i8, Kind::i4})
            for (Kind cache : {Kind::f32, Kind::bf16, Kind::f16, Kind::i8}) one_model(weights, cache, isa), ++cases;
        for (Kind weights : {Kind::f32, Kind::bf16, Kind::i8}) speculation(weights, isa), ++cases;
    }
    std::printf("%d models on every instruction set: the same bits always\n", cases);
    return 0;
}
