/* The two accumulations, in vectors of the width that this build has. In lanes, so the width does not show in the bits.

   In typed Cython (`q[j] += d * d` over local arrays) gcc unrolled the loop over 16 lanes before it vectorised, and
   then made 3 to 25 GB/s of it, depending on what it knew of the arguments; as vectors it is 33 whatever surrounds it.
   Nothing here is more than addition, subtraction and multiplication of lanes. */
#ifndef CYBN_LANES_H
#define CYBN_LANES_H

#include <stddef.h>

#if defined(__GNUC__)

/* Half a vector of floats at p, as doubles: gcc makes two conversions of one when asked with __builtin_convertvector */
#if defined(__SSE2__)
#include <immintrin.h>
#define CYBN_WIDEN_16(p) _mm_cvtps_pd(_mm_castpd_ps(_mm_load_sd((const double *)(p))))
#define CYBN_WIDEN_32(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#else
#define CYBN_WIDEN_16(p) __builtin_convertvector(*(const half *)(p), wide)
#endif
#if defined(__AVX__)
#define CYBN_WIDTH 32
#else
#define CYBN_WIDTH 16
#endif

/* Vectors of `bytes` bytes, wherever they lie. */
#define CYBN_VECTOR(real, bytes) real __attribute__((vector_size(bytes), aligned(sizeof(real)), may_alias))
#define CYBN_UNROLL _Pragma("GCC unroll 16")

/* n columns, a multiple of the vector: sums += x (double) and squares += (x - shift)^2 (float). */
#define CYBN_STATS_FLOAT(name, bytes, n)                                                                              \
    static inline void name(const float *x, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t ahead, const float *shift,     \
                            double *sums, float *squares) {                                                           \
        typedef CYBN_VECTOR(float, bytes) vector;                                                                     \
        typedef CYBN_VECTOR(float, bytes / 2) half;                                                                   \
        typedef CYBN_VECTOR(double, bytes) wide;                                                                      \
        enum { F = bytes / 4, D = bytes / 8 };                                                                        \
        vector q[n / F], k[n / F];                                                                                    \
        wide a[n / D];                                                                                                \
        ptrdiff_t r;                                                                                                  \
        int i;                                                                                                        \
        CYBN_UNROLL for (i = 0; i < n / F; i++) {                                                                     \
            q[i] = *(const vector *)(squares + i * F);                                                                \
            k[i] = *(const vector *)(shift + i * F);                                                                  \
        }                                                                                                             \
        CYBN_UNROLL for (i = 0; i < n / D; i++) a[i] = *(const wide *)(sums + i * D);                                 \
        for (r = 0; r < rows; r++, x += pitch) {                                                                      \
            __builtin_prefetch(x + ahead);                                                                            \
            CYBN_UNROLL for (i = 0; i < n / F; i++) {                                                                 \
                vector d = *(const vector *)(x + i * F) - k[i];                                                       \
                q[i] += d * d;                                                                                        \
            }                                                                                                         \
            CYBN_UNROLL for (i = 0; i < n / D; i++)                                                                   \
                a[i] += (wide)CYBN_WIDEN_##bytes(x + i * D);                                                          \
        }                                                                                                             \
        CYBN_UNROLL for (i = 0; i < n / F; i++) *(vector *)(squares + i * F) = q[i];                                  \
        CYBN_UNROLL for (i = 0; i < n / D; i++) *(wide *)(sums + i * D) = a[i];                                       \
    }

/* sums += t and products += t * (x - shift), all of one type. t: dy (gradients) or x - shift (statistics of double). */
#define CYBN_PRODUCTS(name, real, bytes, n, T)                                                                        \
    static inline void name(const real *x, ptrdiff_t pitch, const real *dy, ptrdiff_t dy_pitch, ptrdiff_t rows,       \
                            ptrdiff_t ahead, const real *shift, real *sums, real *products) {                         \
        typedef CYBN_VECTOR(real, bytes) vector;                                                                      \
        enum { F = bytes / sizeof(real) };                                                                            \
        vector a[n / F], q[n / F], k[n / F];                                                                          \
        ptrdiff_t r;                                                                                                  \
        int i;                                                                                                        \
        CYBN_UNROLL for (i = 0; i < n / F; i++) {                                                                     \
            a[i] = *(const vector *)(sums + i * F);                                                                   \
            q[i] = *(const vector *)(products + i * F);                                                               \
            k[i] = *(const vector *)(shift + i * F);                                                                  \
        }                                                                                                             \
        for (r = 0; r < rows; r++, x += pitch, dy += dy_pitch) {                                                      \
            __builtin_prefetch(x + ahead);                                                                            \
            __builtin_prefetch(dy + ahead);                                                                           \
            CYBN_UNROLL for (i = 0; i < n / F; i++) {                                                                 \
                vector d = *(const vector *)(x + i * F) - k[i];                                                       \
                vector t = T;                                                                                         \
                a[i] += t;                                                                                            \
                q[i] += t * d;                                                                                        \
            }                                                                                                         \
        }                                                                                                             \
        CYBN_UNROLL for (i = 0; i < n / F; i++) {                                                                     \
            *(vector *)(sums + i * F) = a[i];                                                                         \
            *(vector *)(products + i * F) = q[i];                                                                     \
        }                                                                                                             \
    }
#define CYBN_D d
#define CYBN_DY *(const vector *)(dy + i * F)

#else

#define CYBN_WIDTH 16
#define CYBN_STATS_FLOAT(name, bytes, n)                                                                              \
    static inline void name(const float *x, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t ahead, const float *shift,     \
                            double *sums, float *squares) {                                                           \
        ptrdiff_t r;                                                                                                  \
        int i;                                                                                                        \
        for (r = 0; r < rows; r++, x += pitch)                                                                        \
            for (i = 0; i < n; i++) {                                                                                 \
                float d = x[i] - shift[i];                                                                            \
                squares[i] += d * d;                                                                                  \
                sums[i] += x[i];                                                                                      \
            }                                                                                                         \
    }
#define CYBN_PRODUCTS(name, real, bytes, n, T)                                                                        \
    static inline void name(const real *x, ptrdiff_t pitch, const real *dy, ptrdiff_t dy_pitch, ptrdiff_t rows,       \
                            ptrdiff_t ahead, const real *shift, real *sums, real *products) {                         \
        ptrdiff_t r;                                                                                                  \
        int i;                                                                                                        \
        for (r = 0; r < rows; r++, x += pitch, dy += dy_pitch)                                                        \
            for (i = 0; i < n; i++) {                                                                                 \
                real d = x[i] - shift[i];                                                                             \
                real t = T;                                                                                           \
                sums[i] += t;                                                                                         \
                products[i] += t * d;                                                                                 \
            }                                                                                                         \
    }
#define CYBN_D d
#define CYBN_DY dy[i]

#endif

#define CYBN_EXPAND(macro, ...) macro(__VA_ARGS__)
CYBN_EXPAND(CYBN_STATS_FLOAT, cybn_stats_f32, CYBN_WIDTH, 16)
CYBN_STATS_FLOAT(cybn_stats_f32_quad, 16, 4)
CYBN_PRODUCTS(cybn_stats_f64, double, CYBN_WIDTH, 16, CYBN_D)
CYBN_PRODUCTS(cybn_stats_f64_quad, double, 16, 4, CYBN_D)
CYBN_PRODUCTS(cybn_grads_f32, float, CYBN_WIDTH, 16, CYBN_DY)
CYBN_PRODUCTS(cybn_grads_f32_quad, float, 16, 4, CYBN_DY)
CYBN_PRODUCTS(cybn_grads_f64, double, CYBN_WIDTH, 16, CYBN_DY)
CYBN_PRODUCTS(cybn_grads_f64_quad, double, 16, 4, CYBN_DY)

#endif
