/* Loops over per-channel vectors that gcc leaves scalar: square roots, for the sake of errno (sqrt() sets it unless
   -fno-math-errno; the instruction is correctly rounded either way), and searches, for the sake of the bit they return.
   In calls of a microsecond they count. */
#ifndef CYBN_VECTORS_H
#define CYBN_VECTORS_H

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

#endif
