from numpy cimport ndarray

from cybn._coefficients cimport Coefficients

cpdef double real_number(object value, str name) except? -1
cpdef bint truth(object value, str name) except -1
cpdef int activation_number(object activation) except -1
cdef double slope_of(int activation, object negative_slope) except? -1
cdef object given(object out, ndarray result)
cdef tuple forward_call(object x, object running_mean, object running_var, object weight, object bias, bint train,
                        double momentum, double eps, object axis, object out, object num_threads, double correction,
                        int activation, double negative_slope, object residual, object mask, object sample_weight,
                        object masked_output, bint save, bint marks, int stacklevel)
cdef tuple backward_call(object grad_output, object x, object save_mean, object save_invstd, object weight, bint train,
                         object axis, object out, object num_threads, object bias, int activation,
                         double negative_slope, object output, object mask, object sample_weight, bint with_residual,
                         ndarray gate)
cdef tuple gradient_input(object grad_output, ndarray output, object out, object num_threads, object weight,
                          object bias, Py_ssize_t channels)
cdef Coefficients find_coefficients(Coefficients before, tuple vectors, double eps, Py_ssize_t channels)
cdef ndarray evaluate(ndarray x, object axis, object out, object num_threads, Coefficients coefficients, int activation,
                      double negative_slope, object residual, object mask, object sample_weight, object masked_output)
