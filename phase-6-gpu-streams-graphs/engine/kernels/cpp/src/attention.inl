// Attention of a few tokens over a KV cache. Included by one file per instruction set.
//
// Keys are visited in the order of their positions, LANES at a time, from the first visible key: the cached tokens,
// then the query's ancestors among the new tokens. The order of every sum does not depend on the slots of the keys, so
// a token in a draft, in a tree or alone gets the same bits.

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

// For Q queries and C registers of features from `from` on: the sum over keys of probability x value.
template <Kind KIND, int Q, int C>
static void mix(
    const uint8_t* values, const Visible& visible, int keys, int d, int from, const float* scores, int score_stride,
    float* out
) {
    Floats acc[Q][C];
    LAB_EACH(q, Q) LAB_EACH(c, C) acc[q][c] = Floats{};
    const int width = C == 1 && d - from < LANES ? d - from : LANES;
    for (int j = 0; j < keys; ++j) {
        const uint8_t* at = values + (visible[j] * d + from) * size_of(KIND);
        if (j + KEYS_AHEAD < keys) fetch(values + (visible[j + KEYS_AHEAD] * d + from) * size_of(KIND), C * LANES * size_of(KIND));
        LAB_EACH(c, C) {
            const Floats value = load_any<KIND>(at + c * LANES * size_of(KIND), C == 1 ? width : LANES);
            LAB_EACH(q, Q) acc[q][c] = fma(value, all(scores[q * score_stride + j]), acc[q][c]);
        }
    }
    LAB_EACH(q, Q) LAB_EACH(c, C) {
        float lane[LANES];
        store(lane, acc[q][c]);
        memcpy(out + size_t(q) * d + from + c * LANES, lane, size_t(C == 1 ? width : LANES) * 4);
    }
}

template <Kind KIND, int Q>
static void mix_all(
    const uint8_t* values, const Visible& visible, int keys, int d, const float* scores, int stride, float* out
) {
    int from = 0;
    for (; from + 4 * LANES <= d; from += 4 * LANES)
        mix<KIND, Q, 4>(values, visible, keys, d, from, scores, stride, out);
    for (; from + 2 * LANES <= d; from += 2 * LANES)
        mix<KIND, Q, 2>(values, visible, keys, d, from, scores, stride, out);
    for (; from < d; from += LANES) mix<KIND, Q, 1>(values, visible, keys, d, from, scores, stride, out);
}

// Attention of `queries` adjacent heads of one token, which share keys and values: scaled query [queries, d] -> out.
template <Kind KIND>
static void attend_as(
    int layer, const Token& token, int kv_head, int window, const float* query, int queries, float* scores, int stride,
    float* out
) {
    const Cache& cache = *token.cache;
    const int d = cache.head_dim;
    const size_t head = size_t(kv_head) * cache.slots;
    const auto* keys = (const uint8_t*)cache.keys[layer] + head * d * size_of(KIND);
    const auto* values = (const uint8_t*)cache.values[layer] + head * d * size_of(KIND);
    const int seen = token.held + token.line_length;
    const int first = window > 0 && seen > window ? seen - window : 0;
    const int count = seen - first;
    const Visible visible{token.entries + (first - token.from), token.held - first, token.line};

    for (int block = 0; block < count; block += LANES) {
        const uint8_t* at[LANES];
        float scale[LANES];
        for (int i = 0; i < LANES; ++i) {
            const size_t entry = visible[block + i < count ? block + i : count - 1];
            at[i] = keys + entry * d * size_of(KIND);
            if constexpr (KIND == Kind::i8) scale[i] = float_of_bf16(cache.key_scales[layer][head + entry]);
            if (block + 2 * LANES + i < count) fetch(keys + visible[block + 2 * LANES + i] * d * size_of(KIND), d * size_of(KIND));
        }
        for (int q = 0; q < queries; ++q) {
            Floats dots[LANES];
            LAB_EACH(i, LANES) dots[i] = Floats{};
            int from = 0;
            for (; from + LANES <= d; from += LANES) {
                const Floats asked = load(query + q * d + from);
                LAB_EACH(i, LANES) dots[i] = fma(load_any<KIND>(at[i] + from * size_of(KIND)), asked, dots[i]);
            }
            if (from < d) {
                const Floats asked = load_any<Kind::f32>(query + q * d + from, d - from);
                LAB_EACH(i, LANES) dots[i] = fma(load_any<KIND>(at[i] + from * size_of(KIND), d - from), asked, dots[i]);
            }
            Floats score = sums(dots);
            if constexpr (KIND == Kind::i8) score = score * load(scale);
            store(scores + size_t(q) * stride + block, score);
        }
    }
    for (int q = 0; q < queries; ++q) {
        float* mine = scores + size_t(q) * stride;
        for (int i = count; i < round_up(count, LANES); ++i) mine[i] = -__builtin_inff();
        Floats most = all(-__builtin_inff());
        for (int i = 0; i < count; i += LANES) most = larger(most, load(mine + i));
        const Floats peak = all(largest(most));
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
    for (int q = 0; q < queries;) {
        const float* mine = scores + size_t(q) * stride;
        switch (queries - q) {
            case 1: mix_all<KIND, 1>(values, visible, count, d, mine, stride, out + q * d), q += 1; break;
            case 2: mix_all<KIND, 2>(values, visible, count, d, mine, stride, out + q * d), q += 2; break;
            case 3: mix_all<KIND, 3>(values, visible, count, d, mine, stride, out + q * d), q += 3; break;
            default: mix_all<KIND, 4>(values, visible, count, d, mine, stride, out + q * d), q += 4; break;
        }
    }
}

static void attend(
    int layer, const Token& token, int kv_head, int window, const float* query, int queries, float* scores, int stride,
    float* out
) {
    switch (token.cache->kind) {
        case Kind::f32:
            return attend_as<Kind::f32>(layer, token, kv_head, window, query, queries, scores, stride, out);
        case Kind::bf16:
            return attend_as<Kind::bf16>(layer, token, kv_head, window, query, queries, scores, stride, out);
        case Kind::f16:
            return attend_as<Kind::f16>(layer, token, kv_head, window, query, queries, scores, stride, out);
        default:
            return attend_as<Kind::i8>(layer, token, kv_head, window, query, queries, scores, stride, out);
    }
}

}  // namespace lab::SIMD_NAME
