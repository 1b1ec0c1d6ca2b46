/* Matrix products in bf16 with fp32 sums. They use tiles (AMX) or dot products of pairs (AVX-512 BF16); both take the
   right-hand side in the same layout.

   A tile is 16 rows of 64 bytes. C (16 x 16 fp32) += A (16 x 32 bf16) B, where B's 32 x 16 numbers are stored as 16
   rows of pairs: word [r][n] holds B[2r][n] in its low half and B[2r + 1][n] in its high half. So there are two ways
   to pack a right-hand side:
     `pack_paired`  M itself: rows 2r and 2r + 1 are interleaved;
     `pack_turned`  the transpose of M: M[n][2r] and M[n][2r + 1] are adjacent already, so words are transposed.

   C has no portable names for these instructions, so this file uses intrinsics; for processors without them it
   contains no products. A thread calls `begin_products` before its first product and `end_products` after its last. */

#ifndef PRODUCTS_BF16_H
#define PRODUCTS_BF16_H

#include "common.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#define SIZE 16  /* rows of a tile, and words in a row */
#define DEPTH 32 /* bf16 numbers in a tile's row */

/* ---------------------------------------------------------------- C [32, n] (+)= A [32, k] B, n and k multiples of 32

   B's tile of the columns from 16 j and the rows from 32 p is at B + j * b_n + p * b_k (in vectors of 16 words). */

#if defined(__AMX_BF16__) && defined(__linux__)
static inline void begin_products(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 4 * SIZE, shape.rows[tile] = SIZE;
    _tile_loadconfig(&shape);
}

static inline void end_products(void) { _tile_release(); }

static inline void product_bf16(float *C, int64_t c_row, const uint16_t *A, int64_t a_row, const words *B, int64_t b_n,
                                int64_t b_k, int64_t n, int64_t k, int add) {
    for (int64_t j = 0; j < n; j += 2 * SIZE) {
        float *c = C + j, *below = c + SIZE * c_row;
        if (add) {
            _tile_loadd(0, c, 4 * c_row); _tile_loadd(1, c + SIZE, 4 * c_row);
            _tile_loadd(2, below, 4 * c_row); _tile_loadd(3, below + SIZE, 4 * c_row);
        } else {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        }
        for (int64_t p = 0; p < k / DEPTH; p++) {
            const words *b = B + j / SIZE * b_n + p * b_k;
            _tile_loadd(4, A + p * DEPTH, 2 * a_row); _tile_loadd(6, b, 64); _tile_loadd(7, b + b_n, 64);
            _tile_loadd(5, A + p * DEPTH + SIZE * a_row, 2 * a_row);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, 4 * c_row); _tile_stored(1, c + SIZE, 4 * c_row);
        _tile_stored(2, below, 4 * c_row); _tile_stored(3, below + SIZE, 4 * c_row);
    }
}

#else
static inline void begin_products(void) {}
static inline void end_products(void) {}

#define ROWS 8 /* rows of C held in registers, two vectors of each */

static inline void product_bf16(float *C, int64_t c_row, const uint16_t *A, int64_t a_row, const words *B, int64_t b_n,
                                int64_t b_k, int64_t n, int64_t k, int add) {
    for (int64_t i = 0; i < 2 * SIZE; i += ROWS, C += ROWS * c_row, A += ROWS * a_row)
        for (int64_t j = 0; j < n; j += 2 * SIZE) {
            __m512 left[ROWS], right[ROWS];
            for (int r = 0; r < ROWS; r++) {
                left[r] = add ? _mm512_loadu_ps(C + r * c_row + j) : _mm512_setzero_ps();
                right[r] = add ? _mm512_loadu_ps(C + r * c_row + j + SIZE) : _mm512_setzero_ps();
            }
            for (int64_t p = 0; p < k / DEPTH; p++) {
                const words *b = B + j / SIZE * b_n + p * b_k;
                for (int pair = 0; pair < SIZE; pair++) {
                    __m512bh b_left = (__m512bh)b[pair], b_right = (__m512bh)b[b_n + pair];
                    for (int r = 0; r < ROWS; r++) {
                        int32_t numbers;
                        memcpy(&numbers, A + r * a_row + p * DEPTH + 2 * pair, sizeof numbers);
                        __m512bh a = (__m512bh)_mm512_set1_epi32(numbers);
                        left[r] = _mm512_dpbf16_ps(left[r], a, b_left);
                        right[r] = _mm512_dpbf16_ps(right[r], a, b_right);
                    }
                }
            }
            for (int r = 0; r < ROWS; r++) {
                _mm512_storeu_ps(C + r * c_row + j, left[r]);
                _mm512_storeu_ps(C + r * c_row + j + SIZE, right[r]);
            }
        }
}
#endif

/* ---------------------------------------------------------------- layouts of the right-hand side */

INLINE __m256i to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }
INLINE words paired(__m256i low, __m256i high) {
    return (words)_mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* Transposes a square of words whose rows are `row` words apart; the result's rows are `to_row` words apart. */
INLINE void turn_tile(uint32_t *to, int64_t to_row, const uint32_t *from, int64_t row) {
    words tile[SIZE];
    for (int r = 0; r < SIZE; r++) memcpy(tile + r, from + r * row, sizeof(words));
    turn_square(tile);
    for (int r = 0; r < SIZE; r++) memcpy(to + r * to_row, tile + r, sizeof(words));
}

/* B tiles of Mᵀ, M [rows, columns]: the columns from 16 j and rows from 32 p of Mᵀ at (j * columns / 32 + p) * 16. */
static inline void pack_turned(words *tiles, const uint16_t *M, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < rows; j += SIZE)
        for (int64_t p = 0; p < columns; p += DEPTH, tiles += SIZE)
            turn_tile((uint32_t *)tiles, SIZE, (const uint32_t *)(M + j * columns + p), columns / 2);
}

/* B tiles of M [rows, columns]: the columns from 16 j and rows from 32 p of M at (p * columns / 16 + j) * 16. */
static inline void pack_paired(words *tiles, const uint16_t *M, int64_t rows, int64_t columns) {
    for (int64_t p = 0; p < rows; p += DEPTH)
        for (int64_t j = 0; j < columns; j += SIZE, tiles += SIZE)
            for (int r = 0; r < SIZE; r++) {
                const uint16_t *row = M + (p + 2 * r) * columns + j;
                tiles[r] = paired(_mm256_loadu_si256((const __m256i *)row),
                                  _mm256_loadu_si256((const __m256i *)(row + columns)));
            }
}

#else
INLINE void begin_products(void) {}
INLINE void end_products(void) {}
#endif
#endif
