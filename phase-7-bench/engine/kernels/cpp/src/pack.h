// Packs matrices into panels, once, when a model is loaded; after that nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "model.h"

namespace lab {

// Memory for all matrices of a model, in huge pages if available: a step reads all of it, and 4 KB pages would cost
// thousands of TLB misses per token.
class Arena {
public:
    explicit Arena(size_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    void* take(size_t bytes);  // zeroed, 64-byte aligned; std::bad_alloc if it does not fit
    size_t used() const { return used_; }

private:
    uint8_t* memory_;
    size_t mapped_, size_, used_ = 0;
};

struct Shape {
    Kind kind;
    int outputs, inputs;
    bool wide;        // activations stay float32
    bool pair;        // the rows are two halves, gate and up, whose panels alternate
    int scale_group;  // i4
    bool zeros, factor, bias;
};

// A matrix in the arena, filled row by row.
class Packed {
public:
    Packed(std::shared_ptr<Arena> arena, const Shape& shape);

    static size_t bytes(const Shape& shape);  // bytes that it allocates

    // Fill the rows first .. first + count - 1 from memory [count, inputs] in a floating format.
    void fill(int first, int count, const void* rows, Kind kind);
    // The same from levels as engine/quantize.py stores them: int8 [count, inputs], or int4 [count, groups, group / 2].
    // Scales [count, groups] are bfloat16, zeros float16.
    void fill_levels(int first, int count, const void* levels, const uint16_t* scales, const uint16_t* zeros);
    void set_bias(const float* bias);      // [outputs]
    void set_factor(const float* factor);  // [inputs]
    void set_order(std::vector<int> order);  // [inputs]: the index of each input's activation

    Matrix matrix;
    const Shape shape;

private:
    void check(int first, int count, const void* rows) const;
    int index_of(int row) const;  // the output index of a row
    uint8_t* panel_of(int at);
    // read_words(row, begin, count, to): reads the 32-bit words begin .. begin + count - 1 of a row, in the panel's
    // layout.
    template <class Read>
    void fill_words(int first, int count, Read read_words);
    std::vector<int> order_;
    std::shared_ptr<Arena> arena_;
};

}  // namespace lab
