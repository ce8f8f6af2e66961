// Detects the CPU's instruction sets. A library of its own, because the result decides what is compiled.
#include <cstring>

extern "C" __attribute__((visibility("default"))) int processor_has(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (strcmp(name, "avx512") == 0)
        return wide && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (strcmp(name, "avx512-plain") == 0) return wide;
    if (strcmp(name, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return strcmp(name, "portable") == 0;
}
