cdef int choose_threads(object num_threads) except -1
cdef int usable_threads(int wanted) noexcept nogil
