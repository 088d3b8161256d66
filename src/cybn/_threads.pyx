"""How many threads a call uses, and when it must stay serial. The only file that names omp.h.

In order of precedence: the call's `num_threads`, `with num_threads(n)` (this Python thread), `set_num_threads(n)`
(the process), CYBN_NUM_THREADS, and what OpenMP would take (OMP_NUM_THREADS, limits set by threadpoolctl), which is
at most the processors this process may run on. The number never changes a result.
"""
import operator

from cybn._environment import number

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define CYBN_OPENMP _OPENMP
    #else
    #define CYBN_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    static int omp_in_parallel(void) { return 0; }
    #endif

    #if defined(_MSC_VER)
    #define CYBN_THREAD_LOCAL __declspec(thread)
    #else
    #define CYBN_THREAD_LOCAL __thread
    #endif

    /* Threads asked for by `with num_threads(n)` in this thread; 0: none. */
    static CYBN_THREAD_LOCAL int cybn_local_threads = 0;

    /* libgomp hangs when a thread that owned a team before fork() starts one in the child: the team's threads are
       gone. So the one thread that crossed the fork stays serial; threads made in the child are free. The handler is
       C's and not os.register_at_fork because servers written in C fork without telling Python. */
    static CYBN_THREAD_LOCAL int cybn_forked = 0;
    #if CYBN_OPENMP && !defined(_WIN32)
    #include <pthread.h>
    static void cybn_in_child(void) { cybn_forked = 1; }
    static int cybn_guard_fork(void) { return pthread_atfork(NULL, NULL, cybn_in_child); }
    #else
    static int cybn_guard_fork(void) { return 0; }
    #endif
    """
    int CYBN_OPENMP
    int omp_get_max_threads() nogil
    int omp_in_parallel() nogil
    int cybn_local_threads
    int cybn_forked
    int cybn_guard_fork()

openmp_version = CYBN_OPENMP
"""Date (yyyymm) of the OpenMP specification the compiler implements; 0: built without OpenMP."""

cdef enum:
    MOST = 4096     # threads that anyone can mean

cdef int process_threads = 0    # set_num_threads or CYBN_NUM_THREADS; 0: OpenMP's choice


cdef int positive(object n) except -1:
    cdef object given = n
    if isinstance(n, bool):
        raise TypeError(f"num_threads must be an integer, got {n!r}")
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"num_threads must be an integer, got {given!r}") from None
    if n < 1:
        raise ValueError(f"num_threads must be at least 1, got {n}")
    return min(n, MOST)


cdef int choose_threads(object num_threads) except -1:
    """The number of threads a call may use."""
    if num_threads is not None:
        return positive(num_threads)
    if cybn_local_threads:
        return cybn_local_threads
    if process_threads:
        return process_threads
    return omp_get_max_threads()


cdef int usable_threads(int wanted) noexcept nogil:
    """1 where a team cannot or must not be started: without OpenMP, after fork, inside a parallel region."""
    if CYBN_OPENMP == 0 or cybn_forked or omp_in_parallel():
        return 1
    return wanted


def set_num_threads(n):
    """Set the number of threads that calls in this process use unless told otherwise.

    Parameters
    ----------
    n : int
        At least 1. The results do not depend on it.

    Raises
    ------
    TypeError, ValueError
        If `n` is not a positive integer.

    See Also
    --------
    num_threads : the same for a block of code in one thread.
    """
    global process_threads
    process_threads = positive(n)


def get_num_threads():
    """Return the number of threads that a call in this thread may use.

    Returns
    -------
    int
        From `num_threads` (context manager), else `set_num_threads`, else the environment variable
        ``CYBN_NUM_THREADS``, else OpenMP's own choice (``OMP_NUM_THREADS``, the processors available). 1 when cybn
        was built without OpenMP and in a thread that has crossed a fork. Small arrays use fewer.
    """
    return usable_threads(choose_threads(None))


class num_threads:
    """Context manager: the number of threads for calls made by this thread within the block.

    Parameters
    ----------
    n : int
        At least 1.

    Examples
    --------
    >>> import cybn
    >>> with cybn.num_threads(1):
    ...     cybn.get_num_threads()
    1
    """

    def __init__(self, n):
        self._n = positive(n)
        self._before = []

    def __enter__(self):
        global cybn_local_threads
        self._before.append(cybn_local_threads)
        cybn_local_threads = self._n
        return self

    def __exit__(self, *exc_info):
        global cybn_local_threads
        cybn_local_threads = self._before.pop()


process_threads = min(number("CYBN_NUM_THREADS", 0, least=1, what="a positive integer"), MOST)
if cybn_guard_fork() != 0:
    raise ImportError("cybn could not register its fork handler (pthread_atfork failed)")
