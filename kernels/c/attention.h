/* One head of one sequence, as both implementations of attention address it. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include "common.h"

typedef struct {
    int64_t heads, dim, start, length, head;
    int64_t width, row; /* length rounded up to whole vectors; floats from a row of that width to the next */
    dropout_t dropout;
} head_t;

/* Sequence `task / heads`, head `task % heads`. */
INLINE head_t find_head(const int64_t *offsets, int64_t task, int64_t heads, int64_t dim, dropout_t dropout) {
    int64_t start = offsets[task / heads], length = offsets[task / heads + 1] - start;
    int64_t width = round_up(length, LANES);
    return (head_t){heads, dim, start, length, task % heads, width, row_of(width), dropout};
}

#endif
