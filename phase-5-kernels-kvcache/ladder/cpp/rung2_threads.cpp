// Rung 2: the same on all cores. Every product starts the threads and waits for them, four times per layer.
#include "step.h"

static void product(const void* w, const float* x, float* y, int outputs, int inputs, int threads) {
    const auto* weights = static_cast<const float*>(w);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < outputs; ++n) {
        float sum = 0;
        for (int k = 0; k < inputs; ++k) sum += weights[size_t(n) * inputs + k] * x[k];
        y[n] = sum;
    }
}
