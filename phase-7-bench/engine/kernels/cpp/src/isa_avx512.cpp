#if defined(__x86_64__)
#define SIMD_NAME avx512_code
#define ISA_OBJECT lab_isa_avx512
#define ISA_TEXT "avx512-plain"
#include "isa.inl"
#endif
