/* What the loops in C share: vectors, rows of fp32 or bf16, and the random numbers of `rng.py`.

   `native.py` builds and loads them; they make training on a CPU fast. They use GCC's and Clang's vector types.
   Tensors are contiguous, fp32 or bf16 (`bf16` != 0); everything is computed in fp32 (except the products in
   `attention_bf16.c`). The order of every sum is independent of the number of threads.

   Left out on purpose: fp64 and fp16 (the twins take them); intrinsics, except for bf16 products, the conversion to
   bf16 and the halves of 64-bit products, which C has no names for. */

#ifndef COMMON_H
#define COMMON_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16 /* numbers in a vector of AVX-512, and a whole number of vectors on other processors */
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* Rows of an odd number of cache lines: those of a power of two would have their columns in a few of the cache's sets,
   and push each other out of it. */
INLINE int64_t row_of(int64_t width) { return width | LANES; }

/* ---------------------------------------------------------------- rows of fp32 or bf16 */

INLINE float as_float(uint32_t bits) { union { uint32_t u; float f; } both = {.u = bits}; return both.f; }
INLINE uint32_t as_bits(float value) { union { float f; uint32_t u; } both = {.f = value}; return both.u; }

static inline void load(float *to, const void *from, int64_t first, int64_t count, int bf16) {
    if (!bf16) { memcpy(to, (const float *)from + first, 4 * count); return; }
    const uint16_t *halves = (const uint16_t *)from + first;
    for (int64_t i = 0; i < count; i++) to[i] = as_float((uint32_t)halves[i] << 16);
}

/* Rounds to the nearest bf16, ties to even; a NaN stays a NaN. */
static inline void store(void *to, int64_t first, const float *from, int64_t count, int bf16) {
    if (!bf16) { memcpy((float *)to + first, from, 4 * count); return; }
    uint16_t *halves = (uint16_t *)to + first;
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + LANES <= count; i += LANES)
        _mm256_storeu_si256((__m256i *)(halves + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < count; i++) {
        uint32_t bits = as_bits(from[i]);
        halves[i] = from[i] == from[i] ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
    }
}

/* ---------------------------------------------------------------- random numbers: rng.philox, rng.keep_mask */

#define NUMBERS (8 * LANES) /* 16-bit numbers that `LANES` Philox calls give */

typedef struct { uint32_t key_low, key_high, first_row, stream; } seed_t;
typedef struct { seed_t seed; int32_t threshold; float scale; } dropout_t; /* threshold 0: nothing is dropped */

static inline dropout_t read_dropout(const int64_t *seed, int64_t stream, int32_t threshold, float scale) {
    dropout_t none = {{0, 0, 0, 0}, 0, 1.0f};
    if (!threshold) return none;
    uint64_t key = (uint64_t)seed[0];
    return (dropout_t){{(uint32_t)key, (uint32_t)(key >> 32), (uint32_t)seed[1], (uint32_t)stream}, threshold, scale};
}

#ifdef __clang__
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* before 12, GCC knows no other name */
#define ZIP(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
#define ZIP_LOW(a, b) ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

/* Transposes a square of words: rows i and i + 8 are zipped four times, which rotates the index bits (row, column)
   into (column, row). */
INLINE void turn_square(words *rows) {
    words zipped[LANES];
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < LANES / 2; i++) {
            zipped[2 * i] = ZIP_LOW(rows[i], rows[i + LANES / 2]);
            zipped[2 * i + 1] = ZIP_HIGH(rows[i], rows[i + LANES / 2]);
        }
        memcpy(rows, zipped, sizeof zipped);
    }
}

#if defined(__AVX512F__) || defined(__AVX2__)
/* High (returned) and low halves of the 32 x 32 -> 64 bit products a b. `calls` is a word of each of several calls. */
#ifdef __AVX512F__
typedef words calls;
INLINE calls multiply(calls a, uint32_t b, calls *low) {
    __m512i factor = _mm512_set1_epi64(b), even = _mm512_mul_epu32((__m512i)a, factor);
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    *low = (calls)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0x80);
    return (calls)_mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0x31);
}
#else
typedef uint32_t calls __attribute__((vector_size(32)));
INLINE calls multiply(calls a, uint32_t b, calls *low) {
    __m256i factor = _mm256_set1_epi64x(b), even = _mm256_mul_epu32((__m256i)a, factor);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    *low = (calls)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    return (calls)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
#endif

/* The four words of every call, from the calls' numbers. */
INLINE void philox(calls *words_4, calls numbers, seed_t seed, uint32_t row, uint32_t plane) {
    calls c0 = numbers, c1 = numbers * 0 + (row + seed.first_row);
    calls c2 = numbers * 0 + seed.stream, c3 = numbers * 0 + plane;
    uint32_t k0 = seed.key_low, k1 = seed.key_high;
    for (int round = 0; round < 7; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        calls low_a, low_b, high_a = multiply(c0, 0xD2511F53u, &low_a), high_b = multiply(c2, 0xCD9E8D57u, &low_b);
        c0 = high_b ^ c1 ^ k0, c1 = low_b, c2 = high_a ^ c3 ^ k1, c3 = low_a;
    }
    words_4[0] = c0, words_4[1] = c1, words_4[2] = c2, words_4[3] = c3;
}
#endif

/* `NUMBERS` 16-bit random numbers of one row, from column `first` on, in the order of the columns. A call gives four
   words; their low halves come first in memory on every machine that torch runs on. */
#if defined(__AVX512F__)
INLINE void random_numbers(uint16_t *numbers, uint32_t first, seed_t seed, uint32_t row, uint32_t plane) {
    const calls lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    calls c[4];
    philox(c, lane + first / 8, seed, row, plane);
    calls even[2] = {ZIP_LOW(c[0], c[2]), ZIP_HIGH(c[0], c[2])}, odd[2] = {ZIP_LOW(c[1], c[3]), ZIP_HIGH(c[1], c[3])};
    calls all[4] = {ZIP_LOW(even[0], odd[0]), ZIP_HIGH(even[0], odd[0]), ZIP_LOW(even[1], odd[1]),
                    ZIP_HIGH(even[1], odd[1])};
    memcpy(numbers, all, sizeof all);
}
#elif defined(__AVX2__)
/* Even calls come first, because instructions that interleave words do so within each half of a vector: so the four
   words of call 0 end up beside those of call 1. */
INLINE void random_numbers(uint16_t *numbers, uint32_t first, seed_t seed, uint32_t row, uint32_t plane) {
    const calls lane = {0, 2, 4, 6, 1, 3, 5, 7};
    for (uint32_t eight = 0; eight < LANES / 8; eight++) {
        calls c[4];
        philox(c, lane + (first / 8 + 8 * eight), seed, row, plane);
        __m256i front01 = _mm256_unpacklo_epi32((__m256i)c[0], (__m256i)c[1]);
        __m256i front23 = _mm256_unpacklo_epi32((__m256i)c[2], (__m256i)c[3]);
        __m256i back01 = _mm256_unpackhi_epi32((__m256i)c[0], (__m256i)c[1]);
        __m256i back23 = _mm256_unpackhi_epi32((__m256i)c[2], (__m256i)c[3]);
        __m256i all[4] = {_mm256_unpacklo_epi64(front01, front23), _mm256_unpackhi_epi64(front01, front23),
                          _mm256_unpacklo_epi64(back01, back23), _mm256_unpackhi_epi64(back01, back23)};
        memcpy(numbers + 64 * eight, all, sizeof all);
    }
}
#else
/* The same number by number. Compilers make vectors of the processor's width of this, but take wider ones apart. */
INLINE void random_numbers(uint16_t *numbers, uint32_t first, seed_t seed, uint32_t row, uint32_t plane) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES], all[4 * LANES];
    uint32_t k0 = seed.key_low, k1 = seed.key_high;
    for (int i = 0; i < LANES; i++)
        c0[i] = first / 8 + i, c1[i] = row + seed.first_row, c2[i] = seed.stream, c3[i] = plane;
    for (int round = 0; round < 7; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < LANES; i++) {
            uint64_t a = (uint64_t)c0[i] * 0xD2511F53u, b = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(b >> 32) ^ c1[i] ^ k0, c1[i] = (uint32_t)b;
            c2[i] = (uint32_t)(a >> 32) ^ c3[i] ^ k1, c3[i] = (uint32_t)a;
        }
    for (int i = 0; i < LANES; i++) {
        all[4 * i] = c0[i], all[4 * i + 1] = c1[i];
        all[4 * i + 2] = c2[i], all[4 * i + 3] = c3[i];
    }
    memcpy(numbers, all, sizeof all);
}
#endif

/* Dropout's factors for one row, `columns` rounded up to NUMBERS: `scale` where it keeps a value, else 0. */
static inline void keep_row(float *keep, int64_t columns, dropout_t dropout, uint32_t row, uint32_t plane) {
    for (int64_t first = 0; first < columns; first += NUMBERS) {
        uint16_t numbers[NUMBERS];
        if (dropout.threshold) random_numbers(numbers, (uint32_t)first, dropout.seed, row, plane);
        else memset(numbers, 0, sizeof numbers);
        for (int i = 0; i < NUMBERS; i++) keep[first + i] = numbers[i] >= dropout.threshold ? dropout.scale : 0.0f;
    }
}

#endif
