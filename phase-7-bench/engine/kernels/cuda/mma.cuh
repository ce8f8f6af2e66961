// The tensor cores' product of a warp, D[16, 8] += A[16, 16] B[16, 8], and arithmetic on two numbers in a word.
//
// The layout of the matrices over lanes (PTX ISA, mma.m16n8k16), with g = lane / 4 and t = lane % 4:
//     A  word 0: row g,     columns 2t, 2t + 1     word 1: row g + 8, the same columns
//        word 2: row g,     columns 2t + 8, + 9    word 3: row g + 8, the same columns
//     B  word 0: rows 2t, 2t + 1 of column g       word 1: rows 2t + 8, + 9 of column g
//     D  0, 1: row g, columns 2t, 2t + 1           2, 3: row g + 8, the same columns
// The inputs of a sum can be permuted if A and B use the same permutation. So a lane loads 8 contiguous inputs in one
// access of 16 bytes.
#pragma once

#include "device.cuh"

#ifdef EMULATED

template <class T> inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated::Warp& warp = emulated::warp();
    int lane = emulated::lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) warp.fragments[lane][i] = a[i];
    for (int i = 0; i < 2; i++) warp.fragments[lane][4 + i] = b[i];
    emulated::wait(warp.barrier);
    auto part = [](uint32_t word, int half) { return half ? high_of<T>(word) : low_of<T>(word); };
    for (int i = 0; i < 4; i++) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; k++) {
            uint32_t left = warp.fragments[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            uint32_t right = warp.fragments[column * 4 + k % 8 / 2][4 + k / 8];
            sum += double(part(left, k % 2)) * part(right, k % 2);
        }
        d[i] = float(d[i] + sum);
    }
    emulated::wait(warp.barrier);
}

template <class T> inline uint32_t sub2(uint32_t a, uint32_t b) {
    return pack<T>(low_of<T>(a) - low_of<T>(b), high_of<T>(a) - high_of<T>(b));
}
template <class T> inline uint32_t mul2(uint32_t a, uint32_t b) {
    return pack<T>(low_of<T>(a) * low_of<T>(b), high_of<T>(a) * high_of<T>(b));
}
template <class T> inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return pack<T>(std::fma(low_of<T>(a), low_of<T>(b), low_of<T>(c)), std::fma(high_of<T>(a), high_of<T>(b), high_of<T>(c)));
}
// Byte i of the result is byte (selector >> 4 i) & 7 of the eight in (b, a).
inline uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t both = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}

#else

template <class T> __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, bf16>)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T> struct Two;
template <> struct Two<bf16> {
    using type = __nv_bfloat162;
};
template <> struct Two<f16> {
    using type = __half2;
};
template <class T> __device__ __forceinline__ uint32_t sub2(uint32_t a, uint32_t b) {
    using V = typename Two<T>::type;
    return bits_as<uint32_t>(__hsub2(bits_as<V>(a), bits_as<V>(b)));
}
template <class T> __device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
    using V = typename Two<T>::type;
    return bits_as<uint32_t>(__hmul2(bits_as<V>(a), bits_as<V>(b)));
}
template <class T> __device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    using V = typename Two<T>::type;
    return bits_as<uint32_t>(__hfma2(bits_as<V>(a), bits_as<V>(b), bits_as<V>(c)));
}
__device__ __forceinline__ uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

#endif

// Convert four int8 to two words of two numbers each, exactly. The bits of an integer are the low mantissa bits of a
// power of two whose unit in the last place is 1: 1024 in float16 (with the sign bit flipped), 128 in bfloat16, where
// seven bits fit and a set sign subtracts 128 more.
template <class T> __device__ __forceinline__ void widen_int8(uint32_t four, uint32_t& first, uint32_t& second) {
    if constexpr (std::is_same_v<T, f16>) {
        four ^= 0x80808080u;
        first = sub2<T>(choose_bytes(four, 0x64646464u, 0x4140), 0x64806480u);  // less 1024 + 128
        second = sub2<T>(choose_bytes(four, 0x64646464u, 0x4342), 0x64806480u);
    } else {
        uint32_t low = choose_bytes(four, 0x43434343u, 0x4140), high = choose_bytes(four, 0x43434343u, 0x4342);
        first = sub2<T>(low & 0xff7fff7fu, low & 0xff80ff80u);  // 128 + seven bits, less 128 or 256
        second = sub2<T>(high & 0xff7fff7fu, high & 0xff80ff80u);
    }
}

// Split a number into two of type T that add up to it; float16 needs one, bfloat16 two.
template <class T> __device__ __forceinline__ void split(float x, uint32_t& high, uint32_t& low) {
    T first = from_float<T>(x);
    float left = x - to_float(first);
    high = pack<T>(to_float(first), to_float(first));
    low = pack<T>(left, left);
}
