// Products of tokens with a matrix in panels. Included by one file per instruction set.
//
// One lane of one register sums an output of a token, from the first input to the last; tiles only decide which of
// these sums run side by side, and chunks where a sum waits in memory. So the bits of an output depend neither on the
// number of tokens nor on the thread.
//
// A few tokens: their sums stay in registers while whole panels stream through. More tokens: a panel is taken in
// chunks that fit in the L1 cache. All tokens use a chunk before the next one, which is prefetched meanwhile. For many
// tokens a chunk of 16-bit weights is converted to float32 once (see Tiling).

namespace lab::SIMD_NAME {

// The second numbers of pairs of bfloat16. IN_PLACE: the mask is an operand in memory. Beside twelve sums no register is
// left for it; compilers would take one, and keep a sum in memory.
template <bool IN_PLACE>
LAB_INLINE Floats second_halves(Ints pairs) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (IN_PLACE) {
        static const Ints MASK = Ints{} + int32_t(0xffff0000);
        Floats second;
        asm("vandps %2, %1, %0" : "=x"(second) : "x"(pairs), "m"(MASK));
        return second;
    }
#endif
    return (Floats)(pairs & int32_t(0xffff0000));
}

// Floating weights. WIDE: activations are float32; otherwise they are bfloat16, as the weights.
template <Kind KIND, bool WIDE, int M, int P, int R, From FROM>
struct Tile {
    using Loop = Rows<KIND, M, P, R, FROM>;

    // acc += `rows` rows of the panels at `base`, times the activations at `row`.
    LAB_INLINE void add(
        const uint8_t* const (&base)[P], const uint8_t* const (&row)[M], int rows, int step, const uint8_t* next,
        Floats (&acc)[M][P * R]
    ) {
        Loop::each(0, rows, base, step, [&](int p, int k, const uint8_t* at) __attribute__((always_inline)) {
            if constexpr (KIND == Kind::f32 || KIND == Kind::f16) {
                Loop::outer(
                    p, acc,
                    [&](int r) __attribute__((always_inline)) {
                        if constexpr (KIND == Kind::f32) return load((const float*)(at + r * Loop::LANE_ROW));
                        else return load((const uint16_t*)(at + r * Loop::LANE_ROW), Kind::f16);
                    },
                    [&](int m) __attribute__((always_inline)) { return all(((const float*)row[m])[k]); }
                );
            } else if constexpr (WIDE) {
                LAB_EACH(i, 2) {
                    Loop::outer(
                        p, acc,
                        [&](int r) __attribute__((always_inline)) {
                            const Ints pairs = load_as<Ints>(at + r * Loop::LANE_ROW);
                            return i == 0 ? (Floats)(pairs << 16) : second_halves<M * R == 12>(pairs);
                        },
                        [&](int m) __attribute__((always_inline)) { return all(((const float*)row[m])[2 * k + i]); }
                    );
                }
            } else {
#if defined(__AVX512BF16__)
                LAB_EACH(r, R) {
                    const auto pairs = (__m512bh)_mm512_loadu_si512(at + r * Loop::LANE_ROW);
                    LAB_EACH(m, M) {
                        const auto two = (__m512bh)_mm512_set1_epi32(load_as<int32_t>(row[m] + 4 * k));
                        acc[m][p * R + r] = (Floats)_mm512_dpbf16_ps((__m512)acc[m][p * R + r], pairs, two);
                    }
                }
#endif
            }
        }, next);
    }

    LAB_INLINE void run(const Span& s) {
        Floats acc[M][P * R];
        LAB_EACH(p, P) LAB_EACH(m, M) LAB_EACH(r, R) acc[m][p * R + r] = load(sum(s, p, m) + r * LANES);
        if constexpr (is_levels(KIND)) Levels<KIND, WIDE, M, P, R, FROM>::add(s, acc);
        else {
            constexpr int STEP = together(KIND);
            const uint8_t* base[P];
            const uint8_t* row[M];
            LAB_EACH(p, P) {
                base[p] = FROM == From::converted && s.weights != nullptr ? s.weights : s.w.row(s.panel + p * s.apart, s.begin / STEP);
                base[p] += s.first * Loop::LANE_ROW;
            }
            LAB_EACH(m, M) row[m] = s.x.data + (s.token + m) * s.x.stride + size_t(s.begin) * (WIDE ? 4 : 2);
            add(base, row, (s.end - s.begin) / STEP, s.step, s.next, acc);
        }
        LAB_EACH(p, P) LAB_EACH(m, M) LAB_EACH(r, R) store(sum(s, p, m) + r * LANES, acc[m][p * R + r]);
    }

    LAB_INLINE float* sum(const Span& s, int p, int m) {
        return s.sums + (size_t(p) * s.sum_tokens + s.token + m) * PANEL + s.first * LANES;
    }
};

// The sums [count, PANEL] of a panel -> the outputs, those below `limit`.
static void finish(
    const Matrix& w, int panel, const float* sums, int count, float* out, size_t stride, int limit, bool add
) {
    for (int m = 0; m < count; ++m)
        for (int i = 0; i < PANEL; i += LANES) {
            const int at = panel * PANEL + i;
            Floats y = load(sums + m * PANEL + i);
            if (w.kind == Kind::i8) y = y * load(w.scales + at);
            if (w.bias != nullptr) y = y + load(w.bias + at);
            float* to = out + m * stride + at;
            if (at + LANES <= limit) {
                store(to, add ? load(to) + y : y);
            } else if (at < limit) {  // the last panel may hang over
                float lane[LANES];
                store(lane, y);
                for (int j = 0; j < limit - at; ++j) to[j] = add ? to[j] + lane[j] : lane[j];
            }
        }
}

// M tokens, panels begin .. end - 1, P at a time. The P panels are far apart, so each of the P streams through memory is
// as long as possible, which suits the hardware prefetchers.
template <Kind KIND, bool WIDE, int M, int P>
static void stream(
    const Matrix& w, const Acts& x, int begin, int end, float* out, size_t stride, int limit, bool add
) {
    constexpr int R = Tiling<is_levels(KIND)>::registers(M);
    const int apart = (end - begin) / P;
    for (int panel = begin; panel < begin + apart; ++panel) {
        alignas(64) float sums[P * M * PANEL] = {};
        for (int first = 0; first < PANEL_REGISTERS; first += R)
            Tile<KIND, WIDE, M, P, R, From::panels>::run({w, x, 0, panel, apart, first, 0, w.padded, sums, M, nullptr, nullptr, 0});
        LAB_EACH(p, P) finish(w, panel + p * apart, sums + p * M * PANEL, M, out, stride, limit, add);
    }
    if constexpr (P > 1) stream<KIND, WIDE, M, P / 2>(w, x, begin + apart * P, end, out, stride, limit, add);
}

template <Kind KIND, bool WIDE, int M>
static void stream_tokens(
    const Matrix& w, const Acts& x, int count, int begin, int end, float* out, size_t stride, int limit, bool add
) {
    if (count == M) stream<KIND, WIDE, M, Tiling<is_levels(KIND)>::panels(KIND, M)>(w, x, begin, end, out, stride, limit, add);
    else if constexpr (M > 1) stream_tokens<KIND, WIDE, M - 1>(w, x, count, begin, end, out, stride, limit, add);
}

// All registers of a chunk for a group of m tokens.
template <Kind KIND, bool WIDE, From FROM, int M>
static void add_group(int m, Span& s) {
    if (m == M) {
        constexpr int R = Tiling<is_levels(KIND)>::registers(M);
        for (s.first = 0; s.first < PANEL_REGISTERS; s.first += R) {
            Tile<KIND, WIDE, M, 1, R, FROM>::run(s);
            if (FROM == From::converted) s.next += s.step * ((s.end - s.begin) / 4);
        }
    } else if constexpr (M > 1) add_group<KIND, WIDE, FROM, M - 1>(m, s);
}

// Rows of 16-bit weights -> float32 [inputs, PANEL].
template <Kind KIND>
static void convert(const uint8_t* from, int inputs, float* to) {
    constexpr int STEP = together(KIND), LANE_ROW = row_bytes(KIND) / PANEL_REGISTERS;
    for (int k = 0; k < inputs; k += STEP, from += row_bytes(KIND), to += STEP * PANEL)
        LAB_EACH(r, PANEL_REGISTERS) {
            if constexpr (KIND == Kind::f16) store(to + r * LANES, load((const uint16_t*)(from + r * LANE_ROW), Kind::f16));
            else {
                const Ints pairs = load_as<Ints>(from + r * LANE_ROW);
                store(to + r * LANES, (Floats)(pairs << 16));
                store(to + PANEL + r * LANES, (Floats)(pairs & int32_t(0xffff0000)));
            }
        }
}

// Many tokens: a panel in chunks.
template <Kind KIND, bool WIDE>
static void multiply_chunks(
    const Matrix& w, const Acts& x, int count, int begin, int end, float* out, size_t stride, int limit, bool add
) {
    using Tiles = Tiling<is_levels(KIND)>;
    constexpr bool HALF = WIDE && (KIND == Kind::bf16 || KIND == Kind::f16);
    constexpr int INPUTS = KIND == Kind::i4 ? 4 * CHUNK : CHUNK;  // a multiple of a group
    constexpr int GROUP = Tiles::group(KIND), PASSES = PANEL_REGISTERS / Tiles::registers(Tiles::TOKENS);
    const bool direct = count <= Tiles::direct(KIND);
    const int most = direct ? GROUP : Tiles::TOKENS, groups = (count + most - 1) / most;
    alignas(64) float sums[MAX_BLOCK * PANEL];
    alignas(64) float converted[HALF ? INPUTS * PANEL : 1];
    for (int panel = begin; panel < end; ++panel) {
        memset(sums, 0, size_t(count) * PANEL * sizeof(float));
        const uint8_t* weights = w.data + size_t(panel) * w.panel_bytes();
        for (int from = 0; from < w.padded; from += INPUTS) {
            const int to = from + INPUTS < w.padded ? from + INPUTS : w.padded;
            const int bytes = (to - from) / together(KIND) * row_bytes(KIND);
            Span s{w, x, 0, panel, 0, 0, from, to, sums, count, nullptr, nullptr, bytes};
            const bool many = !direct && WIDE;
            if (many) {
                s.next = weights + bytes;
                s.step = bytes / (groups * PASSES * ((to - from + 3) / 4)) + 1;
                if constexpr (HALF) {
                    convert<KIND>(weights, to - from, converted);
                    s.weights = (const uint8_t*)converted;
                }
            }
            for (int g = 0; g < groups; ++g) {
                s.token = count * g / groups;
                const int m = count * (g + 1) / groups - s.token;
                if constexpr (!is_levels(KIND) && WIDE) {
                    if (many) {
                        add_group<Kind::f32, true, From::converted, Tiles::TOKENS>(m, s);
                        continue;
                    }
                }
                add_group<KIND, WIDE, From::chunk, (GROUP > Tiles::TOKENS ? GROUP : Tiles::TOKENS)>(m, s);
            }
            weights += bytes;
        }
        finish(w, panel, sums, count, out, stride, limit, add);
    }
}

template <Kind KIND, bool WIDE>
static void multiply_as(
    const Matrix& w, const Acts& x, int count, int begin, int end, float* out, size_t stride, int limit, bool add
) {
    constexpr int FEW = Tiling<is_levels(KIND)>::STREAMED;
    if (count <= FEW) stream_tokens<KIND, WIDE, FEW>(w, x, count, begin, end, out, stride, limit, add);
    else multiply_chunks<KIND, WIDE>(w, x, count, begin, end, out, stride, limit, add);
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
