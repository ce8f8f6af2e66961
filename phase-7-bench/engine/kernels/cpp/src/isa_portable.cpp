#define SIMD_NAME portable_code
#define ISA_OBJECT lab_isa_portable
#define ISA_TEXT "portable"
#include "isa.inl"
