from numpy cimport ndarray

from cybn._kernels.kernels cimport Job, Operand, Weights

cdef struct Layout:
    # How x lies in memory: its axes from the slowest to the fastest, those of size 1 left out.
    Py_ssize_t ndim
    int axes[64]
    Py_ssize_t sides[64]
    int rank        # x's own
    int type

cdef ndarray view_array(object value, str name, bint writeable, str wanted=*)
cdef ndarray as_data(object value, str name)
cdef ndarray as_same(object value, str name, ndarray x)
cdef ndarray as_out(object out, ndarray x, ndarray grad_output)
cdef ndarray new_gate(ndarray x)
cdef int check_gate(ndarray gate, ndarray x) except -1
cdef ndarray as_weights(object mask, object sample_weight, ndarray x, int axis, const Layout *layout)
cdef int check_weight_values(ndarray weights, const Weights *found) except -1
cdef int check_overlap(ndarray out, ndarray other, str name) except -1
cdef int check_apart(ndarray a, str name, ndarray other, str other_name) except -1
cdef str shape_of(ndarray a)
cdef object as_integer(object value, str name)
cdef int channel_axis(ndarray x, object axis) except -1
cdef void lay_out(Job *job, Layout *layout, ndarray x, int axis) noexcept
cdef int describe(Operand *op, const Layout *layout, ndarray a) except -1
cdef ndarray as_vector(object value, str name, Py_ssize_t channels, bint writeable)
cdef bint is_dense_vector(ndarray a, Py_ssize_t channels) noexcept
cdef int read_vector(object value, str name, Py_ssize_t channels, double *to, bint negative=*) except -1
cdef ndarray as_running(object value, str name, Py_ssize_t channels)
cdef ndarray new_vector(Py_ssize_t channels, int dtype, const double *values)
cdef void write_vector(ndarray to, const double *values) noexcept
