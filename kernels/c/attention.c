/* Attention in fp32, forward and backward (maths: `attention.py`). Each (sequence, head) is a task of its own; it
   holds QUERIES rows of probabilities at a time, which never leave the cache. The backward pass recomputes them. */

#include <math.h>
#include <stdlib.h>

#include "attention.h"
#include "vectors.h"

static void transpose(float *to, int64_t to_row, const float *from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < columns; i++)
        for (int64_t j = 0; j < rows; j++) to[i * to_row + j] = from[j * columns + i];
}

/* ---------------------------------------------------------------- attention */

#define QUERIES 64 /* rows of probabilities held at a time */

/* Replaces the logits of one row by exp(logit - maximum), with 0 from `length` to `width`; returns the sum. */
static float softmax_row(float *row, int64_t length, int64_t width) {
    floats best = (floats){0} - INFINITY, total = {0};
    for (int64_t j = length; j < width; j++) row[j] = -INFINITY;
    for (int64_t j = 0; j < width; j += WIDTH) best = larger(*(floats *)(row + j), best);
    float highest = -INFINITY;
    for (int i = 0; i < WIDTH; i++) highest = best[i] > highest ? best[i] : highest;
    for (int64_t j = 0; j < width; j += WIDTH) {
        floats *values = (floats *)(row + j);
        *values = exponentials(*values - highest), total += *values;
    }
    return sum_of(total);
}

/* Loads one of q, k, v (`part` of `parts` per token) of one head, as rows of `dim` in fp32. */
static void load_head(float *to, const void *from, head_t at, int64_t part, int64_t parts, int bf16) {
    for (int64_t t = 0; t < at.length; t++)
        load(to + t * at.dim, from, (((at.start + t) * parts + part) * at.heads + at.head) * at.dim, at.dim, bf16);
}

static void store_head(void *to, const float *from, head_t at, int64_t part, int64_t parts, int bf16) {
    for (int64_t t = 0; t < at.length; t++)
        store(to, (((at.start + t) * parts + part) * at.heads + at.head) * at.dim, from + t * at.dim, at.dim, bf16);
}

static void scale_all(float *values, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++) values[i] *= factor;
}

static void head_forward(head_t at, const void *qkv, void *out, float scale, float *scratch, int bf16) {
    int64_t size = at.row * at.dim;
    float *q = scratch, *k = q + size, *kT = k + size, *v = kT + size, *o = v + size, *p = o + size;
    float *keep = p + QUERIES * at.row;
    load_head(q, qkv, at, 0, 3, bf16), load_head(k, qkv, at, 1, 3, bf16), load_head(v, qkv, at, 2, 3, bf16);
    scale_all(q, at.length * at.dim, scale);
    transpose(kT, at.row, k, at.length, at.dim);
    for (int64_t first = 0; first < at.length; first += QUERIES) {
        int64_t rows = least(QUERIES, at.length - first);
        float inverse[QUERIES];
        product(p, at.row, q + first * at.dim, at.dim, 1, kT, at.row, rows, at.width, at.dim, 0);
        for (int64_t t = 0; t < rows; t++) {
            float *row = p + t * at.row;
            inverse[t] = 1.0f / softmax_row(row, at.length, at.width);
            if (!at.dropout.threshold) continue;
            keep_row(keep, at.width, at.dropout, (uint32_t)(at.start + first + t), (uint32_t)at.head);
            for (int64_t j = 0; j < at.width; j++) row[j] *= keep[j];
        }
        product(o + first * at.dim, at.dim, p, at.row, 1, v, at.dim, rows, at.dim, at.length, 0);
        for (int64_t t = 0; t < rows; t++) scale_all(o + (first + t) * at.dim, at.dim, inverse[t]);
    }
    store_head(out, o, at, 0, 1, bf16);
}

static void head_backward(head_t at, const void *qkv, const void *dout, void *dqkv, float scale, float *scratch,
                          int bf16) {
    int64_t size = at.row * at.dim;
    float *q = scratch, *k = q + size, *kT = k + size, *v = kT + size, *vT = v + size, *dO = vT + size;
    float *dq = dO + size, *dk = dq + size, *dv = dk + size, *p = dv + size, *ds = p + QUERIES * at.row;
    float *keep = ds + QUERIES * at.row;
    load_head(q, qkv, at, 0, 3, bf16), load_head(k, qkv, at, 1, 3, bf16), load_head(v, qkv, at, 2, 3, bf16);
    load_head(dO, dout, at, 0, 1, bf16);
    scale_all(q, at.length * at.dim, scale);
    transpose(kT, at.row, k, at.length, at.dim), transpose(vT, at.row, v, at.length, at.dim);
    for (int64_t first = 0; first < at.length; first += QUERIES) {
        int64_t rows = least(QUERIES, at.length - first);
        const float *q_rows = q + first * at.dim, *dO_rows = dO + first * at.dim;
        product(p, at.row, q_rows, at.dim, 1, kT, at.row, rows, at.width, at.dim, 0);
        product(ds, at.row, dO_rows, at.dim, 1, vT, at.row, rows, at.width, at.dim, 0);
        for (int64_t t = 0; t < rows; t++) {
            float *P = p + t * at.row, *dS = ds + t * at.row, delta = 0.0f;
            float inverse = 1.0f / softmax_row(P, at.length, at.width);
            keep_row(keep, at.width, at.dropout, (uint32_t)(at.start + first + t), (uint32_t)at.head);
#pragma omp simd reduction(+ : delta)
            for (int64_t j = 0; j < at.length; j++) P[j] *= inverse, dS[j] *= keep[j], delta += P[j] * dS[j];
            for (int64_t j = 0; j < at.length; j++) dS[j] = P[j] * (dS[j] - delta), P[j] *= keep[j];
        }
        product(dq + first * at.dim, at.dim, ds, at.row, 1, k, at.dim, rows, at.dim, at.length, 0);
        product(dk, at.dim, ds, 1, at.row, q_rows, at.dim, at.length, at.dim, rows, first > 0);
        product(dv, at.dim, p, 1, at.row, dO_rows, at.dim, at.length, at.dim, rows, first > 0);
    }
    scale_all(dq, at.length * at.dim, scale);
    store_head(dqkv, dq, at, 0, 3, bf16), store_head(dqkv, dk, at, 1, 3, bf16), store_head(dqkv, dv, at, 2, 3, bf16);
}

/* Floats of scratch space per thread: at most nine matrices of a head, two blocks of probabilities, a row. */
INLINE int64_t scratch_size(int64_t longest, int64_t dim) {
    int64_t width = round_up(longest, LANES), row = row_of(width);
    return 9 * row * dim + 2 * QUERIES * row + round_up(width, NUMBERS);
}

/* The forward pass if `dout` is NULL, else the gradient of qkv. `dim` is a multiple of LANES. Returns 1 without
   memory for the scratch space. */
int attention(const void *qkv, const int64_t *offsets, const int64_t *seed, const void *dout, void *out,
              int64_t sequences, int64_t longest, int64_t heads, int64_t dim, float softmax_scale, int64_t stream,
              int32_t threshold, float scale, int bf16, int threads) {
    dropout_t drop = read_dropout(seed, stream, threshold, scale);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = aligned_alloc(64, round_up(4 * scratch_size(longest, dim), 64)); /* no vector in two lines */
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < sequences * heads; task++) {
            head_t at = find_head(offsets, task, heads, dim, drop);
            if (!scratch || !at.length) continue;
            if (dout) head_backward(at, qkv, dout, out, softmax_scale, scratch, bf16);
            else head_forward(at, qkv, out, softmax_scale, scratch, bf16);
        }
        free(scratch);
    }
    return failed;
}
