/* The projection of `mlm_head.py` on the vocabulary, with its softmax, forward and backward. Nothing of size M x V is
   stored: a task is a tile of TILE words; for a panel of at most PANEL positions at a time, its logits stay in the
   cache. Positions lie in the lanes of vectors, so that softmax's sums over words are no sums across lanes.

   Products are in bf16 for a bf16 `hidden` (the caller has checked `have_bf16_products`), else in fp32; both have fp32
   sums. Word vectors are rounded to the type of `hidden` first. Words beyond the vocabulary have a bias of -inf,
   positions beyond M a logsumexp of inf: so both have probabilities of 0, and need no masks. */

#include <math.h>
#include <stdlib.h>

#include "products_bf16.h"
#include "vectors.h"

#define TILE 128   /* words; as in sample_replace_reference.py */
#if VECTORS == 3
#define PANEL 96   /* whole strips of `product` */
#else
#define PANEL 128
#endif
#define PITCH (PANEL + LANES)          /* an odd number of cache lines from row to row (`row_of` says why) */
#define HALF_PITCH (PANEL + 2 * LANES) /* the same for rows of bf16 */
#define CHUNK 1024 /* positions whose gradients are summed at a time in the backward pass */
#define GROUPS 16  /* of tiles; each has its own sum of the gradients of `hidden` */

#if defined(__AVX512BF16__)
#define IN_BF16(head) ((head)->in_bf16)
#else
#define IN_BF16(head) 0
#endif

typedef struct {
    const void *hidden, *embedding;
    const float *bias;
    int64_t vocabulary, size; /* V, E */
    int in_bf16, embedding_bf16;
} head_t;

/* What a thread needs for one tile. */
typedef struct {
    float *words, *logits, *dwords;    /* [TILE, row_of(E)], [TILE, PITCH], [TILE, row_of(E)] */
    uint16_t *halves, *turned;         /* bf16: the words [TILE, E] and their transpose [E, TILE] */
    uint16_t *errors;                  /* bf16: [TILE, HALF_PITCH] */
    uint32_t *pairs;                   /* bf16: [TILE / 2, E], and dlogits as a right-hand side */
    float bias[TILE], dbias[TILE];
} space_t;

/* Sets the pointers to consecutive parts from `base` on and returns the bytes (all that counts if `base` is NULL). */
static int64_t lay_out(space_t *at, char *base, int64_t size) {
    int64_t used = 0;
#define TAKE(part, bytes) (at->part = (void *)(base + used), used += round_up(bytes, 64))
    TAKE(words, 4 * TILE * row_of(size)), TAKE(logits, 4 * TILE * PITCH), TAKE(dwords, 4 * TILE * row_of(size));
    TAKE(halves, 2 * TILE * size), TAKE(turned, 2 * TILE * size), TAKE(errors, 2 * TILE * HALF_PITCH);
    TAKE(pairs, 2 * TILE * (size > PANEL ? size : PANEL));
#undef TAKE
    return used;
}

/* The calling thread's own space, to be freed. NULL without memory, and then `failed` is set. */
static char *own_space(space_t *at, int64_t size, int *failed) {
    char *memory = aligned_alloc(64, lay_out(at, NULL, size));
    if (!memory) {
#pragma omp atomic write
        *failed = 1;
    } else
        lay_out(at, memory, size);
    return memory;
}

/* ---------------------------------------------------------------- operands */

/* Positions of the panel from `start` on, rounded up to what the products take. */
INLINE int64_t panel_width(int64_t start, int64_t rows) { return round_up(least(PANEL, rows - start), 2 * LANES); }

/* Numbers (fp32 or bf16) of a packed operand of `rows` positions: whole panels of [E, PANEL]. */
INLINE int64_t packed_size(int64_t rows, int64_t size) { return (rows + PANEL - 1) / PANEL * PITCH * row_of(size); }
INLINE int64_t packed_at(int64_t start, int64_t size) { return start / PANEL * PITCH * row_of(size); }

/* Packs `rows` positions from `first` on as right-hand sides, panel by panel: `turned`, hidden's transpose (rows of
   PITCH), and `plain`, itself (rows of row_of(E); may be NULL). In bf16 both are tiles of `products_bf16.h`.
   `copy` has room for [PANEL, E]. */
static void pack_hidden(const head_t *head, void *turned, void *plain, float *copy, int64_t first, int64_t rows) {
    int64_t size = head->size;
    for (int64_t start = 0; start < rows; start += PANEL) {
        int64_t count = least(PANEL, rows - start), width = panel_width(start, rows), from = (first + start) * size;
#if defined(__AVX512BF16__)
        if (head->in_bf16) {
            uint16_t *halves = (uint16_t *)copy;
            memcpy(halves, (const uint16_t *)head->hidden + from, 2 * count * size);
            memset(halves + count * size, 0, 2 * (width - count) * size);
            pack_turned((words *)((uint16_t *)turned + packed_at(start, size)), halves, width, size);
            if (plain) pack_paired((words *)((uint16_t *)plain + packed_at(start, size)), halves, width, size);
            continue;
        }
#endif
        float *to = (float *)turned + packed_at(start, size);
        load(copy, head->hidden, from, count * size, 0);
        memset(copy + count * size, 0, 4 * (width - count) * size);
        for (int64_t e = 0; e < size; e++)
            for (int64_t m = 0; m < width; m++) to[e * PITCH + m] = copy[m * size + e];
        for (int64_t m = 0; plain && m < count; m++)
            memcpy((float *)plain + packed_at(start, size) + m * row_of(size), copy + m * size, 4 * size);
    }
}

/* Loads the word vectors of a tile, rounded to the type of `hidden`, and their biases. */
static void load_words(const head_t *head, space_t *at, int64_t first) {
    int64_t size = head->size, count = least(TILE, head->vocabulary - first);
    for (int64_t w = 0; w < TILE; w++) {
        float *row = at->words + w * row_of(size);
        at->bias[w] = w < count ? head->bias[first + w] : -INFINITY;
        if (w < count) load(row, head->embedding, (first + w) * size, size, head->embedding_bf16);
        else memset(row, 0, 4 * size);
        if (IN_BF16(head)) store(at->halves, w * size, row, size, 1);
    }
}

#if defined(__AVX512BF16__)
/* Transposes the tile's words. */
static void turn_words(space_t *at, int64_t size) {
    for (int64_t w = 0; w < TILE; w += 2)
        for (int64_t e = 0; e < size; e += LANES) {
            const uint16_t *row = at->halves + w * size + e;
            *(words *)(at->pairs + w / 2 * size + e) = paired(_mm256_loadu_si256((const __m256i *)row),
                                                              _mm256_loadu_si256((const __m256i *)(row + size)));
        }
    for (int64_t e = 0; e < size; e += SIZE)
        for (int64_t w = 0; w < TILE; w += DEPTH)
            turn_tile((uint32_t *)(at->turned + e * TILE + w), TILE / 2, at->pairs + w / 2 * size + e, size);
}
#endif

/* Logits of the tile's words for a panel, without biases. */
static void panel_logits(const head_t *head, space_t *at, const void *turned, int64_t start, int64_t width) {
    int64_t size = head->size, from = packed_at(start, size);
#if defined(__AVX512BF16__)
    if (head->in_bf16) {
        const words *B = (const words *)((const uint16_t *)turned + from);
        for (int64_t w = 0; w < TILE; w += 2 * SIZE)
            product_bf16(at->logits + w * PITCH, PITCH, at->halves + w * size, size, B, size / 2, SIZE, width, size, 0);
        return;
    }
#endif
    product(at->logits, PITCH, at->words, row_of(size), 1, (const float *)turned + from, PITCH, TILE, width, size, 0);
}

/* ---------------------------------------------------------------- forward */

/* For each position of a panel, over the tile's words: the largest logit, and the sums of e^(logit - largest) at
   temperature 1 and of e^((logit - largest) * inverse), the draw's (`drawn` may be NULL). */
static void tile_sums(float *highest, float *total, float *drawn, const space_t *at, int64_t width, float inverse) {
    for (int64_t j = 0; j < width; j += WIDTH) {
        floats best = (floats){0} - INFINITY, sum = {0}, drawn_sum = {0};
        for (int w = 0; w < TILE; w++) {
            floats *logit = (floats *)(at->logits + w * PITCH + j);
            *logit += at->bias[w];
            best = larger(*logit, best);
        }
        floats shift = (floats)((flags)best & (best > -INFINITY)); /* 0 if all are -inf, or NaN */
        for (int w = 0; w < TILE; w++) {
            floats below = *(floats *)(at->logits + w * PITCH + j) - shift;
            sum += exponentials(below);
            if (drawn) drawn_sum += exponentials(below * inverse);
        }
        *(floats *)(highest + j) = best, *(floats *)(total + j) = sum;
        if (drawn) *(floats *)(drawn + j) = drawn_sum;
    }
}

/* `highest`, `total` and `drawn` (may be NULL) of `tile_sums` for all tiles, [tiles, M]. Returns 1 without memory for
   the scratch space. */
int mlm_head_sums(const void *hidden, const void *embedding, const float *bias, float *highest, float *total,
                  float *drawn, int64_t rows, int64_t vocabulary, int64_t size, float inverse, int hidden_bf16,
                  int embedding_bf16, int threads) {
    head_t head = {hidden, embedding, bias, vocabulary, size, hidden_bf16, embedding_bf16};
    float *turned = aligned_alloc(64, round_up(4 * (packed_size(rows, size) + PANEL * size), 64));
    int failed = 0;
    if (!turned) return 1;
    pack_hidden(&head, turned, NULL, turned + packed_size(rows, size), 0, rows);
#pragma omp parallel num_threads(threads)
    {
        space_t space;
        char *memory = own_space(&space, size, &failed);
        if (IN_BF16(&head)) begin_products();
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < (vocabulary + TILE - 1) / TILE; tile++) {
            if (!memory) continue;
            float sums[3][PANEL];
            float *all[3] = {highest, total, drawn};
            load_words(&head, &space, tile * TILE);
            for (int64_t start = 0; start < rows; start += PANEL) {
                int64_t width = panel_width(start, rows);
                panel_logits(&head, &space, turned, start, width);
                tile_sums(sums[0], sums[1], drawn ? sums[2] : NULL, &space, width, inverse);
                for (int i = 0; i < (drawn ? 3 : 2); i++)
                    memcpy(all[i] + tile * rows + start, sums[i], 4 * least(PANEL, rows - start));
            }
        }
        if (IN_BF16(&head)) end_products();
        free(memory);
    }
    free(turned);
    return failed;
}

/* out [M, TILE]: each position's logits of the words of its own tile; -inf beyond the vocabulary. */
int mlm_head_tiles(const void *hidden, const void *embedding, const float *bias, const int64_t *tiles, float *out,
                   int64_t rows, int64_t vocabulary, int64_t size, int hidden_bf16, int embedding_bf16, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *row = malloc(10 * size), *word = row + size;
        uint16_t *halves = (uint16_t *)(word + size);
        if (!row) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) {
            if (!row) continue;
            load(row, hidden, m * size, size, hidden_bf16);
            for (int64_t i = 0; i < TILE; i++) {
                int64_t v = tiles[m] * TILE + i;
                float logit = 0.0f;
                if (v >= vocabulary) { out[m * TILE + i] = -INFINITY; continue; }
                load(word, embedding, v * size, size, embedding_bf16);
                if (hidden_bf16) store(halves, 0, word, size, 1), load(word, halves, 0, size, 1);
#pragma omp simd reduction(+ : logit)
                for (int64_t e = 0; e < size; e++) logit += row[e] * word[e];
                out[m * TILE + i] = logit + bias[v];
            }
        }
        free(row);
    }
    return failed;
}

/* ---------------------------------------------------------------- backward */

typedef struct { float logsumexp[PANEL], grad[PANEL]; int32_t target[PANEL]; } panel_t;

/* grad (P - onehot) of one word for the positions from j on. */
INLINE floats errors_at(const space_t *at, const panel_t *panel, int w, int64_t first, int64_t j) {
    floats logit = *(floats *)(at->logits + w * PITCH + j) + at->bias[w];
    floats P = exponentials(logit - *(floats *)(panel->logsumexp + j)), one = (floats){0} + 1.0f;
    flags hit = *(flags *)(panel->target + j) == (int32_t)(first + w);
    return (P - (floats)((flags)one & hit)) * *(floats *)(panel->grad + j);
}

/* In fp32: errors replace the logits; then they are multiplied with hidden, and with the words. */
static void panel_gradients(const head_t *head, space_t *at, const panel_t *panel, const float *plain, float *dhidden,
                            int64_t first, int64_t count, int64_t width, int add) {
    int64_t size = head->size, row = row_of(size);
    for (int w = 0; w < TILE; w++) {
        floats sum = {0};
        for (int64_t j = 0; j < width; j += WIDTH) {
            floats errors = errors_at(at, panel, w, first, j);
            *(floats *)(at->logits + w * PITCH + j) = errors, sum += errors;
        }
        at->dbias[w] += sum_of(sum);
    }
    product(at->dwords, row, at->logits, PITCH, 1, plain, row, TILE, size, count, add);
    product(dhidden, row, at->logits, 1, PITCH, at->words, row, count, size, TILE, 1);
}

#if defined(__AVX512BF16__)
/* The same in bf16, where `dhidden` is transposed: [E, PITCH]. */
static void panel_gradients_bf16(const head_t *head, space_t *at, const panel_t *panel, const words *plain,
                                 float *dhidden, int64_t first, int64_t width, int add) {
    int64_t size = head->size, row = row_of(size), columns = width / SIZE;
    for (int w = 0; w < TILE; w += 2) {
        floats sum[2] = {{0}, {0}};
        for (int64_t j = 0; j < width; j += SIZE) {
            __m256i both[2];
            for (int i = 0; i < 2; i++) {
                floats errors = errors_at(at, panel, w + i, first, j);
                sum[i] += errors, both[i] = to_bf16((__m512)errors);
                _mm256_storeu_si256((__m256i *)(at->errors + (w + i) * HALF_PITCH + j), both[i]);
            }
            int64_t tile = w / DEPTH * columns + j / SIZE;
            ((words *)at->pairs)[tile * SIZE + w % DEPTH / 2] = paired(both[0], both[1]);
        }
        for (int i = 0; i < 2; i++) at->dbias[w + i] += sum_of(sum[i]);
    }
    for (int64_t w = 0; w < TILE; w += 2 * SIZE)
        product_bf16(at->dwords + w * row, row, at->errors + w * HALF_PITCH, HALF_PITCH, plain, SIZE, size, size, width,
                     add);
    for (int64_t e = 0; e < size; e += 2 * SIZE)
        product_bf16(dhidden + e * PITCH, PITCH, at->turned + e * TILE, TILE, (words *)at->pairs, SIZE, columns * SIZE,
                     width, TILE, 1);
}
#endif

/* The gradients of a tile's words, added to those of earlier positions if `add`, and what they add to dhidden. */
static void tile_gradients(const head_t *head, space_t *at, const panel_t *panels, const float *turned,
                           const float *plain, float *dhidden, float *dembedding, float *dbias, int64_t first,
                           int64_t rows, int add) {
    int64_t size = head->size, count = least(TILE, head->vocabulary - first);
    load_words(head, at, first);
#if defined(__AVX512BF16__)
    if (head->in_bf16) turn_words(at, size);
#endif
    memset(at->dbias, 0, sizeof at->dbias);
    for (int64_t start = 0; start < rows; start += PANEL) {
        int64_t width = panel_width(start, rows), from = packed_at(start, size);
        panel_logits(head, at, turned, start, width);
#if defined(__AVX512BF16__)
        if (head->in_bf16) {
            const words *B = (const words *)((const uint16_t *)plain + from);
            panel_gradients_bf16(head, at, panels + start / PANEL, B, dhidden + from, first, width, start > 0);
            continue;
        }
#endif
        panel_gradients(head, at, panels + start / PANEL, plain + from, dhidden + from, first,
                        least(PANEL, rows - start), width, start > 0);
    }
    for (int64_t w = 0; w < count; w++) {
        float *to = dembedding + (first + w) * size;
        const float *from = at->dwords + w * row_of(size);
        for (int64_t e = 0; e < size; e++) to[e] = add ? to[e] + from[e] : from[e];
        dbias[first + w] = add ? dbias[first + w] + at->dbias[w] : at->dbias[w];
    }
}

static void fill_panels(panel_t *panels, const float *logsumexp, const float *grad, const int64_t *target,
                        int64_t rows) {
    for (int64_t m = 0; m < round_up(rows, PANEL); m++) {
        panel_t *panel = panels + m / PANEL;
        panel->logsumexp[m % PANEL] = m < rows ? logsumexp[m] : INFINITY;
        panel->grad[m % PANEL] = m < rows ? grad[m] : 0.0f;
        panel->target[m % PANEL] = m < rows ? (int32_t)target[m] : -1;
    }
}

/* dhidden [rows, E] = the sum of the groups' parts, which are packed like hidden. */
static void sum_parts(const head_t *head, float *dhidden, const float *parts, int64_t groups, int64_t rows) {
    int64_t size = head->size, part = packed_size(rows, size);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t e = 0; e < size; e++) {
            int64_t inside = IN_BF16(head) ? e * PITCH + m % PANEL : m % PANEL * row_of(size) + e;
            const float *from = parts + packed_at(m, size) + inside;
            float total = 0.0f;
            for (int64_t g = 0; g < groups; g++) total += from[g * part];
            dhidden[m * size + e] = total;
        }
}

/* Gradients of hidden, embedding and bias in fp32. The work is divided among groups of tiles, not threads, so that no
   sum depends on their number; there are as many as need no more memory than the embedding. Returns 1 without memory
   for the scratch space. */
int mlm_head_gradients(const void *hidden, const void *embedding, const float *bias, const int64_t *target,
                       const float *logsumexp, const float *grad, float *dhidden, float *dembedding, float *dbias,
                       int64_t rows, int64_t vocabulary, int64_t size, int hidden_bf16, int embedding_bf16,
                       int threads) {
    head_t head = {hidden, embedding, bias, vocabulary, size, hidden_bf16, embedding_bf16};
    int64_t chunk = least(rows, CHUNK), part = packed_size(chunk, size), tiles = (vocabulary + TILE - 1) / TILE;
    int64_t groups = least(GROUPS, least(tiles, vocabulary / chunk));
    groups = groups < 1 ? 1 : groups;
    int failed = 0;
    float *turned = aligned_alloc(64, round_up(4 * ((2 + groups) * part + PANEL * size), 64));
    panel_t *panels = malloc((chunk + PANEL - 1) / PANEL * sizeof(panel_t));
    if (!turned || !panels) { free(turned), free(panels); return 1; }
    float *plain = turned + part, *copy = plain + part, *parts = copy + PANEL * size;
    for (int64_t first = 0; first < rows; first += CHUNK) {
        int64_t count = least(CHUNK, rows - first);
        pack_hidden(&head, turned, plain, copy, first, count);
        fill_panels(panels, logsumexp + first, grad + first, target + first, count);
#pragma omp parallel num_threads(threads)
        {
            space_t space;
            char *memory = own_space(&space, size, &failed);
            if (IN_BF16(&head)) begin_products();
#pragma omp for schedule(dynamic)
            for (int64_t group = 0; group < groups; group++) {
                float *own = parts + group * packed_size(count, size);
                memset(own, 0, 4 * packed_size(count, size));
                for (int64_t tile = group * tiles / groups; memory && tile < (group + 1) * tiles / groups; tile++)
                    tile_gradients(&head, &space, panels, turned, plain, own, dembedding, dbias, tile * TILE, count,
                                   first > 0);
            }
            if (IN_BF16(&head)) end_products();
            free(memory);
        }
        sum_parts(&head, dhidden + first * size, parts, groups, count);
    }
    free(turned), free(panels);
    return failed;
}
