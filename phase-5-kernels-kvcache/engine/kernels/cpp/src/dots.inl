// Products of a few tokens with a matrix in panels. Included by one file per instruction set.
//
// One lane of one register sums an output of a token, from the first input to the last; tiles only decide which of
// these sums run side by side. So the bits of an output depend neither on the number of tokens nor on the thread.

namespace lab::SIMD_NAME {

constexpr int PANEL_REGISTERS = PANEL / LANES;

LAB_INLINE Ints load_ints(const uint8_t* from) { return load_as<Ints>(from); }

// + the products of 4 unsigned weights and 4 signed activations in every lane; exact.
LAB_INLINE Ints dot4(Ints acc, Ints weights, int32_t four) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(four));
#elif defined(__AVX512F__)
    const __m512i w = (__m512i)weights, x = _mm512_set1_epi32(four);
    const __m512i even = _mm512_and_si512(w, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(w, 8);
    const __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), x_odd = _mm512_srai_epi16(x, 8);
    return acc + (Ints)_mm512_madd_epi16(even, x_even) + (Ints)_mm512_madd_epi16(odd, x_odd);
#elif defined(__AVX2__)
    const __m256i w = (__m256i)weights, x = _mm256_set1_epi32(four);
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(w, 8);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    return acc + (Ints)_mm256_madd_epi16(even, x_even) + (Ints)_mm256_madd_epi16(odd, x_odd);
#else
    for (int i = 0; i < 4; ++i) acc += ((weights >> (8 * i)) & 255) * int32_t(int8_t(four >> (8 * i)));
    return acc;
#endif
}

// The tokens, panels and registers of a panel of one tile: enough sums to hide the latency of an addition, and no more
// than fit in registers.
template <bool INTS>
struct Tiling;
#if defined(__AVX512F__)
template <>
struct Tiling<false> {
    static constexpr int TOKENS = 8;
    static constexpr int panels(int m) { return m == 1 ? 8 : m <= 3 ? 4 : m <= 6 ? 2 : 1; }
    static constexpr int registers(int) { return 2; }
};
template <>
struct Tiling<true> {
    static constexpr int TOKENS = 6;
    static constexpr int panels(int m) { return m == 1 ? 4 : m <= 6 ? 2 : 1; }
    static constexpr int registers(int) { return 2; }
};
#else
template <>
struct Tiling<false> {
    static constexpr int TOKENS = 4;
    static constexpr int panels(int m) { return m == 1 ? 8 / PANEL_REGISTERS : 1; }
    static constexpr int registers(int m) { return m == 1 ? PANEL_REGISTERS : m <= 3 ? 4 : 2; }
};
template <>
struct Tiling<true> {
    static constexpr int TOKENS = 4;
    static constexpr int panels(int) { return 1; }
    static constexpr int registers(int m) { return m <= 1 ? 4 : m <= 3 ? 2 : 1; }
};
#endif

constexpr int AHEAD = 2048;  // bytes of each stream that are asked for before they are needed

#define LAB_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)

// One tile: M tokens, P panels, R registers of each from `first` on. acc[m][p * R + r] goes to the outputs.
template <Kind KIND, bool WIDE, int M, int P, int R>
struct Tile {
    static constexpr int N = P * R;

    LAB_INLINE void add_up(
        const Matrix& w, const Acts& x, int token, int panel, int apart, int first, Floats (&acc)[M][N]
    ) {
        const uint8_t* base[P];
        const uint8_t* row[M];
        LAB_EACH(p, P) base[p] = w.data + (panel + p * apart) * w.panel_bytes() + first * row_bytes(KIND) / PANEL_REGISTERS;
        LAB_EACH(m, M) row[m] = x.data + (token + m) * x.stride;
        LAB_EACH(m, M) LAB_EACH(n, N) acc[m][n] = Floats{};
        if constexpr (KIND == Kind::i8 || KIND == Kind::i4) add_up_levels(w, x, token, panel, apart, first, base, row, acc);
        else
            each_row(0, w.padded / together(KIND), base, [&](int p, int k, const uint8_t* weights) __attribute__((always_inline)) {
                add_row_of(p, k, weights, row, acc);
            });
    }

    // Rows begin .. end - 1 of all P panels, a few of one panel after the other: several whole cache lines in sequence
    // trigger the hardware prefetchers. The next lines of each panel are also prefetched explicitly.
    template <class Row>
    LAB_INLINE void each_row(int begin, int end, const uint8_t* (&base)[P], Row row) {
        constexpr int BYTES = row_bytes(KIND), UNROLL = 256 / BYTES;
        int k = begin;
        for (; k + UNROLL <= end; k += UNROLL)
            LAB_EACH(p, P) {
                const uint8_t* at = base[p] + size_t(k) * BYTES;
                LAB_EACH(line, 256 / 64) __builtin_prefetch(at + AHEAD + 64 * line, 0, 3);
                LAB_EACH(u, UNROLL) row(p, k + u, at + u * BYTES);
            }
        for (; k < end; ++k) LAB_EACH(p, P) row(p, k, base[p] + size_t(k) * BYTES);
    }

    LAB_INLINE void add_row_of(int p, int k, const uint8_t* weights, const uint8_t* (&row)[M], Floats (&acc)[M][N]) {
        constexpr int LANE_ROW = row_bytes(KIND) / PANEL_REGISTERS;  // bytes of one register's weights
        LAB_EACH(r, R) {
            const uint8_t* at = weights + r * LANE_ROW;
            if constexpr (KIND == Kind::f32 || KIND == Kind::f16) {
                Floats wide;
                if constexpr (KIND == Kind::f32) wide = load((const float*)at);
                else wide = load((const uint16_t*)at, Kind::f16);
                LAB_EACH(m, M) acc[m][p * R + r] = fma(wide, all(((const float*)row[m])[k]), acc[m][p * R + r]);
            } else if constexpr (WIDE) {
                const Ints pairs = load_ints(at);
                const Floats even = (Floats)(pairs << 16), odd = (Floats)(pairs & int32_t(0xffff0000));
                LAB_EACH(m, M) {
                    const float* two = (const float*)row[m] + 2 * k;
                    acc[m][p * R + r] = fma(even, all(two[0]), acc[m][p * R + r]);
                    acc[m][p * R + r] = fma(odd, all(two[1]), acc[m][p * R + r]);
                }
            } else {
#if defined(__AVX512BF16__)
                const auto pairs = (__m512bh)_mm512_loadu_si512(at);
                LAB_EACH(m, M) {
                    const auto two = (__m512bh)_mm512_set1_epi32(load_as<int32_t>(row[m] + 4 * k));
                    acc[m][p * R + r] = (Floats)_mm512_dpbf16_ps((__m512)acc[m][p * R + r], pairs, two);
                }
#endif
            }
        }
    }

    // Integers are summed exactly within a group, then groups as floats. WIDE: int levels times float activations.
    LAB_INLINE void add_up_levels(
        const Matrix& w, const Acts& x, int token, int panel, int apart, int first, const uint8_t* (&base)[P],
        const uint8_t* (&row)[M], Floats (&acc)[M][N]
    ) {
        constexpr int LANE_ROW = row_bytes(KIND) / PANEL_REGISTERS;
        constexpr int STEP = together(KIND);
        const int groups = w.padded / w.group, steps = w.group / STEP;
        const int weight_groups = KIND == Kind::i4 ? w.padded / w.scale_group : 1;
        for (int g = 0; g < groups; ++g) {
            Ints whole[M][N];
            Floats part[M][N];
            LAB_EACH(m, M) LAB_EACH(n, N) {
                if constexpr (WIDE) part[m][n] = Floats{};
                else whole[m][n] = all(KIND == Kind::i8 ? -128 * x.sums[(token + m) * x.groups + g] : 0);
            }
            each_row(g * steps, (g + 1) * steps, base, [&](int p, int k, const uint8_t* at) __attribute__((always_inline)) {
                LAB_EACH(r, R) {
                    const Ints raw = load_ints(at + r * LANE_ROW);
                    if constexpr (WIDE) {
                        LAB_EACH(i, STEP) {
                            Ints level;
                            if constexpr (KIND == Kind::i8) level = ((raw >> (8 * i)) & 255) - 128;
                            else level = (raw >> (8 * (i % 4) + 4 * (i / 4))) & 15;
                            const Floats value = to_floats(level);
                            LAB_EACH(m, M) part[m][p * R + r] =
                                fma(value, all(((const float*)row[m])[STEP * k + i]), part[m][p * R + r]);
                        }
                    } else if constexpr (KIND == Kind::i8) {
                        LAB_EACH(m, M) whole[m][p * R + r] =
                            dot4(whole[m][p * R + r], raw, load_as<int32_t>(row[m] + 4 * k));
                    } else {
                        const Ints low = raw & 0x0f0f0f0f, high = (raw >> 4) & 0x0f0f0f0f;
                        LAB_EACH(m, M) {
                            Ints& sum = whole[m][p * R + r];
                            sum = dot4(sum, low, load_as<int32_t>(row[m] + 8 * k));
                            sum = dot4(sum, high, load_as<int32_t>(row[m] + 8 * k + 4));
                        }
                    }
                }
            });
            LAB_EACH(p, P) LAB_EACH(r, R) {
                Floats scale{}, zero = all(8.0f);
                if constexpr (KIND == Kind::i4) {
                    const size_t group = size_t(panel + p * apart) * weight_groups + g * w.group / w.scale_group;
                    const size_t at = group * PANEL + (first + r) * LANES;
                    scale = load(w.halves + at, Kind::bf16);
                    if (w.zeros != nullptr) zero = load(w.zeros + at, Kind::f16);
                }
                LAB_EACH(m, M) {
                    const int n = p * R + r, of = (token + m) * x.groups + g;
                    if constexpr (WIDE && KIND == Kind::i8) acc[m][n] = acc[m][n] + part[m][n];
                    else if constexpr (WIDE)
                        acc[m][n] = fma(part[m][n] - zero * all(x.scales[of]), scale, acc[m][n]);
                    else if constexpr (KIND == Kind::i8)
                        acc[m][n] = fma(to_floats(whole[m][n]), all(x.scales[of]), acc[m][n]);
                    else {
                        const Floats meant = to_floats(whole[m][n]) - zero * all(float(x.sums[of]));
                        acc[m][n] = fma(meant * all(x.scales[of]), scale, acc[m][n]);
                    }
                }
            }
        }
    }

    static void run(
        const Matrix& w, const Acts& x, int token, int panel, int apart, int first, float* out, size_t stride, int limit,
        bool add
    ) {
        Floats acc[M][N];
        add_up(w, x, token, panel, apart, first, acc);
        LAB_EACH(p, P) LAB_EACH(r, R) {
            const int at = (panel + p * apart) * PANEL + (first + r) * LANES;
            LAB_EACH(m, M) {
                Floats y = acc[m][p * R + r];
                if constexpr (KIND == Kind::i8) y = y * load(w.scales + at);
                if (w.bias != nullptr) y = y + load(w.bias + at);
                float* to = out + (token + m) * stride + at;
                if (at + LANES <= limit) {
                    store(to, add ? load(to) + y : y);
                } else if (at < limit) {  // the last panel may hang over
                    float lane[LANES];
                    store(lane, y);
                    for (int i = 0; i < limit - at; ++i) to[i] = add ? to[i] + lane[i] : lane[i];
                }
            }
        }
    }
};

// Panels begin .. end - 1, P at a time. The P panels are far apart, so each of the P streams through memory is as long
// as possible, which suits the hardware prefetchers.
template <Kind KIND, bool WIDE, int M, int P>
static void panels_of(
    const Matrix& w, const Acts& x, int token, int begin, int end, float* out, size_t stride, int limit, bool add
) {
    constexpr int R = Tiling<KIND == Kind::i8 || KIND == Kind::i4>::registers(M);
    const int apart = (end - begin) / P;
    for (int panel = begin; panel < begin + apart; ++panel)
        for (int first = 0; first < PANEL_REGISTERS; first += R)
            Tile<KIND, WIDE, M, P, R>::run(w, x, token, panel, apart, first, out, stride, limit, add);
    if constexpr (P > 1) panels_of<KIND, WIDE, M, P / 2>(w, x, token, begin + apart * P, end, out, stride, limit, add);
}

// Panels that all groups of tokens use before the next ones are read: few enough to stay in the L1 and L2 caches.
constexpr int PANELS_AT_ONCE = 4;

template <Kind KIND, bool WIDE>
static void multiply_as(
    const Matrix& w, const Acts& x, int count, int begin, int end, float* out, size_t stride, int limit, bool add
) {
    using Tiles = Tiling<KIND == Kind::i8 || KIND == Kind::i4>;
    const int groups = (count + Tiles::TOKENS - 1) / Tiles::TOKENS;
    const int chunk = groups == 1 ? end - begin : PANELS_AT_ONCE;
    for (int from = begin; from < end; from += chunk) {
        const int to = from + chunk < end ? from + chunk : end;
        for (int g = 0; g < groups; ++g) {
            const int token = count * g / groups, m = count * (g + 1) / groups - token;
            switch (m) {
                case 1: panels_of<KIND, WIDE, 1, Tiles::panels(1)>(w, x, token, from, to, out, stride, limit, add); break;
                case 2: panels_of<KIND, WIDE, 2, Tiles::panels(2)>(w, x, token, from, to, out, stride, limit, add); break;
                case 3: panels_of<KIND, WIDE, 3, Tiles::panels(3)>(w, x, token, from, to, out, stride, limit, add); break;
                case 4: panels_of<KIND, WIDE, 4, Tiles::panels(4)>(w, x, token, from, to, out, stride, limit, add); break;
#if defined(__AVX512F__)
                case 5: panels_of<KIND, WIDE, 5, Tiles::panels(5)>(w, x, token, from, to, out, stride, limit, add); break;
                case 6: panels_of<KIND, WIDE, 6, Tiles::panels(6)>(w, x, token, from, to, out, stride, limit, add); break;
                case 7:
                    if constexpr (Tiles::TOKENS > 6)
                        panels_of<KIND, WIDE, 7, Tiles::panels(7)>(w, x, token, from, to, out, stride, limit, add);
                    break;
                case 8:
                    if constexpr (Tiles::TOKENS > 6)
                        panels_of<KIND, WIDE, 8, Tiles::panels(8)>(w, x, token, from, to, out, stride, limit, add);
                    break;
#endif
            }
        }
    }
}

// out[token][n] (+)= W x + bias for `count` tokens and the outputs of panels begin .. end - 1, those below `limit`.
static void multiply(
    const Matrix& w, const Acts& x, int count, int begin, int end, float* out, size_t stride, int limit, bool add
) {
    switch (w.kind) {
        case Kind::f32: return multiply_as<Kind::f32, true>(w, x, count, begin, end, out, stride, limit, add);
        case Kind::f16: return multiply_as<Kind::f16, true>(w, x, count, begin, end, out, stride, limit, add);
        case Kind::bf16:
#if defined(__AVX512BF16__)
            if (!w.wide) return multiply_as<Kind::bf16, false>(w, x, count, begin, end, out, stride, limit, add);
#endif
            return multiply_as<Kind::bf16, true>(w, x, count, begin, end, out, stride, limit, add);
        case Kind::i8:
            if (w.wide) return multiply_as<Kind::i8, true>(w, x, count, begin, end, out, stride, limit, add);
            return multiply_as<Kind::i8, false>(w, x, count, begin, end, out, stride, limit, add);
        case Kind::i4:
            if (w.wide) return multiply_as<Kind::i4, true>(w, x, count, begin, end, out, stride, limit, add);
            return multiply_as<Kind::i4, false>(w, x, count, begin, end, out, stride, limit, add);
    }
}

}  // namespace lab::SIMD_NAME
