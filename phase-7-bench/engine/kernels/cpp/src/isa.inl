// One instruction set: compiles the files below for it. The including file defines SIMD_NAME, ISA_OBJECT and ISA_TEXT.
#include "isa.h"

#include "simd.h"

#include "activations.inl"

#include "tiles.inl"

#include "levels.inl"

#include "dots.inl"

#include "attention.inl"

#include "step.inl"

#include "noise.inl"

namespace lab {

namespace SIMD_NAME {

static void one_product(
    const Matrix& w, const float* x, int count, float* out, int limit, float* spare, uint8_t* memory, int thread, int threads
) {
    for (int from = 0; from < count; from += MAX_BLOCK) {
        const int m = count - from < MAX_BLOCK ? count - from : MAX_BLOCK;
        const Range mine = share(w.panels(), thread, threads);
        if (mine.begin == mine.end) return;
        const Acts acts = prepare(w, x + size_t(from) * w.inputs, size_t(w.inputs), m, spare, memory);
        multiply(w, acts, m, mine.begin, mine.end, out + size_t(from) * limit, size_t(limit), limit, false);
    }
}

// Sum with eight parallel streams, the access pattern of products that read panels.
static double read_all(const float* from, size_t count) {
    constexpr size_t STREAMS = 8;
    const size_t length = count / STREAMS / LANES * LANES;
    Floats acc[STREAMS] = {};
    for (size_t i = 0; i < length; i += LANES)
        LAB_EACH(n, 8) acc[n] = acc[n] + load(from + n * length + i);
    for (size_t n = 1; n < STREAMS; ++n) acc[0] = acc[0] + acc[n];
    return sum(acc[0]);
}

}  // namespace SIMD_NAME

const Isa ISA_OBJECT = {
    ISA_TEXT,
#if defined(__AVX512BF16__)
    true,
#else
    false,
#endif
    SIMD_NAME::LANES, SIMD_NAME::step, SIMD_NAME::one_product, SIMD_NAME::exponentials, SIMD_NAME::first_largest,
    SIMD_NAME::gumbel_largest, SIMD_NAME::normalise, SIMD_NAME::read_all,
};

}  // namespace lab
