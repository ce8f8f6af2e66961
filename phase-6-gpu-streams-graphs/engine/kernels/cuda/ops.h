// The functions that bindings.cpp exports. Addresses and the stream are int64; formats as in device.cuh. The Python
// wrappers check the arguments; nothing is checked here.
#pragma once

#include <cstdint>
#include <vector>

void rms_norm(int format, int64_t x, int64_t residual, int64_t weight, int64_t out, int64_t total, int64_t rows, int D,
              int64_t x_stride, int64_t r_stride, float eps, int64_t stream);

void rope(int format, int64_t x, int64_t cos, int64_t sin, int64_t out, int R, int T, int H, int D, int64_t s_row,
          int64_t s_token, int64_t s_head, int64_t t_row, int64_t t_token, int64_t stream);

// strides: query, key, value (row, token, head each), tables (row, token), cache (page, head, slot: in heads of D)
void rope_append(int format, int stored, int64_t query, int64_t key, int64_t value, int64_t cos, int64_t sin, int64_t out,
                 int64_t keys, int64_t values, int64_t key_scales, int64_t value_scales, int64_t rows, int64_t starts,
                 int64_t counts, int64_t tables, int width, int shift, int64_t wrap, const std::vector<int64_t>& strides, int R,
                 int T, int H, int HK, int D, bool rotate, int64_t stream);

// A matrix as quantize.py stores it; bits: 16 or 32 in x's format, 8, 4. The address of a missing tensor is 0.
struct Matrix {
    int bits, group;
    int64_t values, scales, zeros, factor, bias;
    int bias_format;
    int64_t N, K;  // outputs, inputs
};

// out[M, N] = x[M, K] times the matrix; gated: [M, N / 2]. `sums` float32 [parts, M, columns] if parts > 1.
void linear(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int parts, int64_t sums,
            int64_t out, int64_t stream);
void linear_rows(int format, int64_t x, int64_t x_stride, int M, const Matrix& matrix, bool gated, int64_t out,
                 int64_t stream);

// One call of attention: a layer of the cache, the visible range of each query (lo, end [R, W]; for trees also base [R]
// and lines [R, W, L], else 0), the queries [R, W, H, D]. s_page, s_head, s_slot are in heads of D features, the q_ in
// elements.
struct Attention {
    int format, stored;
    int64_t query, keys, values, key_scales, value_scales, rows, tables, lo, end, base, lines, out;
    int R, W, H, HK, D, width, shift, line_width;
    int64_t wrap, s_page, s_head, s_slot, q_row, q_token, q_head;
};

// mixed float32 [R, W, H, parts, D], tops and sums [R, W, H, parts]: the partial results of parts of `part` positions.
void decode_attention(const Attention& call, int part, int parts, int64_t mixed, int64_t tops, int64_t sums,
                      int64_t stream);
void flash_prefill(const Attention& call, int64_t stream);

// `found`: 8 bytes for every row and each of choice_parts(V)
int choice_parts(int64_t V);
void choices(int format, int64_t scores, int64_t stride, int64_t rows, int64_t V, int64_t found, int64_t out,
             int64_t stream);
void prefix(int64_t draft, int64_t choices, int64_t widths, int64_t accepted, int64_t following, int R, int K,
            int64_t stream);
// keys int64 [R, 2]: seed and sample; positions int64 [R]
void verify_sample(int64_t tokens, int64_t draft, int64_t target, int64_t widths, int64_t keys, int64_t positions,
                   int64_t accepted, int64_t following, int64_t ratios, int R, int K, int64_t V, bool certain, int64_t stream);
// params float64 [R, 4]: temperature, top_k, top_p, min_p
void sample(int format, int64_t logits, int64_t stride, int64_t keys, int64_t positions, int64_t out, int64_t out_stride,
            int R, int64_t V, int64_t params, int64_t stream);
// Of N rows, `each` for a sequence; out float32 [N, V], out_stride between its rows
void probabilities(int format, int64_t logits, int64_t stride, int64_t out, int64_t out_stride, int N, int64_t V,
                   int64_t params, int each, int64_t stream);
void draw(int64_t probs, int64_t stride, int64_t keys, int64_t positions, int64_t out, int64_t out_stride, int N, int64_t V,
          int each, int first, int purpose, int64_t stream);

// tokens int32 [R, T], draft int64 [R, K], out [R, T, D]
void embed(int format, int64_t tokens, int64_t draft, int64_t table, int64_t out, int R, int T, int K, int D,
           int64_t stream);
// int32: at and after [3, R], counts [R], windows [N], positions and end [R, W], lo [N, R, W]
void advance(int64_t at, int64_t counts, int64_t windows, int64_t after, int64_t positions, int64_t end, int64_t lo, int R,
             int W, int N, int64_t stream);
