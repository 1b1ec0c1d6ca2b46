/* Attention for bf16 tensors: products in bf16 with fp32 sums, softmax and dropout in fp32 between them. Probabilities
   and the gradients of the scores are rounded to bf16 before they are multiplied. Each (sequence, head) is a task of
   its own; the backward pass recomputes the probabilities.

   It uses intrinsics (`products_bf16.h` says why); for processors without them it contains no attention. */

#include "attention.h"
#include "products_bf16.h"

#if !defined(__AVX512BF16__)

int have_bf16_products(void) { return 0; }

#else
#include <math.h>
#include <stdlib.h>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* A process has to ask Linux for the use of tiles (ARCH_REQ_XCOMP_PERM, XTILEDATA). */
int have_bf16_products(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
int have_bf16_products(void) { return 1; }
#endif

#define STEP 32   /* queries whose probabilities are held in fp32 at a time */
#define BLOCK 64  /* queries whose probabilities are held in bf16 for the gradients of k and v */

/* ---------------------------------------------------------------- softmax and dropout */

#define LOG2_E 1.44269504f

/* 2^x for x <= 0, with an error of 1e-7: 2^n times a polynomial of degree 5, fitted to [-1/2, 1/2]. */
INLINE __m512 powers_of_two(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.001339086337f), f, _mm512_set1_ps(0.009676031918f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05550357114f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2402210749f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931471880f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000000075f));
    return _mm512_scalef_ps(p, n);
}

/* Which lanes of a row's vector `v` are keys. */
INLINE __mmask16 keys_of(int64_t length, int64_t v) {
    int64_t left = length - v * LANES;
    return left >= LANES ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* Which lanes of 8 vectors, from column `first` on, dropout keeps. */
INLINE void keep_lanes(__mmask16 *kept, int64_t first, dropout_t dropout, uint32_t row, uint32_t plane) {
    uint16_t numbers[NUMBERS];
    if (!dropout.threshold) { memset(kept, 0xFF, NUMBERS / 8); return; }
    random_numbers(numbers, (uint32_t)first, dropout.seed, row, plane);
    for (int i = 0; i < NUMBERS / 32; i++) {
        __mmask32 both = _mm512_cmpge_epu16_mask(_mm512_loadu_si512(numbers + 32 * i),
                                                 _mm512_set1_epi16((int16_t)dropout.threshold));
        kept[2 * i] = (__mmask16)both, kept[2 * i + 1] = (__mmask16)(both >> 16);
    }
}

INLINE __m512 highest_of(const float *row, int64_t length, __m512 factor) {
    __m512 highest = _mm512_set1_ps(-INFINITY), other = highest;
    int64_t v = 0, whole = length / LANES;
    for (; v + 1 < whole; v += 2) {
        highest = _mm512_max_ps(highest, _mm512_mul_ps(_mm512_loadu_ps(row + v * LANES), factor));
        other = _mm512_max_ps(other, _mm512_mul_ps(_mm512_loadu_ps(row + (v + 1) * LANES), factor));
    }
    for (; v * LANES < length; v++)
        highest = _mm512_mask_max_ps(highest, keys_of(length, v), highest,
                                     _mm512_mul_ps(_mm512_loadu_ps(row + v * LANES), factor));
    return _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(highest, other)));
}

/* Scores of one query -> its exponentials after dropout, in bf16; returns their sum before dropout. */
static float forward_row(uint16_t *p, const float *row, int64_t length, int64_t width, float scale, dropout_t dropout,
                         uint32_t t, uint32_t plane) {
    __m512 factor = _mm512_set1_ps(scale * LOG2_E), highest = highest_of(row, length, factor);
    __m512 total = _mm512_setzero_ps();
    for (int64_t first = 0; first < width; first += NUMBERS) {
        __mmask16 kept[NUMBERS / LANES];
        keep_lanes(kept, first, dropout, t, plane);
        for (int64_t v = first / LANES, i = 0; v < least(width, first + NUMBERS) / LANES; v++, i++) {
            __m512 e = powers_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + v * LANES), factor, highest));
            if (v * LANES + LANES > length) e = _mm512_maskz_mov_ps(keys_of(length, v), e);
            total = _mm512_add_ps(total, e);
            _mm256_storeu_si256((__m256i *)(p + v * LANES), to_bf16(_mm512_maskz_mov_ps(kept[i], e)));
        }
    }
    return _mm512_reduce_add_ps(total);
}

/* For one query, in place: scores -> exponentials, and dP -> dP times dropout's factors. `kept` gets the lanes that
   dropout keeps, `delta` the row's sum of probability times gradient. Returns 1 / sum of the exponentials. */
static float backward_row(float *row, float *dP, __mmask16 *kept, float *delta, int64_t length, int64_t width,
                          float scale, dropout_t dropout, uint32_t t, uint32_t plane) {
    __m512 factor = _mm512_set1_ps(scale * LOG2_E), highest = highest_of(row, length, factor);
    __m512 total = _mm512_setzero_ps(), slope = total, keep = _mm512_set1_ps(dropout.scale);
    for (int64_t first = 0; first < width; first += NUMBERS) {
        keep_lanes(kept + first / LANES, first, dropout, t, plane);
        for (int64_t v = first / LANES; v < least(width, first + NUMBERS) / LANES; v++) {
            __m512 e = powers_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + v * LANES), factor, highest));
            __m512 d = _mm512_maskz_mul_ps(kept[v], _mm512_loadu_ps(dP + v * LANES), keep);
            if (v * LANES + LANES > length) e = _mm512_maskz_mov_ps(keys_of(length, v), e);
            total = _mm512_add_ps(total, e), slope = _mm512_fmadd_ps(e, d, slope);
            _mm512_storeu_ps(row + v * LANES, e), _mm512_storeu_ps(dP + v * LANES, d);
        }
    }
    float inverse = 1.0f / _mm512_reduce_add_ps(total);
    *delta = _mm512_reduce_add_ps(slope) * inverse;
    return inverse;
}

typedef struct {
    int64_t width;                      /* length rounded up to whole tiles */
    uint16_t *q, *k, *v, *dO;           /* [width, dim], zeros after the sequence's end */
    words *kT, *vT, *k_rows, *v_rows;   /* B tiles */
    words *q_rows, *dO_rows;
    float *scores, *dP;                 /* [STEP, width] */
    uint16_t *p, *ds;                   /* [STEP, width] */
    uint32_t *p_pairs, *ds_pairs;       /* [STEP / 2, width] pairs of queries */
    uint16_t *pT, *dsT;                 /* [width, BLOCK] */
    __mmask16 *kept;                    /* two rows, each rounded up to whole NUMBERS */
    float *out, *dk, *dv;               /* [STEP, dim], [width, dim] twice */
} space_t;

/* Sets the pointers to consecutive parts from `base` on and returns the bytes (all that counts if `base` is NULL). */
static int64_t lay_out(space_t *at, char *base, int64_t width, int64_t dim) {
    int64_t used = 0, matrix = 2 * width * dim;
#define TAKE(part, bytes) (at->part = (void *)(base + used), used += round_up(bytes, 64))
    at->width = width;
    TAKE(q, matrix), TAKE(k, matrix), TAKE(v, matrix), TAKE(dO, matrix);
    TAKE(kT, matrix), TAKE(vT, matrix), TAKE(k_rows, matrix), TAKE(v_rows, matrix);
    TAKE(q_rows, 2 * BLOCK * dim), TAKE(dO_rows, 2 * BLOCK * dim);
    TAKE(scores, 4 * STEP * width), TAKE(dP, 4 * STEP * width), TAKE(p, 2 * STEP * width), TAKE(ds, 2 * STEP * width);
    TAKE(p_pairs, 2 * STEP * width), TAKE(ds_pairs, 2 * STEP * width);
    TAKE(pT, 2 * BLOCK * width), TAKE(dsT, 2 * BLOCK * width);
    TAKE(kept, 2 * 2 * round_up(width, NUMBERS) / LANES);
    TAKE(out, 4 * STEP * dim), TAKE(dk, 2 * matrix), TAKE(dv, 2 * matrix);
#undef TAKE
    return used;
}

/* Copies one of q, k, v (`part` of `parts` per token) of one head, followed by zeros up to `width` rows. */
static void gather_head(uint16_t *to, const uint16_t *from, head_t at, int64_t width, int64_t part, int64_t parts) {
    for (int64_t t = 0; t < at.length; t++)
        memcpy(to + t * at.dim, from + (((at.start + t) * parts + part) * at.heads + at.head) * at.dim, 2 * at.dim);
    memset(to + at.length * at.dim, 0, 2 * (width - at.length) * at.dim);
}

/* Stores fp32 rows, times `factors` (NULL: 1), to the sequence's tokens from `first` on, in bf16. */
static void scatter_rows(uint16_t *to, const float *from, const float *factors, head_t at, int64_t first, int64_t rows,
                         int64_t part, int64_t parts) {
    for (int64_t r = 0; r < least(rows, at.length - first); r++) {
        uint16_t *token = to + (((at.start + first + r) * parts + part) * at.heads + at.head) * at.dim;
        __m512 factor = _mm512_set1_ps(factors ? factors[r] : 1.0f);
        for (int64_t c = 0; c < at.dim; c += LANES) {
            __m512 values = _mm512_mul_ps(_mm512_loadu_ps(from + r * at.dim + c), factor);
            _mm256_storeu_si256((__m256i *)(token + c), to_bf16(values));
        }
    }
}

static void bf16_forward(head_t at, const uint16_t *qkv, uint16_t *out, float scale, const space_t *s) {
    int64_t width = s->width, dim = at.dim;
    gather_head(s->q, qkv, at, width, 0, 3), gather_head(s->k, qkv, at, width, 1, 3);
    gather_head(s->v, qkv, at, width, 2, 3);
    pack_turned(s->kT, s->k, width, dim), pack_paired(s->v_rows, s->v, width, dim);
    for (int64_t first = 0; first < at.length; first += STEP) {
        float factors[STEP];
        product_bf16(s->scores, width, s->q + first * dim, dim, s->kT, dim / 2, SIZE, width, dim, 0);
        for (int64_t t = 0; t < STEP; t++) {
            float total = forward_row(s->p + t * width, s->scores + t * width, at.length, width, scale, at.dropout,
                                      (uint32_t)(at.start + first + t), (uint32_t)at.head);
            factors[t] = at.dropout.scale / total;
        }
        product_bf16(s->out, dim, s->p, width, s->v_rows, SIZE, dim, dim, width, 0);
        scatter_rows(out, s->out, factors, at, first, STEP, 0, 1);
    }
}

/* STEP queries from `first` on: stores their gradients, and leaves P and dS, transposed, for those of k and v. */
static void backward_step(head_t at, int64_t first, int64_t slot, uint16_t *dqkv, float scale, const space_t *s) {
    int64_t width = s->width, dim = at.dim, row_masks = round_up(width, NUMBERS) / LANES;
    __m512 keep = _mm512_set1_ps(at.dropout.scale), factor = _mm512_set1_ps(scale);
    product_bf16(s->scores, width, s->q + first * dim, dim, s->kT, dim / 2, SIZE, width, dim, 0);
    product_bf16(s->dP, width, s->dO + first * dim, dim, s->vT, dim / 2, SIZE, width, dim, 0);
    for (int64_t t = 0; t < STEP; t += 2) {
        float inverse[2], delta[2];
        for (int r = 0; r < 2; r++)
            inverse[r] = backward_row(s->scores + (t + r) * width, s->dP + (t + r) * width, s->kept + r * row_masks,
                                      delta + r, at.length, width, scale, at.dropout,
                                      (uint32_t)(at.start + first + t + r), (uint32_t)at.head);
        for (int64_t v = 0; v < width / LANES; v++) {
            __m256i p[2], ds[2];
            for (int r = 0; r < 2; r++) {
                int64_t column = (t + r) * width + v * LANES;
                __m512 P = _mm512_mul_ps(_mm512_loadu_ps(s->scores + column), _mm512_set1_ps(inverse[r]));
                __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(s->dP + column), _mm512_set1_ps(delta[r]));
                ds[r] = to_bf16(_mm512_mul_ps(_mm512_mul_ps(P, factor), slope));
                p[r] = to_bf16(_mm512_maskz_mul_ps(s->kept[r * row_masks + v], P, keep));
                _mm256_storeu_si256((__m256i *)(s->ds + column), ds[r]);
            }
            *(words *)(s->p_pairs + t / 2 * width + v * LANES) = paired(p[0], p[1]);
            *(words *)(s->ds_pairs + t / 2 * width + v * LANES) = paired(ds[0], ds[1]);
        }
    }
    for (int64_t j = 0; j < width; j += SIZE) {
        turn_tile((uint32_t *)(s->pT + j * BLOCK + slot * STEP), BLOCK / 2, s->p_pairs + j, width);
        turn_tile((uint32_t *)(s->dsT + j * BLOCK + slot * STEP), BLOCK / 2, s->ds_pairs + j, width);
    }
    product_bf16(s->out, dim, s->ds, width, s->k_rows, SIZE, dim, dim, width, 0);
    scatter_rows(dqkv, s->out, NULL, at, first, STEP, 0, 3);
}

static void bf16_backward(head_t at, const uint16_t *qkv, const uint16_t *dout, uint16_t *dqkv, float scale,
                           const space_t *s) {
    int64_t width = s->width, dim = at.dim;
    gather_head(s->q, qkv, at, width, 0, 3), gather_head(s->k, qkv, at, width, 1, 3);
    gather_head(s->v, qkv, at, width, 2, 3), gather_head(s->dO, dout, at, width, 0, 1);
    pack_turned(s->kT, s->k, width, dim), pack_turned(s->vT, s->v, width, dim);
    pack_paired(s->k_rows, s->k, width, dim);
    for (int64_t first = 0; first < width; first += BLOCK) {
        int64_t queries = least(BLOCK, width - first);
        for (int64_t slot = 0; slot < queries / STEP; slot++)
            backward_step(at, first + slot * STEP, slot, dqkv, scale, s);
        pack_paired(s->q_rows, s->q + first * dim, queries, dim);
        pack_paired(s->dO_rows, s->dO + first * dim, queries, dim);
        for (int64_t j = 0; j < width; j += STEP) {
            const uint16_t *pT = s->pT + j * BLOCK, *dsT = s->dsT + j * BLOCK;
            product_bf16(s->dv + j * dim, dim, pT, BLOCK, s->dO_rows, SIZE, dim, dim, queries, first > 0);
            product_bf16(s->dk + j * dim, dim, dsT, BLOCK, s->q_rows, SIZE, dim, dim, queries, first > 0);
        }
    }
    scatter_rows(dqkv, s->dk, NULL, at, 0, width, 1, 3), scatter_rows(dqkv, s->dv, NULL, at, 0, width, 2, 3);
}

/* The forward pass if `dout` is NULL, else the gradient of qkv. `dim` is a multiple of DEPTH, and the caller has
   checked `have_bf16_products`. Returns 1 without memory for the scratch space. */
int attention_in_bf16(const uint16_t *qkv, const int64_t *offsets, const int64_t *seed, const uint16_t *dout,
                      uint16_t *out, int64_t sequences, int64_t longest, int64_t heads, int64_t dim,
                      float softmax_scale, int64_t stream, int32_t threshold, float scale, int threads) {
    dropout_t drop = read_dropout(seed, stream, threshold, scale);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        space_t space;
        char *memory = aligned_alloc(64, lay_out(&space, NULL, round_up(longest, DEPTH), dim));
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        begin_products();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < sequences * heads; task++) {
            head_t at = find_head(offsets, task, heads, dim, drop);
            if (!memory || !at.length) continue;
            lay_out(&space, memory, round_up(at.length, DEPTH), dim);
            if (dout) bf16_backward(at, qkv, dout, out, softmax_scale, &space);
            else bf16_forward(at, qkv, out, softmax_scale, &space);
        }
        end_products();
        free(memory);
    }
    return failed;
}
#endif
