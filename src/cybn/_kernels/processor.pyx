"""What this processor can run. Compiled for the baseline, so that asking is safe anywhere."""

cdef extern from *:
    """
    #if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
    /* The parts of x86-64-v3 that compilers can ask for; no processor has these and lacks the rest. */
    static int cybn_has_x86_v3(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    }
    #else
    static int cybn_has_x86_v3(void) { return 0; }
    #endif
    """
    bint cybn_has_x86_v3()


def has_x86_v3():
    """Whether the processor and the operating system support x86-64-v3 (AVX2, FMA, BMI)."""
    return cybn_has_x86_v3()
