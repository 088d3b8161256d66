/* What the headers of the kernels compute, as bits: compiled as for processors and compilers of other kinds
   (test_lanes.py), all must print the same. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#ifdef NO_VECTORS
#undef __GNUC__
#endif

#include "gate.h"
#include "lanes.h"
#include "stream.h"
#include "vectors.h"

enum { ROWS = 6, COLS = 61, N = ROWS * COLS };

static uint64_t hash = 14695981039346656037u;

static void add(const void *bytes, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) hash = (hash ^ ((const unsigned char *)bytes)[i]) * 1099511628211u;
}

static double number(int i) { return ((i * 7919 + 12345) % 1009 - 504) / 37.0; }

#define SHOW(real)                                                                                                    \
    static void show_##real(void) {                                                                                   \
        static real x[N + 64], dy[N + 64], y[N + 64], shift[64], scale[64], offset[64], kept[N + 64], a[64], q[64];   \
        static signed char flags[N + 64];                                                                             \
        static unsigned char gate[N + 64];                                                                            \
        double sums[64];                                                                                              \
        int i, kind, run;                                                                                             \
        for (i = 0; i < N + 64; i++) {                                                                                \
            x[i] = (real)number(i);                                                                                   \
            dy[i] = (real)(number(3 * i + 1) * number(i + 2));                                                        \
            y[i] = i % 11 ? (real)number(5 * i + 2) : i % 2 ? (real)-0.0 : (real)NAN;                                 \
            flags[i] = number(7 * i) > -5 ? -1 : 0;                                                                   \
        }                                                                                                             \
        for (i = 0; i < 64; i++) {                                                                                    \
            shift[i] = (real)number(11 * i) / 8;                                                                      \
            scale[i] = (real)number(13 * i) / 16;                                                                     \
            offset[i] = (real)number(17 * i);                                                                         \
        }                                                                                                             \
        for (i = 0; i < 40; i++) {                                                                                    \
            cybn_mark_##real(y, N - i, i % 2, gate, i % 9);                                                           \
            add(gate, sizeof gate);                                                                                   \
            cybn_pass_##real(dy, N - i, i % 3 > 0, (real)0.25, gate, i % 13, kept);                                   \
            add(kept, sizeof kept);                                                                                   \
            cybn_stream_##real(kept + i % 19, y, N - i, i % 5 ? NULL : x, NULL, i % 2, i % 7 ? gate : NULL, i % 23);  \
            cybn_stream_end();                                                                                        \
            add(kept, sizeof kept);                                                                                   \
            add(gate, sizeof gate);                                                                                   \
        }                                                                                                             \
        printf("gate %016llx\n", (unsigned long long)hash);                                                           \
        for (kind = CYBN_PLAIN; kind <= CYBN_BY_MASK; kind++)                                                         \
            for (run = 0; run < 3; run++) { /* rows, a run, rows from afar */                                         \
                const int bits = kind >= CYBN_BY_RELU_BITS && kind <= CYBN_KEPT_LEAKY;                                \
                const signed char *what = bits ? (signed char *)gate : flags;                                         \
                memset(sums, 0, sizeof sums);                                                                         \
                memset(a, 0, sizeof a);                                                                               \
                memset(q, 0, sizeof q);                                                                               \
                if (run == 1)                                                                                         \
                    cybn_sum_##real(0, kind, 16, 0, 16, x, 16, dy, 16, what, 16, 3, N / 16, N % 16, 0, 16, 0, shift,  \
                                        scale, offset, (real)0.25, kept, 16, sums, a, q);                             \
                else                                                                                                  \
                    cybn_sum_##real(1, kind, COLS / 4 * 4, 0, 64, x, COLS, dy, COLS, what, COLS, run, ROWS, 0, 0,     \
                                    COLS, run * 8, shift, scale, offset, (real)0.25, kept, COLS, sums, a, q);         \
                add(sums, sizeof sums);                                                                               \
                add(a, sizeof a);                                                                                     \
                add(q, sizeof q);                                                                                     \
                add(kept, sizeof kept);                                                                               \
                printf("%d %d %016llx\n", kind, run, (unsigned long long)hash);                                       \
            }                                                                                                         \
        for (i = 0; i < 64; i++) {                                                                                    \
            const cybn_weights w = cybn_weigh_##real(x + i, i);                                                       \
            add(&w, sizeof w);                                                                                        \
        }                                                                                                             \
        printf("weights %016llx\n", (unsigned long long)hash);                                                        \
    }
SHOW(float)
SHOW(double)

int main(void) {
    static double values[64], roots[64];
    static signed char flags[64];
    ptrdiff_t n, whole, end;
    int i;
    show_float();
    show_double();
    for (i = 0; i < 64; i++) {
        values[i] = i % 9 ? 1 + number(i) * number(i) : 0;
        flags[i] = i < 20 || i % 7 == 3 ? -1 : 0;
    }
    for (n = 0; n < 64; n++) {
        double count = cybn_count_flags(flags + n / 2, n - n / 2);
        i = cybn_outside(values, n, 0, 40);
        cybn_inverse_sqrt(values, 0, roots, n);
        cybn_bound_flags(flags, n, &whole, &end);
        add(&count, sizeof count);
        add(&i, sizeof i);
        add(roots, sizeof roots);
        add(&whole, sizeof whole);
        add(&end, sizeof end);
    }
    printf("vectors %016llx\n", (unsigned long long)hash);
    return 0;
}
