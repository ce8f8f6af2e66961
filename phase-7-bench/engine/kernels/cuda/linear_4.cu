// `linear` with weights of 4 bits; see linear.cuh.
#include "linear.cuh"

LINEAR_OF(4)
