// Philox 4x32-10 (Salmon et al. 2011), Gumbel noise and softmax, LANES at a time. Included by one file per instruction
// set. The random words are those of common/philox.py, bit for bit; logarithms may differ in the last place.

namespace lab::SIMD_NAME {

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));

// The low and high halves of 64-bit products, per lane.
LAB_INLINE void products(Words a, uint32_t by, Words& low, Words& high) {
    const Longs lanes = (Longs)a;
    const Longs even = (lanes & 0xffffffffull) * uint64_t(by), odd = (lanes >> 32) * uint64_t(by);
    low = (Words)((even & 0xffffffffull) | (odd << 32));
    high = (Words)((even >> 32) | (odd & 0xffffffff00000000ull));
}

// The four words of LANES blocks, whose first counter words are `block`.
LAB_INLINE void philox(Words block, const uint32_t counter[3], const uint32_t key[2], Words (&words)[4]) {
    Words a = block, b = counter[0] - Words{}, c = counter[1] - Words{}, d = counter[2] - Words{};
    uint32_t first = key[0], second = key[1];
    for (int round = 0; round < 10; ++round) {
        Words low_a, high_a, low_c, high_c;
        products(a, 0xD2511F53u, low_a, high_a);
        products(c, 0xCD9E8D57u, low_c, high_c);
        a = high_c ^ b ^ first;
        b = low_c;
        c = high_a ^ d ^ second;
        d = low_a;
        first += 0x9E3779B9u;
        second += 0xBB67AE85u;
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

// Natural logarithm of normal positive numbers, to about one unit in the last place (Cephes' logf).
LAB_INLINE Floats logarithm(Floats x) {
    const Ints bits = (Ints)x;
    Ints exponent = (bits >> 23) - 126;
    Floats m = (Floats)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    const Ints small = m < all(0.70710678f);
    exponent += small;  // a true lane is -1
    m = m + (Floats)(small & (Ints)m) - 1.0f;
    const Floats e = to_floats(exponent), z = m * m;
    Floats y = all(7.0376836292e-2f);
    y = fma(y, m, all(-1.1514610310e-1f));
    y = fma(y, m, all(1.1676998740e-1f));
    y = fma(y, m, all(-1.2420140846e-1f));
    y = fma(y, m, all(1.4249322787e-1f));
    y = fma(y, m, all(-1.6668057665e-1f));
    y = fma(y, m, all(2.0000714765e-1f));
    y = fma(y, m, all(-2.4999993993e-1f));
    y = fma(y, m, all(3.3333331174e-1f));
    y = y * m * z;
    y = fma(e, all(-2.12194440e-4f), y);
    y = fma(z, all(-0.5f), y);
    return fma(e, all(0.693359375f), m + y);
}

LAB_INLINE Floats gumbel_of(Words words) {
    const Floats uniform = (to_floats((Ints)(words >> 9)) + 0.5f) * 1.1920928955078125e-7f;  // 2^-23
    return -logarithm(-logarithm(uniform));
}

// Argmax of scale * x[i] + noise[i] over begin .. end - 1; ties: the lowest index.
static int gumbel_largest(
    const float* x, int begin, int end, float scale, const uint32_t key[2], const uint32_t counter[3], float* best_value
) {
    float best = -__builtin_inff();
    int at = begin;
    Words block;
    for (int i = 0; i < LANES; ++i) block[i] = uint32_t(i);
    for (int from = begin; from < end; from += 4 * LANES) {
        Words words[4];
        philox(block + uint32_t(from / 4), counter, key, words);
        // Word i belongs to token from + 4 * lane + i: transpose through memory.
        float noise[4][LANES];
        for (int i = 0; i < 4; ++i) store(noise[i], gumbel_of(words[i]));
        float value[4 * LANES];
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 0; i < 4; ++i) value[4 * lane + i] = noise[i][lane];
        const int here = end - from < 4 * LANES ? end - from : 4 * LANES;
        if (here < 4 * LANES) {
            for (int i = 0; i < here; ++i) value[i] += scale * x[from + i];
            for (int i = 0; i < here; ++i)
                if (value[i] > best) best = value[i], at = from + i;
            continue;
        }
        Floats most = all(-__builtin_inff());
        for (int i = 0; i < 4; ++i) {
            const Floats y = load(value + i * LANES) + load(x + from + i * LANES) * scale;
            store(value + i * LANES, y);
            most = larger(most, y);
        }
        if (largest(most) > best)
            for (int i = 0; i < 4 * LANES; ++i)
                if (value[i] > best) best = value[i], at = from + i;
    }
    *best_value = best;
    return at;
}

static int first_largest(const float* x, int count) {
    Floats most = all(-__builtin_inff());
    int i = 0;
    for (; i + LANES <= count; i += LANES) most = larger(most, load(x + i));
    float best = largest(most);
    for (; i < count; ++i) best = x[i] > best ? x[i] : best;
    for (i = 0; i + LANES <= count; i += LANES) {
        const Ints found = load(x + i) == all(best);
        int any = 0;
        for (int lane = 0; lane < LANES; ++lane) any |= found[lane];
        if (any) break;
    }
    for (; i < count; ++i)
        if (x[i] == best) return i;
    return 0;
}

static double exponentials(float* x, int count, float most) {
    Floats total{};
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats y = load(x + i);
        const Floats e = y == all(-__builtin_inff()) ? Floats{} : exponential(y - most);
        store(x + i, e);
        total = total + e;
    }
    float rest = 0;
    for (; i < count; ++i) {
        float lane[LANES];
        store(lane, exponential(all(x[i] - most)));
        x[i] = x[i] == -__builtin_inff() ? 0.0f : lane[0];
        rest += x[i];
    }
    return double(sum(total)) + double(rest);
}

}  // namespace lab::SIMD_NAME
