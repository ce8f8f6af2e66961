// `linear` with weights of 8 bits; see linear.cuh.
#include "linear.cuh"

LINEAR_OF(8)
