#include "pack.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "need.h"

#define SIMD_NAME plain_code
#include "simd.h"

namespace lab {

using namespace plain_code;

namespace {

constexpr size_t LARGE = size_t(1) << 21;

size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

Matrix dimensions(const Shape& shape) {
    constexpr int MOST = 1 << 26;
    need(shape.outputs > 0 && shape.outputs <= MOST && shape.inputs > 0 && shape.inputs <= MOST, "a matrix has at least one row and one column");
    need(!shape.pair || shape.outputs % 2 == 0, "a pair of matrices has an even number of rows");
    if (shape.kind == Kind::i4) {
        const int group = shape.scale_group;
        need(group > 0 && group % 32 == 0 && (group <= MAX_GROUP || group % MAX_GROUP == 0), "a group has 32 inputs, or a multiple of 64");
        need(shape.inputs % group == 0, "groups do not divide the inputs");
    }
    Matrix m;
    m.kind = shape.kind;
    m.outputs = shape.pair ? 2 * round_up(shape.outputs / 2, PANEL) : round_up(shape.outputs, PANEL);
    m.inputs = shape.inputs;
    m.wide = shape.wide;
    m.group = m.scale_group = 1;
    if (shape.kind == Kind::i8) m.group = MAX_GROUP;
    if (shape.kind == Kind::i4) {
        m.scale_group = shape.scale_group;
        m.group = shape.scale_group < MAX_GROUP ? shape.scale_group : MAX_GROUP;
    }
    const int step = m.group > 1 ? m.group : together(shape.kind);
    m.padded = round_up(shape.inputs, step);
    return m;
}

size_t scale_count(const Matrix& m) { return size_t(m.outputs) * (m.kind == Kind::i4 ? m.padded / m.scale_group : 1); }

constexpr int size_of(Kind kind) { return kind == Kind::f32 ? 4 : 2; }

float read(const void* from, Kind kind, size_t at) {
    if (kind == Kind::f32) return static_cast<const float*>(from)[at];
    const uint16_t bits = static_cast<const uint16_t*>(from)[at];
    return kind == Kind::bf16 ? float_of_bf16(bits) : float_of_half(bits);
}

#if defined(__clang__)
#define LAB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LAB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Four{__VA_ARGS__})
#endif

constexpr int WORDS = 32;  // of a row that are copied at a time

// to[w * PANEL + i] = lines[i][w], four by four.
void transpose(const uint32_t (&lines)[PANEL][WORDS], int words, uint32_t* to) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    for (int w = 0; w < words; w += 4) {
        for (int i = 0; i < PANEL; i += 4) {
            Four a, b, c, d;
            memcpy(&a, &lines[i][w], 16);
            memcpy(&b, &lines[i + 1][w], 16);
            memcpy(&c, &lines[i + 2][w], 16);
            memcpy(&d, &lines[i + 3][w], 16);
            const Four ab = LAB_SHUFFLE(a, b, 0, 4, 1, 5), cd = LAB_SHUFFLE(c, d, 0, 4, 1, 5);
            const Four AB = LAB_SHUFFLE(a, b, 2, 6, 3, 7), CD = LAB_SHUFFLE(c, d, 2, 6, 3, 7);
            const Four rows[4] = {
                LAB_SHUFFLE(ab, cd, 0, 1, 4, 5), LAB_SHUFFLE(ab, cd, 2, 3, 6, 7),
                LAB_SHUFFLE(AB, CD, 0, 1, 4, 5), LAB_SHUFFLE(AB, CD, 2, 3, 6, 7),
            };
            for (int n = 0; n < 4 && w + n < words; ++n) memcpy(to + size_t(w + n) * PANEL + i, &rows[n], 16);
        }
    }
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
    if (bytes >= LARGE) madvise(all, mapped_, MADV_HUGEPAGE);  // a hint: huge pages may not be available
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

int Packed::index_of(int row) const {
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
    const size_t row_size = size_t(matrix.inputs) * size_of(kind);
    if (matrix.kind == Kind::f16) {  // two bytes per input: not a multiple of words
        for (int row = 0; row < count; ++row) {
            const int at = index_of(first + row);
            auto* to = reinterpret_cast<uint16_t*>(panel_of(at)) + at % PANEL;
            for (int k = 0; k < matrix.inputs; ++k) {
                const size_t from = size_t(row) * matrix.inputs + k;
                to[size_t(k) * PANEL] = kind == Kind::f16 ? static_cast<const uint16_t*>(rows)[from] : half_of_float(read(rows, kind, from));
            }
        }
        return;
    }
    fill_words(first, count, [&](int row, int begin, int words, uint32_t* to) {
        const auto* from = static_cast<const uint8_t*>(rows) + size_t(row) * row_size;
        const int step = together(matrix.kind), k = begin * step, inputs = words * step;
        const int there = k + inputs <= matrix.inputs ? inputs : matrix.inputs - k;
        if (there < inputs) memset(to, 0, size_t(words) * 4);
        if (kind == matrix.kind) {
            memcpy(to, from + size_t(k) * size_of(kind), size_t(there) * size_of(kind));
        } else if (matrix.kind == Kind::f32) {
            for (int i = 0; i < there; ++i) reinterpret_cast<float*>(to)[i] = read(from, kind, size_t(k + i));
        } else {
            for (int i = 0; i < there; ++i) reinterpret_cast<uint16_t*>(to)[i] = bf16_of_float(read(from, kind, size_t(k + i)));
        }
    });
}

void Packed::fill_levels(int first, int count, const void* levels, const uint16_t* scales, const uint16_t* zeros) {
    check(first, count, levels);
    need(matrix.kind >= Kind::i8 && scales != nullptr && (zeros != nullptr) == shape.zeros, "levels come with their scales and zeros");
    const int groups = matrix.kind == Kind::i4 ? matrix.padded / matrix.scale_group : 1, half = matrix.scale_group / 2;
    fill_words(first, count, [&](int row, int begin, int words, uint32_t* to) {
        if (matrix.kind == Kind::i8) {
            // The dot instruction needs one unsigned operand: add 128 here, and subtract it again in every sum.
            const auto* from = static_cast<const uint8_t*>(levels) + size_t(row) * matrix.inputs;
            const int k = begin * 4, there = k + words * 4 <= matrix.inputs ? words * 4 : matrix.inputs - k;
            if (there < words * 4) memset(to, 0, size_t(words) * 4);
            if (there > 0) memcpy(to, from + k, size_t(there));
            for (int w = 0; w < words; ++w) to[w] ^= 0x80808080u;
            return;
        }
        // Of eight inputs, 0 .. 3 are the low nibbles of the word's bytes and 4 .. 7 the high nibbles.
        const auto* from = static_cast<const uint8_t*>(levels) + size_t(row) * groups * half;
        for (int w = 0; w < words; ++w) {
            const int k = (begin + w) * 8, of = k % matrix.scale_group;
            const uint8_t* both = from + size_t(k / matrix.scale_group) * half + of % half;
            uint32_t low, high;
            memcpy(&low, both, 4);
            memcpy(&high, both + 4, 4);
            to[w] = of < half ? (low & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4 : (low >> 4 & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u);
        }
    });
    for (int row = 0; row < count; ++row) {
        const int at = index_of(first + row), lane = at % PANEL;
        if (matrix.kind == Kind::i8) writable(matrix.scales)[at] = float_of_bf16(scales[row]);
        else
            for (int g = 0; g < groups; ++g) {
                const size_t to = (size_t(at / PANEL) * groups + g) * PANEL + lane;
                writable(matrix.halves)[to] = scales[size_t(row) * groups + g];
                if (zeros != nullptr) writable(matrix.zeros)[to] = zeros[size_t(row) * groups + g];
            }
    }
}

uint8_t* Packed::panel_of(int at) { return writable(matrix.data) + size_t(at / PANEL) * matrix.panel_bytes(); }

// Adjacent rows of a panel are transposed together, some words at a time: words are read along the rows and written
// across them, a whole cache line at once.
template <class Read>
void Packed::fill_words(int first, int count, Read read_words) {
    uint32_t lines[PANEL][WORDS];
    const int words = matrix.padded / together(matrix.kind);
    for (int row = 0; row < count;) {
        const int at = index_of(first + row), lane = at % PANEL;
        int lanes = 1;
        while (row + lanes < count && lane + lanes < PANEL && index_of(first + row + lanes) == at + lanes) ++lanes;
        auto* panel = reinterpret_cast<uint32_t*>(panel_of(at)) + lane;
        for (int begin = 0; begin < words; begin += WORDS) {
            const int some = words - begin < WORDS ? words - begin : WORDS;
            for (int i = 0; i < lanes; ++i) read_words(row + i, begin, some, lines[i]);
            if (lanes == PANEL) transpose(lines, some, panel + size_t(begin) * PANEL);
            else
                for (int w = 0; w < some; ++w)
                    for (int i = 0; i < lanes; ++i) panel[size_t(begin + w) * PANEL + i] = lines[i][w];
        }
        row += lanes;
    }
}

void Packed::set_bias(const float* bias) {
    need(shape.bias && bias != nullptr, "the matrix has no bias");
    for (int row = 0; row < shape.outputs; ++row) writable(matrix.bias)[index_of(row)] = bias[row];
}

void Packed::set_factor(const float* factor) {
    need(shape.factor && factor != nullptr, "the matrix has no factor");
    memcpy(writable(matrix.factor), factor, size_t(matrix.inputs) * 4);
}

void Packed::set_order(std::vector<int> order) {
    need(order_.empty(), "the matrix has an order already");
    need(order.size() == size_t(matrix.inputs), "an order has a number for every input");
    for (int from : order) need(from >= 0 && from < matrix.inputs, "an order names an input that is not there");
    order_ = std::move(order);
    matrix.order = order_.data();
}

}  // namespace lab
