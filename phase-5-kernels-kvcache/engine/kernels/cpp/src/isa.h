// What every instruction set brings, and which of them this processor has.
#pragma once

#include "model.h"
#include "threads.h"

namespace lab {

struct Isa {
    const char* name;
    bool narrow_bf16;  // whether bfloat16 weights meet activations rounded to bfloat16
    int lanes;
    void (*step)(const Block&, int thread, int threads, Barrier&);
    // out[token][n] = W x + bias, for tests and for whoever needs one product: x [count, inputs].
    void (*product)(const Matrix&, const float* x, int count, float* out, int limit, float* spare, uint8_t* memory, int thread, int threads);
    // x[i] = exp(x[i] - most), and their sum.
    double (*exponentials)(float* x, int count, float most);
    int (*largest)(const float* x, int count);  // the first of the largest
    // The argmax over begin .. end - 1 of scale * x[i] + Gumbel noise of word i under the counter (., position, sample,
    // purpose); begin is a multiple of 64.
    int (*gumbel)(const float* x, int begin, int end, float scale, const uint32_t key[2], const uint32_t counter[3], float* best);
    void (*normalise)(const Norm&, const float* x, int width, float* to);
    double (*read)(const float* from, size_t count);  // a sum: for measuring how fast memory is read
};

extern const Isa portable;
#if defined(__x86_64__)
extern const Isa avx2, avx512, avx512_dot;
#endif

// By name (avx512, avx512-plain, avx2, portable), or the best for an empty name. Null where this processor lacks it, or
// where no such name is known.
const Isa* find_isa(const char* name);

}  // namespace lab
