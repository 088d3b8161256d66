from cybn._kernels.kernels cimport Job, finisher

cdef class Coefficients:
    cdef double eps
    cdef Py_ssize_t channels
    cdef tuple vectors      # copies of running_mean, running_var, weight and bias; None where there is none
    cdef double *memory     # center, factor, scale, offset

    cdef void use(self, Job *job) noexcept

cdef Coefficients coefficients_of(Coefficients before, tuple vectors, double eps, Py_ssize_t channels,
                                  finisher finish_normalize)
