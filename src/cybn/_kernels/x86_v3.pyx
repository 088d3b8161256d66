"""The kernels for x86-64-v3: 256-bit vectors (AVX2)."""
include "finishers.pxi"
include "body.pxi"
