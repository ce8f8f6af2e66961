// Activations in the form that a matrix takes: float32 unchanged, bfloat16, or int8 levels by groups. Included by one
// file per instruction set, before the products (dots.inl).

namespace lab::SIMD_NAME {

// Prepared activations of a few tokens.
struct Acts {
    const uint8_t* data;
    size_t stride;        // bytes from token to token
    int groups;            // i8, i4; the arrays below are [tokens, groups]
    const float* scales;   // of the integers
    const int32_t* starts; // sums of integers begin here: weights are stored with an offset
    const float* sums;     // i4: of the group
};

// Integers from -127 to 127 of one group, their scale and their sum.
LAB_INLINE void quantise(const float* x, int count, int8_t* to, float& scale, int32_t& total) {
    Floats most{};
    int k = 0;
    for (; k + LANES <= count; k += LANES) most = larger(most, absolute(load(x + k)));
    float peak = largest(most);
    for (; k < count; ++k) peak = __builtin_fabsf(x[k]) > peak ? __builtin_fabsf(x[k]) : peak;
    scale = peak > 0 ? peak / 127 : 1;
    const float inverse = peak > 0 ? 127 / peak : 0;
    total = 0;
    Ints totals{};
    const Floats shift = all(12582912.0f);
    for (k = 0; k + LANES <= count; k += LANES) {
        const Ints level = __builtin_convertvector(load(x + k) * inverse + shift - shift, Ints);
        const Bytes bytes = __builtin_convertvector(level, Bytes);
        memcpy(to + k, &bytes, sizeof bytes);
        totals += level;
    }
    for (int i = 0; i < LANES; ++i) total += totals[i];
    for (; k < count; ++k) {
        const float level = x[k] * inverse + 12582912.0f - 12582912.0f;
        to[k] = int8_t(level);
        total += int32_t(level);
    }
}

// AVX2 multiplies unsigned bytes by signed bytes, and a sum of two such products must fit in 16 bits. So activations become
// their sizes, at most 127, and masks that give each weight, stored with an offset of 128, the sign of its activation:
// w + 128 xor 0x80 is w, and xor 0x7f is -w - 1. A sum of products then lacks the sizes of the negative activations.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr bool SIGNS = true;
// A group of levels -> by fours, sizes and masks. Returns the sum of the sizes of the negative levels.
LAB_INLINE int32_t split_signs(const int8_t* from, uint8_t* to) {
    __m128i lacking = _mm_setzero_si128();
    for (int k = 0; k < MAX_GROUP; k += 8) {  // as they were stored: a wider load would wait for the stores
        const __m128i levels = _mm_loadl_epi64((const __m128i*)(from + k)), size = _mm_abs_epi8(levels);
        const __m128i negative = _mm_cmpgt_epi8(_mm_setzero_si128(), levels);
        lacking = _mm_add_epi64(lacking, _mm_sad_epu8(_mm_and_si128(size, negative), _mm_setzero_si128()));
        _mm_storeu_si128((__m128i*)(to + 2 * k), _mm_unpacklo_epi32(size, _mm_xor_si128(negative, _mm_set1_epi8(-128))));
    }
    return _mm_cvtsi128_si32(lacking);
}
#else
constexpr bool SIGNS = false;
LAB_INLINE int32_t split_signs(const int8_t*, uint8_t*) { return 0; }
#endif

// Activations x [count, inputs] (stride floats apart) in the form that the matrix takes, written to `memory`.
static Acts prepare(const Matrix& w, const float* x, size_t stride, int count, float* spare, uint8_t* memory) {
    if (w.factor != nullptr || w.order != nullptr) {
        auto* row = (float*)memory;  // x may be `spare` itself
        for (int m = 0; m < count; ++m) {
            for (int k = 0; k < w.inputs; ++k) {
                row[k] = x[m * stride + (w.order != nullptr ? w.order[k] : k)];
                if (w.factor != nullptr) row[k] *= w.factor[k];
            }
            memcpy(spare + size_t(m) * w.inputs, row, size_t(w.inputs) * 4);
        }
        x = spare;
        stride = size_t(w.inputs);
    }
    bool wide = w.wide || w.kind == Kind::f32 || w.kind == Kind::f16;
#if !defined(__AVX512BF16__)
    wide = wide || w.kind == Kind::bf16;
#endif
    const bool levels = w.kind == Kind::i8 || w.kind == Kind::i4;
    const int groups = levels ? w.padded / w.group : 0;
    if (wide) {
        if (w.kind == Kind::i4) {  // a zero point meets the sum of a group's activations
            float* sums = (float*)(memory + size_t(MAX_BLOCK) * w.padded * 4);
            for (int m = 0; m < count; ++m)
                for (int g = 0; g < groups; ++g) {
                    float total = 0;
                    for (int k = g * w.group; k < (g + 1) * w.group; ++k) total += k < w.inputs ? x[m * stride + k] : 0;
                    sums[m * groups + g] = total;
                }
            if (w.padded == w.inputs) return {(const uint8_t*)x, stride * 4, groups, nullptr, nullptr, sums};
        }
        if (w.padded == w.inputs) return {(const uint8_t*)x, stride * 4, groups, nullptr, nullptr, nullptr};
        for (int m = 0; m < count; ++m) {
            float* to = (float*)memory + size_t(m) * w.padded;
            memcpy(to, x + m * stride, size_t(w.inputs) * 4);
            memset(to + w.inputs, 0, size_t(w.padded - w.inputs) * 4);
        }
        const float* sums = (const float*)(memory + size_t(MAX_BLOCK) * w.padded * 4);
        return {memory, size_t(w.padded) * 4, groups, nullptr, nullptr, sums};
    }
    if (w.kind == Kind::bf16) {
        for (int m = 0; m < count; ++m) {
            const float* from = x + m * stride;
            auto* to = (uint16_t*)memory + size_t(m) * w.padded;
            int k = 0;
#if defined(__AVX512BF16__)
            for (; k + LANES <= w.inputs; k += LANES) {
                const __m256bh narrow = _mm512_cvtneps_pbh((__m512)load(from + k));
                memcpy(to + k, &narrow, sizeof narrow);
            }
#endif
            for (; k < w.inputs; ++k) to[k] = bf16_of_float(from[k]);
            for (; k < w.padded; ++k) to[k] = 0;
        }
        return {memory, size_t(w.padded) * 2, 0, nullptr, nullptr, nullptr};
    }
    auto* scales = (float*)(memory + size_t(MAX_BLOCK) * w.padded * 2);
    auto* starts = (int32_t*)(scales + size_t(MAX_BLOCK) * groups);
    auto* sums = (float*)(starts + size_t(MAX_BLOCK) * groups);
    const int offset = w.kind == Kind::i8 ? 128 : w.zeros == nullptr ? 8 : 0;
    const bool split = SIGNS && w.kind == Kind::i8;
    const size_t bytes = size_t(w.padded) * (split ? 2 : 1);
    for (int m = 0; m < count; ++m) {
        uint8_t* to = memory + m * bytes;
        for (int g = 0; g < groups; ++g) {
            alignas(64) int8_t levels[MAX_GROUP] = {};
            const int begin = g * w.group, end = begin + w.group < w.inputs ? begin + w.group : w.inputs;
            int32_t total;
            quantise(x + m * stride + begin, end - begin, levels, scales[m * groups + g], total);
            starts[m * groups + g] = -offset * total;
            sums[m * groups + g] = float(total);
            if (split) starts[m * groups + g] = split_signs(levels, to + 2 * begin);
            else memcpy(to + begin, levels, size_t(w.group));
        }
    }
    return {memory, bytes, groups, scales, starts, sums};
}

}  // namespace lab::SIMD_NAME
