// The data structures of a model: matrices in panels, float32 vectors, and sizes. No arithmetic here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lab {

// Number formats in memory.
enum class Kind : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i4 = 4 };

constexpr int PANEL = 32;      // outputs that are interleaved
constexpr int MAX_BLOCK = 64;  // tokens per forward pass; longer inputs are split into blocks
constexpr int MAX_GROUP = 64;  // int8 and int4: the most activations that share a scale
constexpr int SCORE_ROWS = 8;  // queries that attention takes together: more only if they share a token
constexpr int ALIGNMENT = 64;

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// How many consecutive inputs of one output are contiguous: the width of a 32-bit lane of a dot instruction.
constexpr int together(Kind kind) { return kind == Kind::bf16 ? 2 : kind == Kind::i8 ? 4 : kind == Kind::i4 ? 8 : 1; }

// Bytes of one row of a panel: `together` inputs of 32 outputs.
constexpr int row_bytes(Kind kind) { return kind == Kind::f16 ? 2 * PANEL : 4 * PANEL; }

// A matrix [outputs, inputs] in the layout of the dot products: panels of 32 outputs. A panel stores, from the first
// input to the last, `together` inputs of output 0, of output 1, ... A register holds adjacent outputs, and each lane
// sums one output from the first input to the last. So the order of a sum is always the same.
struct Matrix {
    Kind kind = Kind::f32;
    int outputs = 0;           // as stored: multiple of PANEL
    int inputs = 0;            // of the model
    int padded = 0;            // as stored: multiple of `together` and of `group`
    int group = 0;             // i8, i4: activations that share a scale
    int scale_group = 0;       // i4: inputs that share a weight scale; multiple of `group`
    bool wide = false;         // activations stay float32, and weights are converted to float32
    const uint8_t* data = nullptr;
    const float* scales = nullptr;     // i8: [outputs]
    const uint16_t* halves = nullptr;  // i4: scales [panel][input / scale_group][PANEL], bfloat16
    const uint16_t* zeros = nullptr;   // i4: likewise, float16; null: 8
    const int* order = nullptr;        // [inputs]: the index of each input's activation; null: identity
    const float* factor = nullptr;     // [inputs]: factors of the activations
    const float* bias = nullptr;       // [outputs]

    size_t panel_bytes() const { return size_t(padded / together(kind)) * row_bytes(kind); }
    int panels() const { return outputs / PANEL; }
    const uint8_t* row(int panel, int number) const { return data + panel * panel_bytes() + size_t(number) * row_bytes(kind); }
};

struct Norm {
    const float* weight = nullptr;
    const float* bias = nullptr;
    float eps = 0;
    bool rms = true;
};

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2, relu = 3 };

struct Layer {
    Norm attention_norm, ffn_norm;
    const float* query_norm = nullptr;  // [head_dim]
    const float* key_norm = nullptr;
    Matrix qkv, output, up, down;       // up: with a gate, panels of gate and up alternate
    int window = 0;                     // visible positions, the query's own included; 0: all
};

struct Table {  // a table in the layout of the checkpoint
    const void* data = nullptr;
    Kind kind = Kind::f32;
    int rows = 0;
};

// A model that several processes share. Each has some heads, some inner features, and some rows of the embedding and of
// the output matrix. By outputs, every other matrix is split too, and each process reads all of its inputs. Otherwise
// `output` and `down` are split by inputs, and the processes add up partial sums (Shoeybi et al. 2019, Megatron-LM).
struct Split {
    int rank = 0, ranks = 1;
    bool by_outputs = true;
    int vocab = 0;  // rows of the embedding and of the output matrix in each process; the last may have fewer
};

struct Model {
    int layers = 0, width = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;  // heads, ffn: of this process
    Split split;
    int position_offset = 0;
    bool gated = true, rope = true;
    Activation activation = Activation::silu;
    float norm_eps = 1e-6f;
    Table embedding, positions;
    const float* cos = nullptr;  // [rotations, head_dim / 2]
    const float* sin = nullptr;
    int rotations = 0;
    const Layer* layer = nullptr;
    Norm norm;
    Matrix head;

    int qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
    int ffn_padded() const { return round_up(ffn, PANEL); }
    // What `output` and `down` read and write.
    int readers() const { return split.by_outputs ? split.ranks : 1; }
    int mixed() const { return heads * head_dim * readers(); }
    int inner() const { return ffn * readers(); }
    int columns() const { return width / readers(); }
};

// A KV cache: per layer keys and values [pages, kv_heads, slots, head_dim]. A row of the cache is a list of pages, its
// block table: position p is in slot p % slots of page p / slots. A static cache has one page per row. A ring has one
// page per row too, and every position is in it.
struct Cache {
    Kind kind = Kind::f32;
    int pages = 0, kv_heads = 0, slots = 0, head_dim = 0;
    bool ring = false;
    void* const* keys = nullptr;
    void* const* values = nullptr;
    uint16_t* const* key_scales = nullptr;  // i8: [pages, kv_heads, slots], bfloat16
    uint16_t* const* value_scales = nullptr;

    // The index of a position's entry of head 0. The entry of head h is `h * slots` further.
    int entry(const int* pages_of_row, int position) const {
        const int page = ring ? pages_of_row[0] : pages_of_row[position / slots];
        return page * kv_heads * slots + position % slots;
    }
};

// One token of a block.
struct Token {
    int id = 0, position = 0;
    const Cache* cache = nullptr;
    int entry = 0;                  // where its key and value are written: see Cache
    const int* entries = nullptr;   // of the row's positions from `from` on
    int from = 0;
    int held = 0;                   // it sees the positions 0 .. held - 1 of the row
    const int* line = nullptr;      // and these entries, in order: its ancestors among the new tokens, and itself
    int line_length = 0;
    int wanted = -1;                // row of the outputs; -1: no output
};

// How processes exchange numbers. Each calls in the same order; the call returns when all have.
enum class How : int {
    gather = 0,  // count numbers of each process -> ranks * count, in the order of the ranks
    sum = 1,     // the sum, in place
    owned = 2,   // the sum of bit patterns, in place: one process has numbers, the others zeros
};
using Exchange = void (*)(void* with, How how, float* mine, float* all, size_t count);

// The inputs, outputs and scratch memory of one block. All arrays are float32.
struct Block {
    const Model* model = nullptr;
    const Token* tokens = nullptr;
    int count = 0;
    bool embedded = false;      // x already holds the embeddings
    float* x = nullptr;         // [count, width]
    float* qkv = nullptr;       // [count, qkv.outputs]
    float* mixed = nullptr;     // [count, heads * head_dim]
    float* up = nullptr;        // [count, up.outputs]
    float* inner = nullptr;     // [count, ffn_padded]
    int wanted = 0;             // number of tokens with outputs
    float* hidden = nullptr;    // [wanted in all blocks, width], or null
    float* logits = nullptr;    // [wanted in all blocks, vocab], or null
    float* tapped = nullptr;    // [wanted in all blocks, taps * width], or null
    const int* taps = nullptr;
    int tap_count = 0;
    float* const* normed = nullptr;   // per thread: [MAX_BLOCK, widest]
    uint8_t* const* acts = nullptr;   // per thread: activations in the format of a matrix
    float* const* scores = nullptr;   // per thread: [SCORE_ROWS or queries of a group, visible keys + lanes]
    int widest = 0;
    int score_stride = 0;
    Exchange exchange = nullptr;  // null: one process
    void* with = nullptr;         // its first argument
    // Of this process alone, with several; else the same as the arrays of all.
    float* my_mixed = nullptr;    // [count, heads * head_dim]
    float* my_inner = nullptr;    // [count, ffn_padded]
    float* my_logits = nullptr;   // [count, split.vocab]
    float* partial = nullptr;     // [count, width]
    float* sent = nullptr;        // what is exchanged, without gaps
    float* received = nullptr;
};

}  // namespace lab
