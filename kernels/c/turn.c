/* Transposes matrices of 16-bit numbers (`fast_bf16.py` says what for). */

#include "common.h"

#define TALL 32 /* a block of TALL x WIDE is transposed in registers; a row of the result fills a cache line */
#define WIDE LANES
typedef uint16_t halves __attribute__((vector_size(2 * WIDE), aligned(2)));

/* Packs pairs of rows into rows of 32-bit words, and transposes those. */
INLINE void turn_block(const uint16_t *in, int64_t in_row, uint16_t *out, int64_t out_row) {
    words rows[WIDE];
    for (int i = 0; i < WIDE; i++) {
        words even = __builtin_convertvector(*(const halves *)(in + 2 * i * in_row), words);
        rows[i] = even | __builtin_convertvector(*(const halves *)(in + (2 * i + 1) * in_row), words) << 16;
    }
    turn_square(rows);
    for (int i = 0; i < WIDE; i++) memcpy(out + i * out_row, rows + i, sizeof(words));
}

/* out [columns, out_row >= rows] = in [rows, columns] transposed. */
int turn(const uint16_t *in, uint16_t *out, int64_t rows, int64_t columns, int64_t out_row, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r += TALL)
        for (int64_t c = 0; c < columns; c += WIDE) {
            int64_t height = least(TALL, rows - r), width = least(WIDE, columns - c);
            const uint16_t *from = in + r * columns + c;
            uint16_t *to = out + c * out_row + r;
            if (height == TALL && width == WIDE) {
                turn_block(from, columns, to, out_row);
                continue;
            }
            uint16_t part[TALL * WIDE] = {0}, turned[TALL * WIDE];
            for (int64_t i = 0; i < height; i++) memcpy(part + i * WIDE, from + i * columns, 2 * width);
            turn_block(part, WIDE, turned, TALL);
            for (int64_t j = 0; j < width; j++) memcpy(to + j * out_row, turned + j * TALL, 2 * height);
        }
    return 0;
}
