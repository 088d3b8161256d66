"""Which elements form a block (fixed: it makes the bits) and which thread does what, when (free).

Between the sweeps over the elements stand the finishers: per channel, in double, they combine the slices and turn
statistics into the coefficients of the second sweep.
"""
from cython.parallel cimport parallel, prange
from libc.math cimport fabs, sqrt

from cybn._environment import number

from cybn._kernels.kernels cimport COLUMNS, LANES, PERIOD, PANEL, ROWS, Job, verb
from cybn._threads cimport usable_threads

cdef enum:
    SHORT = 64              # runs shorter than this are treated as rows of channels
    PARTIALS = 8192         # slices * channels, about: enough slices for many threads, few enough to combine quickly
    STRETCH = 32 * 1024     # bytes of memory in one piece that a group of channels reads at least
    SERIAL = 128 * 1024     # bytes below which a team of threads costs more than it brings

cdef double WIDE = 18446744073709551616.0   # 2**64

cdef extern from *:
    """
    #if defined(__linux__)
    #include <unistd.h>
    static long cybn_cache(int level) {
        return sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
    }
    #else
    static long cybn_cache(int level) { return 0; }
    #endif
    """
    long cybn_cache(int level)

# Sizes in bytes; where the system does not tell, those of a small processor of the last ten years.
cdef Py_ssize_t L2 = cybn_cache(2) if cybn_cache(2) > 0 else 512 * 1024
cdef Py_ssize_t L3 = cybn_cache(3) if cybn_cache(3) > 0 else 4 * 1024 * 1024


# Size from which results are written past the caches. Smaller ones are likely to be found in the last cache by who
# reads them next; 32 MiB is where streaming began to gain on the machines that were tried.
cdef Py_ssize_t STREAM = number("CYBN_STREAM_MIN_BYTES", 32 * 1024 * 1024)


def set_stream_min_bytes(Py_ssize_t n):
    """Change that size (for tests and measurements). Return the one before."""
    global STREAM
    before = STREAM
    STREAM = n
    return before


# --------------------------------------------------------------------------------- decomposition: from shape and dtype

cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Py_ssize_t gcd(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef void decompose(Job *job) noexcept nogil:
    """Cut (outer, channels, inner) into blocks and slices. Nothing but these three numbers may decide."""
    cdef Py_ssize_t width = job.channels * job.inner, whole
    job.rows = job.inner < SHORT
    job.period = 1
    job.block_inner = job.inner
    if job.rows:
        # Several outer indices per row where rows are short, as long as there remain ROWS rows to sum over; a
        # multiple of the lanes if one fits, so that no row ends in a tail.
        job.period = max(1, min(PERIOD // width, job.outer // ROWS))
        whole = LANES // gcd(LANES, width)
        if job.period > whole:
            job.period -= job.period % whole
        job.block_outer = ROWS * job.period
        job.tile = job.channels if job.period > 1 else max(1, COLUMNS // job.inner)
    else:
        job.tile = COLUMNS // LANES
        job.block_outer = max(1, PANEL // job.inner)
        if job.inner > PANEL:
            # Equal pieces, whole lanes.
            job.block_inner = ceil_div(job.inner, ceil_div(job.inner, PANEL))
            job.block_inner = ceil_div(job.block_inner, LANES) * LANES
    job.blocks_inner = ceil_div(job.inner, job.block_inner)
    job.blocks = ceil_div(job.outer, job.block_outer) * job.blocks_inner
    job.slices = max(1, min(PARTIALS // job.channels, job.blocks))
    job.slice_blocks = ceil_div(job.blocks, job.slices)
    job.slices = ceil_div(job.blocks, job.slice_blocks)


cdef Py_ssize_t partial_size(const Job *job) noexcept nogil:
    """Doubles of `job.partial` and `job.counts`."""
    return (2 * job.channels + 1) * job.slices


cdef void count_slices(Job *job) noexcept nogil:
    cdef Py_ssize_t block, bo, bi, piece
    for piece in range(job.slices):
        job.counts[piece] = 0
        for block in range(piece * job.slice_blocks, min((piece + 1) * job.slice_blocks, job.blocks)):
            bo = block // job.blocks_inner
            bi = block - bo * job.blocks_inner
            job.counts[piece] += (min(job.block_outer, job.outer - bo * job.block_outer)
                                  * min(job.block_inner, job.inner - bi * job.block_inner))


# ------------------------------------------------------------------------------------------------------------ schedule

cdef void group(Job *job, const Channels *v, verb reduce, finisher finish, verb apply,
                Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Owner: one thread takes channels from their statistics to their results while they are in its cache."""
    cdef Py_ssize_t piece
    if reduce != NULL:
        for piece in range(job.slices):
            reduce(job, c0, c1, piece)
    finish(job, v, c0, c1)
    if apply != NULL:
        # Backwards: what was read last is still in the cache.
        for piece in range(job.slices):
            apply(job, c0, c1, job.slices - 1 - piece)


cdef void sweep(const Job *job, verb work, Py_ssize_t width, Py_ssize_t groups, Py_ssize_t first, Py_ssize_t last,
                bint backwards) noexcept nogil:
    """Tasks [first, last) of slices x groups of channels, in the order of memory or against it."""
    cdef Py_ssize_t i, task, piece, c0
    for i in range(first, last):
        task = last - 1 - (i - first) if backwards else i
        piece = task // groups
        c0 = (task - piece * groups) * width
        work(job, c0, min(c0 + width, job.channels), piece)


cdef void run(Job *job, const Channels *v, verb reduce, finisher finish, verb apply, int threads) noexcept nogil:
    """reduce -> finish -> apply over the whole array; reduce and apply may be NULL."""
    cdef Py_ssize_t result = job.outer * job.inner * job.channels * job.itemsize
    cdef Py_ssize_t operands
    cdef Py_ssize_t channel_bytes, stretch, width, groups, tasks, t
    cdef bint owner = reduce != NULL and apply != NULL     # with one sweep there is nothing to keep
    # Not in place: there the lines have been read anyway.
    job.stream = (apply != NULL and result >= STREAM and job.out.direct and job.out.data != job.x.data
                  and job.out.data != job.dy.data)
    operands = 1 + (job.dy.data != NULL) + (job.out.data != NULL and not job.stream)
    channel_bytes = job.outer * job.inner * job.itemsize * operands
    threads = <int> min(<Py_ssize_t> usable_threads(threads), channel_bytes * job.channels // SERIAL + 1)
    # An owner's group of channels fills half of L2, and is wide enough to read memory in long stretches even if that
    # takes it beyond L2, but not beyond a quarter of the thread's share of L3. There must be a group for every thread.
    # Rows of several periods cannot be cut.
    stretch = job.inner * job.itemsize
    width = max(1, L2 // 2 // channel_bytes, STRETCH // stretch)
    if job.rows and job.period > 1:
        width = job.channels
    if threads > 1 and not (job.rows and job.period > 1):
        width = min(width, ceil_div(job.channels, threads))
    width = min(width, job.channels)
    groups = ceil_div(job.channels, width)
    owner = owner and width * channel_bytes <= max(L2 // 2, L3 // (4 * threads)) and groups >= threads
    if not owner:
        width = min(job.tile, job.channels)
        groups = ceil_div(job.channels, width)
    if threads == 1:
        if owner:
            for t in range(groups):
                group(job, v, reduce, finish, apply, t * width, min((t + 1) * width, job.channels))
        else:
            if reduce != NULL:
                sweep(job, reduce, width, groups, 0, groups * job.slices, False)
            finish(job, v, 0, job.channels)
            if apply != NULL:
                sweep(job, apply, width, groups, 0, groups * job.slices, True)
        return
    tasks = groups * job.slices
    with parallel(num_threads=threads):
        if owner:
            for t in prange(groups, schedule='dynamic'):
                group(job, v, reduce, finish, apply, t * width, min((t + 1) * width, job.channels))
        else:
            # Share t of each phase goes to the same thread, so the second sweep starts in its own cache.
            if reduce != NULL:
                for t in prange(threads, schedule='static', chunksize=1):
                    sweep(job, reduce, width, groups, tasks * t // threads, tasks * (t + 1) // threads, False)
            for t in prange(threads, schedule='static', chunksize=1):
                finish(job, v, job.channels * t // threads, job.channels * (t + 1) // threads)
            if apply != NULL:
                for t in prange(threads, schedule='static', chunksize=1):
                    sweep(job, apply, width, groups, tasks * t // threads, tasks * (t + 1) // threads, True)


# ----------------------------------------------------------------------------------------------------------- finishers

cdef inline double inverse_std(double var, double eps) noexcept nogil:
    """1 / sqrt(var + eps); 0 for a constant channel without eps, which then gives the bias instead of NaN."""
    return 1 / sqrt(var + eps) if var + eps != 0 else 0


cdef void invert_std(const double *var, double eps, double *invstd, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(n):
        invstd[c] = inverse_std(var[c], eps)


cdef void finish_moments(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Mean and m2 of each channel from its slices: two passes over the slice means, exact to double rounding.

    Channels inside the loops: they lie side by side.
    """
    cdef const double *first = job.partial
    cdef const double *p
    cdef Py_ssize_t c, s
    cdef double n, d, total = 0
    for c in range(c0, c1):
        v.mean[c] = 0
        v.m2[c] = 0
    for s in range(job.slices):
        p = job.partial + 2 * s * job.channels
        n = job.counts[s]
        total += n
        for c in range(c0, c1):
            v.mean[c] += n * (p[2 * c] - first[2 * c])
    for c in range(c0, c1):
        v.mean[c] = first[2 * c] + v.mean[c] / total
    for s in range(job.slices):
        p = job.partial + 2 * s * job.channels
        n = job.counts[s]
        for c in range(c0, c1):
            d = p[2 * c] - v.mean[c]
            v.m2[c] += p[2 * c + 1] + n * (d * d)


cdef inline double set_factor(Job *job, Py_ssize_t c, double mean, double scale) noexcept nogil:
    """Scale x by a power of two where x - mean would overflow in float32, or the scale leave its normal range.

    Returns what the scale must be multiplied with in turn. Elsewhere both are 1, which costs no bit.
    """
    cdef double up = 1
    if (fabs(mean) > 1e30) | (fabs(scale) < 1e-30):
        up = WIDE
    elif (fabs(scale) > 1e30) & (fabs(mean) < 1e10):
        up = 1 / WIDE
    job.factor[c] = 1 / up
    job.center[c] = mean * job.factor[c]
    return up


cdef inline double weighted(const Channels *v, Py_ssize_t c) noexcept nogil:
    return v.invstd[c] * v.weight[c] if v.weight != NULL else v.invstd[c]


cdef void finish_normalize(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """mean and invstd -> the coefficients of `normalize`."""
    cdef Py_ssize_t c
    for c in range(c0, c1):
        job.scale[c] = weighted(v, c) * set_factor(job, c, v.mean[c], v.invstd[c])
        job.offset[c] = v.bias[c] if v.bias != NULL else 0
        job.slope[c] = 0


cdef void finish_training(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Slices -> mean, m2, invstd -> the coefficients of `normalize`."""
    cdef Py_ssize_t c
    finish_moments(job, v, c0, c1)
    for c in range(c0, c1):
        v.invstd[c] = inverse_std(v.m2[c] / v.count, v.eps)
    finish_normalize(job, v, c0, c1)


cdef void finish_sums(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Slices -> sum_dy, sum_dy_xmu."""
    cdef const double *p
    cdef Py_ssize_t c, s
    for c in range(c0, c1):
        v.sum_dy[c] = 0
        v.sum_dy_xmu[c] = 0
    for s in range(job.slices):
        p = job.partial + 2 * s * job.channels
        for c in range(c0, c1):
            v.sum_dy[c] += p[2 * c]
            v.sum_dy_xmu[c] += p[2 * c + 1]


cdef void finish_backward_input(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sums -> the coefficients of `backward_input`."""
    cdef Py_ssize_t c
    cdef double up
    for c in range(c0, c1):
        up = set_factor(job, c, v.mean[c], v.invstd[c])
        job.scale[c] = weighted(v, c) * up
        job.offset[c] = v.sum_dy[c] / v.count
        job.slope[c] = v.invstd[c] * v.invstd[c] * (v.sum_dy_xmu[c] / v.count) * up


cdef void finish_backward(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    finish_sums(job, v, c0, c1)
    finish_backward_input(job, v, c0, c1)


cdef void finish_frozen(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Constants as statistics: dx = dy * weight * invstd, which is `normalize` applied to dy with mean 0."""
    cdef Py_ssize_t c
    finish_sums(job, v, c0, c1)
    for c in range(c0, c1):
        job.scale[c] = weighted(v, c) * set_factor(job, c, 0, weighted(v, c))
        job.offset[c] = 0
        job.slope[c] = 0
