/* The hot loops of training on a CPU: the maths of `layer_norm.py` and `attention.py`, the bits of `rng.py`.

   C with GCC's and Clang's vector types, built and loaded by `native.py`. Tensors are contiguous, fp32 or bf16
   (`bf16` != 0); everything is computed in fp32. Every sum runs in an order that does not depend on the number
   of threads.

   Left out on purpose: intrinsics (one source for every processor), fp64 and fp16 (the twins take them). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16 /* numbers of a vector; processors with narrower ones split it */
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint64_t longs __attribute__((vector_size(4 * LANES)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* ---------------------------------------------------------------- rows of fp32 or bf16 */

INLINE float as_float(uint32_t bits) { union { uint32_t u; float f; } both = {.u = bits}; return both.f; }
INLINE uint32_t as_bits(float value) { union { float f; uint32_t u; } both = {.f = value}; return both.u; }

static void load(float *to, const void *from, int64_t first, int64_t count, int bf16) {
    if (!bf16) { memcpy(to, (const float *)from + first, 4 * count); return; }
    const uint16_t *halves = (const uint16_t *)from + first;
    for (int64_t i = 0; i < count; i++) to[i] = as_float((uint32_t)halves[i] << 16);
}

/* To the nearest bf16, ties to even; a NaN stays one. */
static void store(void *to, int64_t first, const float *from, int64_t count, int bf16) {
    if (!bf16) { memcpy((float *)to + first, from, 4 * count); return; }
    uint16_t *halves = (uint16_t *)to + first;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = as_bits(from[i]);
        halves[i] = from[i] == from[i] ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
    }
}

/* ---------------------------------------------------------------- random numbers: rng.philox, rng.keep_mask */

#define NUMBERS (8 * LANES) /* 16-bit numbers that `LANES` Philox calls give */

typedef struct { uint32_t key_low, key_high, first_row, stream; } seed_t;
typedef struct { seed_t seed; int32_t threshold; float scale; } dropout_t; /* threshold 0: nothing is dropped */

static dropout_t read_dropout(const int64_t *seed, int64_t stream, int32_t threshold, float scale) {
    dropout_t none = {{0, 0, 0, 0}, 0, 1.0f};
    if (!threshold) return none;
    uint64_t key = (uint64_t)seed[0];
    return (dropout_t){{(uint32_t)key, (uint32_t)(key >> 32), (uint32_t)seed[1], (uint32_t)stream}, threshold, scale};
}

/* High and low halves of the 32 x 32 -> 64 bit products; even and odd lanes apart. */
INLINE words multiply(words a, uint32_t b, words *low) {
    longs even = ((longs)a & 0xFFFFFFFF) * (uint64_t)b, odd = ((longs)a >> 32) * (uint64_t)b;
    *low = (words)((even & 0xFFFFFFFF) | odd << 32);
    return (words)(even >> 32 | (odd & 0xFFFFFFFF00000000));
}

#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

/* `NUMBERS` numbers of one row from column `first` on, in the order of the columns. */
INLINE void random_numbers(uint16_t *numbers, uint32_t first, seed_t seed, uint32_t row, uint32_t plane) {
    const words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    words c0 = lane + first / 8, c1 = lane * 0 + (row + seed.first_row);
    words c2 = lane * 0 + seed.stream, c3 = lane * 0 + plane;
    uint32_t k0 = seed.key_low, k1 = seed.key_high;
    for (int round = 0; round < 7; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        words low_a, low_b, high_a = multiply(c0, 0xD2511F53u, &low_a), high_b = multiply(c2, 0xCD9E8D57u, &low_b);
        c0 = high_b ^ c1 ^ k0, c1 = low_b, c2 = high_a ^ c3 ^ k1, c3 = low_a;
    }
    /* Four words to a call; in memory their low halves come first on every machine that torch runs on. */
    words even[2] = {ZIP_LOW(c0, c2), ZIP_HIGH(c0, c2)}, odd[2] = {ZIP_LOW(c1, c3), ZIP_HIGH(c1, c3)};
    words all[4] = {ZIP_LOW(even[0], odd[0]), ZIP_HIGH(even[0], odd[0]), ZIP_LOW(even[1], odd[1]),
                    ZIP_HIGH(even[1], odd[1])};
    memcpy(numbers, all, sizeof all);
}

/* Factors of one row, `columns` rounded up to NUMBERS: 0 where dropout drops, `scale` where it keeps. */
static void keep_row(float *keep, int64_t columns, dropout_t dropout, uint32_t row, uint32_t plane) {
    for (int64_t first = 0; first < columns; first += NUMBERS) {
        uint16_t numbers[NUMBERS];
        if (dropout.threshold) random_numbers(numbers, (uint32_t)first, dropout.seed, row, plane);
        else memset(numbers, 0, sizeof numbers);
        for (int i = 0; i < NUMBERS; i++) keep[first + i] = numbers[i] >= dropout.threshold ? dropout.scale : 0.0f;
    }
}

/* ---------------------------------------------------------------- dropout + residual + LayerNorm */

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

/* ---------------------------------------------------------------- small matrix products */

/* C [m, LANES * vectors] (+)= A [m, k] B [k, LANES * vectors]; A by any strides, B and C by rows. */
INLINE void strip(float *C, int64_t c_row, const float *A, int64_t a_row, int64_t a_column, const float *B,
                  int64_t b_row, int64_t m, int64_t k, int add, const int vectors) {
    for (int64_t i = 0; i < m;) {
        const int rows = m - i >= 4 ? 4 : 1;
        floats total[4][4];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                total[r][v] = add ? *(floats *)(C + (i + r) * c_row + v * LANES) : (floats){0};
        if (rows == 4) {
            for (int64_t p = 0; p < k; p++)
                for (int r = 0; r < 4; r++)
                    for (int v = 0; v < vectors; v++)
                        total[r][v] += A[(i + r) * a_row + p * a_column] * *(floats *)(B + p * b_row + v * LANES);
        } else {
            for (int64_t p = 0; p < k; p++)
                for (int v = 0; v < vectors; v++)
                    total[0][v] += A[i * a_row + p * a_column] * *(floats *)(B + p * b_row + v * LANES);
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) *(floats *)(C + (i + r) * c_row + v * LANES) = total[r][v];
        i += rows;
    }
}

/* The same for n columns, a multiple of LANES. */
static void product(float *C, int64_t c_row, const float *A, int64_t a_row, int64_t a_column, const float *B,
                    int64_t b_row, int64_t m, int64_t n, int64_t k, int add) {
    for (int64_t j = 0; j < n; j += 4 * LANES) {
        switch (least(4, (n - j) / LANES)) {
            case 1: strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, 1); break;
            case 2: strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, 2); break;
            case 3: strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, 3); break;
            default: strip(C + j, c_row, A, a_row, a_column, B + j, b_row, m, k, add, 4);
        }
    }
}

static void transpose(float *to, int64_t to_row, const float *from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < columns; i++)
        for (int64_t j = 0; j < rows; j++) to[i * to_row + j] = from[j * columns + i];
}

/* ---------------------------------------------------------------- attention */

#define QUERIES 64 /* rows of probabilities held at a time */

/* e^x for x <= 0 to about 2 units in the last place; a NaN stays one. Cephes' polynomial (Moshier). */
INLINE float exponential(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
    float clamped = x < -87.0f ? -87.0f : x, shifted = clamped * 1.44269504f + magic, n = shifted - magic;
    float f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f, p = p * f + 8.3334519073e-3f, p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f, p = p * f + 5.0000001201e-1f, p = p * f * f + f + 1.0f;
    return x == x ? as_float(as_bits(p) + (as_bits(shifted) << 23)) : x;
}

/* Logits of one row -> their exponentials less the maximum, 0 from `length` to `width`; returns the sum. */
static float softmax_row(float *row, int64_t length, int64_t width) {
    float best[LANES], highest = -INFINITY, total = 0.0f;
    for (int64_t j = length; j < width; j++) row[j] = -INFINITY;
    for (int i = 0; i < LANES; i++) best[i] = -INFINITY;
    for (int64_t j = 0; j < width; j += LANES)
        for (int i = 0; i < LANES; i++) best[i] = row[j + i] > best[i] ? row[j + i] : best[i];
    for (int i = 0; i < LANES; i++) highest = best[i] > highest ? best[i] : highest;
    for (int64_t j = 0; j < width; j++) row[j] = exponential(row[j] - highest);
    for (int64_t j = length; j < width; j++) row[j] = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < width; j++) total += row[j];
    return total;
}

typedef struct {
    int64_t heads, dim, start, length, width, head; /* width: length rounded up to whole vectors */
    dropout_t dropout;
} head_t;

/* One of q, k, v (`part` of `parts` per token) of one head: rows of `dim`, fp32. */
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

/* Sequence `task / heads`, head `task % heads`. */
INLINE head_t find_head(const int64_t *offsets, int64_t task, int64_t heads, int64_t dim, dropout_t dropout) {
    int64_t start = offsets[task / heads], length = offsets[task / heads + 1] - start;
    return (head_t){heads, dim, start, length, round_up(length, LANES), task % heads, dropout};
}

static void head_forward(head_t at, const void *qkv, void *out, float scale, float *scratch, int bf16) {
    int64_t size = at.width * at.dim;
    float *q = scratch, *k = q + size, *kT = k + size, *v = kT + size, *o = v + size, *p = o + size;
    float *keep = p + QUERIES * at.width;
    load_head(q, qkv, at, 0, 3, bf16), load_head(k, qkv, at, 1, 3, bf16), load_head(v, qkv, at, 2, 3, bf16);
    scale_all(q, at.length * at.dim, scale);
    transpose(kT, at.width, k, at.length, at.dim);
    for (int64_t first = 0; first < at.length; first += QUERIES) {
        int64_t rows = least(QUERIES, at.length - first);
        float inverse[QUERIES];
        product(p, at.width, q + first * at.dim, at.dim, 1, kT, at.width, rows, at.width, at.dim, 0);
        for (int64_t t = 0; t < rows; t++) {
            float *row = p + t * at.width;
            inverse[t] = 1.0f / softmax_row(row, at.length, at.width);
            keep_row(keep, at.width, at.dropout, (uint32_t)(at.start + first + t), (uint32_t)at.head);
            for (int64_t j = 0; j < at.width; j++) row[j] *= keep[j];
        }
        product(o + first * at.dim, at.dim, p, at.width, 1, v, at.dim, rows, at.dim, at.length, 0);
        for (int64_t t = 0; t < rows; t++) scale_all(o + (first + t) * at.dim, at.dim, inverse[t]);
    }
    store_head(out, o, at, 0, 1, bf16);
}

static void head_backward(head_t at, const void *qkv, const void *dout, void *dqkv, float scale, float *scratch,
                          int bf16) {
    int64_t size = at.width * at.dim;
    float *q = scratch, *k = q + size, *kT = k + size, *v = kT + size, *vT = v + size, *dO = vT + size;
    float *dq = dO + size, *dk = dq + size, *dv = dk + size, *p = dv + size, *ds = p + QUERIES * at.width;
    float *keep = ds + QUERIES * at.width;
    load_head(q, qkv, at, 0, 3, bf16), load_head(k, qkv, at, 1, 3, bf16), load_head(v, qkv, at, 2, 3, bf16);
    load_head(dO, dout, at, 0, 1, bf16);
    scale_all(q, at.length * at.dim, scale);
    transpose(kT, at.width, k, at.length, at.dim), transpose(vT, at.width, v, at.length, at.dim);
    for (int64_t first = 0; first < at.length; first += QUERIES) {
        int64_t rows = least(QUERIES, at.length - first);
        const float *q_rows = q + first * at.dim, *dO_rows = dO + first * at.dim;
        product(p, at.width, q_rows, at.dim, 1, kT, at.width, rows, at.width, at.dim, 0);
        product(ds, at.width, dO_rows, at.dim, 1, vT, at.width, rows, at.width, at.dim, 0);
        for (int64_t t = 0; t < rows; t++) {
            float *P = p + t * at.width, *dS = ds + t * at.width, delta = 0.0f;
            float inverse = 1.0f / softmax_row(P, at.length, at.width);
            keep_row(keep, at.width, at.dropout, (uint32_t)(at.start + first + t), (uint32_t)at.head);
#pragma omp simd reduction(+ : delta)
            for (int64_t j = 0; j < at.length; j++) P[j] *= inverse, dS[j] *= keep[j], delta += P[j] * dS[j];
            for (int64_t j = 0; j < at.length; j++) dS[j] = P[j] * (dS[j] - delta), P[j] *= keep[j];
        }
        product(dq + first * at.dim, at.dim, ds, at.width, 1, k, at.dim, rows, at.dim, at.length, 0);
        product(dk, at.dim, ds, 1, at.width, q_rows, at.dim, at.length, at.dim, rows, first > 0);
        product(dv, at.dim, p, 1, at.width, dO_rows, at.dim, at.length, at.dim, rows, first > 0);
    }
    scale_all(dq, at.length * at.dim, scale);
    store_head(dqkv, dq, at, 0, 3, bf16), store_head(dqkv, dk, at, 1, 3, bf16), store_head(dqkv, dv, at, 2, 3, bf16);
}

/* Floats that one thread works in: at most nine matrices of a head, and the probabilities. */
INLINE int64_t scratch_size(int64_t longest, int64_t dim) {
    int64_t width = round_up(longest, LANES);
    return 9 * width * dim + 2 * QUERIES * width + round_up(width, NUMBERS);
}

/* dim is a multiple of LANES. With `dout` == NULL the forward pass, else the gradient of qkv. */
int attention(const void *qkv, const int64_t *offsets, const int64_t *seed, const void *dout, void *out,
              int64_t sequences, int64_t longest, int64_t heads, int64_t dim, float softmax_scale, int64_t stream,
              int32_t threshold, float scale, int bf16, int threads) {
    dropout_t drop = read_dropout(seed, stream, threshold, scale);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = malloc(4 * scratch_size(longest, dim));
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

/* ---------------------------------------------------------------- transposing 16-bit numbers */

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
