/* What the kernels that work on one row of logits at a time have in common: reading, ordering and exponentials.
 *
 * The files are built without -ffast-math, but sums may be reassociated. Where rounding must be as written, the code
 * says fmaf. Loops over tokens run in chunks whose sums are float and are added in double.
 */

#ifndef TRB_ROWS_H
#define TRB_ROWS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#if !defined(__FP_FAST_FMAF) && !defined(__FMA__) && !defined(__aarch64__) && !defined(__arm64__)
#error "trb's kernels need a CPU with fused multiply-add"
#endif

#define INLINE static inline __attribute__((always_inline))

enum { CHUNK = 256 };

/* A token this unlikely for both models is absent: it stems from a mask. */
static const float ABSENT = -1e30f;
/* Lowest x with a normal e^x. */
static const float EXP_FLOOR = -87.0f;

INLINE float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Integers in the order of the floats, with NaN beyond the infinities: their maxima vectorise and hide no NaN. */
INLINE int32_t order_of(float value) {
    int32_t bits = bits_of(value);
    return bits ^ ((bits >> 31) & INT32_MAX);
}

INLINE float load(const void *row, int64_t i, int bf16) {
    if (bf16) return float_of((int32_t)((uint32_t)((const uint16_t *)row)[i] << 16));
    return ((const float *)row)[i];
}

/* e^x = 2^n (1 + q) with q = e^r - 1 and |r| <= log(2)/2, for x in [EXP_FLOOR, 88]; q has a relative error of 2e-8
 * before rounding. */
INLINE float reduced_expm1(float x, float *power) {
    const float n = rintf(x * 1.44269504f);
    const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float series = fmaf(r, 0x1.6c5584p-10f, 0x1.1223f8p-7f);
    series = fmaf(r, series, 0x1.5555bap-5f);
    series = fmaf(r, series, 0x1.5554b6p-3f);
    series = fmaf(r, series, 0.5f);
    *power = float_of(((int32_t)n + 127) << 23);
    return fmaf(r * r, series, r);
}

/* e^x for x <= 88, and 0 where it would not be a normal number. */
INLINE float exp_or_zero(float x) {
    float power;
    const float q = reduced_expm1(x > EXP_FLOOR ? x : EXP_FLOOR, &power);
    return x > EXP_FLOOR ? fmaf(power, q, power) : 0.0f;
}

/* e^x - 1 for x <= 88, to a few units in the last place also near 0. */
INLINE float expm1_bounded(float x) {
    float power;
    const float q = reduced_expm1(x > EXP_FLOOR ? x : EXP_FLOOR, &power);
    return fmaf(power, q, power - 1.0f);
}

static inline int64_t chunk_end(int64_t start, int64_t vocabulary) {
    return vocabulary - start < CHUNK ? vocabulary : start + CHUNK;
}

/* Denormal products are worth nothing here and take a hundred cycles each; `restore` puts the caller's mode back. */
static inline unsigned without_denormals(void) {
#ifdef __SSE__
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
#else
    return 0;
#endif
}

static inline void restore(unsigned mode) {
#ifdef __SSE__
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

#endif
