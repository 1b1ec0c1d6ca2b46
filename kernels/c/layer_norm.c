/* Dropout + residual + LayerNorm, forward and backward (maths: `layer_norm.py`). The backward pass recomputes the sum,
   its statistics and the dropout decisions. */

#include <math.h>

#include "common.h"

#define ROW_BLOCK 64 /* rows per partial sum of the parameters' gradients */

INLINE float number(const void *from, int64_t i, int bf16) {
    return bf16 ? as_float((uint32_t)((const uint16_t *)from)[i] << 16) : ((const float *)from)[i];
}

/* values = residual + keep (x + shift) for the row that starts at `first`; returns their sum. */
INLINE float add_row(float *values, const float *keep, const float *shift, const void *x, const void *residual,
                     int64_t first, int64_t size, int x_bf16, int residual_bf16) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < size; c++) {
        values[c] = number(residual, first + c, residual_bf16) + (number(x, first + c, x_bf16) + shift[c]) * keep[c];
        total += values[c];
    }
    return total;
}

/* values = residual + keep (x + shift) of row t, less their mean; returns 1 / standard deviation. */
static float centre(float *values, const float *keep, const float *shift, const void *x, const void *residual,
                    int64_t t, int64_t size, float eps, int x_bf16, int residual_bf16) {
    int64_t first = t * size;
    float total, squares = 0.0f;
    if (x_bf16) /* a loop for each case, so that none branches per number */
        total = residual_bf16 ? add_row(values, keep, shift, x, residual, first, size, 1, 1)
                              : add_row(values, keep, shift, x, residual, first, size, 1, 0);
    else
        total = residual_bf16 ? add_row(values, keep, shift, x, residual, first, size, 0, 1)
                              : add_row(values, keep, shift, x, residual, first, size, 0, 0);
    float mean = total / size;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < size; c++) values[c] -= mean, squares += values[c] * values[c];
    return 1.0f / sqrtf(squares / size + eps);
}

/* Copies a parameter; zeros if it is missing. */
static void copy_row(float *row, const float *parameter, int64_t size) {
    if (parameter)
        memcpy(row, parameter, 4 * size);
    else
        memset(row, 0, 4 * size);
}

void layer_norm_forward(const void *x, const void *residual, const float *weight, const float *bias,
                        const float *x_bias, const int64_t *seed, void *out, int64_t rows, int64_t size, float eps,
                        int64_t stream, int32_t threshold, float scale, int x_bf16, int residual_bf16, int threads) {
    dropout_t drop = read_dropout(seed, stream, threshold, scale);
#pragma omp parallel num_threads(threads)
    {
        float keep[round_up(size, NUMBERS)], normed[size], shift[size];
        copy_row(shift, x_bias, size);
        keep_row(keep, size, drop, 0, 0);
#pragma omp for
        for (int64_t t = 0; t < rows; t++) {
            if (threshold) keep_row(keep, size, drop, (uint32_t)t, 0);
            float inverse = centre(normed, keep, shift, x, residual, t, size, eps, x_bf16, residual_bf16);
            for (int64_t c = 0; c < size; c++) normed[c] = normed[c] * inverse * weight[c] + bias[c];
            store(out, t * size, normed, size, x_bf16);
        }
    }
}

/* dweight, dbias and dx_bias (may be NULL) get one row of partial sums for each block of ROW_BLOCK tokens.
   The gradient of the result is dout + dout_again (may be NULL). */
void layer_norm_backward(const void *dout, const void *dout_again, const void *x, const void *residual,
                         const float *weight, const float *x_bias, const int64_t *seed, void *dx, void *dresidual,
                         float *dweight, float *dbias, float *dx_bias, int64_t rows, int64_t size, float eps,
                         int64_t stream, int32_t threshold, float scale, int x_bf16, int residual_bf16, int threads) {
    dropout_t drop = read_dropout(seed, stream, threshold, scale);
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < (rows + ROW_BLOCK - 1) / ROW_BLOCK; block++) {
        float keep[round_up(size, NUMBERS)], normed[size], grad[size], shift[size], unused[size];
        float *dw = dweight + block * size, *db = dbias + block * size, *ds = dx_bias ? dx_bias + block * size : unused;
        memset(dw, 0, 4 * size), memset(db, 0, 4 * size), memset(ds, 0, 4 * size);
        copy_row(shift, x_bias, size);
        keep_row(keep, size, drop, 0, 0);
        for (int64_t t = block * ROW_BLOCK; t < least(rows, (block + 1) * ROW_BLOCK); t++) {
            if (threshold) keep_row(keep, size, drop, (uint32_t)t, 0);
            float inverse = centre(normed, keep, shift, x, residual, t, size, eps, x_bf16, residual_bf16);
            float mean = 0.0f, slope = 0.0f;
            load(grad, dout, t * size, size, x_bf16);
            if (dout_again)
                for (int64_t c = 0; c < size; c++) grad[c] += number(dout_again, t * size + c, x_bf16);
#pragma omp simd reduction(+ : mean, slope)
            for (int64_t c = 0; c < size; c++) {
                normed[c] *= inverse;
                dw[c] += grad[c] * normed[c], db[c] += grad[c], grad[c] *= weight[c];
                mean += grad[c], slope += grad[c] * normed[c];
            }
            mean /= size, slope /= size;
            for (int64_t c = 0; c < size; c++) grad[c] = (grad[c] - mean - normed[c] * slope) * inverse;
            store(dresidual, t * size, grad, size, residual_bf16);
            if (threshold) { /* otherwise dx equals dresidual */
                for (int64_t c = 0; c < size; c++) grad[c] *= keep[c];
                store(dx, t * size, grad, size, x_bf16);
            }
            for (int64_t c = 0; c < size; c++) ds[c] += grad[c];
        }
    }
}
