#include "pack.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <stdexcept>

#define SIMD_NAME plain_code
#include "simd.h"

namespace lab {

using namespace plain_code;

namespace {

constexpr size_t LARGE = size_t(1) << 21;
constexpr int GROUP = 64;  // activations that are quantised together

size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

void need(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

Matrix dimensions(const Shape& shape) {
    constexpr int MOST = 1 << 26;
    need(shape.outputs > 0 && shape.outputs <= MOST && shape.inputs > 0 && shape.inputs <= MOST, "a matrix has at least one row and one column");
    need(!shape.pair || shape.outputs % 2 == 0, "a pair of matrices has an even number of rows");
    if (shape.kind == Kind::i4) {
        const int group = shape.scale_group;
        need(group > 0 && group % 32 == 0 && (group <= GROUP || group % GROUP == 0), "a group has 32 inputs, or a multiple of 64");
        need(shape.inputs % group == 0, "groups do not divide the inputs");
    }
    Matrix m;
    m.kind = shape.kind;
    m.outputs = shape.pair ? 2 * round_up(shape.outputs / 2, PANEL) : round_up(shape.outputs, PANEL);
    m.inputs = shape.inputs;
    m.wide = shape.wide;
    m.group = m.scale_group = 1;
    if (shape.kind == Kind::i8) m.group = GROUP;
    if (shape.kind == Kind::i4) {
        m.scale_group = shape.scale_group;
        m.group = shape.scale_group < GROUP ? shape.scale_group : GROUP;
    }
    const int step = m.group > 1 ? m.group : together(shape.kind);
    m.padded = round_up(shape.inputs, step);
    return m;
}

size_t scale_count(const Matrix& m) { return size_t(m.outputs) * (m.kind == Kind::i4 ? m.padded / m.scale_group : 1); }

float read(const void* from, Kind kind, size_t at) {
    if (kind == Kind::f32) return static_cast<const float*>(from)[at];
    const uint16_t bits = static_cast<const uint16_t*>(from)[at];
    return kind == Kind::bf16 ? float_of_bf16(bits) : float_of_half(bits);
}

template <class T>
T* writable(const T* x) { return const_cast<T*>(x); }

}  // namespace

Arena::Arena(size_t bytes) : mapped_(bytes + LARGE), size_(bytes) {
    if (mapped_ < bytes) throw std::bad_alloc();
    void* all = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(all);
#if defined(MADV_HUGEPAGE)
    if (bytes >= LARGE) madvise(all, mapped_, MADV_HUGEPAGE);  // a wish: the system may have none
#endif
    used_ = (LARGE - reinterpret_cast<size_t>(memory_) % LARGE) % LARGE;
    size_ += used_;
}

Arena::~Arena() { munmap(memory_, mapped_); }

void* Arena::take(size_t bytes) {
    if (bytes > size_ || aligned(bytes) > size_ - used_) throw std::bad_alloc();
    void* taken = memory_ + used_;
    used_ += aligned(bytes);
    return taken;
}

size_t Packed::bytes(const Shape& shape) {
    const Matrix m = dimensions(shape);
    size_t total = aligned(m.panel_bytes() * m.panels());
    if (shape.kind == Kind::i8) total += aligned(size_t(m.outputs) * 4);
    if (shape.kind == Kind::i4) total += aligned(scale_count(m) * 2) * (shape.zeros ? 2 : 1);
    if (shape.bias) total += aligned(size_t(m.outputs) * 4);
    if (shape.factor) total += aligned(size_t(m.inputs) * 4);
    return total;
}

Packed::Packed(std::shared_ptr<Arena> arena, const Shape& s) : matrix(dimensions(s)), shape(s), arena_(std::move(arena)) {
    matrix.data = static_cast<uint8_t*>(arena_->take(matrix.panel_bytes() * matrix.panels()));
    if (s.kind == Kind::i8) matrix.scales = static_cast<float*>(arena_->take(size_t(matrix.outputs) * 4));
    if (s.kind == Kind::i4) {
        matrix.halves = static_cast<uint16_t*>(arena_->take(scale_count(matrix) * 2));
        if (s.zeros) matrix.zeros = static_cast<uint16_t*>(arena_->take(scale_count(matrix) * 2));
    }
    if (s.bias) matrix.bias = static_cast<float*>(arena_->take(size_t(matrix.outputs) * 4));
    if (s.factor) matrix.factor = static_cast<float*>(arena_->take(size_t(matrix.inputs) * 4));
}

int Packed::place(int row) const {
    if (!shape.pair) return row;
    const int half = shape.outputs / 2, of = row % half;
    return of / PANEL * 2 * PANEL + of % PANEL + (row >= half ? PANEL : 0);
}

void Packed::check(int first, int count, const void* rows) const {
    need(first >= 0 && count >= 0 && first <= shape.outputs - count, "the matrix has no such rows");
    need(rows != nullptr, "the rows have no memory");
}

void Packed::fill(int first, int count, const void* rows, Kind kind) {
    check(first, count, rows);
    need(kind < Kind::i8 && matrix.kind < Kind::i8, "levels come with scales");
    const int step = together(matrix.kind);
    for (int row = 0; row < count; ++row) {
        const int at = place(first + row), lane = at % PANEL;
        uint8_t* panel = writable(matrix.data) + size_t(at / PANEL) * matrix.panel_bytes();
        for (int k = 0; k < matrix.inputs; ++k) {
            const float x = read(rows, kind, size_t(row) * matrix.inputs + k);
            uint8_t* to = panel + size_t(k / step) * row_bytes(matrix.kind);
            const size_t element = size_t(lane) * step + k % step;
            if (matrix.kind == Kind::f32) reinterpret_cast<float*>(to)[element] = x;
            else reinterpret_cast<uint16_t*>(to)[element] = matrix.kind == Kind::bf16 ? bf16_of_float(x) : half_of_float(x);
        }
    }
}

void Packed::fill_levels(int first, int count, const void* levels, const uint16_t* scales, const uint16_t* zeros) {
    check(first, count, levels);
    need(matrix.kind >= Kind::i8 && scales != nullptr && (zeros != nullptr) == shape.zeros, "levels come with their scales and zeros");
    const int groups = matrix.kind == Kind::i4 ? matrix.padded / matrix.scale_group : 1, half = matrix.scale_group / 2;
    for (int row = 0; row < count; ++row) {
        const int at = place(first + row), lane = at % PANEL;
        uint8_t* panel = writable(matrix.data) + size_t(at / PANEL) * matrix.panel_bytes();
        if (matrix.kind == Kind::i8) {
            const int8_t* from = static_cast<const int8_t*>(levels) + size_t(row) * matrix.inputs;
            // Unsigned, as the dot instruction wants one side: 128 more, which is taken off again in every sum.
            for (int k = 0; k < matrix.padded; ++k)
                panel[size_t(k / 4) * 4 * PANEL + size_t(lane) * 4 + k % 4] = uint8_t((k < matrix.inputs ? from[k] : 0) + 128);
            writable(matrix.scales)[at] = float_of_bf16(scales[row]);
            continue;
        }
        const uint8_t* from = static_cast<const uint8_t*>(levels) + size_t(row) * groups * half;
        for (int k = 0; k < matrix.inputs; ++k) {
            const int of = k % matrix.scale_group;
            const uint8_t both = from[size_t(k / matrix.scale_group) * half + of % half];
            const uint8_t level = of < half ? both & 15 : both >> 4;
            uint8_t& to = panel[size_t(k / 8) * 4 * PANEL + size_t(lane) * 4 + k % 4];
            to = uint8_t(k % 8 < 4 ? (to & 0xf0) | level : (to & 0x0f) | level << 4);
        }
        for (int g = 0; g < groups; ++g) {
            const size_t to = (size_t(at / PANEL) * groups + g) * PANEL + lane;
            writable(matrix.halves)[to] = scales[size_t(row) * groups + g];
            if (zeros != nullptr) writable(matrix.zeros)[to] = zeros[size_t(row) * groups + g];
        }
    }
}

void Packed::set_bias(const float* bias) {
    need(shape.bias && bias != nullptr, "the matrix has no bias");
    for (int row = 0; row < shape.outputs; ++row) writable(matrix.bias)[place(row)] = bias[row];
}

void Packed::set_factor(const float* factor) {
    need(shape.factor && factor != nullptr, "the matrix has no factor");
    memcpy(writable(matrix.factor), factor, size_t(matrix.inputs) * 4);
}

}  // namespace lab
