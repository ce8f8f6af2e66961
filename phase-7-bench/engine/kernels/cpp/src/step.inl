// All layers for a block of tokens: the work of one thread between two barriers. Included by one file per instruction
// set.
//
// The outputs of a matrix are split between the threads. The thread that computes an output also applies its bias,
// residual, RoPE rotation or gate. Norms are recomputed on every thread, which is cheaper than a barrier. Five barriers
// per layer remain.

namespace lab::SIMD_NAME {

struct Range {
    int begin, end;
};

LAB_INLINE Range share(int units, int thread, int threads) {
    return {int(int64_t(units) * thread / threads), int(int64_t(units) * (thread + 1) / threads)};
}

static void normalise(const Norm& norm, const float* x, int width, float* to) {
    int k = 0;
    Floats squares{}, plain{};
    float mean = 0;
    if (!norm.rms) {
        for (; k + LANES <= width; k += LANES) plain = plain + load(x + k);
        mean = sum(plain);
        for (; k < width; ++k) mean += x[k];
        mean /= float(width);
    }
    for (k = 0; k + LANES <= width; k += LANES) {
        const Floats centred = load(x + k) - mean;
        squares = fma(centred, centred, squares);
    }
    float total = sum(squares);
    for (; k < width; ++k) total += (x[k] - mean) * (x[k] - mean);
    const float scale = 1 / __builtin_sqrtf(total / float(width) + norm.eps);
    for (k = 0; k + LANES <= width; k += LANES) {
        Floats y = (load(x + k) - mean) * scale * load(norm.weight + k);
        if (norm.bias != nullptr) y = y + load(norm.bias + k);
        store(to + k, y);
    }
    for (; k < width; ++k) to[k] = (x[k] - mean) * scale * norm.weight[k] + (norm.bias != nullptr ? norm.bias[k] : 0);
}

LAB_INLINE Floats activate(Floats x, Activation how) {
    switch (how) {
        case Activation::silu: return x / (1.0f + exponential(-x));
        case Activation::relu: return x > 0 ? x : Floats{};
        case Activation::gelu_tanh: {  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
            const Floats u = 1.5957691216057308f * (x + 0.044715f * x * x * x);
            return x / (1.0f + exponential(-u));
        }
        default:
            for (int i = 0; i < LANES; ++i) x[i] = 0.5f * x[i] * (1 + __builtin_erff(x[i] * 0.70710678f));
            return x;
    }
}

static void rotate(float* x, int d, const float* cos, const float* sin) {
    const int half = d / 2;
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

static void add_row(const Table& table, int row, int width, float* to, bool add) {
    const size_t at = size_t(row) * width;
    for (int k = 0; k < width; ++k) {
        float x;
        if (table.kind == Kind::f32) x = ((const float*)table.data)[at + k];
        else if (table.kind == Kind::bf16) x = float_of_bf16(((const uint16_t*)table.data)[at + k]);
        else x = float_of_half(((const uint16_t*)table.data)[at + k]);
        to[k] = add ? to[k] + x : x;
    }
}

// Join the columns of all processes: mine [rows, columns] -> all [rows, ranks * columns], but at most `limit` of them.
// Called by all threads, after a barrier.
static void gather(
    const Block& block, int thread, Barrier& barrier, const float* mine, size_t stride, int rows, int columns, float* all,
    size_t all_stride, int limit
) {
    if (block.exchange == nullptr) return;
    if (thread == 0) {
        const int ranks = block.model->split.ranks;
        for (int m = 0; m < rows; ++m) memcpy(block.sent + size_t(m) * columns, mine + m * stride, size_t(columns) * 4);
        block.exchange(block.with, How::gather, block.sent, block.received, size_t(rows) * columns);
        for (int rank = 0; rank < ranks; ++rank) {
            const int first = rank * columns, count = first + columns < limit ? columns : limit - first;
            for (int m = 0; m < rows && count > 0; ++m)
                memcpy(all + m * all_stride + first, block.received + (size_t(rank) * rows + m) * columns, size_t(count) * 4);
        }
    }
    barrier.wait();
}

// For the heads begin .. end - 1: normalise and rotate queries and keys; write keys and values to the cache.
static void finish_heads(const Block& block, int layer, int begin, int end) {
    const Model& model = *block.model;
    const Layer& weights = model.layer[layer];
    const int d = model.head_dim, stride = weights.qkv.outputs;
    const float asked = 1 / __builtin_sqrtf(float(d));
    for (int m = 0; m < block.count; ++m) {
        const Token& token = block.tokens[m];
        for (int head = begin; head < end; ++head) {
            float* x = block.qkv + size_t(m) * stride + size_t(head) * d;
            const bool query = head < model.heads, value = head >= model.heads + model.kv_heads;
            const float* norm = query ? weights.query_norm : value ? nullptr : weights.key_norm;
            if (norm != nullptr) normalise({norm, nullptr, model.norm_eps, true}, x, d, x);
            if (model.rope && !value) {
                const size_t at = size_t(token.position) * (d / 2);
                rotate(x, d, model.cos + at, model.sin + at);
            }
            if (query) {
                for (int i = 0; i < d; ++i) x[i] *= asked;
                continue;
            }
            const Cache& cache = *token.cache;
            const int of = head - model.heads - (value ? model.kv_heads : 0);
            const size_t entry = size_t(of) * cache.slots + token.entry;
            void* base = value ? cache.values[layer] : cache.keys[layer];
            uint16_t* scales = cache.kind != Kind::i8 ? nullptr
                             : value                  ? cache.value_scales[layer]
                                                      : cache.key_scales[layer];
            write_entry(cache.kind, x, d, base, scales, entry);
        }
    }
}

// The smallest number of panels that holds a whole number of heads.
LAB_INLINE int panels_per_unit(int d) {
    int panels = 1;
    while (panels * PANEL % d != 0) ++panels;
    return panels;
}

// True if `next` sees what `token` sees, and itself.
LAB_INLINE bool continues(const Token& token, const Token& next) {
    return next.entries == token.entries && next.held == token.held + 1 && token.line_length == 0 && next.line_length == 0;
}

static void attention_of(const Block& block, int layer, int thread, int threads) {
    const Model& model = *block.model;
    const int d = model.head_dim, group = model.heads / model.kv_heads, window = model.layer[layer].window;
    // Heads that share keys are one item, unless there are fewer items than threads.
    const int items = block.count * model.kv_heads;
    const int parts = items >= threads ? 1 : (threads / items < group ? threads / items : group);
    const Range mine = share(items * parts, thread, threads);
    for (int item = mine.begin; item < mine.end;) {
        const int m = item % block.count, kv_head = item / block.count / parts;
        const Range heads = share(group, item / block.count % parts, parts);
        const int count = heads.end - heads.begin;
        const Token* token = block.tokens + m;
        int run = 1;  // tokens of a chain whose queries share each read of a key
        while ((run + 1) * count <= SCORE_ROWS && m + run < block.count && item + run < mine.end &&
               continues(token[run - 1], token[run]) && (window == 0 || token[run].held <= window)) ++run;
        const size_t stride = size_t(model.layer[layer].qkv.outputs), out_stride = size_t(model.heads) * d;
        const size_t head = size_t(kv_head * group + heads.begin) * d;
        attend(
            layer, {token, run, count, block.qkv + m * stride + head, stride, block.my_mixed + m * out_stride + head, out_stride},
            kv_head, window, block.scores[thread], block.score_stride
        );
        item += run;
    }
}

static void activate_all(const Block& block, int begin, int end) {
    const Model& model = *block.model;
    const int stride = block.model->layer[0].up.outputs, to_stride = model.ffn_padded();
    for (int m = 0; m < block.count; ++m) {
        for (int panel = begin; panel < end; ++panel) {
            const float* from = block.up + size_t(m) * stride + size_t(panel) * PANEL * (model.gated ? 2 : 1);
            float* to = block.my_inner + size_t(m) * to_stride + size_t(panel) * PANEL;
            for (int i = 0; i < PANEL; i += LANES) {
                Floats y = activate(load(from + i), model.activation);
                if (model.gated) y = y * load(from + PANEL + i);
                store(to + i, y);
            }
        }
    }
}

// Multiply by w, with the outputs split between the threads in units of `unit` panels; return this thread's units.
static Range product(
    const Block& block, const Matrix& w, const float* x, size_t stride, int count, int unit, int thread, int threads,
    float* out, size_t out_stride, int limit, bool add
) {
    const Range units = share((w.panels() + unit - 1) / unit, thread, threads);
    if (units.begin == units.end) return units;
    float* spare = block.normed[thread];
    const Acts acts = prepare(w, x, stride, count, spare, block.acts[thread]);
    const int end = units.end * unit < w.panels() ? units.end * unit : w.panels();
    multiply(w, acts, count, units.begin * unit, end, out, out_stride, limit, add);
    return units;
}

// Add W x to the residual stream [count, width], on all threads and in all processes. Ends with a barrier.
static void add_product(
    const Block& block, const Matrix& w, const float* from, int inputs, int thread, int threads, Barrier& barrier
) {
    const Model& model = *block.model;
    const int width = model.width, count = block.count, columns = model.columns();
    if (block.exchange == nullptr || model.split.by_outputs) {
        float* x = block.x + (block.exchange == nullptr ? 0 : model.split.rank * columns);
        product(block, w, from, inputs, count, 1, thread, threads, x, width, columns, true);
        barrier.wait();
        return gather(block, thread, barrier, x, width, count, columns, block.x, width, width);
    }
    product(block, w, from, inputs, count, 1, thread, threads, block.partial, width, width, false);
    barrier.wait();
    if (thread == 0) {
        const size_t size = size_t(count) * width;
        block.exchange(block.with, How::sum, block.partial, block.partial, size);
        for (size_t i = 0; i < size; ++i) block.x[i] += block.partial[i];
    }
    barrier.wait();
}

static void layers_of(const Block& block, int thread, int threads, Barrier& barrier) {
    const Model& model = *block.model;
    const int width = model.width, d = model.head_dim, count = block.count;
    float* normed = block.normed[thread];
    for (int number = 0; number < model.layers; ++number) {
        const Layer& layer = model.layer[number];
        for (int m = 0; m < count; ++m)
            normalise(layer.attention_norm, block.x + size_t(m) * width, width, normed + size_t(m) * width);
        const int unit = panels_per_unit(d);
        const Range units = product(
            block, layer.qkv, normed, width, count, unit, thread, threads, block.qkv, layer.qkv.outputs,
            layer.qkv.outputs, false
        );
        const int heads = model.heads + 2 * model.kv_heads, per_unit = unit * PANEL / d;
        const int end = units.end * per_unit;
        finish_heads(block, number, units.begin * per_unit < heads ? units.begin * per_unit : heads, end < heads ? end : heads);
        barrier.wait();

        attention_of(block, number, thread, threads);
        barrier.wait();

        if (model.split.by_outputs)
            gather(block, thread, barrier, block.my_mixed, model.heads * d, count, model.heads * d, block.mixed, model.mixed(), model.mixed());
        add_product(block, layer.output, block.mixed, model.mixed(), thread, threads, barrier);

        for (int m = 0; m < count; ++m)
            normalise(layer.ffn_norm, block.x + size_t(m) * width, width, normed + size_t(m) * width);
        const Range panels = product(
            block, layer.up, normed, width, count, model.gated ? 2 : 1, thread, threads, block.up, layer.up.outputs,
            layer.up.outputs, false
        );
        activate_all(block, panels.begin, panels.end);
        barrier.wait();

        const int inner = round_up(model.inner(), PANEL);
        if (model.split.by_outputs)
            gather(block, thread, barrier, block.my_inner, model.ffn_padded(), count, model.ffn, block.inner, inner, model.inner());
        add_product(block, layer.down, block.inner, inner, thread, threads, barrier);
        for (int tap = 0; tap < block.tap_count; ++tap) {
            if (block.taps[tap] != number || thread != 0) continue;
            for (int m = 0; m < count; ++m) {
                if (block.tokens[m].wanted < 0) continue;
                const size_t at = (size_t(block.tokens[m].wanted) * block.tap_count + tap) * width;
                memcpy(block.tapped + at, block.x + size_t(m) * width, size_t(width) * 4);
            }
        }
    }
}

// One thread's share of a step.
static void step(const Block& block, int thread, int threads, Barrier& barrier) {
    const Model& model = *block.model;
    const int width = model.width;
    if (!block.embedded) {
        const Range mine = share(block.count, thread, threads);
        for (int m = mine.begin; m < mine.end; ++m) {
            const Token& token = block.tokens[m];
            float* x = block.x + size_t(m) * width;
            const int id = token.id - model.split.rank * model.split.vocab;
            if (id >= 0 && id < model.embedding.rows) add_row(model.embedding, id, width, x, false);
            else memset(x, 0, size_t(width) * 4);  // another process has it
        }
        if (block.exchange != nullptr) {
            barrier.wait();
            if (thread == 0) block.exchange(block.with, How::owned, block.x, block.x, size_t(block.count) * width);
            barrier.wait();
        }
        for (int m = mine.begin; !model.rope && m < mine.end; ++m)
            add_row(
                model.positions, block.tokens[m].position + model.position_offset, width, block.x + size_t(m) * width, true
            );
        barrier.wait();
    }
    layers_of(block, thread, threads, barrier);
    if (block.wanted == 0) return;
    float* normed = block.normed[thread];
    int row = 0, first = -1;
    for (int m = 0; m < block.count; ++m) {
        if (block.tokens[m].wanted < 0) continue;
        if (first < 0) first = block.tokens[m].wanted;
        normalise(model.norm, block.x + size_t(m) * width, width, normed + size_t(row) * width);
        if (thread == 0 && block.hidden != nullptr)
            memcpy(block.hidden + size_t(block.tokens[m].wanted) * width, normed + size_t(row) * width, size_t(width) * 4);
        ++row;
    }
    if (block.logits == nullptr) return;
    float* logits = block.logits + size_t(first) * model.vocab;
    const int vocab = model.split.vocab;
    float* to = block.exchange == nullptr ? logits : block.my_logits;
    product(block, model.head, normed, width, row, 1, thread, threads, to, vocab, vocab, false);
    if (block.exchange == nullptr) return;
    barrier.wait();
    gather(block, thread, barrier, to, vocab, row, vocab, logits, model.vocab, model.vocab);
}

}  // namespace lab::SIMD_NAME
