/* The trust-region blend of one row at a time, while the row stays in the CPU's cache.
 *
 * What `trb.blend` does with tensors (which is the semantics of record), for rows that float32 represents well. With
 * x, y the logits of student and teacher below their maxima, p = e^x and c = y - x centred at its mean under p:
 *
 *   E_k = sum p (e^{wc} - 1) c^k / sum p,   log sum p e^{wc} = log sum p + log(1 + E_0),
 *   KL(mu || student) = w E_1 / (1 + E_0) - log(1 + E_0),
 *
 * where nothing cancels, since c has no mean. The search runs on u = sqrt(2 KL), which is almost linear in w: its
 * first guess comes from a polynomial through what is known at both ends of the path, the next ones from a power law
 * through the point before, bracketed, and from bisection if those do not end it.
 *
 * Left out: rows that need float64 or log space, which are flagged (see `solve_row`), and everything about batches,
 * threads and memory, which is `trb.blend.native`.
 */

#include "rows.h"

enum { MAX_EVALUATIONS = 60, FREE_EVALUATIONS = 8, FLAGGED = -1 };

/* Accepted shortfall below the budget, relative to it, and the part of it kept free for the rounding of the sums. */
static const double WINDOW = 8e-4;
static const double MARGIN = 2e-5;
/* Absolute doubt about a KL that comes from uncentred sums, relative to their size. */
static const double UNCENTRED_DOUBT = 1e-6;
/* A divergence below this is lost in the rounding of uncentred sums. */
static const double UNRESOLVED = 1e-7;
/* Below it, rounding of float32 log-ratios reaches the window of the divergence. */
static const double BUDGET_FLOOR = 1e-5;
/* First guess, at most, in units of the weight at which a ratio of constant variance would spend the budget. */
static const double LONGEST_GUESS = 2;
/* Up to this ratio, p e^c of what lies below EXP_FLOOR is below e^-27. */
static const float LARGEST_RATIO = 60.0f;

typedef struct {
    const void *student, *teacher;
    int64_t vocabulary;
    float top_s, top_t;
    double log_p, log_q;       /* log of the sums of e^x and e^y */
    double mean;               /* E_student[y - x] */
    double kl_end;             /* KL(teacher || student) */
    double kl_end_doubt;       /* how far off it may be */
    double variance_end;       /* of the log-ratio under the teacher */
    float centre;              /* `mean` as it was subtracted from the ratio */
    double rest;               /* E_student[c]: what was left of it */
    double second, third, fourth; /* E_student[c^k] */
    float *p, *c;
} Row;

typedef struct {
    double weight, kl;
    double growth;    /* E_0 */
    double mean;      /* E_mu[c] */
    double variance;  /* Var_mu[c] */
    double third;     /* third central moment of c under mu */
} Point;

/* Maxima of both models, or 0 when the row has NaN, no token, or a token that only one model allows. */
INLINE int find_tops(Row *row, int bf16) {
    const int32_t absent = order_of(ABSENT), infinity = order_of(INFINITY);
    int32_t top_s = INT32_MIN, top_t = INT32_MIN, low = INT32_MAX, differ = 0;
    for (int64_t i = 0; i < row->vocabulary; i++) {
        const int32_t s = order_of(load(row->student, i, bf16)), t = order_of(load(row->teacher, i, bf16));
        top_s = s > top_s ? s : top_s;
        top_t = t > top_t ? t : top_t;
        const int32_t lower = s < t ? s : t;
        low = lower < low ? lower : low;
        differ |= (s <= absent) ^ (t <= absent);
    }
    row->top_s = float_of(top_s ^ ((top_s >> 31) & INT32_MAX));
    row->top_t = float_of(top_t ^ ((top_t >> 31) & INT32_MAX));
    const int readable = top_s < infinity && top_t < infinity && low >= order_of(-INFINITY);
    return readable && !differ && top_s > absent && top_t > absent;
}

/* A divergence from uncentred sums: what is below their rounding is zero, so that equal models are equal. */
static inline double resolved(double divergence) { return divergence > UNRESOLVED ? divergence : 0; }

/* Fills p and c (not centred yet) and every sum that needs no centring; returns whether the row can be solved. */
INLINE int normalise(Row *row, int bf16) {
    const float top_s = row->top_s, top_t = row->top_t;
    float *restrict const p_out = row->p, *restrict const c_out = row->c;
    int32_t largest = INT32_MIN;
    double total_p = 0, total_q = 0, first_p = 0, first_q = 0, second_q = 0;
    for (int64_t start = 0; start < row->vocabulary; start = chunk_end(start, row->vocabulary)) {
        const int64_t end = chunk_end(start, row->vocabulary);
        float sum_p = 0, sum_q = 0, sum_pc = 0, sum_qc = 0, sum_qcc = 0;
        for (int64_t i = start; i < end; i++) {
            const float s = load(row->student, i, bf16);
            const float x = s - top_s, y = load(row->teacher, i, bf16) - top_t;
            const float p = exp_or_zero(x), q = exp_or_zero(y);
            float c = s <= ABSENT ? 0.0f : y - x;
            const int32_t order = order_of(c);
            largest = order > largest ? order : largest;
            /* Tokens without probability must not bring their ratio, perhaps 1e30, into a product. */
            c = p > 0.0f ? c : 0.0f;
            p_out[i] = p;
            c_out[i] = c;
            const float qc = q * c;
            sum_p += p;
            sum_q += q;
            sum_pc += p * c;
            sum_qc += qc;
            sum_qcc += qc * c;
        }
        total_p += sum_p;
        total_q += sum_q;
        first_p += sum_pc;
        first_q += sum_qc;
        second_q += sum_qcc;
    }
    const double mean_q = first_q / total_q;
    row->log_p = log(total_p);
    row->log_q = log(total_q);
    row->mean = first_p / total_p;
    row->kl_end = resolved(mean_q + row->log_p - row->log_q);
    row->kl_end_doubt = UNCENTRED_DOUBT * (1 + fabs(mean_q));
    row->variance_end = fmax(second_q / total_q - mean_q * mean_q, 0);
    const float largest_ratio = float_of(largest ^ ((largest >> 31) & INT32_MAX));
    return isfinite(row->mean) && isfinite(second_q) && largest_ratio - row->mean <= LARGEST_RATIO;
}

/* Centres c and takes its moments under the student; returns whether they are finite. */
static int centre(Row *row) {
    const float shift = row->centre = (float)row->mean;
    const float *restrict const p_in = row->p;
    float *restrict const c_both = row->c;
    double first = 0, second = 0, third = 0, fourth = 0;
    for (int64_t start = 0; start < row->vocabulary; start = chunk_end(start, row->vocabulary)) {
        const int64_t end = chunk_end(start, row->vocabulary);
        float sum_1 = 0, sum_2 = 0, sum_3 = 0, sum_4 = 0;
        for (int64_t i = start; i < end; i++) {
            const float c = c_both[i] - shift;
            c_both[i] = c;
            const float pc = p_in[i] * c, pcc = pc * c, pccc = pcc * c;
            sum_1 += pc;
            sum_2 += pcc;
            sum_3 += pccc;
            sum_4 += pccc * c;
        }
        first += sum_1;
        second += sum_2;
        third += sum_3;
        fourth += sum_4;
    }
    const double total = exp(row->log_p);
    row->rest = first / total;
    row->second = second / total;
    row->third = third / total;
    row->fourth = fourth / total;
    return isfinite(row->second) && isfinite(row->third) && isfinite(row->fourth);
}

static Point evaluate(const Row *row, double weight) {
    const float step = (float)weight;
    const float *restrict const p_in = row->p, *restrict const c_in = row->c;
    double sum_0 = 0, sum_1 = 0, sum_2 = 0, sum_3 = 0;
    for (int64_t start = 0; start < row->vocabulary; start = chunk_end(start, row->vocabulary)) {
        const int64_t end = chunk_end(start, row->vocabulary);
        float chunk_0 = 0, chunk_1 = 0, chunk_2 = 0, chunk_3 = 0;
        for (int64_t i = start; i < end; i++) {
            const float c = c_in[i];
            const float change = p_in[i] * expm1_bounded(step * c);
            const float first = change * c, second = first * c;
            chunk_0 += change;
            chunk_1 += first;
            chunk_2 += second;
            chunk_3 += second * c;
        }
        sum_0 += chunk_0;
        sum_1 += chunk_1;
        sum_2 += chunk_2;
        sum_3 += chunk_3;
    }
    const double total = exp(row->log_p);
    Point point = {.weight = weight, .growth = sum_0 / total};
    const double grown = 1 + point.growth, mean = point.mean = (row->rest + sum_1 / total) / grown;
    const double second = (row->second + sum_2 / total) / grown, third = (row->third + sum_3 / total) / grown;
    point.variance = fmax(second - mean * mean, 0);
    point.third = third - 3 * mean * second + 2 * mean * mean * mean;
    point.kl = fmax(weight * mean - log1p(point.growth), 0);
    return point;
}

/* The sweeps compute in float: the weight reported must be the weight that was evaluated. */
static double representable(double weight) { return (double)(float)weight; }

/* Where the quintic that agrees with u = sqrt(2 KL) to third order at the student, and in value and slope at the
 * teacher, passes the aim. KL = k2 w^2/2 + k3 w^3/3 + k4 w^4/8 + ... in the cumulants of the ratio. */
static double first_guess(const Row *row, double aim) {
    const double k2 = fmax(row->second, 1e-30), k4 = row->fourth - 3 * k2 * k2;
    const double target = sqrt(2 * aim), end = sqrt(2 * row->kl_end);
    const double skew = row->third / (3 * k2);
    const double a1 = sqrt(k2), a2 = a1 * skew, a3 = a1 * (k4 / (8 * k2) - skew * skew / 2);
    const double value = end - (a1 + a2 + a3), slope = row->variance_end / end - (a1 + 2 * a2 + 3 * a3);
    const double a4 = 5 * value - slope, a5 = slope - 4 * value;
    /* Far beyond where the leading term arrives, a quintic from a steep start may pass the aim again. */
    double low = 0, high = fmin(1, LONGEST_GUESS * target / a1);
    for (int i = 0; i < 30; i++) {
        const double w = (low + high) / 2;
        if (w * (a1 + w * (a2 + w * (a3 + w * (a4 + w * a5)))) < target) low = w;
        else high = w;
    }
    return representable(fmin(fmax((low + high) / 2, 1e-12), 1 - 1e-7));
}

/* Where the power law or exponential in w that agrees with KL to second order at the point reaches the aim. Near the
 * student KL ~ w^2, and where both models are sure of different tokens it grows exponentially: either takes one step.
 * A third-order method, like Halley's. */
static double third_order_step(const Point *at, double aim) {
    const double w = at->weight, slope = w * at->variance, curvature = at->variance + w * at->third;
    const double shape = fmin(fmax(1 - at->kl * curvature / (slope * slope), -1), 2); /* 1/2 for w^2, 0 for e^w */
    const double ratio = log(aim / at->kl);
    return w + at->kl / slope * (fabs(shape) > 1e-6 ? expm1(shape * ratio) / shape : ratio);
}

/* The largest weight whose KL stays below the budget; returns the evaluations it took, or FLAGGED. */
static int search(const Row *row, double budget, Point *best) {
    const double most = budget * (1 - MARGIN), least = budget * (1 - WINDOW), aim = (most + least) / 2;
    double low = 0, high = 1;
    double weight = row->kl_end <= most + row->kl_end_doubt ? 1 : first_guess(row, aim);
    for (int evaluations = 1; evaluations <= MAX_EVALUATIONS; evaluations++) {
        const Point point = evaluate(row, weight);
        if (!isfinite(point.kl) || !isfinite(point.third)) return FLAGGED;
        if (point.kl <= most) {
            *best = point;
            if (point.kl >= least || weight == 1) return evaluations;
            low = weight;
        } else {
            high = weight;
        }
        const double next = representable(third_order_step(&point, aim));
        const int usable = next > low && next < high && evaluations < FREE_EVALUATIONS;
        weight = usable ? next : representable((low + high) / 2);
        if (!(weight > low && weight < high)) return FLAGGED;
    }
    return FLAGGED;
}

/* log mu = (1 - w) s + w t - log_norm, from logits below their maxima so that large logits cost no digits. */
INLINE void write_log_probs(
    const Row *row, double weight, double log_norm, float *restrict out, int bf16
) {
    const float share_s = (float)(1 - weight), share_t = (float)weight, norm = (float)log_norm;
    const float top_s = row->top_s, top_t = row->top_t;
    for (int64_t i = 0; i < row->vocabulary; i++) {
        const float s = load(row->student, i, bf16);
        const float x = s - top_s, y = load(row->teacher, i, bf16) - top_t;
        out[i] = s <= ABSENT ? -INFINITY : fmaf(share_t, y, share_s * x) - norm;
    }
}

typedef struct {
    double weight, log_norm, kl_student, kl_teacher;
} Solution;

/* Sweeps over the row, or FLAGGED where it takes float64: NaN, supports that differ, a centred log-ratio above
 * LARGEST_RATIO, moments that overflow, or a positive budget below BUDGET_FLOOR. */
INLINE int64_t solve_row(
    Row *row, double budget, Solution *solution, float *out, int bf16
) {
    if (!(budget >= 0) || (budget > 0 && budget < BUDGET_FLOOR)) return FLAGGED;
    if (!find_tops(row, bf16) || !normalise(row, bf16)) return FLAGGED;
    int64_t passes = 1;
    const double norm_s = row->top_s + row->log_p, norm_t = row->top_t + row->log_q;
    double log_norm; /* of the logits below their maxima */
    if (budget == 0) {
        log_norm = row->log_p;
        *solution = (Solution){0, norm_s, 0, resolved(row->log_q - row->log_p - row->mean)};
    } else if (row->kl_end + row->kl_end_doubt <= budget * (1 - MARGIN)) {
        log_norm = row->log_q;
        *solution = (Solution){1, norm_t, row->kl_end, 0};
    } else {
        if (!centre(row)) return FLAGGED;
        Point point;
        const int evaluations = search(row, budget, &point);
        if (evaluations == FLAGGED) return FLAGGED;
        passes += 1 + evaluations;
        const double w = point.weight, growth = log1p(point.growth);
        const double mean_ratio = row->centre + row->log_p - row->log_q;
        log_norm = w < 1 ? row->log_p + w * row->centre + growth : row->log_q;
        solution->weight = w;
        solution->log_norm = (1 - w) * row->top_s + w * row->top_t + log_norm;
        solution->kl_student = point.kl;
        solution->kl_teacher = w < 1 ? fmax((w - 1) * point.mean - growth - mean_ratio, 0) : 0;
    }
    if (out) {
        write_log_probs(row, solution->weight, log_norm, out, bf16);
        passes += 1;
    }
    return passes;
}

/* Solves rows [start, end) of N; returns how many were flagged (their outputs are NaN and FLAGGED).
 *
 * student, teacher: logits, float32 or (bf16 = 1) bfloat16, rows `*_stride` elements apart, tokens adjacent.
 * budget, teacher_weight, log_norm, kl_student, kl_teacher, passes: [N]. log_probs: [N, V] or NULL.
 * scratch: 2 V floats for this call alone. */
int solve_rows(
    const void *student, const void *teacher, int bf16, int64_t student_stride, int64_t teacher_stride,
    int64_t vocabulary, int64_t start, int64_t end, const double *budget, double *teacher_weight, double *log_norm,
    double *kl_student, double *kl_teacher, int64_t *passes, float *log_probs, float *scratch
) {
    const unsigned mode = without_denormals();
    int flagged = 0;
    const int64_t size = bf16 ? 2 : 4;
    for (int64_t n = start; n < end; n++) {
        Row row = {
            .student = (const char *)student + n * student_stride * size,
            .teacher = (const char *)teacher + n * teacher_stride * size,
            .vocabulary = vocabulary,
            .p = scratch,
            .c = scratch + vocabulary,
        };
        Solution solution;
        float *out = log_probs ? log_probs + n * vocabulary : NULL;
        /* Constants, so that each copy of the loops reads one dtype. */
        passes[n] = bf16 ? solve_row(&row, budget[n], &solution, out, 1)
                         : solve_row(&row, budget[n], &solution, out, 0);
        if (passes[n] == FLAGGED) {
            flagged++;
            solution = (Solution){NAN, NAN, NAN, NAN};
            for (int64_t i = 0; out && i < vocabulary; i++) out[i] = NAN;
        }
        teacher_weight[n] = solution.weight;
        log_norm[n] = solution.log_norm;
        kl_student[n] = solution.kl_student;
        kl_teacher[n] = solution.kl_teacher;
    }
    restore(mode);
    return flagged;
}
