from cybn._kernels.kernels cimport Job, finisher

cdef tuple NAMES     # of the vectors: running_mean, running_var, weight, bias

cdef class Coefficients:
    cdef double eps
    cdef Py_ssize_t channels
    cdef tuple vectors      # copies of those; None where there is none
    cdef double *memory     # center, factor, scale, offset

    cdef void use(self, Job *job) noexcept

cdef Coefficients coefficients_of(Coefficients before, tuple vectors, double eps, Py_ssize_t channels,
                                  finisher finish_normalize)
