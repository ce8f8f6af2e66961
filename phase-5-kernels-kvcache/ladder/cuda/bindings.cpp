// The rungs as Python calls them.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "ladder.h"

PYBIND11_MODULE(MODULE, m) {
    m.def("linear", [](int rung, int64_t x, int64_t w, int64_t bias, int64_t out, int N, int K, int64_t stream) {
        void (*const rungs[])(const LinearRung&, int64_t) = {linear_1, linear_2, linear_3, linear_4, linear_5};
        if (rung < 1 || rung > 5) throw std::invalid_argument("no such rung");
        rungs[rung - 1]({x, w, bias, out, N, K}, stream);
    });
    m.def("attention", [](int rung, int64_t query, int64_t keys, int64_t values, int64_t out, int64_t scratch, int H, int HK,
                          int D, int n, int64_t slots, int64_t stream) {
        void (*const rungs[])(const AttentionRung&, int64_t) = {attention_1, attention_2, attention_3, attention_4, attention_5};
        if (rung < 1 || rung > 5) throw std::invalid_argument("no such rung");
        rungs[rung - 1]({query, keys, values, out, scratch, H, HK, D, n, slots}, stream);
    });
}
