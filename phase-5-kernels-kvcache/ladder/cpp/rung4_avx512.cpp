// Rung 4: 32 products per instruction: the dot product of bfloat16 pairs. The vector is rounded to bfloat16 first.
#include "step.h"

#include <immintrin.h>

#include <vector>

static void product(const void* w, const float* x, float* y, int outputs, int inputs, int threads) {
    const auto* weights = static_cast<const unsigned short*>(w);
    static thread_local std::vector<unsigned short> kept;
    kept.resize(size_t(inputs));
    unsigned short* narrow = kept.data();
    for (int k = 0; k < inputs; k += 16) {
        const __mmask16 there = inputs - k >= 16 ? 0xffff : __mmask16((1 << (inputs - k)) - 1);
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + k));
        _mm256_mask_storeu_epi16(narrow + k, there, reinterpret_cast<const __m256i&>(rounded));
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < outputs; ++n) {
        const unsigned short* row = weights + size_t(n) * inputs;
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int k = 0, i = 0; k < inputs; k += 32, i = (i + 1) % 4) {
            const __mmask32 there = inputs - k >= 32 ? ~0u : (1u << (inputs - k)) - 1;
            const __m512i a = _mm512_maskz_loadu_epi16(there, row + k), b = _mm512_maskz_loadu_epi16(there, narrow + k);
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)a, (__m512bh)b);
        }
        y[n] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    }
}
