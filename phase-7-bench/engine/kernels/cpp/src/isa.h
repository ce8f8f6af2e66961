// The functions of an instruction set, and the registry of loaded instruction sets.
#pragma once

#include "model.h"
#include "threads.h"

namespace lab {

struct Isa {
    const char* name;
    bool narrow_bf16;  // true: bfloat16 weights are multiplied with activations rounded to bfloat16
    int lanes;
    void (*step)(const Block&, int thread, int threads, Barrier&);
    // out[token][n] = W x + bias, for single products: x [count, inputs].
    void (*product)(const Matrix&, const float* x, int count, float* out, int limit, float* spare, uint8_t* memory, int thread, int threads);
    // Sets x[i] = exp(x[i] - most), and returns the sum.
    double (*exponentials)(float* x, int count, float most);
    int (*largest)(const float* x, int count);  // the argmax; ties: the lowest index
    // The argmax over begin .. end - 1 of scale * x[i] + Gumbel noise of word i under the counter (., position, sample,
    // purpose); begin is a multiple of 64.
    int (*gumbel)(const float* x, int begin, int end, float scale, const uint32_t key[2], const uint32_t counter[3], float* best);
    void (*normalise)(const Norm&, const float* x, int width, float* to);
    double (*read)(const float* from, size_t count);  // returns the sum; measures the read speed of memory
};

// One object per instruction set, each in its own library (isa_*.cpp). `portable` runs on any CPU.
extern "C" __attribute__((visibility("default"))) const Isa lab_isa_portable, lab_isa_avx2, lab_isa_avx512, lab_isa_avx512_dot;

// Register an instruction set. The caller has checked that this CPU has it.
void add_isa(const Isa* isa);
// Load the library at `path`, which stays loaded, and register its object `symbol`. std::runtime_error if it does not
// load.
void load_isa(const char* path, const char* symbol);

// Find one by name (avx512, avx512-plain, avx2, portable). Null if it is not registered.
const Isa* find_isa(const char* name);

}  // namespace lab
