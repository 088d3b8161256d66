from cybn._kernels.kernels cimport Channels, Job, Weights, finisher, marker, verb, weigher

cdef void decompose(Job *job) noexcept nogil
cdef Weights weigh_blocks(Job *job, weigher weigh) noexcept nogil
cdef Py_ssize_t partial_size(const Job *job) noexcept nogil
cdef void mark(const Job *job, marker make, int threads) noexcept nogil
cdef void run(Job *job, const Channels *v, verb reduce, finisher finish, verb apply, int threads) noexcept nogil
