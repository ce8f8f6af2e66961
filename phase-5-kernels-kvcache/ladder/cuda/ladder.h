// The rungs: the same two ops, from the first idea to one that keeps the memory bus busy. Everything is bfloat16.
//
// linear: out[N] = w[N, K] x[K] + bias[N]. attention: one query [H, D] over the first n tokens of keys and values
// [HK, slots, D] -> out [H, D], H a multiple of HK, D 64 or 128. `scratch` float32 [H, n] holds what a rung must write
// down in between; that of the last rung float32 [H, parts, D + 2].
#pragma once

#include <cstdint>

struct LinearRung {
    int64_t x, w, bias, out;
    int N, K;
};

struct AttentionRung {
    int64_t query, keys, values, out, scratch;
    int H, HK, D, n;
    int64_t slots;
};

void linear_1(const LinearRung& call, int64_t stream);
void linear_2(const LinearRung& call, int64_t stream);
void linear_3(const LinearRung& call, int64_t stream);
void linear_4(const LinearRung& call, int64_t stream);
void linear_5(const LinearRung& call, int64_t stream);
void attention_1(const AttentionRung& call, int64_t stream);
void attention_2(const AttentionRung& call, int64_t stream);
void attention_3(const AttentionRung& call, int64_t stream);
void attention_4(const AttentionRung& call, int64_t stream);
void attention_5(const AttentionRung& call, int64_t stream);
