/* Arithmetic in vectors of the processor's width: fp32 products of matrices that the cache holds, and exponentials. */

#ifndef VECTORS_H
#define VECTORS_H

#include "common.h"

/* ---------------------------------------------------------------- vectors */

/* Floats in one of the processor's vectors, and vectors of a row of C: four rows of C, a row of B and a number of A
   fit the registers. GCC keeps anything wider, or more, in memory. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4
#elif defined(__FMA__)
#define VECTORS 3
#else
#define VECTORS 2
#endif
typedef float floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t flags __attribute__((vector_size(4 * WIDTH), aligned(4))); /* -1: yes, 0: no */
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* The larger number of every lane; a NaN in `a` is left out. */
INLINE floats larger(floats a, floats b) {
    flags above = a > b;
    return (floats)(((flags)a & above) | ((flags)b & ~above));
}

INLINE float sum_of(floats values) {
    float total = 0.0f;
    for (int i = 0; i < WIDTH; i++) total += values[i];
    return total;
}

/* ---------------------------------------------------------------- products */

/* Compilers would read a row of B once for each row of A, as an operand of the multiplication; this makes them keep it
   in a register. There are more multiplications than loads then, and they run at the processor's peak. */
#if defined(__AVX512F__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#elif defined(__x86_64__)
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))
#elif defined(__aarch64__)
#define IN_REGISTER(vector) __asm__("" : "+w"(vector))
#else
#define IN_REGISTER(vector)
#endif

/* C [rows, WIDTH * vectors] (+)= A [rows, k] B [k, WIDTH * vectors]; A has any strides, rows of B and C are contiguous.
   `rows` and `vectors` are constants, at most 4. Added to C is the finished sum, which is more exact. */
INLINE void block(float *C, int64_t c_row, const float *A, int64_t a_row, int64_t a_column, const float *B,
                  int64_t b_row, int64_t k, int add, const int rows, const int vectors) {
    floats total[4][4], b[4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) total[r][v] = (floats){0};
    for (int64_t p = 0; p < k; p++) {
        for (int v = 0; v < vectors; v++) {
            b[v] = *(floats *)(B + p * b_row + v * WIDTH);
            IN_REGISTER(b[v]);
        }
        for (int r = 0; r < rows; r++) {
            float a = A[r * a_row + p * a_column];
            for (int v = 0; v < vectors; v++) total[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            floats *c = (floats *)(C + r * c_row + v * WIDTH);
            *c = add ? *c + total[r][v] : total[r][v];
        }
}

/* The same for m rows. */
INLINE void strip(float *C, int64_t c_row, const float *A, int64_t a_row, int64_t a_column, const float *B,
                  int64_t b_row, int64_t m, int64_t k, int add, const int vectors) {
    int64_t whole = m / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4)
        block(C + i * c_row, c_row, A + i * a_row, a_row, a_column, B, b_row, k, add, 4, vectors);
    for (int64_t i = whole; i < m; i++)
        block(C + i * c_row, c_row, A + i * a_row, a_row, a_column, B, b_row, k, add, 1, vectors);
}

/* The same for n columns, a multiple of LANES. */
static void product(float *C, int64_t c_row, const float *A, int64_t a_row, int64_t a_column, const float *B,
                    int64_t b_row, int64_t m, int64_t n, int64_t k, int add) {
    int64_t j = 0;
    for (; j + VECTORS * WIDTH <= n; j += VECTORS * WIDTH)
        strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, VECTORS);
    int64_t left = (n - j) / WIDTH;
    if (left == 1) strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, 1);
    if (left == 2 && VECTORS > 2) strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, 2);
    if (left == 3 && VECTORS > 3) strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, 3);
}

/* ---------------------------------------------------------------- exponentials */

/* e^x for x <= 0, to about 2 units in the last place, and 0 below -87; a NaN stays a NaN. Cephes' polynomial
   (Moshier). */
INLINE floats exponentials(floats x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
    floats shifted = x * 1.44269504f + magic, n = shifted - magic;
    floats f = (x - n * 0.693359375f) + n * 2.12194440e-4f, p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f, p = p * f + 4.1665795894e-2f, p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f, p = p * f * f + f + 1.0f;
    flags result = (flags)((bits)p + ((bits)shifted << 23)), number = x == x;
    return (floats)((result & (x >= -87.0f)) | ((flags)x & ~number));
}

#endif
