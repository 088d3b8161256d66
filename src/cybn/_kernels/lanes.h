/* The two accumulations, in vectors of the width that this build has. In lanes, so the width does not show in the bits.

   In typed Cython (`q[j] += d * d` over local arrays) gcc unrolled the loop over 16 lanes before it vectorised, and
   then made 3 to 25 GB/s of it, depending on what it knew of the arguments; as vectors it is 33 whatever surrounds it.
   Nothing here is more than addition, subtraction and multiplication of lanes.

   A leaf has n columns of accumulators in registers: for `rows` rows, then for the first `rest` elements of another,
   which go to the last `rest` columns (the tail of a run: n elements are read that end with it, the others masked).
   `cybn_sum_*` take a run, or more columns, 32, 16 or 4 at a time. With each row and 16 columns a cache line is fetched
   ahead: x + ahead + r * line, with the g-th 16 columns also g * step; and the line `further` than that (0: none) into
   the second cache, which has room for more requests than the first: alone the near ones read memory at 12 to 16 GB/s
   (one core of Zen 4), the far ones at 20, both at 25. In the order of memory (line 16) all are faster than in that in
   which columns are read. */
#ifndef CYBN_LANES_H
#define CYBN_LANES_H

#include <stddef.h>
#include <string.h>

#include "gate.h"

/* What a leaf takes, each array with its pitch from row to row. */
#define CYBN_TAKES(real)                                                                                              \
    const real *x, ptrdiff_t pitch, const real *dy, ptrdiff_t dy_pitch, const signed char *flags,                     \
        ptrdiff_t flags_pitch, ptrdiff_t bit, ptrdiff_t rows, ptrdiff_t rest, ptrdiff_t ahead, ptrdiff_t line,        \
        ptrdiff_t further, const real *shift, const real *scale, const real *offset, real slope, real *passed,        \
        ptrdiff_t passed_pitch

#if defined(__GNUC__)

/* Half a vector of floats at p, as doubles: gcc makes two conversions of one when asked with __builtin_convertvector */
#if defined(__SSE2__)
#include <immintrin.h>
#define CYBN_WIDEN_16(p) _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(p))))
#define CYBN_WIDEN_32(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
/* The i-th half of vectors in registers. (Of the long ones gcc 12 extracts it; by way of memory it is no faster.) */
#define CYBN_HALF_16(v, i) _mm_cvtps_pd((i) % 2 ? _mm_movehl_ps((v)[(i) / 2], (v)[(i) / 2]) : (__m128)(v)[(i) / 2])
#define CYBN_HALF_32(v, i) CYBN_WIDEN_32((const float *)(v) + (i) * 4)
#else
#define CYBN_WIDEN_16(p) __builtin_convertvector(*(const half *)(p), wide)
#define CYBN_HALF_16(v, i) CYBN_WIDEN_16((const float *)(v) + (i) * 2)
#endif
#define CYBN_INLINE static inline __attribute__((always_inline))

/* A vector of flags, bytes of 0 and -1, as such lanes. (Of __builtin_convertvector gcc 12 makes a load for each.) */
#if defined(__SSE2__)
CYBN_INLINE __m128i cybn_four(const signed char *p) {
    int four;
    memcpy(&four, p, sizeof four);
    return _mm_cvtsi32_si128(four);
}
CYBN_INLINE __m128i cybn_flags_16_float(const signed char *p) {
    __m128i v = cybn_four(p);
    v = _mm_unpacklo_epi8(v, v);
    return _mm_unpacklo_epi16(v, v);
}
CYBN_INLINE __m128i cybn_flags_16_double(const signed char *p) {
    short two;
    memcpy(&two, p, sizeof two);
    __m128i v = _mm_cvtsi32_si128(two);
    v = _mm_unpacklo_epi8(v, v);
    v = _mm_unpacklo_epi16(v, v);
    return _mm_unpacklo_epi32(v, v);
}
#define CYBN_FLAGS_16_float(p) (mask)cybn_flags_16_float(p)
#define CYBN_FLAGS_16_double(p) (mask)cybn_flags_16_double(p)
#define CYBN_FLAGS_32_float(p) (mask)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define CYBN_FLAGS_32_double(p) (mask)_mm256_cvtepi8_epi64(cybn_four(p))
#else
#define CYBN_FLAGS_16_float(p) (mask){(p)[0], (p)[1], (p)[2], (p)[3]}
#define CYBN_FLAGS_16_double(p) (mask){(p)[0], (p)[1]}
#endif
#define CYBN_EACH(i, n) _Pragma("GCC unroll 16") for (i = 0; i < (n); i++)
#define CYBN_LINE(p) ((int)(64 / sizeof *(p)))
#define CYBN_PREFETCH(p, n)                                                                                           \
    CYBN_EACH(i, n / CYBN_LINE(p)) {                                                                                  \
        __builtin_prefetch((p) + i * CYBN_LINE(p));                                                                   \
        if (further) __builtin_prefetch((p) + further + i * CYBN_LINE(p), 0, 2);                                      \
    }

/* Computed here: gcc 12 would put the additions of all rows after the loads of all, and run out of registers. */
#if defined(__x86_64__) || defined(__i386__)
#define CYBN_NOW(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define CYBN_NOW(v) __asm__("" : "+w"(v))
#else
#define CYBN_NOW(v)
#endif

/* a + v and a + v * w, in double, of v and w that were floats. A multiply-add rounds once; v * 1 and the product of two
   floats are exact in double, so it rounds what the separate operations would: the same bits. Statistics wait for the
   adders, and where these are other units than the multipliers (AMD's Zen), 34 GB/s from L2 become 46. */
#if defined(__FMA__)
#define CYBN_PLUS_16(a, v) _mm_fmadd_pd(v, one, a)
#define CYBN_PLUS_32(a, v) _mm256_fmadd_pd(v, one, a)
#define CYBN_PLUS_PRODUCT_16(a, v, w) _mm_fmadd_pd(v, w, a)
#define CYBN_PLUS_PRODUCT_32(a, v, w) _mm256_fmadd_pd(v, w, a)
#else
#define CYBN_PLUS_16(a, v) (a) + (v)
#define CYBN_PLUS_32(a, v) (a) + (v)
#define CYBN_PLUS_PRODUCT_16(a, v, w) (a) + (v) * (w)
#define CYBN_PLUS_PRODUCT_32(a, v, w) (a) + (v) * (w)
#endif

/* Four rows unrolled: in wide rows half of the time went into leaving a loop of eight. (Gradients are no faster so.) */
#define CYBN_ROWS(step)                                                                                               \
    for (; rows >= 4; rows -= 4) CYBN_EACH(r, 4) step                                                                 \
    for (; rows > 0; rows--) step

/* From element `rest` on: masks that keep the last `rest` of 16. */
#define CYBN_OFF 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
#define CYBN_ON -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1
static const int cybn_last_float[32] = {CYBN_OFF, CYBN_ON};
static const long long cybn_last_double[32] = {CYBN_OFF, CYBN_ON};

/* sums += w * x (double) and squares += w * (x - shift)^2 (float), with w in the place of dy. `weighted` is a constant.
   0: w is 1 and not read; 1: any; 2: it is 1 where flags are set, else 0; 3: it is not 0. So odd ones multiply, and 1
   and 2 select: what has weight 0 does not count, even if it is no number. */
#define CYBN_COUNTS_FLOAT(bytes, weighted)                                                                            \
    (weighted == 2 ? CYBN_FLAGS_##bytes##_float(flags + i * F) : (mask)(*(const vector *)(dy + i * F) != 0))
#define CYBN_STATS_FLOAT(name, bytes, n, weighted)                                                                    \
    CYBN_INLINE void name(CYBN_TAKES(float), double *sums, float *squares) {                                          \
        typedef CYBN_VECTOR(float, bytes) vector;                                                                     \
        typedef CYBN_VECTOR(float, bytes / 2) half;                                                                   \
        typedef CYBN_VECTOR(double, bytes) wide;                                                                      \
        typedef CYBN_VECTOR(int, bytes) mask;                                                                         \
        enum { F = bytes / 4, D = bytes / 8 };                                                                        \
        const float *next = x + ahead;                                                                                \
        vector q[n / F], k[n / F], row[n / F], d;                                                                     \
        wide a[n / D], one = (wide){} + 1;                                                                            \
        int i, r;                                                                                                     \
        CYBN_NOW(one); /* or a compiler that knows it would make additions of the multiply-adds again */              \
        CYBN_EACH(i, n / F) {                                                                                         \
            q[i] = *(const vector *)(squares + i * F);                                                                \
            k[i] = *(const vector *)(shift + i * F);                                                                  \
        }                                                                                                             \
        CYBN_EACH(i, n / D) a[i] = *(const wide *)(sums + i * D);                                                     \
        CYBN_ROWS({                                                                                                   \
            CYBN_PREFETCH(next, n);                                                                                   \
            CYBN_EACH(i, n / F) {                                                                                     \
                d = *(const vector *)(x + i * F) - k[i];                                                              \
                if (weighted % 3) {                                                                                   \
                    const mask counts = CYBN_COUNTS_FLOAT(bytes, weighted);                                           \
                    row[i] = (vector)(*(const mask *)(x + i * F) & counts);                                           \
                    d = (vector)((mask)d & counts);                                                                   \
                }                                                                                                     \
                q[i] += weighted % 2 ? d * *(const vector *)(dy + i * F) * d : d * d;                                 \
                CYBN_NOW(q[i]);                                                                                       \
            }                                                                                                         \
            CYBN_EACH(i, n / D) {                                                                                     \
                const wide v = (wide)(weighted % 3 ? CYBN_HALF_##bytes(row, i) : CYBN_WIDEN_##bytes(x + i * D));      \
                if (weighted % 2)                                                                                     \
                    a[i] = CYBN_PLUS_PRODUCT_##bytes(a[i], v, (wide)CYBN_WIDEN_##bytes(dy + i * D));                  \
                else                                                                                                  \
                    a[i] = CYBN_PLUS_##bytes(a[i], v);                                                                \
                CYBN_NOW(a[i]);                                                                                       \
            }                                                                                                         \
            x += pitch;                                                                                               \
            dy += dy_pitch;                                                                                           \
            if (weighted == 2) flags += flags_pitch;                                                                  \
            next += line;                                                                                             \
        })                                                                                                            \
        if (rest) {                                                                                                   \
            CYBN_PREFETCH(next, n);                                                                                   \
            x += rest - n;                                                                                            \
            dy += rest - n;                                                                                           \
            if (weighted == 2) flags += rest - n;                                                                     \
            CYBN_EACH(i, n / F) {                                                                                     \
                mask counts;                                                                                          \
                if (rest <= n - (i + 1) * F) continue;                                                                \
                counts = *(const mask *)(cybn_last_float + rest + i * F);                                             \
                CYBN_NOW(counts);                                                                                     \
                if (weighted % 3) counts &= CYBN_COUNTS_FLOAT(bytes, weighted);                                       \
                row[i] = *(const vector *)(x + i * F);                                                                \
                d = (vector)((mask)(row[i] - k[i]) & counts);                                                         \
                row[i] = (vector)((mask)row[i] & counts);                                                             \
                q[i] += weighted % 2 ? d * *(const vector *)(dy + i * F) * d : d * d;                                 \
            }                                                                                                         \
            CYBN_EACH(i, n / D) {                                                                                     \
                wide v;                                                                                               \
                if (rest <= n - (i + 1) * D) continue;                                                                \
                v = (wide)CYBN_HALF_##bytes(row, i);                                                                  \
                if (weighted % 2)                                                                                     \
                    a[i] = CYBN_PLUS_PRODUCT_##bytes(a[i], v, (wide)CYBN_WIDEN_##bytes(dy + i * D));                  \
                else                                                                                                  \
                    a[i] = CYBN_PLUS_##bytes(a[i], v);                                                                \
            }                                                                                                         \
        }                                                                                                             \
        CYBN_EACH(i, n / F) *(vector *)(squares + i * F) = q[i];                                                      \
        CYBN_EACH(i, n / D) *(wide *)(sums + i * D) = a[i];                                                           \
    }

/* sums += t and products += t * (x - shift), all of one type. t: dy (gradients), or x - shift (statistics of double),
   or w * (x - shift) where dy is w, or dy behind the activation of (x - shift) * scale + offset, or behind one that it
   passes as it is where flags are set, or one of these where they are set. `counts`, to T: the flags of these elements,
   as a mask. `flagged` is a constant. 0: nothing is; 1: flags are bytes; 2: they are bits of a gate, from `bit` on,
   with a pitch of bits; 3: the same, and t is written to passed. (Which is fetched, too, where rows lie far apart, or
   stores wait for it: 7 x 7 from L3 took 1.1 times as long. Where rows follow each other the processor does that.) */
#define CYBN_PRODUCTS(name, real, bits, bytes, n, T, flagged)                                                         \
    CYBN_INLINE void name(CYBN_TAKES(real), real *sums, real *products) {                                             \
        typedef CYBN_VECTOR(real, bytes) vector;                                                                      \
        typedef CYBN_VECTOR(bits, bytes) mask;                                                                        \
        enum { F = bytes / sizeof(real) };                                                                            \
        const real *next = x + ahead, *dy_next = dy + ahead;                                                          \
        vector a[n / F], q[n / F], k[n / F], d, t;                                                                    \
        mask counts;                                                                                                  \
        unsigned word;                                                                                                \
        int i;                                                                                                        \
        CYBN_EACH(i, n / F) {                                                                                         \
            a[i] = *(const vector *)(sums + i * F);                                                                   \
            q[i] = *(const vector *)(products + i * F);                                                               \
            k[i] = *(const vector *)(shift + i * F);                                                                  \
        }                                                                                                             \
        for (; rows > 0; rows--) {                                                                                    \
            CYBN_PREFETCH(next, n);                                                                                   \
            CYBN_PREFETCH(dy_next, n);                                                                                \
            if (flagged == 3 && line != n) __builtin_prefetch(passed + ahead);                                        \
            if (flagged >= 2) word = cybn_bits((const unsigned char *)flags, bit);                                    \
            CYBN_EACH(i, n / F) {                                                                                     \
                d = *(const vector *)(x + i * F) - k[i];                                                              \
                if (flagged == 1) counts = CYBN_FLAGS_##bytes##_##real(flags + i * F);                                \
                if (flagged >= 2) counts = CYBN_BITS(word, i, real);                                                  \
                t = T(dy);                                                                                            \
                a[i] += t;                                                                                            \
                q[i] += t * d;                                                                                        \
                CYBN_NOW(a[i]);                                                                                       \
                CYBN_NOW(q[i]);                                                                                       \
            }                                                                                                         \
            x += pitch;                                                                                               \
            dy += dy_pitch;                                                                                           \
            if (flagged == 1) flags += flags_pitch;                                                                   \
            if (flagged >= 2) bit += flags_pitch;                                                                     \
            passed += passed_pitch;                                                                                   \
            next += line;                                                                                             \
            dy_next += line;                                                                                          \
        }                                                                                                             \
        if (rest) {                                                                                                   \
            CYBN_PREFETCH(next, n);                                                                                   \
            CYBN_PREFETCH(dy_next, n);                                                                                \
            x += rest - n;                                                                                            \
            dy += rest - n;                                                                                           \
            if (flagged == 1) flags += rest - n;                                                                      \
            if (flagged >= 2) word = cybn_bits((const unsigned char *)flags, bit + rest - n);                         \
            passed += rest - n;                                                                                       \
            CYBN_EACH(i, n / F) {                                                                                     \
                mask last;                                                                                            \
                if (rest <= n - (i + 1) * F) continue;                                                                \
                last = *(const mask *)(cybn_last_##real + rest + i * F);                                              \
                d = *(const vector *)(x + i * F) - k[i];                                                              \
                if (flagged == 1) counts = CYBN_FLAGS_##bytes##_##real(flags + i * F);                                \
                if (flagged >= 2) counts = CYBN_BITS(word, i, real);                                                  \
                t = T(dy);                                                                                            \
                a[i] += (vector)((mask)t & last);                                                                     \
                q[i] += (vector)((mask)(t * d) & last);                                                               \
            }                                                                                                         \
        }                                                                                                             \
        CYBN_EACH(i, n / F) {                                                                                         \
            *(vector *)(sums + i * F) = a[i];                                                                         \
            *(vector *)(products + i * F) = q[i];                                                                     \
        }                                                                                                             \
    }
#define CYBN_DEVIATION(g) d
#define CYBN_GRADIENT(g) *(const vector *)((g) + i * F)
#define CYBN_WEIGHED(w)                                                                                               \
    CYBN_GRADIENT(w) * (d = (vector)((mask)d & (mask)(CYBN_GRADIENT(w) != 0)))
#define CYBN_COUNTED(w) (d = (vector)((mask)d & counts))

#define CYBN_Z d * *(const vector *)(scale + i * F) + *(const vector *)(offset + i * F)
#define CYBN_RELU(g, z) (vector)((mask)CYBN_GRADIENT(g) & ~(mask)((z) <= 0))
#define CYBN_LEAKY(g, z)                                                                                              \
    (vector)(((mask)CYBN_GRADIENT(g) & (mask)((z) > 0)) | ((mask)(CYBN_GRADIENT(g) * slope) & ~(mask)((z) > 0)))
#define CYBN_RELU_X(g) CYBN_RELU(g, CYBN_Z)
#define CYBN_LEAKY_X(g) CYBN_LEAKY(g, CYBN_Z)
#define CYBN_RELU_BITS(g) (vector)((mask)CYBN_GRADIENT(g) & counts)
#define CYBN_LEAKY_BITS(g) (vector)(((mask)CYBN_GRADIENT(g) & counts) | ((mask)(CYBN_GRADIENT(g) * slope) & ~counts))
#define CYBN_KEEP_RELU(g) (*(vector *)(passed + i * F) = CYBN_RELU_BITS(g))
#define CYBN_KEEP_LEAKY(g) (*(vector *)(passed + i * F) = CYBN_LEAKY_BITS(g))
#define CYBN_MASKED(g) (d = (vector)((mask)d & counts), (vector)((mask)CYBN_GRADIENT(g) & counts))

#else

#define CYBN_INLINE static inline
#define CYBN_WIDTH 16
#define CYBN_STATS_FLOAT(name, bytes, n, weighted)                                                                    \
    CYBN_INLINE void name(CYBN_TAKES(float), double *sums, float *squares) {                                          \
        ptrdiff_t r, i;                                                                                               \
        for (r = 0; r <= rows; r++, x += pitch, dy += dy_pitch, flags += flags_pitch)                                 \
            for (i = r < rows ? 0 : n - rest; i < n; i++) {                                                           \
                ptrdiff_t at = r < rows ? i : i + rest - n;                                                           \
                float d = x[at] - shift[i];                                                                           \
                if (weighted == 2 ? !flags[at] : weighted && dy[at] == 0) continue;                                   \
                squares[i] += weighted % 2 ? d * dy[at] * d : d * d;                                                  \
                sums[i] += weighted % 2 ? (double)x[at] * dy[at] : x[at];                                             \
            }                                                                                                         \
    }
#define CYBN_PRODUCTS(name, real, bits, bytes, n, T, flagged)                                                         \
    CYBN_INLINE void name(CYBN_TAKES(real), real *sums, real *products) {                                             \
        ptrdiff_t r, i;                                                                                               \
        for (r = 0; r <= rows; r++, x += pitch, dy += dy_pitch, bit += flags_pitch, passed += passed_pitch,           \
                               flags += flagged == 1 ? flags_pitch : 0)                                               \
            for (i = r < rows ? 0 : n - rest; i < n; i++) {                                                           \
                ptrdiff_t at = r < rows ? i : i + rest - n;                                                           \
                const unsigned char *gate = (const unsigned char *)flags;                                             \
                const int counts = flagged == 1 ? flags[at] : flagged ? cybn_bits(gate, bit + at) & 1 : 0;            \
                real d = x[at] - shift[i];                                                                            \
                real t = T(dy);                                                                                       \
                sums[i] += t;                                                                                         \
                products[i] += t * d;                                                                                 \
            }                                                                                                         \
    }
#define CYBN_DEVIATION(g) d
#define CYBN_GRADIENT(g) (g)[at]
#define CYBN_WEIGHED(w) CYBN_GRADIENT(w) * (d = CYBN_GRADIENT(w) != 0 ? d : 0)
#define CYBN_COUNTED(w) (d = counts ? d : 0)
#define CYBN_RELU_X(g) (d * scale[i] + offset[i] <= 0 ? 0 : CYBN_GRADIENT(g))
#define CYBN_LEAKY_X(g) (d * scale[i] + offset[i] > 0 ? CYBN_GRADIENT(g) : CYBN_GRADIENT(g) * slope)
#define CYBN_RELU_BITS(g) (counts ? CYBN_GRADIENT(g) : 0)
#define CYBN_LEAKY_BITS(g) (counts ? CYBN_GRADIENT(g) : CYBN_GRADIENT(g) * slope)
#define CYBN_KEEP_RELU(g) (passed[at] = CYBN_RELU_BITS(g))
#define CYBN_KEEP_LEAKY(g) (passed[at] = CYBN_LEAKY_BITS(g))
#define CYBN_MASKED(g) (d = counts ? d : 0, counts ? CYBN_GRADIENT(g) : 0)

#endif

#define CYBN_EXPAND(macro, ...) macro(__VA_ARGS__)
#define CYBN_KIND(name, real, bits, T, flagged)                                                                       \
    CYBN_EXPAND(CYBN_PRODUCTS, name, real, bits, CYBN_WIDTH, 16, T, flagged)                                          \
    CYBN_EXPAND(CYBN_PRODUCTS, name##_pair, real, bits, CYBN_WIDTH, 32, T, flagged)                                   \
    CYBN_PRODUCTS(name##_quad, real, bits, 16, 4, T, flagged)

#define CYBN_STATS(name, weighted)                                                                                    \
    CYBN_EXPAND(CYBN_STATS_FLOAT, name, CYBN_WIDTH, 16, weighted)                                                     \
    CYBN_EXPAND(CYBN_STATS_FLOAT, name##_pair, CYBN_WIDTH, 32, weighted)                                              \
    CYBN_STATS_FLOAT(name##_quad, 16, 4, weighted)
#define CYBN_GRADIENTS(real, bits)                                                                                    \
    CYBN_KIND(cybn_backward_##real, real, bits, CYBN_GRADIENT, 0)                                                     \
    CYBN_KIND(cybn_relu_x_##real, real, bits, CYBN_RELU_X, 0)                                                         \
    CYBN_KIND(cybn_leaky_x_##real, real, bits, CYBN_LEAKY_X, 0)                                                       \
    CYBN_KIND(cybn_relu_bits_##real, real, bits, CYBN_RELU_BITS, 2)                                                   \
    CYBN_KIND(cybn_leaky_bits_##real, real, bits, CYBN_LEAKY_BITS, 2)                                                 \
    CYBN_KIND(cybn_keep_relu_##real, real, bits, CYBN_KEEP_RELU, 3)                                                   \
    CYBN_KIND(cybn_keep_leaky_##real, real, bits, CYBN_KEEP_LEAKY, 3)                                                 \
    CYBN_KIND(cybn_masked_##real, real, bits, CYBN_MASKED, 1)

CYBN_STATS(cybn_plain_float, 0)
CYBN_STATS(cybn_weighted_float, 1)
CYBN_STATS(cybn_positive_float, 3)
CYBN_STATS(cybn_counted_float, 2)
CYBN_KIND(cybn_plain_double, double, long long, CYBN_DEVIATION, 0)
CYBN_KIND(cybn_weighted_double, double, long long, CYBN_WEIGHED, 0)
CYBN_KIND(cybn_positive_double, double, long long, CYBN_WEIGHED, 0)
CYBN_KIND(cybn_counted_double, double, long long, CYBN_COUNTED, 1)
CYBN_GRADIENTS(float, int)
CYBN_GRADIENTS(double, long long)

/* What is summed beside x: nothing, weights in dy's place, positive ones, or flags; dy, dy behind a ReLU or a leaky one
   (of x, or as bits tell, or that and written to passed), dy where flags are set. */
enum {
    CYBN_PLAIN, CYBN_WEIGHTED, CYBN_POSITIVE, CYBN_COUNTED_ONLY, CYBN_BACKWARD, CYBN_BY_RELU_X, CYBN_BY_LEAKY_X,
    CYBN_BY_RELU_BITS, CYBN_BY_LEAKY_BITS, CYBN_KEPT_RELU, CYBN_KEPT_LEAKY, CYBN_BY_MASK
};

/* Where the first sums go, and at which columns dy and flags are read: of a kind. */
#define CYBN_KINDS(DO, real)                                                                                          \
    DO(CYBN_PLAIN, cybn_plain_##real, real, x_sums, j, 0)                                                             \
    DO(CYBN_WEIGHTED, cybn_weighted_##real, real, x_sums, w, 0)                                                       \
    DO(CYBN_POSITIVE, cybn_positive_##real, real, x_sums, w, 0)                                                       \
    DO(CYBN_COUNTED_ONLY, cybn_counted_##real, real, x_sums, j, w)                                                    \
    DO(CYBN_BACKWARD, cybn_backward_##real, real, dy_sums, j, 0)                                                      \
    DO(CYBN_BY_RELU_X, cybn_relu_x_##real, real, dy_sums, j, 0)                                                       \
    DO(CYBN_BY_LEAKY_X, cybn_leaky_x_##real, real, dy_sums, j, 0)                                                     \
    DO(CYBN_BY_RELU_BITS, cybn_relu_bits_##real, real, dy_sums, j, 0)                                                 \
    DO(CYBN_BY_LEAKY_BITS, cybn_leaky_bits_##real, real, dy_sums, j, 0)                                               \
    DO(CYBN_KEPT_RELU, cybn_keep_relu_##real, real, dy_sums, j, 0)                                                    \
    DO(CYBN_KEPT_LEAKY, cybn_keep_leaky_##real, real, dy_sums, j, 0)                                                  \
    DO(CYBN_BY_MASK, cybn_masked_##real, real, dy_sums, j, w)

#define CYBN_ALL(real)                                                                                                \
    ptrdiff_t cols, ptrdiff_t step, ptrdiff_t wrap, CYBN_TAKES(real), double *x_sums, real *dy_sums, real *products
#define CYBN_ARGUMENTS                                                                                                \
    cols, step, wrap, x, pitch, dy, dy_pitch, flags, flags_pitch, bit, rows, rest, ahead, line, further, shift,       \
        scale, offset, slope, passed, passed_pitch, x_sums, dy_sums, products

/* Columns in groups of 16, or 32, and of four. (`rest` is for one group: a run.) Weights and flags repeat every `wrap`
   columns, at least 16, and stand there once with 15 more: w is where they are read. Bits do not. */
#define CYBN_NEXT(n) (j += n, w = w + n < wrap ? w + n : w + n - wrap)
/* Gradients with nothing beside them have registers for twice as many: from memory, read in longer stretches, their
   sums take 0.83 to 0.97 of the time. (Of bits there are no more than 16 in a word.) */
#define CYBN_PAIRED(kind, real) (kind == CYBN_BACKWARD && CYBN_WIDTH == 32 && sizeof(real) == 4)
#define CYBN_BY(n, name, to, dy_at, flags_at, further)                                                                \
    for (; j + n <= cols; CYBN_NEXT(n), ahead += n / 16 * step - n)                                                   \
        name(x + j, pitch, dy + dy_at, dy_pitch, flags + flags_at, flags_pitch, bit + j, rows, rest,                  \
             ahead, line == 16 ? n : line, further, shift + j, scale + j, offset + j, slope, passed + j,              \
             passed_pitch, to + j, products + j);
/* Rows in functions of their own, with all registers for the places that they read: weighted sums took 1.1 to 1.2 times
   as long in the midst of the rest. Runs are too short for a call, and the sums of nothing else are 2 to 6 % slower. */
#define CYBN_COLUMNS(kind, name, real, to, dy_at, flags_at)                                                           \
    CYBN_INLINE void name##_run(CYBN_ALL(real)) {                                                                     \
        ptrdiff_t j = 0, w = 0;                                                                                       \
        /* Twice, so that loops that fetch nothing from afar do not ask (3 to 14 % of theirs from L2). */             \
        if (further) {                                                                                                \
            if (CYBN_PAIRED(kind, real)) CYBN_BY(32, name##_pair, to, dy_at, flags_at, further)                       \
            CYBN_BY(16, name, to, dy_at, flags_at, further)                                                           \
        } else {                                                                                                      \
            CYBN_BY(16, name, to, dy_at, flags_at, 0)                                                                 \
        }                                                                                                             \
        for (; j + 4 <= cols; CYBN_NEXT(4))                                                                           \
            name##_quad(x + j, pitch, dy + dy_at, dy_pitch, flags + flags_at, flags_pitch, bit + j, rows, 0, 0, 0,    \
                        0, shift + j, scale + j, offset + j, slope, passed + j, passed_pitch, to + j, products + j);  \
    }                                                                                                                 \
    CYBN_APART void name##_rows(CYBN_ALL(real)) {                                                                     \
        name##_run(CYBN_ARGUMENTS);                                                                                   \
    }
#define CYBN_CASE(kind, name, ...)                                                                                    \
    case kind:                                                                                                        \
        if (apart) name##_rows(CYBN_ARGUMENTS);                                                                       \
        else name##_run(CYBN_ARGUMENTS);                                                                              \
        break;
#define CYBN_SUM(real)                                                                                                \
    CYBN_KINDS(CYBN_COLUMNS, real)                                                                                    \
    CYBN_INLINE void cybn_sum_##real(int apart, int kind, CYBN_ALL(real)) {                                           \
        switch (kind) { CYBN_KINDS(CYBN_CASE, real) }                                                                 \
    }
CYBN_SUM(float)
CYBN_SUM(double)

#endif
