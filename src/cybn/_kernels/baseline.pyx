"""The kernels for any processor: what the compiler's default target allows."""
include "body.pxi"
