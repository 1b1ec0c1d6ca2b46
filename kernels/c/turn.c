/* Transposing matrices of 16-bit numbers (what for: `tiles.py`). */

#include "common.h"

#define SIDE 16 /* of a square that is turned over in registers */
typedef uint16_t halves __attribute__((vector_size(2 * SIDE), aligned(2)));
#define ZIP16(a, b, i) __builtin_shufflevector(a, b, i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19, i + 4, \
                                               i + 20, i + 5, i + 21, i + 6, i + 22, i + 7, i + 23)

/* Row i and row i + 8 are zipped four times over: a square's index bits (row, column) rotate into (column, row). */
INLINE void turn_square(const uint16_t *in, int64_t in_row, uint16_t *out, int64_t out_row) {
    halves rows[SIDE], zipped[SIDE];
    for (int i = 0; i < SIDE; i++) rows[i] = *(const halves *)(in + i * in_row);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < SIDE / 2; i++) {
            zipped[2 * i] = ZIP16(rows[i], rows[i + 8], 0);
            zipped[2 * i + 1] = ZIP16(rows[i], rows[i + 8], 8);
        }
        memcpy(rows, zipped, sizeof rows);
    }
    for (int i = 0; i < SIDE; i++) *(halves *)(out + i * out_row) = rows[i];
}

/* out [columns, out_row >= rows] = in [rows, columns] transposed; by blocks of a cache line, both ways. */
int turn(const uint16_t *in, uint16_t *out, int64_t rows, int64_t columns, int64_t out_row, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < rows; block += 2 * SIDE)
        for (int64_t c = 0; c < columns; c += SIDE)
            for (int64_t r = block; r < least(rows, block + 2 * SIDE); r += SIDE) {
                int64_t height = least(SIDE, rows - r), width = least(SIDE, columns - c);
                const uint16_t *from = in + r * columns + c;
                uint16_t *to = out + c * out_row + r;
                if (height == SIDE && width == SIDE) {
                    turn_square(from, columns, to, out_row);
                    continue;
                }
                for (int64_t i = 0; i < height; i++)
                    for (int64_t j = 0; j < width; j++) to[j * out_row + i] = from[i * columns + j];
            }
    return 0;
}
