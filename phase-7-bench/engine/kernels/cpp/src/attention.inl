// Attention of a few tokens over a KV cache. Included by one file per instruction set.
//
// Keys are visited in the order of their positions, LANES at a time, from the first visible key: the cached tokens,
// then the query's ancestors among the new tokens. The order of every sum depends neither on the slots of the keys nor on
// the queries that share them, so a token in a prompt, in a draft, in a tree or alone gets the same bits.

namespace lab::SIMD_NAME {

// Write x [count] to the cache in its number format, rounded as in kv_cache/storage.py.
template <Kind KIND>
static void write_entry(const float* x, int count, void* to, uint16_t* scale_to) {
    if constexpr (KIND == Kind::i8) {
        float peak = 0;
        for (int i = 0; i < count; ++i) peak = __builtin_fabsf(x[i]) > peak ? __builtin_fabsf(x[i]) : peak;
        float scale = peak / 127;
        *scale_to = bf16_of_float(scale < 1e-30f ? 1e-30f : scale);
        scale = float_of_bf16(*scale_to);
        for (int i = 0; i < count; ++i) {
            float level = __builtin_rintf(x[i] / scale);
            level = level > 127 ? 127 : level < -127 ? -127 : level;
            ((int8_t*)to)[i] = int8_t(level);
        }
    } else if constexpr (KIND == Kind::f32) {
        memcpy(to, x, size_t(count) * 4);
    } else {
        for (int i = 0; i < count; ++i)
            ((uint16_t*)to)[i] = KIND == Kind::bf16 ? bf16_of_float(x[i]) : half_of_float(x[i]);
    }
}

LAB_INLINE void write_entry(Kind kind, const float* x, int count, void* base, uint16_t* scales, size_t entry) {
    const size_t at = entry * size_t(count);
    switch (kind) {
        case Kind::f32: return write_entry<Kind::f32>(x, count, (float*)base + at, nullptr);
        case Kind::bf16: return write_entry<Kind::bf16>(x, count, (uint16_t*)base + at, nullptr);
        case Kind::f16: return write_entry<Kind::f16>(x, count, (uint16_t*)base + at, nullptr);
        default: return write_entry<Kind::i8>(x, count, (int8_t*)base + at, scales + entry);
    }
}

// The entries of the keys that a token sees, in the order of their positions.
struct Visible {
    const int* cached;
    int count;  // of `cached`; then come those of `line`
    const int* line;

    size_t operator[](int at) const { return size_t(at < count ? cached[at] : line[at - count]); }
};

// Ask for the cache lines of [from, from + bytes): the keys of a row are not adjacent in memory if their pages are not.
LAB_INLINE void fetch(const uint8_t* from, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

constexpr int KEYS_AHEAD = 16;  // keys whose values are asked for in advance

constexpr int size_of(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::i8 ? 1 : 2; }

// For Q queries and C registers of features from `from` on: the sum over keys of probability x value. Query q sees the
// first counts[q] keys; the counts ascend.
template <Kind KIND, int Q, int C>
static void mix(
    const uint8_t* values, const Visible& visible, const int (&counts)[Q], int d, int from, const float* scores,
    int score_stride, float* const (&out)[Q]
) {
    Floats acc[Q][C];
    LAB_EACH(q, Q) LAB_EACH(c, C) acc[q][c] = Floats{};
    const int width = C == 1 && d - from < LANES ? d - from : LANES;
    const int most = counts[Q - 1];
    auto add = [&](int j, bool seen_by_all) __attribute__((always_inline)) {
        const uint8_t* at = values + (visible[j] * d + from) * size_of(KIND);
        if (j + KEYS_AHEAD < most) fetch(values + (visible[j + KEYS_AHEAD] * d + from) * size_of(KIND), C * LANES * size_of(KIND));
        Floats value[C];
        LAB_EACH(c, C) value[c] = load_any<KIND>(at + c * LANES * size_of(KIND), C == 1 ? width : LANES);
        LAB_EACH(q, Q) {
            if (!seen_by_all && j >= counts[q]) continue;
            const Floats share = all(scores[q * score_stride + j]);
            LAB_EACH(c, C) acc[q][c] = fma(value[c], share, acc[q][c]);
        }
    };
    for (int j = 0; j < counts[0]; ++j) add(j, true);
    for (int j = counts[0]; j < most; ++j) add(j, false);
    LAB_EACH(q, Q) LAB_EACH(c, C) {
        float lane[LANES];
        store(lane, acc[q][c]);
        memcpy(out[q] + from + c * LANES, lane, size_t(C == 1 ? width : LANES) * 4);
    }
}

template <Kind KIND, int Q>
static void mix_all(
    const uint8_t* values, const Visible& visible, const int (&counts)[Q], int d, const float* scores, int stride,
    float* const (&out)[Q]
) {
    constexpr int MOST = Q == 1 ? 8 : Q < 4 || LANES == 16 ? 4 : 2;  // sums of all queries fit in registers
    int from = 0;
    for (; from + MOST * LANES <= d; from += MOST * LANES)
        mix<KIND, Q, MOST>(values, visible, counts, d, from, scores, stride, out);
    for (; from + 2 * LANES <= d; from += 2 * LANES)
        mix<KIND, Q, 2>(values, visible, counts, d, from, scores, stride, out);
    for (; from < d; from += LANES) mix<KIND, Q, 1>(values, visible, counts, d, from, scores, stride, out);
}

// The products of a query [d] with LANES keys.
template <Kind KIND>
LAB_INLINE Floats dots_of(const uint8_t* const (&keys)[LANES], const float* query, int d) {
    Floats dots[LANES];
    LAB_EACH(i, LANES) dots[i] = Floats{};
    int from = 0;
    for (; from + LANES <= d; from += LANES) {
        const Floats asked = load(query + from);
        LAB_EACH(i, LANES) dots[i] = fma(load_any<KIND>(keys[i] + from * size_of(KIND)), asked, dots[i]);
    }
    if (from < d) {
        const Floats asked = load_any<Kind::f32>(query + from, d - from);
        LAB_EACH(i, LANES) dots[i] = fma(load_any<KIND>(keys[i] + from * size_of(KIND), d - from), asked, dots[i]);
    }
    return sums(dots);
}

constexpr int WIDEST = 128;  // features of keys that are converted once for several queries

// `heads` adjacent heads of `run` tokens, which share keys and values: each of these tokens sees one key more than the
// token before it. Scaled queries and outputs are [heads, d] at a token's place.
struct Queries {
    const Token* tokens;
    int run, heads;
    const float* query;
    size_t query_stride;  // from token to token
    float* out;
    size_t out_stride;

    // The keys that a row, a head of a token, sees, if the last token sees `most`.
    int keys(int row, int most) const { return most - (run - 1 - row / heads); }
};

template <Kind KIND, int Q>
static void mix_rows(
    const Queries& of, const uint8_t* values, const Visible& visible, int most, int d, int row, const float* scores,
    int stride
) {
    int counts[Q];
    float* out[Q];
    for (int q = 0; q < Q; ++q) {
        counts[q] = of.keys(row + q, most);
        out[q] = of.out + (row + q) / of.heads * of.out_stride + (row + q) % of.heads * d;
    }
    mix_all<KIND, Q>(values, visible, counts, d, scores + size_t(row) * stride, stride, out);
}

template <Kind KIND>
static void attend_as(int layer, const Queries& of, int kv_head, int window, float* scores, int stride) {
    const Token& last = of.tokens[of.run - 1];
    const Cache& cache = *last.cache;
    const int d = cache.head_dim, rows = of.run * of.heads;
    const size_t head = size_t(kv_head) * cache.slots;
    const auto* keys = (const uint8_t*)cache.keys[layer] + head * d * size_of(KIND);
    const auto* values = (const uint8_t*)cache.values[layer] + head * d * size_of(KIND);
    const int seen = last.held + last.line_length;
    const int first = window > 0 && seen > window ? seen - window : 0;
    const int most = seen - first;
    const Visible visible{last.entries + (first - last.from), last.held - first, last.line};
    const bool convert_once = KIND != Kind::f32 && rows > 1 && d <= WIDEST;

    for (int block = 0; block < most; block += LANES) {
        const uint8_t* at[LANES];
        float scale[LANES];
        for (int i = 0; i < LANES; ++i) {
            const size_t entry = visible[block + i < most ? block + i : most - 1];
            at[i] = keys + entry * d * size_of(KIND);
            if constexpr (KIND == Kind::i8) scale[i] = float_of_bf16(cache.key_scales[layer][head + entry]);
            if (block + 2 * LANES + i < most) fetch(keys + visible[block + 2 * LANES + i] * d * size_of(KIND), d * size_of(KIND));
        }
        alignas(64) float converted[LANES * WIDEST];
        if (convert_once)
            for (int i = 0; i < LANES; ++i) {
                float* to = converted + i * WIDEST;
                for (int from = 0; from < d; from += LANES)
                    store(to + from, load_any<KIND>(at[i] + from * size_of(KIND), d - from < LANES ? d - from : LANES));
                at[i] = (const uint8_t*)to;
            }
        for (int row = 0; row < rows; ++row) {
            const float* query = of.query + row / of.heads * of.query_stride + row % of.heads * d;
            Floats score = convert_once ? dots_of<Kind::f32>(at, query, d) : dots_of<KIND>(at, query, d);
            if constexpr (KIND == Kind::i8) score = score * load(scale);
            store(scores + size_t(row) * stride + block, score);
        }
    }
    for (int row = 0; row < rows; ++row) {
        float* mine = scores + size_t(row) * stride;
        const int count = of.keys(row, most);
        for (int i = count; i < round_up(count, LANES); ++i) mine[i] = -__builtin_inff();
        Floats highest = all(-__builtin_inff());
        for (int i = 0; i < count; i += LANES) highest = larger(highest, load(mine + i));
        const Floats peak = all(largest(highest));
        Floats total{};
        for (int i = 0; i < count; i += LANES) {
            const Floats score = load(mine + i);
            Floats weight = exponential(score - peak);
            if (i + LANES > count) weight = score == all(-__builtin_inff()) ? Floats{} : weight;  // past the last key
            store(mine + i, weight);
            total = total + weight;
        }
        const Floats share = all(1 / sum(total));
        for (int i = 0; i < count; i += LANES) store(mine + i, load(mine + i) * share);
        if constexpr (KIND == Kind::i8) {
            for (int i = 0; i < count; ++i) mine[i] *= float_of_bf16(cache.value_scales[layer][head + visible[i]]);
        }
    }
    for (int row = 0; row < rows;) {
        switch (rows - row) {
            case 1: mix_rows<KIND, 1>(of, values, visible, most, d, row, scores, stride), row += 1; break;
            case 2: mix_rows<KIND, 2>(of, values, visible, most, d, row, scores, stride), row += 2; break;
            case 3: mix_rows<KIND, 3>(of, values, visible, most, d, row, scores, stride), row += 3; break;
            default: mix_rows<KIND, 4>(of, values, visible, most, d, row, scores, stride), row += 4; break;
        }
    }
}

static void attend(int layer, const Queries& of, int kv_head, int window, float* scores, int stride) {
    switch (of.tokens->cache->kind) {
        case Kind::f32: return attend_as<Kind::f32>(layer, of, kv_head, window, scores, stride);
        case Kind::bf16: return attend_as<Kind::bf16>(layer, of, kv_head, window, scores, stride);
        case Kind::f16: return attend_as<Kind::f16>(layer, of, kv_head, window, scores, stride);
        default: return attend_as<Kind::i8>(layer, of, kv_head, window, scores, stride);
    }
}

}  // namespace lab::SIMD_NAME
