/* Dropout + residual + LayerNorm, forward and backward (the maths: `layer_norm.py`). */

#include <math.h>

#include "common.h"

#define ROW_BLOCK 64 /* rows whose gradients of weight and bias are added up in one go */

INLINE float sum(const float *values, int64_t count) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < count; c++) total += values[c];
    return total;
}

INLINE float dot(const float *a, const float *b, int64_t count) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < count; c++) total += a[c] * b[c];
    return total;
}

/* (residual + keep x - mean) / deviation of row t, and 1 / deviation. */
static float normalise(float *normed, const float *keep, const void *x, const void *residual, int64_t t, int64_t size,
                       float eps, int x_bf16, int residual_bf16) {
    float values[size];
    load(values, x, t * size, size, x_bf16);
    load(normed, residual, t * size, size, residual_bf16);
    for (int64_t c = 0; c < size; c++) normed[c] += values[c] * keep[c];
    float mean = sum(normed, size) / size;
    for (int64_t c = 0; c < size; c++) normed[c] -= mean;
    float scale = 1.0f / sqrtf(dot(normed, normed, size) / size + eps);
    for (int64_t c = 0; c < size; c++) normed[c] *= scale;
    return scale;
}

void layer_norm_forward(const void *x, const void *residual, const float *weight, const float *bias,
                        const int64_t *seed, void *out, int64_t rows, int64_t size, float eps, int64_t stream,
                        int32_t threshold, float scale, int x_bf16, int residual_bf16, int threads) {
    dropout_t drop = read_dropout(seed, stream, threshold, scale);
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < rows; t++) {
        float keep[round_up(size, NUMBERS)], normed[size];
        keep_row(keep, size, drop, (uint32_t)t, 0);
        normalise(normed, keep, x, residual, t, size, eps, x_bf16, residual_bf16);
        for (int64_t c = 0; c < size; c++) normed[c] = normed[c] * weight[c] + bias[c];
        store(out, t * size, normed, size, x_bf16);
    }
}

/* dweight and dbias: one row for each block of ROW_BLOCK tokens, to be added up. */
void layer_norm_backward(const void *dout, const void *x, const void *residual, const float *weight,
                         const int64_t *seed, void *dx, void *dresidual, float *dweight, float *dbias, int64_t rows,
                         int64_t size, float eps, int64_t stream, int32_t threshold, float scale, int x_bf16,
                         int residual_bf16, int threads) {
    dropout_t drop = read_dropout(seed, stream, threshold, scale);
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < (rows + ROW_BLOCK - 1) / ROW_BLOCK; block++) {
        float keep[round_up(size, NUMBERS)], normed[size], grad[size];
        float *dw = dweight + block * size, *db = dbias + block * size;
        memset(dw, 0, 4 * size), memset(db, 0, 4 * size);
        for (int64_t t = block * ROW_BLOCK; t < least(rows, (block + 1) * ROW_BLOCK); t++) {
            keep_row(keep, size, drop, (uint32_t)t, 0);
            float inverse = normalise(normed, keep, x, residual, t, size, eps, x_bf16, residual_bf16);
            load(grad, dout, t * size, size, x_bf16);
            for (int64_t c = 0; c < size; c++) dw[c] += grad[c] * normed[c], db[c] += grad[c], grad[c] *= weight[c];
            float mean = sum(grad, size) / size, slope = dot(grad, normed, size) / size;
            for (int64_t c = 0; c < size; c++) grad[c] = (grad[c] - mean - normed[c] * slope) * inverse;
            store(dresidual, t * size, grad, size, residual_bf16);
            if (!threshold) continue; /* dx is dresidual */
            for (int64_t c = 0; c < size; c++) grad[c] *= keep[c];
            store(dx, t * size, grad, size, x_bf16);
        }
    }
}
