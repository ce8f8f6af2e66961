// The shapes of tiles, and their loops over the rows of a panel. Included before the products (levels.inl, dots.inl).

namespace lab::SIMD_NAME {

constexpr int PANEL_REGISTERS = PANEL / LANES;
constexpr int CHUNK = 128;         // inputs of a panel in the L1 cache, for all tokens: 16 KB of float32, 4 of int8

constexpr bool is_levels(Kind kind) { return kind == Kind::i8 || kind == Kind::i4; }

// The tokens, panels and registers of a panel of one tile: enough sums to hide the latency of an addition, and no more
// than fit in registers. ahead: how many bytes ahead each stream of weights is prefetched; 0: not at all, because the
// hardware's own prefetchers are faster (measured with AVX2 and AVX-512, weights in the caches and in memory). They
// follow the two streams of one token well: with eight, products from the L2 cache take 1.5 times as long. With AVX-512
// the same holds for two and three tokens, but not in float16.
// STREAMED: the most tokens for which whole panels are streamed. More tokens share a chunk. Up to `direct` tokens use it
// as stored, in groups of at most `group`. More use it in groups of at most TOKENS, and 16-bit weights are converted to
// float32 first. Integers are never converted.
template <bool INTS>
struct Tiling;
#if defined(__AVX512F__)
template <>
struct Tiling<false> {
    static constexpr int TOKENS = 8, STREAMED = 8;
    static constexpr int group(Kind) { return 8; }
    static constexpr int direct(Kind) { return 16; }
    static constexpr int panels(Kind kind, int m) { return kind == Kind::f16 && (m == 2 || m == 3) ? 4 : m <= 6 ? 2 : 1; }
    static constexpr int registers(int) { return 2; }
    static constexpr int ahead(Kind kind, int m) { return m == 1 || (m <= 3 && kind != Kind::f16) ? 0 : 8192; }
};
template <>
struct Tiling<true> {
    static constexpr int TOKENS = 6, STREAMED = 6;
    static constexpr int group(Kind) { return TOKENS; }
    static constexpr int direct(Kind) { return MAX_BLOCK; }
    static constexpr int panels(Kind, int) { return 2; }
    static constexpr int registers(int) { return 2; }
    static constexpr int ahead(Kind, int) { return 0; }
};
#else
template <>
struct Tiling<false> {
    // Three tokens times whole rows of a chunk: a tile of two registers and six tokens reads as much from the L1 cache, but
    // its six streams of activations miss more often. The conversion of a chunk is repaid by more than 16 tokens.
    static constexpr int TOKENS = 3, STREAMED = 3;
    static constexpr int group(Kind kind) { return kind == Kind::bf16 ? 5 : 4; }
    static constexpr int direct(Kind kind) { return kind == Kind::f32 ? 8 : 16; }
    static constexpr int panels(Kind, int m) { return m == 1 ? 8 / PANEL_REGISTERS : 1; }
    static constexpr int registers(int m) { return m == 1 ? PANEL_REGISTERS : m <= 3 ? 4 : 2; }
    static constexpr int ahead(Kind, int) { return 0; }
};
template <>
struct Tiling<true> {
    static constexpr int TOKENS = 5, STREAMED = 3;
    static constexpr int group(Kind) { return TOKENS; }
    static constexpr int direct(Kind) { return MAX_BLOCK; }
    static constexpr int panels(Kind, int m) { return m == 1 ? 2 : 1; }
    static constexpr int registers(int m) { return m <= 2 ? 4 : 2; }
    static constexpr int ahead(Kind, int) { return 0; }
};
#endif

#define LAB_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)

// What a tile adds to its sums: the inputs begin .. end - 1 of some tokens, times registers from `first` on of panels.
struct Span {
    const Matrix& w;
    const Acts& x;
    int token, panel, apart;     // apart: from panel to panel, if a tile has several
    int first, begin, end;
    float* sums;                 // [panels of the tile, tokens, PANEL]
    int sum_tokens;
    const uint8_t* weights;      // a converted chunk; null: the matrix's own
    const uint8_t* next;         // prefetched while a converted chunk is used
    int step;                    // converted: bytes of `next` that an iteration prefetches; chunk: how many bytes ahead
};

// What a tile reads: whole panels, a chunk of one, or such a chunk as float32, in the L1 cache.
enum class From { panels, chunk, converted };

// The loops over the rows of a tile's weights.
template <Kind KIND, int M, int P, int R, From FROM>
struct Rows {
    static constexpr int BYTES = row_bytes(KIND), LANE_ROW = BYTES / PANEL_REGISTERS;
    static constexpr int AHEAD = Tiling<is_levels(KIND)>::ahead(KIND, M);

    // Rows begin .. end - 1 of all P panels, a few of one panel after the other: several whole cache lines in sequence
    // trigger the hardware prefetchers. A chunk's successor, and panels where Tiling::ahead is above 0, are also
    // prefetched into the L2 cache: only few misses of the L1 cache can be under way.
    template <class Row>
    LAB_INLINE void each(
        int begin, int end, const uint8_t* const (&base)[P], int step, Row row, const uint8_t* next = nullptr
    ) {
        constexpr int UNROLL = FROM == From::converted ? 4 : 256 / BYTES, LINES = R * LANE_ROW > 64 ? R * LANE_ROW / 64 : 1;
        int k = begin;
        for (; k + UNROLL <= end; k += UNROLL) {
            if constexpr (FROM == From::converted) {
                LAB_EACH(line, 4) __builtin_prefetch(next + 64 * line, 0, 3);
                next += step;
            }
            LAB_EACH(p, P) {
                const uint8_t* at = base[p] + size_t(k) * BYTES;
                LAB_EACH(u, UNROLL) {
                    if constexpr (FROM == From::chunk || (FROM == From::panels && AHEAD > 0)) {
                        const uint8_t* ahead = at + u * BYTES + (FROM == From::chunk ? step : AHEAD);
                        LAB_EACH(line, LINES) __builtin_prefetch(ahead + 64 * line, 0, 2);
                    }
                    row(p, k + u, at + u * BYTES);
                }
            }
        }
        for (; k < end; ++k) LAB_EACH(p, P) row(p, k, base[p] + size_t(k) * BYTES);
    }

    // acc += weight(r) * active(m) for all R registers and M tokens; as few operands as possible are held.
    template <class Weight, class Active>
    LAB_INLINE void outer(int p, Floats (&acc)[M][P * R], Weight weight, Active active) {
        if constexpr (R <= M) {
            Floats w[R];
            LAB_EACH(r, R) w[r] = weight(r);
            LAB_EACH(m, M) {
                const Floats x = active(m);
                LAB_EACH(r, R) acc[m][p * R + r] = fma(w[r], x, acc[m][p * R + r]);
            }
        } else {
            Floats x[M];
            LAB_EACH(m, M) x[m] = active(m);
            LAB_EACH(r, R) {
                const Floats w = weight(r);
                LAB_EACH(m, M) acc[m][p * R + r] = fma(w, x[m], acc[m][p * R + r]);
            }
        }
    }
};

}  // namespace lab::SIMD_NAME
