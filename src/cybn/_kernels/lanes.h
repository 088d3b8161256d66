/* The two accumulations, in vectors of the width that this build has. In lanes, so the width does not show in the bits.

   In typed Cython (`q[j] += d * d` over local arrays) gcc unrolled the loop over 16 lanes before it vectorised, and
   then made 3 to 25 GB/s of it, depending on what it knew of the arguments; as vectors it is 33 whatever surrounds it.
   Nothing here is more than addition, subtraction and multiplication of lanes.

   A leaf has n columns of accumulators in registers: for `rows` rows, and then for the first `rest` elements of another,
   which go to the last `rest` columns (the tail of a run: the n elements that end with it are read, the others masked).
   `name_rows` takes more columns, 16 or 4 at a time. With each row a cache line is fetched ahead: x + ahead + r * line,
   with the g-th 16 columns also g * step. In the order of memory (line 16) L3 is read at 24 to 33 GB/s, memory at 14
   to 16; in the order in which the columns are read at 15 to 28 and 10. */
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
#define CYBN_EACH(i, n) _Pragma("GCC unroll 16") for (i = 0; i < (n); i++)
#define CYBN_LINE(p) ((int)(64 / sizeof *(p)))
#define CYBN_PREFETCH(p, n) CYBN_EACH(i, n / CYBN_LINE(p)) __builtin_prefetch((p) + i * CYBN_LINE(p))

/* Computed here: gcc 12 would put the additions of all rows after the loads of all, and run out of registers. */
#if defined(__x86_64__) || defined(__i386__)
#define CYBN_NOW(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define CYBN_NOW(v) __asm__("" : "+w"(v))
#else
#define CYBN_NOW(v)
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

/* sums += x (double) and squares += (x - shift)^2 (float). */
#define CYBN_STATS_FLOAT(name, bytes, n)                                                                              \
    static inline void name(const float *x, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t rest, ptrdiff_t ahead,         \
                            ptrdiff_t line, const float *shift, double *sums, float *squares) {                       \
        typedef CYBN_VECTOR(float, bytes) vector;                                                                     \
        typedef CYBN_VECTOR(float, bytes / 2) half;                                                                   \
        typedef CYBN_VECTOR(double, bytes) wide;                                                                      \
        typedef CYBN_VECTOR(int, bytes) mask;                                                                         \
        enum { F = bytes / 4, D = bytes / 8 };                                                                        \
        const float *next = x + ahead;                                                                                \
        vector q[n / F], k[n / F], d;                                                                                 \
        wide a[n / D];                                                                                                \
        int i, r;                                                                                                     \
        CYBN_EACH(i, n / F) {                                                                                         \
            q[i] = *(const vector *)(squares + i * F);                                                                \
            k[i] = *(const vector *)(shift + i * F);                                                                  \
        }                                                                                                             \
        CYBN_EACH(i, n / D) a[i] = *(const wide *)(sums + i * D);                                                     \
        CYBN_ROWS({                                                                                                   \
            CYBN_PREFETCH(next, n);                                                                                   \
            CYBN_EACH(i, n / F) {                                                                                     \
                d = *(const vector *)(x + i * F) - k[i];                                                              \
                q[i] += d * d;                                                                                        \
                CYBN_NOW(q[i]);                                                                                       \
            }                                                                                                         \
            CYBN_EACH(i, n / D) {                                                                                     \
                a[i] += (wide)CYBN_WIDEN_##bytes(x + i * D);                                                          \
                CYBN_NOW(a[i]);                                                                                       \
            }                                                                                                         \
            x += pitch;                                                                                               \
            next += line;                                                                                             \
        })                                                                                                            \
        if (rest) {                                                                                                   \
            vector row[n / F];                                                                                        \
            x += rest - n;                                                                                            \
            CYBN_EACH(i, n / F) {                                                                                     \
                const mask last = *(const mask *)(cybn_last_float + rest + i * F);                                    \
                row[i] = *(const vector *)(x + i * F);                                                                \
                d = (vector)((mask)(row[i] - k[i]) & last);                                                           \
                row[i] = (vector)((mask)row[i] & last);                                                               \
                q[i] += d * d;                                                                                        \
            }                                                                                                         \
            CYBN_EACH(i, n / D) a[i] += (wide)CYBN_WIDEN_##bytes((const float *)row + i * D);                         \
        }                                                                                                             \
        CYBN_EACH(i, n / F) *(vector *)(squares + i * F) = q[i];                                                      \
        CYBN_EACH(i, n / D) *(wide *)(sums + i * D) = a[i];                                                           \
    }

/* sums += t and products += t * (x - shift), all of one type. t: dy (gradients) or x - shift (statistics of double). */
#define CYBN_PRODUCTS(name, real, bits, bytes, n, T)                                                                  \
    static inline void name(const real *x, ptrdiff_t pitch, const real *dy, ptrdiff_t dy_pitch, ptrdiff_t rows,       \
                            ptrdiff_t rest, ptrdiff_t ahead, ptrdiff_t line, const real *shift, real *sums,           \
                            real *products) {                                                                         \
        typedef CYBN_VECTOR(real, bytes) vector;                                                                      \
        typedef CYBN_VECTOR(bits, bytes) mask;                                                                        \
        enum { F = bytes / sizeof(real) };                                                                            \
        const real *next = x + ahead, *dy_next = dy + ahead;                                                          \
        vector a[n / F], q[n / F], k[n / F], d, t;                                                                    \
        int i;                                                                                                        \
        CYBN_EACH(i, n / F) {                                                                                         \
            a[i] = *(const vector *)(sums + i * F);                                                                   \
            q[i] = *(const vector *)(products + i * F);                                                               \
            k[i] = *(const vector *)(shift + i * F);                                                                  \
        }                                                                                                             \
        for (; rows > 0; rows--) {                                                                                    \
            CYBN_PREFETCH(next, n);                                                                                   \
            CYBN_PREFETCH(dy_next, n);                                                                                \
            CYBN_EACH(i, n / F) {                                                                                     \
                d = *(const vector *)(x + i * F) - k[i];                                                              \
                t = T(dy);                                                                                            \
                a[i] += t;                                                                                            \
                q[i] += t * d;                                                                                        \
                CYBN_NOW(a[i]);                                                                                       \
                CYBN_NOW(q[i]);                                                                                       \
            }                                                                                                         \
            x += pitch;                                                                                               \
            dy += dy_pitch;                                                                                           \
            next += line;                                                                                             \
            dy_next += line;                                                                                          \
        }                                                                                                             \
        if (rest) {                                                                                                   \
            x += rest - n;                                                                                            \
            dy += rest - n;                                                                                           \
            CYBN_EACH(i, n / F) {                                                                                     \
                const mask last = *(const mask *)(cybn_last_##real + rest + i * F);                                   \
                d = *(const vector *)(x + i * F) - k[i];                                                              \
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

#else

#define CYBN_WIDTH 16
#define CYBN_STATS_FLOAT(name, bytes, n)                                                                              \
    static inline void name(const float *x, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t rest, ptrdiff_t ahead,         \
                            ptrdiff_t line, const float *shift, double *sums, float *squares) {                       \
        ptrdiff_t r, i;                                                                                               \
        for (r = 0; r <= rows; r++, x += pitch)                                                                       \
            for (i = r < rows ? 0 : n - rest; i < n; i++) {                                                           \
                float e = x[r < rows ? i : i + rest - n];                                                             \
                squares[i] += (e - shift[i]) * (e - shift[i]);                                                        \
                sums[i] += e;                                                                                         \
            }                                                                                                         \
    }
#define CYBN_PRODUCTS(name, real, bits, bytes, n, T)                                                                  \
    static inline void name(const real *x, ptrdiff_t pitch, const real *dy, ptrdiff_t dy_pitch, ptrdiff_t rows,       \
                            ptrdiff_t rest, ptrdiff_t ahead, ptrdiff_t line, const real *shift, real *sums,           \
                            real *products) {                                                                         \
        ptrdiff_t r, i;                                                                                               \
        for (r = 0; r <= rows; r++, x += pitch, dy += dy_pitch)                                                       \
            for (i = r < rows ? 0 : n - rest; i < n; i++) {                                                           \
                ptrdiff_t at = r < rows ? i : i + rest - n;                                                           \
                real d = x[at] - shift[i];                                                                            \
                real t = T(dy);                                                                                       \
                sums[i] += t;                                                                                         \
                products[i] += t * d;                                                                                 \
            }                                                                                                         \
    }
#define CYBN_DEVIATION(g) d
#define CYBN_GRADIENT(g) (g)[at]

#endif

#define CYBN_EXPAND(macro, ...) macro(__VA_ARGS__)
#define CYBN_COLUMNS_OF_STATS_FLOAT(name)                                                                             \
    static inline void name##_rows(const float *x, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t ahead,  \
                                   ptrdiff_t line, ptrdiff_t step, const float *shift, double *sums,                  \
                                   float *squares) {                                                                  \
        for (; cols >= 16; cols -= 16, x += 16, ahead += step - 16, shift += 16, sums += 16, squares += 16)           \
            name(x, pitch, rows, 0, ahead, line, shift, sums, squares);                                               \
        for (; cols >= 4; cols -= 4, x += 4, shift += 4, sums += 4, squares += 4)                                     \
            name##_quad(x, pitch, rows, 0, 0, 0, shift, sums, squares);                                               \
    }
#define CYBN_COLUMNS_OF_PRODUCTS(name, real)                                                                          \
    static inline void name##_rows(const real *x, ptrdiff_t pitch, const real *dy, ptrdiff_t dy_pitch,                \
                                   ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t ahead, ptrdiff_t line, ptrdiff_t step,   \
                                   const real *shift, real *sums, real *products) {                                   \
        for (; cols >= 16; cols -= 16, x += 16, dy += 16, ahead += step - 16, shift += 16, sums += 16, products += 16)\
            name(x, pitch, dy, dy_pitch, rows, 0, ahead, line, shift, sums, products);                                \
        for (; cols >= 4; cols -= 4, x += 4, dy += 4, shift += 4, sums += 4, products += 4)                           \
            name##_quad(x, pitch, dy, dy_pitch, rows, 0, 0, 0, shift, sums, products);                                \
    }

CYBN_EXPAND(CYBN_STATS_FLOAT, cybn_stats_f32, CYBN_WIDTH, 16)
CYBN_STATS_FLOAT(cybn_stats_f32_quad, 16, 4)
CYBN_COLUMNS_OF_STATS_FLOAT(cybn_stats_f32)

CYBN_EXPAND(CYBN_PRODUCTS, cybn_stats_f64, double, long long, CYBN_WIDTH, 16, CYBN_DEVIATION)
CYBN_PRODUCTS(cybn_stats_f64_quad, double, long long, 16, 4, CYBN_DEVIATION)
CYBN_COLUMNS_OF_PRODUCTS(cybn_stats_f64, double)

CYBN_EXPAND(CYBN_PRODUCTS, cybn_grads_f32, float, int, CYBN_WIDTH, 16, CYBN_GRADIENT)
CYBN_PRODUCTS(cybn_grads_f32_quad, float, int, 16, 4, CYBN_GRADIENT)
CYBN_COLUMNS_OF_PRODUCTS(cybn_grads_f32, float)

CYBN_EXPAND(CYBN_PRODUCTS, cybn_grads_f64, double, long long, CYBN_WIDTH, 16, CYBN_GRADIENT)
CYBN_PRODUCTS(cybn_grads_f64_quad, double, long long, 16, 4, CYBN_GRADIENT)
CYBN_COLUMNS_OF_PRODUCTS(cybn_grads_f64, double)

#endif
