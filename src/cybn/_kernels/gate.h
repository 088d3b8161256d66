/* A bit for each element: whether its gradient passes the activation as it is. Element i is bit i % 8 of byte i / 8.

   Behind a residual x alone cannot tell, and the output is an array more to read: it is asked once, where it has just
   been written, and the bits, a 32nd of it (of float32), serve backward. Elements are numbered through, so pieces of
   any length, and the threads that do them, may share a byte: what is not a whole one is written bit by bit. */
#ifndef CYBN_GATE_H
#define CYBN_GATE_H

#include <stddef.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

enum { CYBN_GATE_ROOM = 4 }; /* bytes behind the last that may be read */

/* A function with all registers to itself, though what calls it is large. */
#if defined(__GNUC__)
#define CYBN_APART static __attribute__((noinline, unused))
#else
#define CYBN_APART static
#endif

/* n < 8 bits of a byte, from its `first` on, whatever another thread does to the rest. */
static inline void cybn_mark_byte(unsigned char *p, int first, int n, unsigned bits) {
    const unsigned char all = (unsigned char)(((1u << n) - 1) << first), set = (unsigned char)(bits << first);
#if defined(_MSC_VER) && !defined(__clang__)
    _InterlockedAnd8((volatile char *)p, (char)~all);
    _InterlockedOr8((volatile char *)p, (char)set);
#else
    __atomic_fetch_and(p, (unsigned char)~all, __ATOMIC_RELAXED);
    __atomic_fetch_or(p, set, __ATOMIC_RELAXED);
#endif
}

/* Bits of CYBN_MANY_* results of an activation -> p: of a ReLU pass those that are not 0 or less (so no numbers do), of
   a leaky one those above 0. Masks are packed before they become bits: one movemask of each took twice as long. */
#if defined(__AVX2__)
enum { CYBN_MANY_float = 32, CYBN_MANY_double = 8 };
static inline __m256i cybn_passing_float(const float *y, int relu) {
    const __m256 v = _mm256_loadu_ps(y), o = _mm256_setzero_ps();
    return _mm256_castps_si256(relu ? _mm256_cmp_ps(v, o, _CMP_NLE_UQ) : _mm256_cmp_ps(v, o, _CMP_GT_OQ));
}
static inline void cybn_mark_many_float(const float *y, int relu, unsigned char *p) {
    const __m256i a = _mm256_packs_epi32(cybn_passing_float(y, relu), cybn_passing_float(y + 8, relu));
    const __m256i b = _mm256_packs_epi32(cybn_passing_float(y + 16, relu), cybn_passing_float(y + 24, relu));
    const __m256i fours = _mm256_packs_epi16(a, b), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const int bits = _mm256_movemask_epi8(_mm256_permutevar8x32_epi32(fours, order));
    memcpy(p, &bits, 4);
}
static inline int cybn_passing_double(const double *y, int relu) {
    const __m256d v = _mm256_loadu_pd(y), o = _mm256_setzero_pd();
    return _mm256_movemask_pd(relu ? _mm256_cmp_pd(v, o, _CMP_NLE_UQ) : _mm256_cmp_pd(v, o, _CMP_GT_OQ));
}
static inline void cybn_mark_many_double(const double *y, int relu, unsigned char *p) {
    *p = (unsigned char)(cybn_passing_double(y, relu) | cybn_passing_double(y + 4, relu) << 4);
}
#elif defined(__SSE2__)
enum { CYBN_MANY_float = 16, CYBN_MANY_double = 8 };
static inline __m128i cybn_passing_float(const float *y, int relu) {
    const __m128 v = _mm_loadu_ps(y), o = _mm_setzero_ps();
    return _mm_castps_si128(relu ? _mm_cmpnle_ps(v, o) : _mm_cmpgt_ps(v, o));
}
static inline void cybn_mark_many_float(const float *y, int relu, unsigned char *p) {
    const __m128i a = _mm_packs_epi32(cybn_passing_float(y, relu), cybn_passing_float(y + 4, relu));
    const __m128i b = _mm_packs_epi32(cybn_passing_float(y + 8, relu), cybn_passing_float(y + 12, relu));
    const int bits = _mm_movemask_epi8(_mm_packs_epi16(a, b));
    memcpy(p, &bits, 2);
}
static inline int cybn_passing_double(const double *y, int relu) {
    const __m128d v = _mm_loadu_pd(y), o = _mm_setzero_pd();
    return _mm_movemask_pd(relu ? _mm_cmpnle_pd(v, o) : _mm_cmpgt_pd(v, o));
}
static inline void cybn_mark_many_double(const double *y, int relu, unsigned char *p) {
    *p = (unsigned char)(cybn_passing_double(y, relu) | cybn_passing_double(y + 2, relu) << 2
                         | cybn_passing_double(y + 4, relu) << 4 | cybn_passing_double(y + 6, relu) << 6);
}
#else
enum { CYBN_MANY_float = 8, CYBN_MANY_double = 8 };
#define CYBN_MARK_MANY(real)                                                                                          \
    static inline void cybn_mark_many_##real(const real *y, int relu, unsigned char *p) {                             \
        int i;                                                                                                        \
        for (*p = 0, i = 0; i < 8; i++) *p |= (unsigned char)((relu ? !(y[i] <= 0) : y[i] > 0) << i);                 \
    }
CYBN_MARK_MANY(float)
CYBN_MARK_MANY(double)
#endif

/* The bits of n results, from number `bit` on. */
#define CYBN_MARK(real)                                                                                               \
    static inline void cybn_mark_few_##real(const real *y, ptrdiff_t n, int relu, unsigned char *gate, ptrdiff_t bit) {\
        int i, count;                                                                                                 \
        for (; n > 0; n -= count, y += count, bit += count) {                                                         \
            unsigned bits = 0;                                                                                        \
            count = 8 - (int)(bit & 7);                                                                               \
            if (count > n) count = (int)n;                                                                            \
            for (i = 0; i < count; i++) bits |= (unsigned)(relu ? !(y[i] <= 0) : y[i] > 0) << i;                      \
            if (count == 8) gate[bit >> 3] = (unsigned char)bits;                                                     \
            else cybn_mark_byte(gate + (bit >> 3), (int)(bit & 7), count, bits);                                      \
        }                                                                                                             \
    }                                                                                                                 \
    static inline void cybn_mark_##real(const real *y, ptrdiff_t n, int relu, unsigned char *gate, ptrdiff_t bit) {   \
        const ptrdiff_t head = n < (-bit & 7) ? n : -bit & 7;                                                         \
        ptrdiff_t i = head;                                                                                           \
        if (head) cybn_mark_few_##real(y, head, relu, gate, bit);                                                     \
        for (; i + CYBN_MANY_##real <= n; i += CYBN_MANY_##real)                                                      \
            cybn_mark_many_##real(y + i, relu, gate + ((bit + i) >> 3));                                              \
        if (i < n) cybn_mark_few_##real(y + i, n - i, relu, gate, bit + i);                                           \
    }
CYBN_MARK(float)
CYBN_MARK(double)

/* The lines of n bits, to be read or written soon. There is one for 512 elements, too few for the processor to foresee:
   stores waited for each of them, and all that came after waited, too (forward passes took 1.1 times as long). */
static inline void cybn_fetch_gate(const unsigned char *gate, ptrdiff_t bit, ptrdiff_t n) {
#if defined(__GNUC__)
    ptrdiff_t i;
    for (i = bit >> 3; i <= (bit + n) >> 3; i += 64) __builtin_prefetch(gate + i);
#else
    (void)gate, (void)bit, (void)n;
#endif
}

/* Bits from number `bit` on, 25 at least. (Of four bytes, for one load.) */
static inline unsigned cybn_bits(const unsigned char *gate, ptrdiff_t bit) {
    const unsigned char *p = gate + (bit >> 3);
    return (p[0] | (unsigned)p[1] << 8 | (unsigned)p[2] << 16 | (unsigned)p[3] << 24) >> (bit & 7);
}

#if defined(__GNUC__)
#if defined(__AVX__)
#define CYBN_WIDTH 32
#else
#define CYBN_WIDTH 16
#endif
/* Vectors of `bytes` bytes, wherever they lie. */
#define CYBN_VECTOR(real, bytes) real __attribute__((vector_size(bytes), aligned(sizeof(real)), may_alias))
/* The i-th F of 16 bits as lanes of a mask. (clang adds no unsigned number to a vector of int.) */
#define CYBN_PLACES 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768
static const int cybn_places_float[16] = {CYBN_PLACES};
static const long long cybn_places_double[16] = {CYBN_PLACES};
#define CYBN_PLACE(i, real) (*(const mask *)(cybn_places_##real + (i) * F))
#define CYBN_BITS(word, i, real) (mask)((((mask){} + (int)(word)) & CYBN_PLACE(i, real)) == CYBN_PLACE(i, real))
#endif

/* Gradients behind the activation: those whose bits are not set are 0 (relu) or multiplied by slope. Of a line, whose
   bits are the first of a word. */
#define CYBN_PASSED(bit, g) ((bit) & 1 ? (g) : relu ? 0 : (g) * slope)
#if defined(__GNUC__)
#define CYBN_PASS_LINE(real, lane)                                                                                    \
    static inline void cybn_pass_line_##real(const real *dy, int relu, real slope, unsigned word, real *to) {         \
        typedef CYBN_VECTOR(real, CYBN_WIDTH) vector;                                                                 \
        typedef CYBN_VECTOR(lane, CYBN_WIDTH) mask;                                                                   \
        enum { F = CYBN_WIDTH / sizeof(real), N = 64 / CYBN_WIDTH };                                                  \
        int i;                                                                                                        \
        _Pragma("GCC unroll 4") for (i = 0; i < N; i++) {                                                             \
            const mask passes = CYBN_BITS(word, i, real);                                                             \
            const vector v = *(const vector *)(dy + i * F);                                                           \
            const mask less = relu ? (mask){} : (mask)((mask)(v * slope) & ~passes);                                  \
            *(vector *)(to + i * F) = (vector)(((mask)v & passes) | less);                                            \
        }                                                                                                             \
    }
#else
#define CYBN_PASS_LINE(real, lane)                                                                                    \
    static inline void cybn_pass_line_##real(const real *dy, int relu, real slope, unsigned word, real *to) {         \
        int i;                                                                                                        \
        for (i = 0; i < (int)(64 / sizeof(real)); i++) to[i] = CYBN_PASSED(word >> i, dy[i]);                         \
    }
#endif
/* Of n, from number `bit` on. */
#define CYBN_PASS(real, lane)                                                                                         \
    CYBN_PASS_LINE(real, lane)                                                                                        \
    CYBN_APART void cybn_pass_##real(const real *dy, ptrdiff_t n, int relu, real slope, const unsigned char *gate,    \
                                     ptrdiff_t bit, real *to) {                                                       \
        const ptrdiff_t line = 64 / sizeof(real);                                                                     \
        ptrdiff_t i = 0;                                                                                              \
        for (; i + line <= n; i += line) cybn_pass_line_##real(dy + i, relu, slope, cybn_bits(gate, bit + i), to + i);\
        for (; i < n; i++) to[i] = CYBN_PASSED(cybn_bits(gate, bit + i), dy[i]);                                      \
    }
CYBN_PASS(float, int)
CYBN_PASS(double, long long)

#endif
