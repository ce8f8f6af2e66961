// Tests the kernels without Python; the sanitizers run this program (see sanitize.py). Random models, formats,
// caches and trees: every token's logits must have the same bits alone and in a batch, in pages and in a ring, on one
// thread and on several. Batches that are decoded with every drafter must give each sequence what it gets alone.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "decode.h"

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
    std::shared_ptr<Packed> join;

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

    // windowed: every layer has a window. eagle: of EAGLE's layer beside this model.
    explicit Made(Kind kind, bool windowed = false, int vocab = 0, const Model* eagle = nullptr) {
        Model& m = model;
        m.layers = eagle ? 1 : between(1, 2), m.kv_heads = between(1, 3), m.heads = m.kv_heads * between(1, 5);
        m.head_dim = 2 * between(1, 20);
        const bool groups = kind == Kind::i4;
        if (groups) m.head_dim = 32;
        m.width = eagle ? eagle->width : groups ? 32 * between(1, 3) : between(1, 70), m.ffn = groups ? 32 * between(1, 3) : between(1, 90);
        m.vocab = vocab ? vocab : between(2, 90);
        m.gated = between(0, 1) == 1, m.rope = between(0, 1) == 1, m.activation = Activation(between(0, 3));
        const bool wide = between(0, 1) == 1, layer_norm = between(0, 1) == 1, qk = between(0, 1) == 1;
        auto vector = [&](int layer, const char* name, int count) {
            vectors.emplace_back(layer, name, normals(size_t(count), 0.2f, 1));
        };
        for (int layer = 0; layer < m.layers; ++layer) {
            windows.push_back(windowed || between(0, 2) == 0 ? between(1, 15) : 0);
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
        if (eagle) {
            join = matrix(kind, m.width, 2 * m.width, wide, false, false);
            vector(-1, "token_norm.weight", m.width), vector(-1, "state_norm.weight", m.width);
        }
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
        if (join != nullptr) made->set_join(join);
        made->set_rotation(cos, sin);
        made->finish();
        return made;
    }
};

enum class Place { rows, pages, ring };

// A cache of some rows with room for `room` tokens each: one page per row, pages of a few tokens in random order, or a
// ring for steps of at most `most` tokens.
struct Memory {
    std::vector<std::vector<uint8_t>> owned;
    std::vector<std::vector<uint16_t>> scales;
    std::shared_ptr<View> view = std::make_shared<View>();
    std::vector<Row> rows;

    Memory(const Made& made, Kind kind, int count, int room, Place place = Place::rows, int most = 0) {
        const Model& m = made.model;
        Cache& cache = view->cache;
        const int window = *std::max_element(made.windows.begin(), made.windows.end());
        cache.kind = kind, cache.kv_heads = m.kv_heads, cache.head_dim = m.head_dim, cache.ring = place == Place::ring;
        cache.slots = place == Place::pages ? between(1, 6) : place == Place::ring ? window + most - 1 : room;
        const int each = place == Place::pages ? (room + cache.slots - 1) / cache.slots : 1;
        cache.pages = count * each;
        const size_t entries = size_t(cache.pages) * size_t(m.kv_heads) * size_t(cache.slots);
        const size_t bytes = entries * size_t(m.head_dim) * (kind == Kind::f32 ? 4 : kind == Kind::i8 ? 1 : 2);
        for (int i = 0; i < 2 * m.layers; ++i) owned.emplace_back(bytes, 0xff), scales.emplace_back(entries, 0xffff);
        for (int i = 0; i < m.layers; ++i) {
            view->keys.push_back(owned[size_t(2 * i)].data()), view->values.push_back(owned[size_t(2 * i + 1)].data());
            if (kind != Kind::i8) continue;
            view->key_scales.push_back(scales[size_t(2 * i)].data());
            view->value_scales.push_back(scales[size_t(2 * i + 1)].data());
        }
        view->bind();
        std::vector<int> pages(size_t(cache.pages));
        for (int i = 0; i < cache.pages; ++i) pages[size_t(i)] = i;
        if (place == Place::pages) std::shuffle(pages.begin(), pages.end(), random_bits);
        for (int r = 0; r < count; ++r)
            rows.push_back({view, {pages.begin() + long(r) * each, pages.begin() + long(r + 1) * each}, 0});
    }

    Row row(int number, int held) const {
        Row found = rows[size_t(number)];
        found.held = held;
        return found;
    }
};

Request request_of(const std::vector<int>& tokens, Row row, float* logits) {
    Request request;
    request.tokens = tokens;
    for (size_t i = 0; i < tokens.size(); ++i) {
        request.positions.push_back(row.held + int(i));
        request.wanted.push_back(int(i));
    }
    request.rows = {std::move(row)}, request.counts = {int(tokens.size())};
    request.logits = logits;
    return request;
}

Sampling random_sampling() {
    Sampling how;
    how.temperature = between(0, 2) == 0 ? 0 : 0.8, how.top_k = between(0, 5), how.top_p = between(0, 1) ? 0.9 : 1;
    how.seed = uint64_t(between(0, 1 << 30));
    return how;
}

void one_model(Kind weights, Kind kind, const Isa* isa) {
    const bool ringed = between(0, 1) == 1;
    Made made(weights, ringed);
    const size_t vocab = size_t(made.model.vocab), count = 21;
    std::vector<int> tokens(count);
    for (int& token : tokens) token = between(0, made.model.vocab - 1);
    std::vector<float> alone(count * vocab), together(count * vocab), tree(count * vocab);
    {
        auto engine = made.engine(1, isa);
        Memory memory(made, kind, 2, 40);
        for (size_t i = 0; i < count; ++i) engine->step(request_of({tokens[i]}, memory.row(1, int(i)), &alone[i * vocab]));
    }
    for (int threads = 1; threads <= 3; ++threads) {
        auto engine = made.engine(threads, isa);
        // A cache of each place. The ring has room for the whole text in one step or for one token.
        const Place place = threads == 3 && ringed ? Place::ring : threads == 1 ? Place::rows : Place::pages;
        Memory memory(made, kind, 2, 40, place, 40);
        const size_t first = size_t(between(1, 20));
        const std::vector<int> head(tokens.begin(), tokens.begin() + long(first)), tail(tokens.begin() + long(first), tokens.end());
        engine->step(request_of(head, memory.row(0, 0), together.data()));
        engine->step(request_of(tail, memory.row(0, int(first)), &together[first * vocab]));
        need(std::memcmp(alone.data(), together.data(), alone.size() * 4) == 0, "a token among others has other bits");
        // The same tokens as one path of a tree: every second node is a leaf.
        Request branched = request_of({}, memory.row(0, int(first)), tree.data());
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
            engine->step(branched);
            need(std::memcmp(&alone[first * vocab], tree.data(), tail.size() * vocab * 4) == 0, "a tree's line has other bits");
        }
        if (ringed) {  // a ring that each token overwrites
            Memory narrow(made, kind, 1, 40, Place::ring, 1);
            for (size_t i = 0; i < count; ++i) engine->step(request_of({tokens[i]}, narrow.row(0, int(i)), &together[i * vocab]));
            need(std::memcmp(alone.data(), together.data(), alone.size() * 4) == 0, "a ring has other bits");
        }
        std::vector<float> probs(4 * vocab), ratios(3), spare(vocab);
        const Sequence text{memory.row(1, 0), tokens, random_sampling(), 0, int(count)};
        const std::vector<int> drawn = engine->draft({text}, {4}, DRAFT, probs.data()).front().tokens;
        need(drawn.size() == 4, "a chain has another length");
        std::vector<int64_t> ids(drawn.begin(), drawn.begin() + 3);
        if (text.how.temperature != 0) {
            const Accepted verdict =
                verify(*isa, ids.data(), 3, probs.data(), probs.data(), int(vocab), 1, 2, 3, false, ratios.data(), spare.data());
            need(verdict.accepted == 3, "a draft by the target itself must be accepted");
        }
    }
}

enum class Who { nobody, model, eagle, medusa, given };

struct Asked {  // one sequence of a batch
    std::vector<int> prompt;
    Sampling how;
    int sample, count;
};

// The models of a batch.
struct Party {
    Made target, draft, layer;
    std::vector<std::shared_ptr<Packed>> blocks, mix;

    explicit Party(Kind weights, bool windowed)
        : target(weights, windowed), draft(weights, false, target.model.vocab),
          layer(weights, false, target.model.vocab, &target.model) {
        const int width = target.model.width;
        for (int head = 0; head < 3; ++head) {
            blocks.push_back(target.matrix(weights, width, width, false, false, true));
            mix.push_back(target.matrix(weights, width, width, false, false, false));
        }
    }
};

// Decodes `steps` steps of a batch, `at_once` in a call. Between the calls the rows keep what they hold, as in Python.
struct Run {
    std::vector<std::vector<int>> texts;     // per sequence: the new tokens
    std::vector<std::vector<int>> accepted;  // per sequence: in each step
    std::vector<std::vector<float>> states;  // per sequence: those of all its tokens but the last

    Run(Party& party, Engine& target, Engine* other, Who who, const std::vector<Asked>& batch, int at_once, int steps, bool own, uint32_t purpose, Kind kind, Place place) {
        const size_t R = batch.size(), size = size_t(target.model.width) * 2;
        int room = 0, most = 0;
        for (const Asked& one : batch) {
            room = std::max(room, int(one.prompt.size()) + steps * (one.count + 1));
            most = std::max({most, int(one.prompt.size()), one.count + 1});
        }
        Memory seen(party.target, kind, int(R), room, place, most);
        Made& its = who == Who::eagle ? party.layer : party.draft;
        Memory drafting(its, Kind::f32, int(R), room, place == Place::ring ? Place::rows : place);
        std::shared_ptr<const Medusa> medusa;
        if (who == Who::medusa) medusa.reset(new Medusa{target, 3, int(size), nullptr, nullptr, {}, 0, party.blocks, party.mix});
        texts.resize(R), accepted.resize(R), states.resize(R);
        std::vector<int> held(R), fed(R), counts;  // tokens that the target's row and the drafter's hold
        for (size_t r = 0; r < R; ++r) {  // prefill all but the last token, for its states
            const std::vector<int>& prompt = batch[r].prompt;
            held[r] = int(prompt.size()) - 1;
            counts.push_back(batch[r].count);
            Request request = request_of({prompt.begin(), prompt.end() - 1}, seen.row(int(r), 0), nullptr);
            std::vector<float> hidden(size_t(held[r]) * size / 2), tapped(hidden.size());
            request.hidden = hidden.data(), request.tapped = tapped.data(), request.taps = {0};
            target.step(request);
            append_states(r, hidden.data(), tapped.data(), size_t(held[r]), size / 2);
        }
        for (int done = 0; done < steps; done += at_once) {
            Batch mine, theirs;
            std::vector<std::vector<float>> read;
            std::vector<float> last;
            std::vector<std::vector<int>> tokens;
            for (size_t r = 0; r < R; ++r) {
                std::vector<int> whole = batch[r].prompt;
                whole.insert(whole.end(), texts[r].begin(), texts[r].end());
                const int length = int(whole.size());
                mine.push_back({seen.row(int(r), held[r]), {whole.begin() + held[r], whole.end()}, batch[r].how, batch[r].sample, length});
                const int from = fed[r] + (who == Who::eagle ? 1 : 0);  // its layer reads states before tokens
                theirs.push_back({drafting.row(int(r), fed[r]), {whole.begin() + from, whole.end()}, batch[r].how, batch[r].sample, length});
                read.emplace_back(states[r].begin() + long(size_t(fed[r]) * size), states[r].end());
                last.insert(last.end(), states[r].end() - long(size), states[r].end());
                tokens.push_back({});
                for (int i = 0; i < batch[r].count; ++i) tokens.back().push_back((length * 7 + i) % target.model.vocab);
            }
            std::unique_ptr<Drafter> drafter;
            if (who == Who::model) drafter = std::make_unique<ModelDrafter>(*other, theirs, purpose);
            if (who == Who::eagle) drafter = std::make_unique<EagleDrafter>(*other, theirs, purpose, nullptr, int(size), read);
            if (who == Who::medusa) drafter = std::make_unique<MedusaDrafter>(medusa, theirs, purpose, last);
            if (who == Who::given) drafter = std::make_unique<GivenDrafter>(target, tokens);
            size_t total = 0;
            for (size_t r = 0; r < R; ++r) total += size_t(at_once) * size_t(counts[r] + 1);
            std::vector<float> found(total * size);
            const std::vector<Decoded> made = decode(target, mine, drafter.get(), {counts, at_once, 0, own, {}}, {found.data(), found.size(), {0}});
            need(int(made.size()) == at_once, "a call made another number of steps");
            const float* at = found.data();
            for (const Decoded& step : made)
                for (size_t r = 0; r < R; ++r) {
                    const Result& one = step.results[r];
                    need(one.accepted >= 0 && one.accepted <= counts[r] && int(one.draft.size()) == counts[r], "a step has another size");
                    const int length = int(batch[r].prompt.size() + texts[r].size());
                    held[r] = length + one.accepted;
                    fed[r] = who == Who::eagle ? length - 1 : length + std::min(one.accepted, counts[r] - 1);
                    if (counts[r] == 0) fed[r] = 0;  // it was not asked
                    texts[r].insert(texts[r].end(), one.draft.begin(), one.draft.begin() + one.accepted);
                    texts[r].push_back(one.next);
                    accepted[r].push_back(one.accepted);
                    const size_t more = size_t(one.accepted) + 1;
                    states[r].insert(states[r].end(), at, at + more * size);
                    at += more * size;
                }
        }
    }

    void append_states(size_t r, const float* hidden, const float* tapped, size_t count, size_t width) {
        for (size_t i = 0; i < count; ++i) {
            states[r].insert(states[r].end(), hidden + i * width, hidden + (i + 1) * width);
            states[r].insert(states[r].end(), tapped + i * width, tapped + (i + 1) * width);
        }
    }

    bool same(size_t r, const Run& other, size_t its) const {
        return texts[r] == other.texts[its] && accepted[r] == other.accepted[its] && states[r].size() == other.states[its].size() &&
               std::memcmp(states[r].data(), other.states[its].data(), states[r].size() * 4) == 0;
    }
};

// A ragged batch: several steps in a call equal single ones, every sequence equals itself alone, in rows, pages and a
// ring, on one thread and on several. The target's own choice gives plain decoding. Two host threads that share the
// pool decode at the same time.
void batches(Kind weights, Kind kind, const Isa* isa, Who who, bool own) {
    const bool ringed = between(0, 1) == 1;
    Party party(weights, ringed);
    std::vector<Asked> batch(size_t(between(2, 4)));
    for (Asked& one : batch) {
        one.prompt.resize(size_t(between(2, 12)));
        for (int& token : one.prompt) token = between(0, party.target.model.vocab - 1);
        one.how = random_sampling(), one.sample = between(0, 3);
        one.count = who == Who::nobody ? 0 : between(0, 3);
    }
    const int steps = who == Who::given ? 1 : 4;
    const uint32_t purpose = own && between(0, 1) == 1 ? SAMPLE : DRAFT;
    std::vector<Run> alone;
    for (int threads = 1; threads <= 3; ++threads) {
        auto target = party.target.engine(threads, isa), other = (who == Who::eagle ? party.layer : party.draft).engine(threads, isa);
        auto run = [&](const std::vector<Asked>& some, int at_once, Place place) {
            return Run(party, *target, other.get(), who, some, at_once, steps, own, purpose, kind, place);
        };
        if (threads == 1)
            for (const Asked& one : batch) alone.push_back(run({one}, 1, Place::rows));
        std::unique_ptr<Run> elsewhere;
        std::thread host([&] { elsewhere = std::make_unique<Run>(run(batch, steps, Place::rows)); });
        const Run single = [&] {
            const std::vector<Asked> again = batch;
            auto twin = (who == Who::eagle ? party.layer : party.draft).engine(threads, isa);
            return Run(party, *target, twin.get(), who, again, 1, steps, own, purpose, kind, Place::rows);
        }();
        host.join();
        const Run paged = run(batch, steps / 2 > 0 ? steps / 2 : 1, Place::pages);
        const Run rings = ringed ? run(batch, steps, Place::ring) : paged;
        for (size_t r = 0; r < batch.size(); ++r) {
            need(alone[r].same(0, single, r), "a sequence in a batch is not what it is alone");
            need(alone[r].same(0, *elsewhere, r), "several steps in a call are not single ones");
            need(alone[r].same(0, paged, r), "pages have other bits");
            need(alone[r].same(0, rings, r), "a ring has other bits");
            if (own || batch[r].how.temperature == 0) {
                Asked plain = batch[r];
                plain.count = 0;
                const int length = int(alone[r].texts[0].size());
                const Run once(party, *target, nullptr, Who::nobody, {plain}, length, length, false, purpose, kind, Place::rows);
                need(once.texts[0] == alone[r].texts[0], "the target's own choice is not plain decoding");
            }
        }
    }
}

// The target drafts for itself: everything is accepted.
void itself(Kind weights, const Isa* isa) {
    Party party(weights, false);
    std::vector<Asked> batch(2);
    for (Asked& one : batch) one = {{0, party.target.model.vocab - 1, 1}, random_sampling(), 1, between(1, 4)};
    auto target = party.target.engine(2, isa), twin = party.target.engine(2, isa);
    Party same = party;
    same.draft = party.target;
    for (bool own : {false, true}) {
        const Run run(same, *target, twin.get(), Who::model, batch, 2, 4, own, own ? SAMPLE : DRAFT, Kind::f32, Place::rows);
        for (size_t r = 0; r < batch.size(); ++r)
            for (int accepted : run.accepted[r]) need(accepted == batch[r].count, "a draft by the target itself must be accepted");
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
        for (Kind weights : {Kind::f32, Kind::bf16, Kind::i8}) {
            for (Who who : {Who::nobody, Who::model, Who::eagle, Who::medusa, Who::given})
                for (bool own : {false, true}) batches(weights, between(0, 1) ? Kind::f32 : Kind::i8, isa, who, own), ++cases;
            itself(weights, isa), ++cases;
        }
    }
    std::printf("%d models on every instruction set: the same bits always\n", cases);
    return 0;
}
