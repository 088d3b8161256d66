/* Loops over per-channel vectors and weights that gcc leaves scalar: square roots, for the sake of errno (sqrt() sets
   it unless -fno-math-errno; the instruction is correctly rounded either way), searches, for the sake of the bit they
   return, and sums of floats in double. They are done by one thread, and in calls of a microsecond they count. */
#ifndef CYBN_VECTORS_H
#define CYBN_VECTORS_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* invstd = 1 / sqrt(var + eps); 0 for a constant channel without eps, which then gives the bias instead of NaN. The two
   arrays may be one. */
static inline void cybn_inverse_sqrt(const double *var, double eps, double *invstd, ptrdiff_t n) {
    ptrdiff_t c = 0;
#if defined(__SSE2__)
    for (; c + 2 <= n; c += 2) {
        __m128d s = _mm_add_pd(_mm_loadu_pd(var + c), _mm_set1_pd(eps));
        __m128d r = _mm_div_pd(_mm_set1_pd(1), _mm_sqrt_pd(s));
        _mm_storeu_pd(invstd + c, _mm_and_pd(r, _mm_cmpneq_pd(s, _mm_setzero_pd())));
    }
#endif
    for (; c < n; c++) {
        double s = var[c] + eps;
        invstd[c] = s != 0 ? 1 / sqrt(s) : 0;
    }
}

/* Whether a value is less than least or greater than most. (A NaN is neither.) */
static inline int cybn_outside(const double *values, ptrdiff_t n, double least, double most) {
    ptrdiff_t c = 0;
    int found = 0;
#if defined(__SSE2__)
    __m128d low = _mm_set1_pd(least), high = _mm_set1_pd(most), any = _mm_setzero_pd();
    for (; c + 2 <= n; c += 2) {
        __m128d v = _mm_loadu_pd(values + c);
        any = _mm_or_pd(any, _mm_or_pd(_mm_cmplt_pd(v, low), _mm_cmpgt_pd(v, high)));
    }
    found = _mm_movemask_pd(any);
#endif
    for (; c < n; c++) found |= values[c] < least || values[c] > most;
    return found != 0;
}

/* A mask: flags, -1 where a value is not 0, else 0. */
static inline void cybn_flag(const char *values, signed char *flags, ptrdiff_t n) {
    ptrdiff_t i;
    for (i = 0; i < n; i++) flags[i] = values[i] != 0 ? -1 : 0;
}

/* How many flags are set. */
static inline double cybn_count_flags(const signed char *flags, ptrdiff_t n) {
    ptrdiff_t i = 0, count = 0;
#if defined(__SSE2__)
    __m128i zero = _mm_setzero_si128(), counts = zero;
    for (; i + 16 <= n; i += 16) {
        __m128i set = _mm_sub_epi8(zero, _mm_loadu_si128((const __m128i *)(const void *)(flags + i)));
        counts = _mm_add_epi64(counts, _mm_sad_epu8(set, zero));
    }
    long long halves[2];
    _mm_storeu_si128((__m128i *)(void *)halves, counts);
    count = (ptrdiff_t)(halves[0] + halves[1]);
#endif
    for (; i < n; i++) count -= flags[i];
    return (double)count;
}

/* What weights may be: bits of what was found. */
enum { CYBN_WRONG = 1, CYBN_ZERO = 2 };     /* a negative one, no number or none that is finite; a 0 */

#if defined(__GNUC__)
#define CYBN_LOOK_VECTORS(real, bits, largest)                                                                        \
    typedef real vector __attribute__((vector_size(16), aligned(sizeof(real)), may_alias));                           \
    typedef bits mask __attribute__((vector_size(16)));                                                               \
    enum { F = 16 / sizeof(real) };                                                                                   \
    mask right = ~(mask){}, zero = {};                                                                                \
    int j;                                                                                                            \
    for (; i + F <= n; i += F) {                                                                                      \
        const vector v = *(const vector *)(w + i);                                                                    \
        right &= (mask)(v >= 0) & (mask)(v <= largest);                                                               \
        zero |= (mask)(v == 0);                                                                                       \
    }                                                                                                                 \
    for (j = 0; j < F; j++) found |= (right[j] ? 0 : CYBN_WRONG) | (zero[j] ? CYBN_ZERO : 0);
#else
#define CYBN_LOOK_VECTORS(real, bits, largest)
#endif
#define CYBN_LOOK(real, bits, largest)                                                                                \
    static inline int cybn_look_##real(const real *w, ptrdiff_t n) {                                                  \
        ptrdiff_t i = 0;                                                                                              \
        int found = 0;                                                                                                \
        CYBN_LOOK_VECTORS(real, bits, largest)                                                                        \
        for (; i < n; i++) found |= (w[i] >= 0 && w[i] <= largest ? 0 : CYBN_WRONG) | (w[i] == 0 ? CYBN_ZERO : 0);    \
        return found;                                                                                                 \
    }
CYBN_LOOK(float, int, FLT_MAX)
CYBN_LOOK(double, long long, DBL_MAX)

/* The sum of powers of weights, 0 (of those that are not 0), 1 or 2, in double: eight sums side by side, element i in
   sum i % 8, the last ones in the first. A loop for each power. */
#if defined(__SSE2__)
#define CYBN_PAIR_float(p) _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)(p))))
#define CYBN_PAIR_double(p) _mm_loadu_pd(p)
#define CYBN_SUM_PAIRS(real)                                                                                          \
    for (; i + 8 <= n; i += 8)                                                                                        \
        for (j = 0; j < 4; j++) {                                                                                     \
            __m128d v = CYBN_PAIR_##real(w + i + 2 * j);                                                              \
            if (power == 0) v = _mm_and_pd(_mm_cmpneq_pd(v, _mm_setzero_pd()), _mm_set1_pd(1));                       \
            if (power == 2) v = _mm_mul_pd(v, v);                                                                     \
            pairs[j] = _mm_add_pd(pairs[j], v);                                                                       \
        }                                                                                                             \
    for (j = 0; j < 4; j++) _mm_storeu_pd(sums + 2 * j, pairs[j]);
#define CYBN_PAIRS __m128d pairs[4] = {_mm_setzero_pd(), _mm_setzero_pd(), _mm_setzero_pd(), _mm_setzero_pd()};
#else
#define CYBN_SUM_PAIRS(real)                                                                                          \
    for (; i + 8 <= n; i += 8)                                                                                        \
        for (j = 0; j < 8; j++) sums[j] += CYBN_POWER(w[i + j]);
#define CYBN_PAIRS
#endif
#define CYBN_POWER(v) (power == 0 ? (double)((v) != 0) : power == 1 ? (double)(v) : (double)(v) * (v))
#define CYBN_SUM_POWERS(real)                                                                                         \
    static inline double cybn_sum_power_##real(const real *w, ptrdiff_t n, const int power) {                         \
        double sums[8] = {0};                                                                                         \
        ptrdiff_t i = 0;                                                                                              \
        int j;                                                                                                        \
        CYBN_PAIRS                                                                                                    \
        CYBN_SUM_PAIRS(real)                                                                                          \
        for (; i < n; i++) sums[0] += CYBN_POWER(w[i]);                                                               \
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));             \
    }                                                                                                                 \
    static inline double cybn_sum_powers_##real(const real *w, ptrdiff_t n, int power) {                              \
        if (power == 0) return cybn_sum_power_##real(w, n, 0);                                                        \
        return power == 1 ? cybn_sum_power_##real(w, n, 1) : cybn_sum_power_##real(w, n, 2);                          \
    }
CYBN_SUM_POWERS(float)
CYBN_SUM_POWERS(double)

#endif
