#if defined(__x86_64__)
#define SIMD_NAME avx512_dot_code
#define ISA_OBJECT lab_isa_avx512_dot
#define ISA_TEXT "avx512"
#include "isa.inl"
#endif
