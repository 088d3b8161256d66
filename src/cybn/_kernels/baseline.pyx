"""The kernels for any processor: what the compiler's default target allows."""
include "finishers.pxi"
include "body.pxi"
