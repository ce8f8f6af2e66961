// Rung 1: float32, one product after the other, as the formula is written. The sum of each output waits for its last
// addition: the processor could do 32 in that time.
#include "step.h"

static void product(const void* w, const float* x, float* y, int outputs, int inputs, int) {
    const auto* weights = static_cast<const float*>(w);
    for (int n = 0; n < outputs; ++n) {
        float sum = 0;
        for (int k = 0; k < inputs; ++k) sum += weights[size_t(n) * inputs + k] * x[k];
        y[n] = sum;
    }
}
