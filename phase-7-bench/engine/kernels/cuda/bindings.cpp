// The interface to Python: integers in, nothing out. Every call releases Python's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;

// A structure is passed as a list of its members, in the order of ops.h.
static Matrix matrix_from(const std::vector<int64_t>& of) {
    return {int(of.at(0)), int(of.at(1)), of.at(2), of.at(3), of.at(4), of.at(5), of.at(6), int(of.at(7)), of.at(8), of.at(9)};
}

static Attention attention_from(const std::vector<int64_t>& of) {
    Attention call{};
    call.format = int(of.at(0)), call.stored = int(of.at(1));
    int64_t* addresses[] = {&call.query, &call.keys, &call.values, &call.key_scales, &call.value_scales, &call.rows,
                            &call.tables, &call.lo, &call.end, &call.base, &call.lines, &call.out};
    int* sizes[] = {&call.R, &call.W, &call.H, &call.HK, &call.D, &call.width, &call.shift, &call.line_width};
    int64_t* strides[] = {&call.wrap, &call.s_page, &call.s_head, &call.s_slot, &call.q_row, &call.q_token, &call.q_head};
    size_t at = 2;
    for (int64_t* each : addresses) *each = of.at(at++);
    for (int* each : sizes) *each = int(of.at(at++));
    for (int64_t* each : strides) *each = of.at(at++);
    return call;
}

PYBIND11_MODULE(MODULE, m) {
    auto free = py::call_guard<py::gil_scoped_release>();
    m.def("rms_norm", &rms_norm, free);
    m.def("rope", &rope, free);
    m.def("rope_append", &rope_append, free);
    m.def("linear",
          [](int format, int64_t x, int64_t x_stride, int M, const std::vector<int64_t>& matrix, bool gated, int parts,
             int64_t sums, int64_t out, int64_t stream) {
              linear(format, x, x_stride, M, matrix_from(matrix), gated, parts, sums, out, stream);
          }, free);
    m.def("linear_rows",
          [](int format, int64_t x, int64_t x_stride, int M, const std::vector<int64_t>& matrix, bool gated, int64_t out,
             int64_t stream) { linear_rows(format, x, x_stride, M, matrix_from(matrix), gated, out, stream); }, free);
    m.def("decode_attention",
          [](const std::vector<int64_t>& call, int part, int parts, int64_t mixed, int64_t tops, int64_t sums,
             int64_t stream) { decode_attention(attention_from(call), part, parts, mixed, tops, sums, stream); }, free);
    m.def("flash_prefill",
          [](const std::vector<int64_t>& call, int64_t stream) { flash_prefill(attention_from(call), stream); }, free);
    m.def("choice_parts", &choice_parts);
    m.def("choices", &choices, free);
    m.def("prefix", &prefix, free);
    m.def("verify_sample", &verify_sample, free);
    m.def("sample", &sample, free);
    m.def("probabilities", &probabilities, free);
    m.def("draw", &draw, free);
    m.def("embed", &embed, free);
    m.def("advance", &advance, free);
}
