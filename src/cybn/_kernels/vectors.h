/* Loops over per-channel vectors and weights that gcc leaves scalar: square roots, for the sake of errno (sqrt() sets
   it unless -fno-math-errno; the instruction is correctly rounded either way), searches, for the sake of the bit they
   return, and sums of floats in double. In calls of a microsecond, and with thousands of channels, they count. */
#ifndef CYBN_VECTORS_H
#define CYBN_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX__)
typedef __m256d cybn_wide;
#define CYBN_WIDE(name) _mm256_##name
#define CYBN_WIDE_float(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#define CYBN_WIDE_double(p) _mm256_loadu_pd(p)
#define CYBN_LESS(a, b) _mm256_cmp_pd(a, b, _CMP_LT_OQ)
#define CYBN_DIFFER(a, b) _mm256_cmp_pd(a, b, _CMP_NEQ_UQ)
#elif defined(__SSE2__)
typedef __m128d cybn_wide;
#define CYBN_WIDE(name) _mm_##name
#define CYBN_WIDE_float(p) _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)(p))))
#define CYBN_WIDE_double(p) _mm_loadu_pd(p)
#define CYBN_LESS(a, b) _mm_cmplt_pd(a, b)
#define CYBN_DIFFER(a, b) _mm_cmpneq_pd(a, b)
#endif
#if defined(__SSE2__)
enum { CYBN_DOUBLES = sizeof(cybn_wide) / sizeof(double) };
#endif

/* invstd = 1 / sqrt(var + eps); 0 for a constant channel without eps, which then gives the bias instead of NaN. The two
   arrays may be one. */
static inline void cybn_inverse_sqrt(const double *var, double eps, double *invstd, ptrdiff_t n) {
    ptrdiff_t c = 0;
#if defined(__SSE2__)
    for (; c + CYBN_DOUBLES <= n; c += CYBN_DOUBLES) {
        const cybn_wide s = CYBN_WIDE(add_pd)(CYBN_WIDE(loadu_pd)(var + c), CYBN_WIDE(set1_pd)(eps));
        const cybn_wide r = CYBN_WIDE(div_pd)(CYBN_WIDE(set1_pd)(1), CYBN_WIDE(sqrt_pd)(s));
        CYBN_WIDE(storeu_pd)(invstd + c, CYBN_WIDE(and_pd)(r, CYBN_DIFFER(s, CYBN_WIDE(setzero_pd)())));
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
    const cybn_wide low = CYBN_WIDE(set1_pd)(least), high = CYBN_WIDE(set1_pd)(most);
    cybn_wide any = CYBN_WIDE(setzero_pd)();
    for (; c + CYBN_DOUBLES <= n; c += CYBN_DOUBLES) {
        const cybn_wide v = CYBN_WIDE(loadu_pd)(values + c);
        any = CYBN_WIDE(or_pd)(any, CYBN_WIDE(or_pd)(CYBN_LESS(v, low), CYBN_LESS(high, v)));
    }
    found = CYBN_WIDE(movemask_pd)(any);
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

/* Of n flags: *whole, a multiple of 16 (lanes.h) or n, before which all are set, and *end, ditto, from which on none is.
   What is left after the last multiple stays together. */
static inline void cybn_bound_flags(const signed char *flags, ptrdiff_t n, ptrdiff_t *whole, ptrdiff_t *end) {
    const signed char *first = (const signed char *)memchr(flags, 0, (size_t)n);
    const ptrdiff_t lanes = 16, rows = n / lanes * lanes;
    ptrdiff_t last = n;
    long long eight;
    *whole = first ? (first - flags) / lanes * lanes : n;
    for (; last >= 8; last -= 8) {
        memcpy(&eight, flags + last - 8, sizeof eight);
        if (eight) break;
    }
    while (last > *whole && !flags[last - 1]) last--;
    last = (last + lanes - 1) / lanes * lanes;
    *end = last > rows ? n : last;
}

/* Of weights: their sum and that of the products of any two, in double (eight sums side by side, element i in sum i % 8,
   the last ones in the first), and the least of them. What is no number makes the sums none; the least is of the others.
   (sum^2 less the squares is twice the products, but for the digits that are lost where one weight is most of the sum.) */
typedef struct {
    double sum, pairs, least;
} cybn_weights;

#if defined(__SSE2__)
#define CYBN_WEIGH_VECTORS(real)                                                                                      \
    cybn_wide a[8 / CYBN_DOUBLES], p[8 / CYBN_DOUBLES], low = CYBN_WIDE(set1_pd)(HUGE_VAL);                           \
    for (j = 0; j < 8 / CYBN_DOUBLES; j++) a[j] = p[j] = CYBN_WIDE(setzero_pd)();                                     \
    for (; i + 8 <= n; i += 8)                                                                                        \
        for (j = 0; j < 8 / CYBN_DOUBLES; j++) {                                                                      \
            const cybn_wide v = CYBN_WIDE_##real(w + i + j * CYBN_DOUBLES);                                           \
            p[j] = CYBN_WIDE(add_pd)(p[j], CYBN_WIDE(mul_pd)(v, a[j]));                                               \
            a[j] = CYBN_WIDE(add_pd)(a[j], v);                                                                        \
            low = CYBN_WIDE(min_pd)(v, low); /* (low where v is no number) */                                         \
        }                                                                                                             \
    for (j = 0; j < 8 / CYBN_DOUBLES; j++) {                                                                          \
        CYBN_WIDE(storeu_pd)(sums + j * CYBN_DOUBLES, a[j]);                                                          \
        CYBN_WIDE(storeu_pd)(pairs + j * CYBN_DOUBLES, p[j]);                                                         \
    }                                                                                                                 \
    CYBN_WIDE(storeu_pd)(least, low);
#else
#define CYBN_WEIGH_VECTORS(real)                                                                                      \
    for (; i + 8 <= n; i += 8)                                                                                        \
        for (j = 0; j < 8; j++) {                                                                                     \
            const double v = w[i + j];                                                                                \
            pairs[j] += v * sums[j];                                                                                  \
            sums[j] += v;                                                                                             \
            if (v < least[0]) least[0] = v;                                                                           \
        }
#endif
#define CYBN_WEIGH(real)                                                                                              \
    static inline cybn_weights cybn_weigh_##real(const real *w, ptrdiff_t n) {                                        \
        double sums[8] = {0}, pairs[8] = {0}, least[4] = {HUGE_VAL, HUGE_VAL, HUGE_VAL, HUGE_VAL}, before = 0;        \
        cybn_weights all;                                                                                             \
        ptrdiff_t i = 0;                                                                                              \
        int j;                                                                                                        \
        CYBN_WEIGH_VECTORS(real)                                                                                      \
        for (; i < n; i++) {                                                                                          \
            const double v = w[i];                                                                                    \
            pairs[0] += v * sums[0];                                                                                  \
            sums[0] += v;                                                                                             \
            if (v < least[0]) least[0] = v;                                                                           \
        }                                                                                                             \
        all.sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));          \
        all.pairs = 0;                                                                                                \
        for (j = 0; j < 8; j++) {                                                                                     \
            all.pairs += pairs[j] + before * sums[j];                                                                 \
            before += sums[j];                                                                                        \
        }                                                                                                             \
        all.least = least[0];                                                                                         \
        for (j = 1; j < 4; j++)                                                                                       \
            if (least[j] < all.least) all.least = least[j];                                                           \
        return all;                                                                                                   \
    }
CYBN_WEIGH(float)
CYBN_WEIGH(double)

#endif
