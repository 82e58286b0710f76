/* k-means of many queries and the nearest points of their centroids, for CPUs; called by native.py.
 *
 * The same algorithm as kmeans.py, which explains it and stays the reference (and runs on GPUs, on float64, and where no
 * compiler was at hand). What is won here: a point's distances to all clusters stay in registers until the nearest is
 * known, and a query stops as soon as it has converged, without company.
 *
 * Shapes, row-major: points (B, T, D), mask (B, T), there (B, K), centroids (B, K, D). A block is LANES points. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

/* What one query works in. Points and centroids lie transposed, padded to whole blocks and groups. */
typedef struct {
    long n, blocks, K, Kp, D;
    long *row;         /* (n) row of each point in the caller's (T, D) */
    const float *rows; /* the caller's (T, D) */
    float *points;     /* (blocks, D, LANES) */
    float *turned;     /* (D, Kp) centroids */
    float *half;       /* (Kp) |c|^2 / 2; infinite for clusters that are not there */
    float *half_point; /* (blocks * LANES) |x|^2 / 2 */
    int32_t *label, *before;
    float *sums, *means, *moved_sums; /* (K, D) */
    long *size, *moved_size;          /* (K) */
    float *distance;                  /* (blocks * LANES) */
} Work;

static void *room(size_t bytes) {
    return aligned_alloc(64, (bytes / 64 + 1) * 64);
}

static void end(Work *w) {
    free(w->row), free(w->points), free(w->turned), free(w->half), free(w->half_point), free(w->label), free(w->before);
    free(w->sums), free(w->means), free(w->moved_sums), free(w->size), free(w->moved_size), free(w->distance);
}

static int begin(Work *w, long T, long K, long D) {
    long most = (T + LANES - 1) / LANES * LANES;
    memset(w, 0, sizeof *w);
    w->K = K, w->D = D, w->Kp = (K + 11) / 12 * 12; /* groups of 12 and of 6 divide it */
    w->row = room(sizeof(long) * (size_t)T);
    w->points = room(sizeof(float) * (size_t)(most * D));
    w->turned = room(sizeof(float) * (size_t)(w->Kp * D));
    w->half = room(sizeof(float) * (size_t)w->Kp);
    w->half_point = room(sizeof(float) * (size_t)most);
    w->label = room(sizeof(int32_t) * (size_t)most);
    w->before = room(sizeof(int32_t) * (size_t)most);
    w->sums = room(sizeof(float) * (size_t)(K * D));
    w->means = room(sizeof(float) * (size_t)(K * D));
    w->moved_sums = room(sizeof(float) * (size_t)(K * D));
    w->size = room(sizeof(long) * (size_t)K);
    w->moved_size = room(sizeof(long) * (size_t)K);
    w->distance = room(sizeof(float) * (size_t)most);
    return w->row && w->points && w->turned && w->half && w->half_point && w->label && w->before && w->sums &&
           w->means && w->moved_sums && w->size && w->moved_size && w->distance;
}

/* Copy the points that count; the last block is filled up with zeros. */
static void take_points(Work *w, const float *rows, const uint8_t *mask, long T) {
    long D = w->D;
    w->rows = rows, w->n = 0;
    for (long t = 0; t < T; t++)
        if (mask[t]) w->row[w->n++] = t;
    w->blocks = (w->n + LANES - 1) / LANES;
    for (long b = 0; b < w->blocks; b++) {
        float *block = w->points + b * LANES * D;
        const float *x[LANES];
        long there = w->n - b * LANES < LANES ? w->n - b * LANES : LANES;
        for (long l = 0; l < LANES; l++) x[l] = rows + w->row[b * LANES + (l < there ? l : 0)] * D;
        for (long d = 0; d < D; d++)
            for (long l = 0; l < LANES; l++) block[d * LANES + l] = x[l][d];
        for (long l = there; l < LANES; l++)
            for (long d = 0; d < D; d++) block[d * LANES + l] = 0.0f;
    }
}

static void take_centroids(Work *w, const float *centroids, const uint8_t *there) {
    for (long k = 0; k < w->Kp; k++) {
        float square = 0;
        for (long d = 0; d < w->D; d++) {
            float c = k < w->K ? centroids[k * w->D + d] : 0.0f;
            w->turned[d * w->Kp + k] = c;
            square += c * c;
        }
        w->half[k] = k < w->K && there[k] ? square / 2 : INFINITY;
    }
}

/* Products of a block with `group` centroids. */
INLINE void products(const float *block, const float *turned, long D, long Kp, floats *product, const int group) {
#pragma GCC unroll 12
    for (int g = 0; g < group; g++) product[g] = (floats){0};
    for (long d = 0; d < D; d++) {
        floats x = *(const floats *)(block + d * LANES);
#pragma GCC unroll 12
        for (int g = 0; g < group; g++) product[g] += x * turned[d * Kp + g];
    }
}

/* label: the nearest centroid by |c|^2 / 2 - <c, x>, the first of equals. */
INLINE void assign_with(Work *w, const int group) {
    for (long b = 0; b < w->blocks; b++) {
        floats best = (floats){0} + INFINITY;
        ints label = {0};
        for (long k = 0; k < w->Kp; k += group) {
            floats product[12];
            products(w->points + b * LANES * w->D, w->turned + k, w->D, w->Kp, product, group);
#pragma GCC unroll 12
            for (int g = 0; g < group; g++) {
                floats distance = w->half[k + g] - product[g];
                ints nearer = distance < best;
                best = (floats)(((ints)distance & nearer) | ((ints)best & ~nearer));
                label = (((ints){0} + (int32_t)(k + g)) & nearer) | (label & ~nearer);
            }
        }
        *(ints *)(w->label + b * LANES) = label;
    }
}

/* score (blocks * LANES) of one group of centroids: <c, x> - |x|^2 / 2; minus infinity behind the last point. */
INLINE void scores_with(const Work *w, long k, float *score, long stride, const int group) {
    for (long b = 0; b < w->blocks; b++) {
        floats product[12];
        products(w->points + b * LANES * w->D, w->turned + k, w->D, w->Kp, product, group);
        floats half = *(const floats *)(w->half_point + b * LANES);
#pragma GCC unroll 12
        for (int g = 0; g < group; g++) *(floats *)(score + g * stride + b * LANES) = product[g] - half;
    }
}

/* More centroids a group where there are registers for their products. */
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f"))) static void assign_512(Work *w) { assign_with(w, 12); }
__attribute__((target("avx2,fma"))) static void assign_256(Work *w) { assign_with(w, 6); }
__attribute__((target("avx512f"))) static void scores_512(const Work *w, long k, float *score, long stride) {
    scores_with(w, k, score, stride, 12);
}
__attribute__((target("avx2,fma"))) static void scores_256(const Work *w, long k, float *score, long stride) {
    scores_with(w, k, score, stride, 12);
}
#endif

/* Bits of the vectors in use: what the processor has, and at most what was asked for. */
static int most_bits = 512;

static int bits(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (most_bits >= 512 && __builtin_cpu_supports("avx512f")) return 512;
    if (most_bits >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 256;
#endif
    return 128;
}

int ckd_ray_vector_bits(int most) {
    most_bits = most;
    return bits();
}

static void assign(Work *w) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (bits() == 512) { assign_512(w); return; }
    if (bits() == 256) { assign_256(w); return; }
#endif
    assign_with(w, 6);
}

static void scores(const Work *w, long k, float *score, long stride) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (bits() == 512) { scores_512(w, k, score, stride); return; }
    if (bits() == 256) { scores_256(w, k, score, stride); return; }
#endif
    scores_with(w, k, score, stride, 12);
}

static void add(float *sum, const float *x, long D, float sign) {
    for (long d = 0; d < D; d++) sum[d] += sign * x[d];
}

/* Sums and sizes follow the points that moved; before the first assignment no point has a cluster (-1). */
static void move(Work *w) {
    for (long i = 0; i < w->n; i++) {
        int32_t now = w->label[i], old = w->before[i];
        if (now == old) continue;
        const float *x = w->rows + w->row[i] * w->D;
        add(w->sums + now * w->D, x, w->D, 1.0f), w->size[now]++;
        if (old >= 0) add(w->sums + old * w->D, x, w->D, -1.0f), w->size[old]--;
    }
}

/* Empty clusters move to the points farthest from their centroids, the farthest first; no label changes by it. */
static void relocate(Work *w, const float *centroids, const uint8_t *there) {
    long D = w->D;
    for (long i = 0; i < w->n; i++) {
        const float *x = w->rows + w->row[i] * D, *c = centroids + w->label[i] * D;
        float square = 0;
        for (long d = 0; d < D; d++) square += (x[d] - c[d]) * (x[d] - c[d]);
        w->distance[i] = square;
    }
    for (long k = 0; k < w->K; k++) {
        if (!there[k] || w->size[k]) continue;
        long far = 0;
        for (long i = 1; i < w->n; i++)
            if (w->distance[i] > w->distance[far]) far = i;
        if (!(w->distance[far] > 0)) return; /* every point left lies on a centroid */
        const float *x = w->rows + w->row[far] * D;
        long old = w->label[far];
        add(w->moved_sums + old * D, x, D, -1.0f), w->moved_size[old]--;
        memcpy(w->moved_sums + k * D, x, sizeof(float) * (size_t)D), w->moved_size[k] = 1;
        w->distance[far] = -1;
    }
}

/* means from the labels; returns the squared shift from `centroids`. */
static float update(Work *w, const float *centroids, const uint8_t *there) {
    long D = w->D, lacking = 0;
    move(w);
    for (long k = 0; k < w->K; k++) lacking += there[k] && !w->size[k];
    float *sums = w->sums;
    long *size = w->size;
    if (lacking) {
        memcpy(w->moved_sums, w->sums, sizeof(float) * (size_t)(w->K * D));
        memcpy(w->moved_size, w->size, sizeof(long) * (size_t)w->K);
        relocate(w, centroids, there);
        sums = w->moved_sums, size = w->moved_size;
    }
    float shift = 0;
    for (long k = 0; k < w->K; k++)
        for (long d = 0; d < D; d++) {
            float old = centroids[k * D + d], mean = size[k] > 0 ? sums[k * D + d] / (float)size[k] : old;
            w->means[k * D + d] = mean;
            shift += (mean - old) * (mean - old);
        }
    return shift;
}

static long lloyd(Work *w, float *centroids, const uint8_t *there, float threshold, long most) {
    memset(w->sums, 0, sizeof(float) * (size_t)(w->K * w->D));
    memset(w->size, 0, sizeof(long) * (size_t)w->K);
    for (long i = 0; i < w->n; i++) w->before[i] = -1;
    for (long iteration = 1;; iteration++) {
        take_centroids(w, centroids, there);
        assign(w);
        float shift = update(w, centroids, there);
        int same = !memcmp(w->label, w->before, sizeof(int32_t) * (size_t)w->n);
        memcpy(centroids, w->means, sizeof(float) * (size_t)(w->K * w->D));
        if (!same && (shift <= threshold || iteration == most)) {
            take_centroids(w, centroids, there);
            assign(w);
        }
        if (same || shift <= threshold || iteration == most) return iteration;
        memcpy(w->before, w->label, sizeof(int32_t) * (size_t)w->n);
    }
}

/* Queries one after the other; centroids holds the start and then the result. Returns 0, or -1 without memory. */
int ckd_ray_kmeans(const float *points, const uint8_t *mask, const uint8_t *there, const float *threshold, long B,
                   long T, long K, long D, long most, float *centroids, int64_t *label, int64_t *size,
                   int64_t *iterations) {
    Work w;
    if (!begin(&w, T, K, D)) { end(&w); return -1; }
    for (long b = 0; b < B; b++) {
        take_points(&w, points + b * T * D, mask + b * T, T);
        iterations[b] = lloyd(&w, centroids + b * K * D, there + b * K, threshold[b], most);
        for (long t = 0; t < T; t++) label[b * T + t] = -1;
        for (long k = 0; k < K; k++) size[b * K + k] = 0;
        for (long i = 0; i < w.n; i++) {
            label[b * T + w.row[i]] = w.label[i];
            size[b * K + w.label[i]]++;
        }
    }
    end(&w);
    return 0;
}

/* Put i behind all that are at least as good, and drop the last; `count` are there so far. */
static long insert(int64_t *position, float *value, long count, long most, long i, float score) {
    long at = count < most ? count : most - 1;
    for (; at > 0 && value[at - 1] < score; at--) value[at] = value[at - 1], position[at] = position[at - 1];
    value[at] = score, position[at] = i;
    return count < most ? count + 1 : most;
}

/* Whether no score of a block is above `limit`. */
static int none_above(const float *score, float limit) {
    int above = 0;
    for (long l = 0; l < LANES; l++) above |= score[l] > limit;
    return !above;
}

/* position (B, K, V): rows of the V points nearest to each centroid, nearest first, the first of equals; -1 for none. */
int ckd_ray_nearest(const float *points, const uint8_t *mask, const float *centroids, long B, long T, long K, long D,
                    long V, int64_t *position) {
    if (V < 1) return 0;
    Work w;
    int ready = begin(&w, T, K, D);
    long stride = (T + LANES - 1) / LANES * LANES;
    float *score = room(sizeof(float) * (size_t)(12 * stride)), *value = room(sizeof(float) * (size_t)V);
    uint8_t *there = room((size_t)K);
    if (!ready || !score || !value || !there) {
        end(&w), free(score), free(value), free(there);
        return -1;
    }
    memset(there, 1, (size_t)K);
    for (long b = 0; b < B; b++) {
        take_points(&w, points + b * T * D, mask + b * T, T);
        take_centroids(&w, centroids + b * K * D, there);
        for (long i = 0; i < w.blocks * LANES; i++) {
            float square = 0;
            for (long d = 0; i < w.n && d < D; d++) square += w.rows[w.row[i] * D + d] * w.rows[w.row[i] * D + d];
            w.half_point[i] = i < w.n ? square / 2 : INFINITY;
        }
        for (long k = 0; k < w.K; k++) {
            if (k % 12 == 0) scores(&w, k, score, stride);
            const float *own = score + (k % 12) * stride;
            int64_t *found = position + (b * K + k) * V;
            long count = 0;
            for (long i = 0; i < w.blocks * LANES; i++) {
                if (i % LANES == 0 && count == V && none_above(own + i, value[V - 1])) i += LANES - 1;
                else if (i < w.n && (count < V || own[i] > value[V - 1]))
                    count = insert(found, value, count, V, i, own[i]);
            }
            for (long v = 0; v < V; v++) found[v] = v < count ? w.row[found[v]] : -1;
        }
    }
    end(&w), free(score), free(value), free(there);
    return 0;
}
