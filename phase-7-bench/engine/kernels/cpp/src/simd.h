// Vectors of float32, as wide as the instruction set that this file is compiled for. Arithmetic uses the compilers'
// vector types, and intrinsics only where these have no operation. Each instruction set has its own namespace, so that
// the linker never mixes their functions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lab::SIMD_NAME {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

#define LAB_INLINE static inline __attribute__((always_inline))

template <class T>
LAB_INLINE T load_as(const void* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}

LAB_INLINE float float_of_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    return load_as<float>(&bits);
}

LAB_INLINE uint16_t bf16_of_float(float x) {
    const uint32_t bits = load_as<uint32_t>(&x);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

LAB_INLINE float float_of_half(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = (x >> 10) & 31, fraction = x & 1023;
    uint32_t bits;
    if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
    else if (exponent != 0) bits = sign | (exponent + 112) << 23 | fraction << 13;
    else {  // subnormal: fraction * 2^-24, exact
        const float tiny = float(fraction) * 5.9604644775390625e-8f;
        return sign ? -tiny : tiny;
    }
    return load_as<float>(&bits);
}

LAB_INLINE uint16_t half_of_float(float x) {
    const uint32_t bits = load_as<uint32_t>(&x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (magnitude < 0x38800000) {  // subnormal in half: adding 0.5 rounds to a multiple of 2^-24
        const float shifted = load_as<float>(&magnitude) + 0.5f;
        return uint16_t(sign | (load_as<uint32_t>(&shifted) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

LAB_INLINE Floats all(float x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Floats)_mm256_set1_ps(x);
#else
    return Floats{x, x, x, x};
#endif
}

LAB_INLINE Ints all(int32_t x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
    return (Ints)_mm256_set1_epi32(x);
#else
    return Ints{x, x, x, x};
#endif
}

LAB_INLINE Floats fma(Floats a, Floats b, Floats c) {  // a * b + c
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

LAB_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
LAB_INLINE Floats absolute(Floats a) { return (Floats)((Ints)a & 0x7fffffff); }
LAB_INLINE Floats to_floats(Ints a) { return __builtin_convertvector(a, Floats); }

LAB_INLINE Floats load(const float* from) { return load_as<Floats>(from); }
LAB_INLINE void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }

LAB_INLINE Floats load(const uint16_t* from, Kind kind) {  // float16 or bfloat16
    if (kind == Kind::bf16) return (Floats)(__builtin_convertvector(load_as<Shorts>(from), Ints) << 16);
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    return Floats{float_of_half(from[0]), float_of_half(from[1]), float_of_half(from[2]), float_of_half(from[3])};
#endif
}

// Load LANES numbers of any format: `count` from memory, the others are 0.
template <Kind KIND>
LAB_INLINE Floats load_any(const void* from, int count = LANES) {
    constexpr int SIZE = KIND == Kind::f32 ? 4 : KIND == Kind::i8 ? 1 : 2;
    alignas(64) uint8_t copy[SIZE * LANES];
    if (count < LANES) {
        memset(copy, 0, sizeof copy);
        memcpy(copy, from, size_t(count) * SIZE);
        from = copy;
    }
    if constexpr (KIND == Kind::f32) return load((const float*)from);
    else if constexpr (KIND == Kind::i8) return to_floats(__builtin_convertvector(load_as<Bytes>(from), Ints));
    else return load((const uint16_t*)from, KIND);
}

LAB_INLINE float sum(Floats x) {  // always in the same order
    float lane[LANES];
    memcpy(lane, &x, sizeof x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

LAB_INLINE float largest(Floats x) {
    float lane[LANES];
    memcpy(lane, &x, sizeof x);
    for (int i = 1; i < LANES; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
    return lane[0];
}

// Lane i of the result is the sum over the lanes of x[i].
LAB_INLINE Floats sums(const Floats (&x)[LANES]) {
#if defined(__AVX512F__)
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 a = (__m512)x[4 * i], b = (__m512)x[4 * i + 1], c = (__m512)x[4 * i + 2], d = (__m512)x[4 * i + 3];
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        four[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    auto fold = [](__m512 a, __m512 b) __attribute__((always_inline)) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return (Floats)fold(fold(four[0], four[1]), fold(four[2], four[3]));
#elif defined(__AVX2__)
    __m256 four[2];
    for (int i = 0; i < 2; ++i) {
        const __m256 ab = _mm256_hadd_ps((__m256)x[4 * i], (__m256)x[4 * i + 1]);
        const __m256 cd = _mm256_hadd_ps((__m256)x[4 * i + 2], (__m256)x[4 * i + 3]);
        four[i] = _mm256_hadd_ps(ab, cd);
    }
    const __m256 low = _mm256_permute2f128_ps(four[0], four[1], 0x20);
    const __m256 high = _mm256_permute2f128_ps(four[0], four[1], 0x31);
    return (Floats)_mm256_add_ps(low, high);
#else
    return Floats{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])};
#endif
}

// e^x, to about one unit in the last place: 2^n * e^r with |r| <= ln 2 / 2, and a polynomial for e^r (Cephes' expf).
LAB_INLINE Floats exponential(Floats x) {
    const Floats low = all(-87.336f), high = all(88.3f), given = x;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats n = fma(x, all(1.44269504088896341f), shift) - shift;
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats y = all(1.9875691500e-4f);
    y = fma(y, r, all(1.3981999507e-3f));
    y = fma(y, r, all(8.3334519073e-3f));
    y = fma(y, r, all(4.1665795894e-2f));
    y = fma(y, r, all(1.6666665459e-1f));
    y = fma(y, r, all(5.0000001201e-1f));
    y = fma(y, r * r, r) + 1.0f;
    y = (Floats)((Ints)y + (__builtin_convertvector(n, Ints) << 23));
    return given < low ? Floats{} : y;  // subnormal results are 0, as in torch
}

}  // namespace lab::SIMD_NAME
