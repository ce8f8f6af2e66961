#define SIMD_NAME portable_code
#define ISA_OBJECT portable
#define ISA_TEXT "portable"
#include "isa.inl"
