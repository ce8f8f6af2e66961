// What a model is to the kernels: matrices in panels, vectors of float32, and numbers. No arithmetic here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lab {

// Formats of numbers in memory.
enum class Kind : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i4 = 4 };

constexpr int PANEL = 32;      // outputs that lie side by side
constexpr int MAX_BLOCK = 32;  // tokens that go through the layers together; longer inputs go block by block
constexpr int ALIGNMENT = 64;

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// How many consecutive inputs of one output stand together: what one 32-bit lane of a dot instruction takes.
constexpr int together(Kind kind) { return kind == Kind::bf16 ? 2 : kind == Kind::i8 ? 4 : kind == Kind::i4 ? 8 : 1; }

// Bytes of one row of a panel: `together` inputs of 32 outputs.
constexpr int row_bytes(Kind kind) { return kind == Kind::f16 ? 2 * PANEL : 4 * PANEL; }

// A matrix [outputs, inputs] as the dot products read it: panels of 32 outputs; in each, from the first input to the
// last, `together` inputs of output 0, of output 1, ... So a register holds neighbouring outputs, each of which is
// summed up in its own lane from the first input to the last. The order of a sum depends on nothing else.
struct Matrix {
    Kind kind = Kind::f32;
    int outputs = 0;           // as they lie: multiple of PANEL
    int inputs = 0;            // as the model says
    int padded = 0;            // as they lie: multiple of `together`, and of `group`
    int group = 0;             // i8, i4: inputs that are quantised together on the side of the activations
    int scale_group = 0;       // i4: inputs that share a weight scale; multiple of `group`
    bool wide = false;         // activations stay float32, and weights are widened to meet them
    const uint8_t* data = nullptr;
    const float* scales = nullptr;     // i8: [outputs]
    const uint16_t* halves = nullptr;  // i4: scales [panel][input / scale_group][PANEL], bfloat16
    const uint16_t* zeros = nullptr;   // i4: likewise, float16; null: 8
    const int* order = nullptr;        // [inputs]: the activation that each input takes; null: in order
    const float* factor = nullptr;     // [inputs]: what activations are multiplied with then
    const float* bias = nullptr;       // [outputs]

    size_t panel_bytes() const { return size_t(padded / together(kind)) * row_bytes(kind); }
    int panels() const { return outputs / PANEL; }
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
    Matrix qkv, output, up, down;       // up: with a gate, panels of gate and up take turns
    int window = 0;                     // positions that attention reaches back, itself included; 0: all
};

struct Table {  // rows of a table as the checkpoint has them
    const void* data = nullptr;
    Kind kind = Kind::f32;
    int rows = 0;
};

struct Model {
    int layers = 0, width = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;
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
};

// A StaticCache: per layer keys and values [rows, kv_heads, capacity, head_dim].
struct Cache {
    Kind kind = Kind::f32;
    int rows = 0, kv_heads = 0, capacity = 0, head_dim = 0;
    void* const* keys = nullptr;
    void* const* values = nullptr;
    uint16_t* const* key_scales = nullptr;  // i8: [rows, kv_heads, capacity], bfloat16
    uint16_t* const* value_scales = nullptr;

    size_t at(int row, int head, int slot) const { return (size_t(row) * kv_heads + head) * capacity + slot; }
};

// One token of a block.
struct Token {
    int id = 0, position = 0;
    int row = 0, slot = 0;          // where its key and value go
    int held = 0;                   // slots 0 .. held - 1 of the row are seen by it
    const int* line = nullptr;      // and these, in order: its ancestors among the new tokens, and itself
    int line_length = 0;
    int wanted = -1;                // row of the outputs, -1: none of it is read
};

// What one step is to do, and memory for it. All arrays are float32.
struct Block {
    const Model* model = nullptr;
    const Cache* cache = nullptr;
    const Token* tokens = nullptr;
    int count = 0;
    bool embedded = false;      // x is there already
    float* x = nullptr;         // [count, width]
    float* qkv = nullptr;       // [count, qkv.outputs]
    float* mixed = nullptr;     // [count, heads * head_dim]
    float* up = nullptr;        // [count, up.outputs]
    float* inner = nullptr;     // [count, ffn_padded]
    int wanted = 0;             // how many of the tokens
    float* hidden = nullptr;    // [wanted in all blocks, width], or null
    float* logits = nullptr;    // [wanted in all blocks, vocab], or null
    float* tapped = nullptr;    // [wanted in all blocks, taps * width], or null
    const int* taps = nullptr;
    int tap_count = 0;
    float* const* normed = nullptr;   // of every thread: [MAX_BLOCK, widest]
    uint8_t* const* acts = nullptr;   // of every thread: activations as a matrix wants them
    float* const* scores = nullptr;   // of every thread: [queries of a group, capacity + lanes]
    int widest = 0;
    int score_stride = 0;
};

}  // namespace lab
