// What the rungs of the ladder share: one token of a Llama model, in the plainest C++. A rung is one way to multiply a
// matrix with a vector, `product`; nearly all of a step's time goes there.
#pragma once

#include <cmath>
#include <cstddef>

struct LayerWeights {
    const void *qkv, *output, *gate_up, *down;  // [outputs, inputs], in the rung's number format
    const float *attention_norm, *ffn_norm;
};

struct Ladder {
    int layers, width, heads, kv_heads, head_dim, ffn, vocab, capacity, threads;
    float eps;
    const LayerWeights* layer;
    const float *norm, *embedding;  // embedding [vocab, width]
    const void* head;
    const float *cos, *sin;         // [capacity, head_dim / 2]
    float *keys, *values;           // [layers, kv_heads, capacity, head_dim]
    float* scratch;                 // see scratch_floats
};

// y [outputs] = w [outputs, inputs] x [inputs]: what a rung defines.
static void product(const void* w, const float* x, float* y, int outputs, int inputs, int threads);

static void rms_norm(const float* x, const float* weight, float eps, int width, float* to) {
    float squares = 0;
    for (int i = 0; i < width; ++i) squares += x[i] * x[i];
    const float scale = 1 / std::sqrt(squares / width + eps);
    for (int i = 0; i < width; ++i) to[i] = x[i] * scale * weight[i];
}

static void rotate(float* x, int d, const float* cos, const float* sin) {
    for (int i = 0; i < d / 2; ++i) {
        const float a = x[i], b = x[i + d / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + d / 2] = b * cos[i] + a * sin[i];
    }
}

// One head's query over keys and values 0 .. last.
static void attend(const float* query, const float* keys, const float* values, int last, int d, float* scores, float* to) {
    float most = -INFINITY, total = 0;
    for (int j = 0; j <= last; ++j) {
        scores[j] = 0;
        for (int i = 0; i < d; ++i) scores[j] += query[i] * keys[j * d + i];
        scores[j] /= std::sqrt(float(d));
        most = scores[j] > most ? scores[j] : most;
    }
    for (int j = 0; j <= last; ++j) total += scores[j] = std::exp(scores[j] - most);
    for (int i = 0; i < d; ++i) to[i] = 0;
    for (int j = 0; j <= last; ++j)
        for (int i = 0; i < d; ++i) to[i] += scores[j] / total * values[j * d + i];
}

// The token at a position, behind those whose keys and values are there: logits [vocab] of what follows.
extern "C" void ladder_step(const Ladder* model, int token, int position, float* logits) {
    const Ladder& m = *model;
    const int d = m.head_dim, qkv_width = (m.heads + 2 * m.kv_heads) * d, group = m.heads / m.kv_heads;
    float* x = m.scratch;
    float* normed = x + m.width;
    float* qkv = normed + m.width;
    float* mixed = qkv + qkv_width;
    float* gate_up = mixed + m.heads * d;
    float* added = gate_up + 2 * m.ffn;
    float* scores = added + m.width;
    for (int i = 0; i < m.width; ++i) x[i] = m.embedding[size_t(token) * m.width + i];

    for (int number = 0; number < m.layers; ++number) {
        const LayerWeights& layer = m.layer[number];
        rms_norm(x, layer.attention_norm, m.eps, m.width, normed);
        product(layer.qkv, normed, qkv, qkv_width, m.width, m.threads);
        const float *cos = m.cos + size_t(position) * (d / 2), *sin = m.sin + size_t(position) * (d / 2);
        for (int head = 0; head < m.heads + m.kv_heads; ++head) rotate(qkv + head * d, d, cos, sin);
        for (int head = 0; head < m.kv_heads; ++head) {
            const size_t at = ((size_t(number) * m.kv_heads + head) * m.capacity + position) * d;
            for (int i = 0; i < d; ++i) {
                m.keys[at + i] = qkv[(m.heads + head) * d + i];
                m.values[at + i] = qkv[(m.heads + m.kv_heads + head) * d + i];
            }
        }
        for (int head = 0; head < m.heads; ++head) {
            const size_t at = (size_t(number) * m.kv_heads + head / group) * m.capacity * d;
            attend(qkv + head * d, m.keys + at, m.values + at, position, d, scores, mixed + head * d);
        }
        product(layer.output, mixed, added, m.width, m.heads * d, m.threads);
        for (int i = 0; i < m.width; ++i) x[i] += added[i];

        rms_norm(x, layer.ffn_norm, m.eps, m.width, normed);
        product(layer.gate_up, normed, gate_up, 2 * m.ffn, m.width, m.threads);
        for (int i = 0; i < m.ffn; ++i) gate_up[i] = gate_up[i] / (1 + std::exp(-gate_up[i])) * gate_up[m.ffn + i];
        product(layer.down, gate_up, added, m.width, m.ffn, m.threads);
        for (int i = 0; i < m.width; ++i) x[i] += added[i];
    }
    rms_norm(x, m.norm, m.eps, m.width, normed);
    product(m.head, normed, logits, m.vocab, m.width, m.threads);
}
