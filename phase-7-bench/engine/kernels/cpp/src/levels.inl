// Products with int8 and int4 weights: integers are summed exactly within a group of inputs, then groups as floats.

namespace lab::SIMD_NAME {

// Keeps the compiler from regrouping a sum of integers, which needs more registers than there are.
#if defined(__AVX2__)
#define LAB_IN_ORDER(x) asm("" : "+v"(x))
#else
#define LAB_IN_ORDER(x)
#endif

#if defined(__AVX512F__)
LAB_INLINE Ints madd16(Ints a, Ints b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
LAB_INLINE Ints madd8(Ints a, Ints b) { return (Ints)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
LAB_INLINE Ints add16(Ints a, Ints b) { return (Ints)_mm512_add_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
LAB_INLINE Ints madd16(Ints a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
LAB_INLINE Ints madd8(Ints a, Ints b) { return (Ints)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
LAB_INLINE Ints add16(Ints a, Ints b) { return (Ints)_mm256_add_epi16((__m256i)a, (__m256i)b); }
#endif

// + the products of 4 unsigned weights and 4 signed activations in every lane; exact.
LAB_INLINE Ints dot4(Ints acc, Ints weights, int32_t four) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(four));
#else
    for (int i = 0; i < 4; ++i) acc += ((weights >> (8 * i)) & 255) * int32_t(int8_t(four >> (8 * i)));
    return acc;
#endif
}

template <Kind KIND, bool WIDE, int M, int P, int R, From FROM>
struct Levels {
    using Loop = Rows<KIND, M, P, R, FROM>;
    static constexpr int N = P * R, STEP = together(KIND);

    // WIDE: levels are converted to float32, and activations are float32.
    LAB_INLINE void add_wide(int begin, int end, const uint8_t* const (&base)[P], const uint8_t* const (&row)[M], int ahead, Floats (&part)[M][N]) {
        Loop::each(begin, end, base, ahead, [&](int p, int k, const uint8_t* at) __attribute__((always_inline)) {
            LAB_EACH(i, STEP) {
                Loop::outer(
                    p, part,
                    [&](int r) __attribute__((always_inline)) {
                        const Ints raw = load_as<Ints>(at + r * Loop::LANE_ROW);
                        if constexpr (KIND == Kind::i8) return to_floats(((raw >> (8 * i)) & 255) - 128);
                        else return to_floats((raw >> (8 * (i % 4) + 4 * (i / 4))) & 15);
                    },
                    [&](int m) __attribute__((always_inline)) { return all(((const float*)row[m])[STEP * k + i]); }
                );
            }
        });
    }

    LAB_INLINE void add_whole(int begin, int end, const uint8_t* const (&base)[P], const uint8_t* const (&row)[M], int ahead, Ints (&whole)[M][N]) {
#if !defined(__AVX2__) || defined(__AVX512VNNI__)
        Loop::each(begin, end, base, ahead, [&](int p, int k, const uint8_t* at) __attribute__((always_inline)) {
            LAB_EACH(r, R) {
                const Ints raw = load_as<Ints>(at + r * Loop::LANE_ROW);
                LAB_EACH(m, M) {
                    Ints& sum = whole[m][p * R + r];
                    if constexpr (KIND == Kind::i8) sum = dot4(sum, raw, load_as<int32_t>(row[m] + 4 * k));
                    else {
                        sum = dot4(sum, raw & 0x0f0f0f0f, load_as<int32_t>(row[m] + 8 * k));
                        sum = dot4(sum, (raw >> 4) & 0x0f0f0f0f, load_as<int32_t>(row[m] + 8 * k + 4));
                    }
                }
            }
        });
#else
        if constexpr (KIND == Kind::i8) {  // see split_signs
            Loop::each(begin, end, base, ahead, [&](int p, int k, const uint8_t* at) __attribute__((always_inline)) {
                Ints raw[R];
                LAB_EACH(r, R) raw[r] = load_as<Ints>(at + r * Loop::LANE_ROW);
                LAB_EACH(m, M) {
                    const Ints size = all(load_as<int32_t>(row[m] + 8 * k)), sign = all(load_as<int32_t>(row[m] + 8 * k + 4));
                    LAB_EACH(r, R) {
                        whole[m][p * R + r] += madd16(madd8(size, raw[r] ^ sign), all(0x00010001));
                        LAB_IN_ORDER(whole[m][p * R + r]);
                    }
                }
            });
        } else {  // 8 sums of two products, 15 * 127 each at most, fit in 16 bits
            for (int from = begin; from < end; from += 4) {
                Ints some[M][N] = {};
                Loop::each(from, from + 4, base, ahead, [&](int p, int k, const uint8_t* at) __attribute__((always_inline)) {
                    Ints low[R], high[R];
                    LAB_EACH(r, R) {
                        const Ints raw = load_as<Ints>(at + r * Loop::LANE_ROW);
                        low[r] = raw & 0x0f0f0f0f;
                        high[r] = (raw >> 4) & 0x0f0f0f0f;
                    }
                    LAB_EACH(m, M) {
                        const Ints x = all(load_as<int32_t>(row[m] + 8 * k));
                        LAB_EACH(r, R) {
                            some[m][p * R + r] = add16(some[m][p * R + r], madd8(low[r], x));
                            LAB_IN_ORDER(some[m][p * R + r]);
                        }
                        const Ints y = all(load_as<int32_t>(row[m] + 8 * k + 4));
                        LAB_EACH(r, R) {
                            some[m][p * R + r] = add16(some[m][p * R + r], madd8(high[r], y));
                            LAB_IN_ORDER(some[m][p * R + r]);
                        }
                    }
                });
                LAB_EACH(m, M) LAB_EACH(n, N) whole[m][n] += madd16(some[m][n], all(0x00010001));
            }
        }
#endif
    }

    LAB_INLINE void add(const Span& s, Floats (&acc)[M][N]) {
        const Matrix& w = s.w;
        const Acts& x = s.x;
        const int steps = w.group / STEP, end = s.end / w.group;
        const int share = KIND == Kind::i4 ? w.scale_group / w.group : 1;  // groups with one weight scale
        const int weight_scales = KIND == Kind::i4 ? w.padded / w.scale_group : 0;
        size_t scale_at[P];
        const uint8_t* base[P];
        const uint8_t* row[M];
        LAB_EACH(p, P) {
            base[p] = w.row(s.panel + p * s.apart, 0) + s.first * Loop::LANE_ROW;
            scale_at[p] = size_t(s.panel + p * s.apart) * weight_scales * PANEL + s.first * LANES;
        }
        LAB_EACH(m, M) row[m] = x.data + (s.token + m) * x.stride;
        for (int g = s.begin / w.group; g < end; ++g) {
            Ints whole[M][N];
            Floats part[M][N];
            if constexpr (WIDE) {
                LAB_EACH(m, M) LAB_EACH(n, N) part[m][n] = Floats{};
                add_wide(g * steps, (g + 1) * steps, base, row, s.step, part);
            } else {
                LAB_EACH(m, M) LAB_EACH(n, N) whole[m][n] = all(x.starts[(s.token + m) * x.groups + g]);
                add_whole(g * steps, (g + 1) * steps, base, row, s.step, whole);
            }
            const size_t of_group = size_t(share == 1 ? g : g / share) * PANEL;
            LAB_EACH(p, P) LAB_EACH(r, R) {
                const size_t at = scale_at[p] + of_group + r * LANES;
                Floats scale{};
                if constexpr (KIND == Kind::i4) scale = load(w.halves + at, Kind::bf16);
                LAB_EACH(m, M) {
                    const int n = p * R + r, of = (s.token + m) * x.groups + g;
                    if constexpr (WIDE && KIND == Kind::i8) acc[m][n] = acc[m][n] + part[m][n];
                    else if constexpr (KIND == Kind::i8) acc[m][n] = fma(to_floats(whole[m][n]), all(x.scales[of]), acc[m][n]);
                    else {
                        Floats meant;
                        if constexpr (WIDE) meant = part[m][n];
                        else meant = to_floats(whole[m][n]);
                        if (w.zeros != nullptr) meant = meant - load(w.zeros + at, Kind::f16) * all(x.sums[of]);
                        else if (WIDE) meant = meant - 8.0f * all(x.sums[of]);
                        if constexpr (!WIDE) meant = meant * all(x.scales[of]);
                        acc[m][n] = fma(meant, scale, acc[m][n]);
                    }
                }
            }
        }
    }
};

}  // namespace lab::SIMD_NAME
