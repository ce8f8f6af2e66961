#include "isa.h"

#include <cstring>

namespace lab {

const Isa* find_isa(const char* name) {
    const bool best = name[0] == '\0';
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool dots = wide && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (dots && (best || strcmp(name, "avx512") == 0)) return &avx512_dot;
    if (wide && (best || strcmp(name, "avx512") == 0 || strcmp(name, "avx512-plain") == 0)) return &avx512;
    if (narrow && (best || strcmp(name, "avx2") == 0)) return &avx2;
#endif
    return best || strcmp(name, "portable") == 0 ? &portable : nullptr;
}

}  // namespace lab
