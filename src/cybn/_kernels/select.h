/* Selection by masks of bits. `a if c else b` in a loop becomes a branch where a or b is computed: gcc moves the
   operation to the only side that wants it, and then may not move it back, for it might raise an exception flag; no
   vectors then (a leaky ReLU took twenty times as long). Masks leave it no side. */
#ifndef CYBN_SELECT_H
#define CYBN_SELECT_H

#include <string.h>

#define CYBN_SELECT(real, bits)                                                                                       \
    /* value, or 0 */                                                                                                 \
    static inline real cybn_keep_##real(int condition, real value) {                                                  \
        bits v;                                                                                                       \
        memcpy(&v, &value, sizeof v);                                                                                 \
        v &= -(bits)condition;                                                                                        \
        memcpy(&value, &v, sizeof v);                                                                                 \
        return value;                                                                                                 \
    }                                                                                                                 \
    /* value, or other */                                                                                             \
    static inline real cybn_choose_##real(int condition, real value, real other) {                                    \
        bits v, o;                                                                                                    \
        memcpy(&v, &value, sizeof v);                                                                                 \
        memcpy(&o, &other, sizeof o);                                                                                 \
        v = (v & -(bits)condition) | (o & ~-(bits)condition);                                                         \
        memcpy(&value, &v, sizeof v);                                                                                 \
        return value;                                                                                                 \
    }                                                                                                                 \
    /* value where the flag, 0 or -1, is set, or 0 */                                                                 \
    static inline real cybn_flagged_##real(signed char flag, real value) {                                            \
        bits v;                                                                                                       \
        memcpy(&v, &value, sizeof v);                                                                                 \
        v &= (bits)flag;                                                                                              \
        memcpy(&value, &v, sizeof v);                                                                                 \
        return value;                                                                                                 \
    }
CYBN_SELECT(float, int)
CYBN_SELECT(double, long long)

#endif
