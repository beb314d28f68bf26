/* The reverse KL of one row at a time, with its gradient and metrics, while the row stays in the CPU's cache.
 *
 * What `trb.losses.terms` does with some thirty sweeps of tensors (which is the semantics of record), in three. With x, y
 * the logits of student and teacher at the temperature, below their maxima, over the shared events, P, Q their laws and
 * r = log P - log Q:
 *
 *   whole vocabulary:   loss = sum P r,                            d loss / d x = P (r - loss)
 *   student's top k S:  loss = (1 / Z) sum_S [P r - P + Q],        d loss / d x = (1 / Z) (P r 1_S - P sum_S P r)
 *
 * where Z = sum_S P is held fixed. Of equal logits at the edge of S the first is taken.
 *
 * Left out: rows where the loss is infinite or not a number, which are flagged (see `read_logits` and `sum_up`), and everything
 * about batches, threads and memory, which is `trb.losses.native`.
 */

#include "rows.h"

enum { MOST_SUPPORT = 1024, MOST_STOPS = 64, NUMBERS = 7 };

/* What is the same for all rows; the arguments of `reverse_kl_rows` say what it is. */
typedef struct {
    int64_t rows_of_head, size, support;
    float inverse_temperature;
    const int64_t *stops;
    int64_t stop_count;
} Shape;

typedef struct {
    const Shape *shape;
    float *x, *y; /* logits, then: e^x of the student, and the log-ratio of both below their maxima */
    float top_x, top_y;
    float stop_share[MOST_STOPS]; /* of each stop id in the event that they are, for the student */
    double log_p, log_q, kl, entropy_p, entropy_q;
    int64_t chosen[MOST_SUPPORT]; /* the support, and the logits there */
    float chosen_x[MOST_SUPPORT], chosen_y[MOST_SUPPORT];
} Row;

INLINE void store(void *row, int64_t i, float value, int bf16) {
    if (bf16) {
        const uint32_t bits = (uint32_t)bits_of(value); /* finite: rounded to the nearest even */
        ((uint16_t *)row)[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    } else {
        ((float *)row)[i] = value;
    }
}

/* Logits at the temperature and their maximum; whether none is infinite or NaN and any is possible. */
INLINE int read_logits(const void *logits, int bf16, const Shape *shape, float *restrict out, float *top) {
    int32_t highest = INT32_MIN, lowest = INT32_MAX;
    for (int64_t i = 0; i < shape->size; i++) {
        const float value = load(logits, i, bf16) * shape->inverse_temperature;
        const int32_t order = order_of(value);
        highest = order > highest ? order : highest;
        lowest = order < lowest ? order : lowest;
        out[i] = value;
    }
    *top = float_of(highest ^ ((highest >> 31) & INT32_MAX));
    return highest > order_of(ABSENT) && highest < order_of(INFINITY) && lowest >= order_of(-INFINITY);
}

/* Moves the probability of every stop id to the first one; fills each id's share of it if asked for. */
static void fold(float *logits, const Shape *shape, float *top, float *share) {
    if (shape->stop_count < 2) return;
    float highest = -INFINITY;
    for (int64_t j = 0; j < shape->stop_count; j++) highest = fmaxf(highest, logits[shape->stops[j]]);
    double total = 0;
    if (highest > ABSENT)
        for (int64_t j = 0; j < shape->stop_count; j++) total += exp((double)logits[shape->stops[j]] - highest);
    for (int64_t j = 0; share && j < shape->stop_count; j++)
        share[j] = total > 0 ? (float)(exp((double)logits[shape->stops[j]] - highest) / total) : 0.0f;
    for (int64_t j = 1; j < shape->stop_count; j++) logits[shape->stops[j]] = -INFINITY;
    const float folded = total > 0 ? (float)(highest + log(total)) : -INFINITY;
    logits[shape->stops[0]] = folded;
    *top = fmaxf(*top, folded);
}

/* The order of the heap below: the least likely of what is kept is at the root, of equal ones the last. */
static inline int before(const Row *row, int64_t a, int64_t b) {
    return row->chosen_x[a] < row->chosen_x[b] || (row->chosen_x[a] == row->chosen_x[b] && row->chosen[a] > row->chosen[b]);
}

static void swap(Row *row, int64_t a, int64_t b) {
    const float value = row->chosen_x[a];
    const int64_t index = row->chosen[a];
    row->chosen_x[a] = row->chosen_x[b], row->chosen[a] = row->chosen[b];
    row->chosen_x[b] = value, row->chosen[b] = index;
}

static void sink(Row *row, int64_t at, int64_t count) {
    for (;;) {
        int64_t least = at;
        for (int64_t child = 2 * at + 1; child <= 2 * at + 2 && child < count; child++)
            if (before(row, child, least)) least = child;
        if (least == at) return;
        swap(row, at, least);
        at = least;
    }
}

/* The student's most likely tokens: a heap of as many as are wanted, which few chunks of the vocabulary get past. */
static void choose_support(Row *row) {
    const float *restrict const x = row->x;
    const int64_t count = row->shape->support, size = row->shape->size;
    for (int64_t i = 0; i < count; i++) row->chosen[i] = i, row->chosen_x[i] = x[i];
    for (int64_t at = count / 2; at-- > 0;) sink(row, at, count);
    for (int64_t start = count; start < size; start = chunk_end(start, size)) {
        const int64_t end = chunk_end(start, size);
        float highest = -INFINITY;
        for (int64_t i = start; i < end; i++) highest = x[i] > highest ? x[i] : highest;
        if (highest <= row->chosen_x[0]) continue;
        for (int64_t i = start; i < end; i++) {
            if (x[i] <= row->chosen_x[0]) continue;
            row->chosen[0] = i, row->chosen_x[0] = x[i];
            sink(row, 0, count);
        }
    }
    for (int64_t j = 0; j < count; j++) row->chosen_y[j] = row->y[row->chosen[j]];
}

/* Everything that needs no gradient; leaves e^x and the log-ratio below the maxima in x and y. Whether the loss is finite:
 * where the teacher forbids what the student may draw, it is not. */
static int sum_up(Row *row) {
    const int64_t size = row->shape->size;
    const float top_x = row->top_x, top_y = row->top_y;
    float *restrict const x_both = row->x, *restrict const y_both = row->y;
    double total_p = 0, total_q = 0, first_px = 0, first_qy = 0, first_pr = 0;
    for (int64_t start = 0; start < size; start = chunk_end(start, size)) {
        const int64_t end = chunk_end(start, size);
        float sum_p = 0, sum_q = 0, sum_px = 0, sum_qy = 0, sum_pr = 0;
        for (int64_t i = start; i < end; i++) {
            const float x = x_both[i] - top_x, y = y_both[i] - top_y;
            const float p = exp_or_zero(x), q = exp_or_zero(y);
            const float r = x > ABSENT ? x - y : 0.0f;
            sum_p += p;
            sum_q += q;
            /* Tokens without probability must not bring their logit, perhaps -inf, into a product. */
            sum_px += p * (x > EXP_FLOOR ? x : EXP_FLOOR);
            sum_qy += q * (y > EXP_FLOOR ? y : EXP_FLOOR);
            sum_pr += p * r;
            x_both[i] = p;
            y_both[i] = r;
        }
        total_p += sum_p;
        total_q += sum_q;
        first_px += sum_px;
        first_qy += sum_qy;
        first_pr += sum_pr;
    }
    row->log_p = log(total_p);
    row->log_q = log(total_q);
    row->entropy_p = row->log_p - first_px / total_p;
    row->entropy_q = row->log_q - first_qy / total_q;
    const double divergence = first_pr / total_p - row->log_p + row->log_q;
    row->kl = fmax(divergence, 0);
    return isfinite(divergence);
}

/* Loss on the support and its mass; leaves in `chosen_y` the gradient that only the support has, before any scale. */
static double on_support(Row *row, double *mass, double *pull) {
    double sum = 0, total = 0, pulls = 0;
    for (int64_t j = 0; j < row->shape->support; j++) {
        const int there = row->chosen_x[j] > ABSENT, taught = row->chosen_y[j] > ABSENT;
        const double log_p = (double)row->chosen_x[j] - row->top_x - row->log_p;
        const double log_q = (double)row->chosen_y[j] - row->top_y - row->log_q;
        const double p = there ? exp(log_p) : 0, q = taught ? exp(log_q) : 0;
        const double weighted = p > 0 ? p * (log_p - log_q) : 0;
        total += p;
        sum += weighted - p + q;
        pulls += weighted;
        row->chosen_y[j] = (float)weighted;
    }
    *mass = total;
    *pull = pulls / total;
    return fmax(sum / total, 0);
}

/* The gradient by the events' logits; then by those of the stop ids that one of them stands for. */
INLINE void differentiate(const Row *row, double scale, double mass, double pull, void *restrict out, int bf16) {
    const Shape *const shape = row->shape;
    const float *restrict const p = row->x, *restrict const r = row->y;
    const double share = scale / exp(row->log_p);
    const int64_t stop = shape->stops[0];
    float at_stop;
    if (shape->support) {
        const float each = (float)(-pull * share);
        at_stop = p[stop] * each;
        for (int64_t i = 0; i < shape->size; i++) store(out, i, p[i] * each, bf16);
        for (int64_t j = 0; j < shape->support; j++) {
            const int64_t i = row->chosen[j];
            const float value = p[i] * each + (float)(row->chosen_y[j] * scale / mass);
            store(out, i, value, bf16);
            if (i == stop) at_stop = value;
        }
    } else {
        const float shift = (float)(row->log_q - row->log_p - row->kl), each = (float)share;
        at_stop = p[stop] * (r[stop] + shift) * each;
        for (int64_t i = 0; i < shape->size; i++) store(out, i, p[i] * (r[i] + shift) * each, bf16);
    }
    for (int64_t j = 0; shape->stop_count > 1 && j < shape->stop_count; j++)
        store(out, shape->stops[j], at_stop * row->stop_share[j], bf16);
    for (int64_t i = shape->size; i < shape->rows_of_head; i++) store(out, i, 0.0f, bf16);
}

/* One row; whether it could be done. The dtypes are constants, so that each copy of the loops reads one. */
INLINE int one_row(
    Row *row, const void *student, const void *teacher, int student_bf16, int teacher_bf16, int64_t token, double weight,
    float *numbers, void *gradient
) {
    const Shape *const shape = row->shape;
    if (token < 0 || token >= shape->size) return 0;
    if (!read_logits(student, student_bf16, shape, row->x, &row->top_x)) return 0;
    if (!read_logits(teacher, teacher_bf16, shape, row->y, &row->top_y)) return 0;
    fold(row->x, shape, &row->top_x, row->stop_share);
    fold(row->y, shape, &row->top_y, NULL);
    const float token_x = row->x[token], token_y = row->y[token];
    if (shape->support) choose_support(row);
    if (!sum_up(row)) return 0;
    double mass = 1, pull = 0;
    const double loss = shape->support ? on_support(row, &mass, &pull) : row->kl;
    numbers[0] = (float)(loss * weight);
    numbers[1] = (float)row->kl;
    numbers[2] = (float)row->entropy_p;
    numbers[3] = (float)row->entropy_q;
    numbers[4] = (float)((double)token_x - row->top_x - row->log_p);
    numbers[5] = (float)((double)token_y - row->top_y - row->log_q);
    numbers[6] = (float)mass;
    if (gradient) differentiate(row, weight * shape->inverse_temperature, mass, pull, gradient, student_bf16);
    return 1;
}

/* Rows [start, end) of N; returns how many were flagged: their numbers are NaN, their gradients as they were.
 *
 * student, teacher: logits, float32 or (`*_bf16` = 1) bfloat16, rows `*_stride` elements apart, tokens adjacent.
 * rows_of_head: of the student's logits and their gradient; only the first `size` are shared with the teacher.
 * support: k of the student's top-k, at most MOST_SUPPORT; 0 for the whole vocabulary.
 * stops, stop_count: ids that are one event, the one that stands for it first; at least one, at most MOST_STOPS.
 * token: [N] events. weight: [N] factors of the losses, or NULL for 1.
 * numbers: [N, NUMBERS] loss, reverse KL, entropies of student and teacher, log-probabilities of the token, support mass.
 * gradient: by the student's logits, in their dtype, rows `gradient_stride` apart; or NULL.
 * scratch: 2 size floats for this call alone. */
int reverse_kl_rows(
    const void *student, const void *teacher, int student_bf16, int teacher_bf16, int64_t student_stride,
    int64_t teacher_stride, int64_t gradient_stride, int64_t rows_of_head, int64_t size, int64_t start, int64_t end,
    int64_t support, double temperature, const int64_t *stops, int64_t stop_count, const int64_t *token,
    const float *weight, float *numbers, void *gradient, float *scratch
) {
    const unsigned mode = without_denormals();
    const Shape shape = {rows_of_head, size, support < size ? support : 0, (float)(1 / temperature), stops, stop_count};
    const int64_t student_size = student_bf16 ? 2 : 4, teacher_size = teacher_bf16 ? 2 : 4;
    Row row = {.shape = &shape, .x = scratch, .y = scratch + size};
    int flagged = 0;
    for (int64_t n = start; n < end; n++) {
        const void *s = (const char *)student + n * student_stride * student_size;
        const void *t = (const char *)teacher + n * teacher_stride * teacher_size;
        void *g = gradient ? (char *)gradient + n * gradient_stride * student_size : NULL;
        const double w = weight ? weight[n] : 1;
        float *found = numbers + n * NUMBERS;
        const int done = student_bf16 ? (teacher_bf16 ? one_row(&row, s, t, 1, 1, token[n], w, found, g)
                                                      : one_row(&row, s, t, 1, 0, token[n], w, found, g))
                                      : (teacher_bf16 ? one_row(&row, s, t, 0, 1, token[n], w, found, g)
                                                      : one_row(&row, s, t, 0, 0, token[n], w, found, g));
        flagged += !done;
        for (int i = 0; !done && i < NUMBERS; i++) found[i] = NAN;
    }
    restore(mode);
    return flagged;
}
