// Matrices are put into panels once, when a model is loaded; after that nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "model.h"

namespace lab {

// Memory for all matrices of a model, in large pages where the system has them: a step reads all of it, and with pages
// of 4 KB the processor would look up thousands of addresses for every token.
class Arena {
public:
    explicit Arena(size_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    void* take(size_t bytes);  // zeroed, 64-byte aligned; std::bad_alloc where it is not there
    size_t used() const { return used_; }

private:
    uint8_t* memory_;
    size_t mapped_, size_, used_ = 0;
};

struct Shape {
    Kind kind;
    int outputs, inputs;
    bool wide;        // activations stay float32
    bool pair;        // the rows are two halves, gate and up, whose panels take turns
    int scale_group;  // i4
    bool zeros, factor, bias;
};

// A matrix that owns its place in the arena, filled row by row.
class Packed {
public:
    Packed(std::shared_ptr<Arena> arena, const Shape& shape);

    static size_t bytes(const Shape& shape);  // that it will take

    // Rows first .. first + count - 1 from memory [count, inputs] of a floating format.
    void fill(int first, int count, const void* rows, Kind kind);
    // Levels as engine/quantize.py stores them: int8 [count, inputs], or int4 [count, groups, group / 2]. Scales and
    // zeros [count, groups], of bfloat16 and float16.
    void fill_levels(int first, int count, const void* levels, const uint16_t* scales, const uint16_t* zeros);
    void set_bias(const float* bias);      // [outputs]
    void set_factor(const float* factor);  // [inputs]
    void set_order(std::vector<int> order);  // [inputs]: the activation that each takes

    Matrix matrix;
    const Shape shape;

private:
    void check(int first, int count, const void* rows) const;
    int place(int row) const;  // where a row goes
    uint8_t* panel_of(int at);
    // read_words(row, begin, count, to): 32-bit words begin .. begin + count - 1 of a row, as a lane of the panel has them.
    template <class Read>
    void fill_words(int first, int count, Read read_words);
    std::vector<int> order_;
    std::shared_ptr<Arena> arena_;
};

}  // namespace lab
