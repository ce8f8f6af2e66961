// `linear` with weights of 16 bits; see linear.cuh.
#include "linear.cuh"

LINEAR_OF(16)
