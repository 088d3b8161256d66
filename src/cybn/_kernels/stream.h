/* Streaming stores, which Cython cannot say: past the caches, without first reading the lines that are overwritten. */
#ifndef CYBN_STREAM_H
#define CYBN_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "gate.h"

#if defined(__SSE2__)
#include <immintrin.h>

/* A line, in the widest stores of this build: half as many of them wait for memory (1.0 to 1.07 times as fast). And its
   bits, of what the registers hold (NULL: not). */
#if defined(__AVX2__)
static inline void cybn_stream_line_float(float *to, const float *from, int relu, unsigned char *bits) {
    const __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + 8);
    if (bits) {
        const int low = _mm256_movemask_ps(_mm256_castsi256_ps(cybn_passing_float(from, relu)));
        const int high = _mm256_movemask_ps(_mm256_castsi256_ps(cybn_passing_float(from + 8, relu)));
        bits[0] = (unsigned char)low;
        bits[1] = (unsigned char)high;
    }
    _mm256_stream_ps(to, a);
    _mm256_stream_ps(to + 8, b);
}
static inline void cybn_stream_line_double(double *to, const double *from, int relu, unsigned char *bits) {
    const __m256d a = _mm256_loadu_pd(from), b = _mm256_loadu_pd(from + 4);
    if (bits) cybn_mark_many_double(from, relu, bits);
    _mm256_stream_pd(to, a);
    _mm256_stream_pd(to + 4, b);
}
#else
#define CYBN_STREAM_LINE(real)                                                                                        \
    static inline void cybn_stream_line_##real(real *to, const real *from, int relu, unsigned char *bits) {           \
        __m128i *t = (__m128i *)(void *)to;                                                                           \
        const __m128i *f = (const __m128i *)(const void *)from;                                                       \
        const __m128i a = _mm_loadu_si128(f), b = _mm_loadu_si128(f + 1);                                             \
        const __m128i c = _mm_loadu_si128(f + 2), d = _mm_loadu_si128(f + 3);                                         \
        if (bits) cybn_mark_##real(from, 64 / sizeof(real), relu, bits, 0);                                           \
        _mm_stream_si128(t, a);                                                                                       \
        _mm_stream_si128(t + 1, b);                                                                                   \
        _mm_stream_si128(t + 2, c);                                                                                   \
        _mm_stream_si128(t + 3, d);                                                                                   \
    }
CYBN_STREAM_LINE(float)
CYBN_STREAM_LINE(double)
#endif
#define CYBN_STREAM_FETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

/* Streaming stores are weakly ordered: before other threads may read, they must be done. */
static inline void cybn_stream_end(void) { _mm_sfence(); }
#else
#define CYBN_STREAM_LINE(real)                                                                                        \
    static inline void cybn_stream_line_##real(real *to, const real *from, int relu, unsigned char *bits) {           \
        if (bits) cybn_mark_##real(from, 64 / sizeof(real), relu, bits, 0);                                           \
        memcpy(to, from, 64);                                                                                         \
    }
CYBN_STREAM_LINE(float)
CYBN_STREAM_LINE(double)
#define CYBN_STREAM_FETCH(p) (void)(p)
static inline void cybn_stream_end(void) {}
#endif

/* n results to their place. Lines of which only a part is written go through the cache: as parts they would cost memory
   a read and a write each, and the other part may follow much later. With each line that goes out one of each of two
   arrays, of which these n elements are read soon, comes into the second cache (NULL: none): memory reads while it
   writes. And bits of the gate are made, from number `bit` on (NULL: none). */
#define CYBN_STREAM(real)                                                                                             \
    CYBN_APART void cybn_stream_##real(real *to, const real *from, ptrdiff_t n, const real *next, const real *other,  \
                                       int relu, unsigned char *gate, ptrdiff_t bit) {                                \
        const ptrdiff_t line = 64 / sizeof(real);                                                                     \
        ptrdiff_t i = (ptrdiff_t)((-(intptr_t)to & 63) / (intptr_t)sizeof(real));                                     \
        if (i > n || (intptr_t)to % (intptr_t)sizeof(real)) i = n; /* (doubles of i386 begin at any 4 bytes) */       \
        if (gate && ((bit + i) & 7)) { /* where lines do not begin with bytes */                                      \
            cybn_mark_##real(from, n, relu, gate, bit);                                                               \
            gate = NULL;                                                                                              \
        }                                                                                                             \
        if (i) memcpy(to, from, (size_t)i * sizeof(real));                                                            \
        if (gate && i) cybn_mark_##real(from, i, relu, gate, bit);                                                    \
        for (; i + line <= n; i += line) {                                                                            \
            cybn_stream_line_##real(to + i, from + i, relu, gate ? gate + ((bit + i) >> 3) : NULL);                   \
            if (next) CYBN_STREAM_FETCH(next + i);                                                                    \
            if (other) CYBN_STREAM_FETCH(other + i);                                                                  \
        }                                                                                                             \
        if (i < n) memcpy(to + i, from + i, (size_t)(n - i) * sizeof(real));                                          \
        if (gate && i < n) cybn_mark_##real(from + i, n - i, relu, gate, bit + i);                                    \
    }
CYBN_STREAM(float)
CYBN_STREAM(double)

#endif
