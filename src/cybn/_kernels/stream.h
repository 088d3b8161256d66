/* Streaming stores, which Cython cannot say: past the caches, without first reading the lines that are overwritten. */
#ifndef CYBN_STREAM_H
#define CYBN_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>

/* Copy n bytes. Lines of which only a part is written go through the cache: as parts they would cost memory a read and a
   write each, and the other part may follow much later. */
static inline void cybn_stream(void *to, const void *from, size_t n) {
    char *t = (char *)to;
    const char *f = (const char *)from;
    size_t head = (size_t)(-(intptr_t)t & 63);
    if (head > n) head = n;
    memcpy(t, f, head);
    for (t += head, f += head, n -= head; n >= 64; t += 64, f += 64, n -= 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)f);
        __m128i b = _mm_loadu_si128((const __m128i *)(f + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(f + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(f + 48));
        _mm_stream_si128((__m128i *)t, a);
        _mm_stream_si128((__m128i *)(t + 16), b);
        _mm_stream_si128((__m128i *)(t + 32), c);
        _mm_stream_si128((__m128i *)(t + 48), d);
    }
    memcpy(t, f, n);
}

/* Streaming stores are weakly ordered: before other threads may read, they must be done. */
static inline void cybn_stream_end(void) { _mm_sfence(); }
#define CYBN_CAN_STREAM 1
#else
static inline void cybn_stream(void *to, const void *from, size_t n) { memcpy(to, from, n); }
static inline void cybn_stream_end(void) {}
#define CYBN_CAN_STREAM 0
#endif

#endif
