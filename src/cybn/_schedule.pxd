from cybn._kernels.kernels cimport Job, Weights, verb, weigher

cdef struct Channels:
    # Per-channel input and results of a finisher, double; NULL where the call has none.
    double *mean
    double *m2
    double *invstd
    double *weight
    double *bias
    double *sum_dy
    double *sum_dy_xmu
    double *running_mean    # to be updated
    double *running_var
    double momentum
    double degrees          # what running_var divides m2 by
    double eps
    double count

ctypedef void (*finisher)(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil

cdef void decompose(Job *job) noexcept nogil
cdef Weights weigh_blocks(Job *job, weigher weigh) noexcept nogil
cdef Py_ssize_t partial_size(const Job *job) noexcept nogil
cdef void run(Job *job, const Channels *v, verb reduce, finisher finish, verb apply, int threads) noexcept nogil

cdef void set_centers(Job *job, const double *mean, const double *invstd, const double *weight,
                      Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
cdef void finish_moments(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
cdef void finish_training(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
cdef void finish_normalize(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
cdef void finish_sums(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
cdef void finish_backward(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
cdef void finish_backward_input(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
cdef void finish_frozen(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
