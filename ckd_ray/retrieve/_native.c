/* Candidates of queries from the inverted lists of centroids, for CPUs; called by centroids.py, which explains them and
 * stays the reference.
 *
 * Shapes, row-major: ids and similarity (B, Q, C), found and estimate (B, limit). */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AHEAD 16 /* passages of a list whose state is on its way from memory */

/* A candidate as one number: a higher estimate is greater, and of equal ones the lower passage. Estimates are above 0, so
 * the bits of their floats are in their order. */
static uint64_t key_of(float estimate, int32_t passage) {
    uint32_t bits;
    memcpy(&bits, &estimate, sizeof bits);
    return (uint64_t)bits << 32 | (uint32_t)(INT32_MAX - passage);
}

/* Put `key` in place i of a heap of `count` keys whose least is at the root, or below it where lesser ones are. */
static void put(uint64_t *heap, long count, long i, uint64_t key) {
    for (;;) {
        long child = 2 * i + 1;
        if (child >= count) break;
        if (child + 1 < count && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= key) break;
        heap[i] = heap[child], i = child;
    }
    heap[i] = key;
}

static int rising(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* total: of a passage; row: the query row that has counted it last. Side by side, they are one access to memory. */
typedef struct {
    float total;
    int32_t row;
} Passage;

/* bounds (K + 1) and passages: the inverted lists. every: whether a row probes all centroids.
 * Returns 0, or 1 without memory. */
int ckd_ray_candidates(const int64_t *bounds, const int32_t *passages, const int32_t *ids, const float *similarity,
                       long B, long Q, long C, int every, long limit, long num_passages, float *estimate,
                       int64_t *found) {
    Passage *state = calloc((size_t)num_passages + 1, sizeof *state);
    int32_t *touched = malloc(((size_t)num_passages + 1) * sizeof *touched);
    uint64_t *heap = malloc(((size_t)limit + 1) * sizeof *heap);
    int failed = !(state && touched && heap);
    for (long b = 0; b < B && !failed; b++) {
        long count = 0, kept = 0;
        int32_t first = (int32_t)(b * Q + 1); /* rows below it are of queries before */
        for (long q = 0; q < Q; q++) {
            const int32_t *id = ids + (b * Q + q) * C;
            const float *s = similarity + (b * Q + q) * C;
            int32_t row = first + (int32_t)q;
            long probed = every ? C : C - 1, nonzero = 0;
            for (long c = 0; c < C; c++) nonzero |= s[c] != 0.0f;
            if (!nonzero) continue; /* a zero row */
            float floor = every ? -1.0f : s[C - 1];
            /* In falling order the first entry of a passage is its best one. */
            for (long c = 0; c < probed; c++) {
                float gain = s[c] - floor;
                if (!(gain > 0.0f)) break;
                for (int64_t at = bounds[id[c]], stop = bounds[id[c] + 1]; at < stop; at++) {
                    __builtin_prefetch(state + passages[at + AHEAD < stop ? at + AHEAD : at]);
                    Passage *p = state + passages[at];
                    if (p->row == row) continue;
                    int new = p->row < first;
                    p->row = row;
                    p->total = (new ? 0.0f : p->total) + gain;
                    touched[count] = passages[at];
                    count += new;
                }
            }
        }
        for (long i = 0; i < count; i++) {
            __builtin_prefetch(state + touched[i + AHEAD < count ? i + AHEAD : i]);
            uint64_t key = key_of(state[touched[i]].total, touched[i]);
            if (kept < limit) {
                heap[kept++] = key;
                for (long j = kept == limit ? kept / 2 - 1 : -1; j >= 0; j--) put(heap, kept, j, heap[j]);
            } else if (key > heap[0]) {
                put(heap, kept, 0, key);
            }
        }
        qsort(heap, (size_t)kept, sizeof *heap, rising);
        for (long i = 0; i < kept; i++) {
            uint64_t key = heap[kept - 1 - i];
            uint32_t bits = (uint32_t)(key >> 32);
            memcpy(estimate + b * limit + i, &bits, sizeof bits);
            found[b * limit + i] = INT32_MAX - (int64_t)(uint32_t)key;
        }
    }
    free(state), free(touched), free(heap);
    return failed;
}
