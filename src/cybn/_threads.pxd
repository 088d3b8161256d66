cdef enum:
    MOST_SHARES = 1024      # of `share_out`; steps: 255 at most

cdef enum:
    # What the work of `share_out` is worth: helpers that are awake; waking some if calls follow each other closely;
    # waking them anyway; and having them compete with other processes.
    AWAKE
    CLOSE
    WAKE
    COMPETE

ctypedef void (*work_on_share)(void *context, Py_ssize_t step, Py_ssize_t share) noexcept nogil

cdef int wished_threads(object num_threads) except -1
cdef int usable_threads(int wished) noexcept nogil
cdef void share_out(work_on_share work, void *context, Py_ssize_t steps, Py_ssize_t shares, Py_ssize_t back,
                    int threads, int worth) noexcept nogil
