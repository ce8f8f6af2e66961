// What every instruction set brings, and which of them are loaded.
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

// The objects of the instruction sets, one per library (isa_*.cpp). `portable` runs everywhere.
extern "C" __attribute__((visibility("default"))) const Isa lab_isa_portable, lab_isa_avx2, lab_isa_avx512, lab_isa_avx512_dot;

// Make an instruction set known under its name. The caller has made sure that this processor has it.
void add_isa(const Isa* isa);
// The same, of the library at this path, which stays loaded; `symbol` names the object. std::runtime_error where it does
// not load.
void load_isa(const char* path, const char* symbol);

// By name (avx512, avx512-plain, avx2, portable). Null where it has not been added.
const Isa* find_isa(const char* name);

}  // namespace lab
