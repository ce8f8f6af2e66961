#if defined(__x86_64__)
#define SIMD_NAME avx2_code
#define ISA_OBJECT lab_isa_avx2
#define ISA_TEXT "avx2"
#include "isa.inl"
#endif
