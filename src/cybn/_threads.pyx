"""How many threads a call uses, and the team that does its work. The only file that names omp.h.

In order of precedence: the call's `num_threads`, `with num_threads(n)` (this Python thread), `set_num_threads(n)`
(the process), CYBN_NUM_THREADS, OMP_NUM_THREADS, and else the smallest of the processors this thread may run on, the
control groups' quota and what OpenMP would take (which is how threadpoolctl limits cybn). The number never changes a
result.
"""
import operator
import os
from threading import local

from cybn import _cgroup
from cybn._environment import number

cdef extern from *:
    """
    #include <limits.h>
    #ifdef _OPENMP
    #include <omp.h>
    #define CYBN_OPENMP _OPENMP
    #else
    #define CYBN_OPENMP 0
    static int omp_get_max_threads(void) { return INT_MAX; }
    static int omp_in_parallel(void) { return 0; }
    #endif
    #if CYBN_OPENMP < 200805
    static int omp_get_thread_limit(void) { return INT_MAX; }
    #endif

    #if defined(_MSC_VER)
    #define CYBN_THREAD_LOCAL __declspec(thread)
    #else
    #define CYBN_THREAD_LOCAL __thread
    #endif

    /* Threads asked for by `with num_threads(n)` in this thread; 0: none. */
    static CYBN_THREAD_LOCAL int cybn_local_threads = 0;

    /* Processors that this thread may run on. */
    #if defined(__linux__)
    #include <sched.h>
    #include <unistd.h>
    static int cybn_processors(void) {
        cpu_set_t set;      /* of 1,024; the system refuses where it has more */
        return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    }
    #elif defined(_WIN32)
    static int cybn_processors(void) { return INT_MAX; }
    #else
    #include <unistd.h>
    static int cybn_processors(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
    #endif
    """
    int CYBN_OPENMP
    int omp_get_max_threads() nogil
    int omp_get_thread_limit() nogil
    int omp_in_parallel() nogil
    int cybn_processors() nogil
    int cybn_local_threads

cdef extern from "_team.h":
    void cybn_team(work_on_share work, void *context, Py_ssize_t steps, Py_ssize_t shares, Py_ssize_t back,
                   int threads, int worth) noexcept nogil
    Py_ssize_t cybn_share_at(Py_ssize_t i, Py_ssize_t place, Py_ssize_t places, Py_ssize_t shares, bint back) noexcept
    int cybn_helpers() noexcept
    long cybn_helped() noexcept
    int cybn_prepare_team() noexcept

cdef extern from *:
    """
    #if defined(__GNUC__)
    _Static_assert(CYBN_MOST_SHARES == 1024 && CYBN_AWAKE == 0 && CYBN_COMPETE == 3, "as in _threads.pxd");
    #endif
    """

openmp_version = CYBN_OPENMP
"""Date (yyyymm) of the OpenMP specification whose settings are followed; 0: built without OpenMP."""

cpu_quota = _cgroup.processors()
"""Processors that the control groups' quota pays for, at import; None: no quota."""

cdef enum:
    MOST = MOST_SHARES      # threads that anyone can mean: there is a share for each

cdef int environment_threads = min(number("CYBN_NUM_THREADS", 0, least=1, what="a positive integer"), MOST)
cdef int process_threads = environment_threads      # set_num_threads or CYBN_NUM_THREADS; 0: neither
cdef int quota = MOST if cpu_quota is None else min(cpu_quota, MOST)
cdef int omp_num_threads = 0    # OMP_NUM_THREADS; 0: not set


cdef int positive(object n) except -1:
    cdef object given = n
    if isinstance(n, bool):
        raise TypeError(f"num_threads must be an integer, got {n!r}")
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"num_threads must be an integer, got {given!r}") from None
    except Exception as error:
        raise TypeError(f"num_threads must be an integer, got {type(given).__name__} ({error})") from error
    if n < 1:
        raise ValueError(f"num_threads must be at least 1, got {n}")
    return min(n, MOST)


cdef int wished_threads(object num_threads) except -1:
    """The argument of a call: None is 0, which leaves it to `usable_threads`."""
    return 0 if num_threads is None else positive(num_threads)


cdef int usable_threads(int wished) noexcept nogil:
    """Threads that a call in this thread may use. 1 inside a parallel region, whose threads have the processors."""
    if omp_in_parallel():
        return 1
    if wished == 0:
        wished = cybn_local_threads
    if wished == 0:
        wished = process_threads
    if wished == 0:
        wished = omp_num_threads if omp_num_threads else min(cybn_processors(), quota)
        wished = min(wished, omp_get_max_threads(), omp_get_thread_limit())
    return max(1, min(wished, MOST))


cdef void share_out(work_on_share work, void *context, Py_ssize_t steps, Py_ssize_t shares, Py_ssize_t back,
                    int threads, int worth) noexcept nogil:
    """work(context, step, share) for all shares of all steps, a step when the one before it is done.

    By the calling thread and at most `threads` - 1 helpers, of which `worth` says more. Every `back`-th step goes from
    each thread's last share to its first (0: none does).
    """
    cybn_team(work, context, steps, shares, back, threads, worth)


def order_of_shares(place, places, shares, back):
    """In which a thread with this place, of so many, tries the shares of a step (for tests)."""
    return [cybn_share_at(i, place, places, shares, back) for i in range(shares)]


def helpers():
    """Threads of cybn's that help the calls of this process. They start with the first call that is worth it."""
    return cybn_helpers()


def helped():
    """How often a helper took part in a call of this process."""
    return cybn_helped()


def processors():
    """Processors that this thread may run on."""
    return cybn_processors()


def set_num_threads(n):
    """Set the number of threads that calls in this process use unless told otherwise.

    Parameters
    ----------
    n : int or None
        At least 1. The results do not depend on it. None: as if it had never been set.

    Raises
    ------
    TypeError, ValueError
        If `n` is neither None nor a positive integer.

    See Also
    --------
    num_threads : the same for a block of code in one thread.
    """
    global process_threads
    process_threads = environment_threads if n is None else positive(n)


def get_num_threads():
    """Return the number of threads that a call in this thread may use.

    Returns
    -------
    int
        From `num_threads` (context manager), else `set_num_threads`, else the environment variable
        ``CYBN_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the smallest of the processors this thread may run on, the
        control groups' CPU quota (rounded down, at least 1) and OpenMP's own limits, which threadpoolctl sets. 1 inside
        an OpenMP parallel region. Small arrays use fewer.
    """
    return usable_threads(0)


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
        self._here = local()    # one object may serve several threads, and be entered again inside

    def __enter__(self):
        global cybn_local_threads
        self._here.__dict__.setdefault("before", []).append(cybn_local_threads)
        cybn_local_threads = self._n
        return self

    def __exit__(self, *exc_info):
        global cybn_local_threads
        before = self._here.__dict__.get("before")
        if not before:
            raise RuntimeError("num_threads must be left by the thread that has entered it")
        cybn_local_threads = before.pop()


# The outermost level of the list that it may be. What is no number is OpenMP's to complain about.
omp_first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
omp_num_threads = min(int(omp_first), MOST) if omp_first.isdecimal() else 0
del omp_first
if cybn_prepare_team() != 0:
    raise ImportError("cybn could not register its fork handler (pthread_atfork failed)")
