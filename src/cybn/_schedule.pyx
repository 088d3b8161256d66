"""Which elements form a block (fixed: it makes the bits) and which thread does what, when (free)."""
from libc.math cimport INFINITY
from libc.string cimport memset

from cybn import _caches
from cybn._environment import number

from cybn._kernels.kernels cimport (
    COLUMNS,
    LANES,
    PANEL,
    SHORTEST,
    Channels,
    Job,
    Weights,
    cybn_count_flags,
    finisher,
    group_start,
    marker,
    part_start,
    partial_sums,
    slice_of,
    slice_start,
    verb,
    weigher,
)
from cybn._threads cimport AWAKE, CLOSE, COMPETE, MOST_SHARES, WAKE, share_out, usable_threads

cdef enum:
    SHORT = 64              # runs shorter than this are treated as rows of channels, if there are enough rows
    PERIOD = 128            # columns of a row, about, where it holds several outer indices
    LONGEST = 512           # columns of a row at most that spare it a tail
    ROWS = 512              # of a block, rows traversal: enough to pay for its shifts and its folding
    FEW_ROWS = 128          # of float64, whose sums lose digits as they get longer; the least where rows cannot be cut
    BLOCKS = 256            # of rows that cannot be cut, if there are rows for them: enough for many threads
    PARTIALS = 32768        # slices * channels, about: enough slices for many threads, few enough to combine quickly
    LEAST_SLICES = 16       # if there are blocks for them
    MOST_SLICES = 1024
    MAP_ROWS = 16           # of a thread: enough to pay for its tables of all columns
    SHARE_ROWS = 128        # of a share, if a thread has several, which all make the same tables
    # Pieces of memory of a cached group, at most: at the ends of each, owners take lines from each other.
    MANY_PIECES = 48        # of less than LONG_PIECE, where the group fits L2
    MOST_PIECES = 12        # where it does not
    LEAST_CUTS = 16         # places for each thread's part to end at, or runs are cut
    BANDS = 16              # at most: where other processes want the processors too, a meeting may take a millisecond
    LINE = 8                # doubles of a cache line
    WORD = 512              # bits of one
    FINISHED = 256          # channels that are finished at a time: their vectors fit the first cache
    STRETCH = 32 * 1024     # bytes of memory in one piece that a group of channels reads at least
    L2_STRETCH = 12 * 1024  # or, if so it fits L2, at least so many
    SHORT_PIECE = 1024      # bytes in one piece that an owner reads at least where its group fits L2
    LONG_PIECE = 8 * 1024   # and where it fits L3 only: two sweeps in the order of memory find it there as well
    SERIAL = 288 * 1024     # bytes of work below which a team of threads costs more than it brings
    WORTH_A_THREAD = 128 * 1024     # of more, each thread's, about
    # A thread's part of a sweep is cut into so many shares at most, of so many bytes of work at least: who is done
    # before the others, since the system or a neighbour has slowed them down, takes some of theirs.
    SHARES = 16
    WORTH_A_SHARE = 1 << 20
    FURTHER = 8192          # bytes beyond what sums fetch into the first cache (measured: 0 to 64 KB)
    CHANNEL = 256           # bytes in whose time a channel's statistics and coefficients are finished, about
    # Of work from which it is worth waking helpers that sleep: if the call before has just ended, so that they will be
    # awake for the next; in any case (50 to 100 us); and even if they have to compete for processors that are busy.
    WORTH_CLOSE = 512 * 1024
    WORTH_WAKING = 4 << 20
    WORTH_COMPETING = 32 << 20

caches = _caches.read()
"""What calls are planned for: the caches of the processors that this process could run on at import."""

cdef Py_ssize_t L2 = caches.l2
cdef Py_ssize_t L3 = caches.l3
cdef Py_ssize_t L3_COUNT = caches.count
cdef Py_ssize_t L3_SHARERS = caches.sharers

# Size from which results are written past the caches. -1: see `streams`.
cdef Py_ssize_t STREAM = number("CYBN_STREAM_MIN_BYTES", -1)


def set_caches(Py_ssize_t l2, Py_ssize_t l3, Py_ssize_t count=1, Py_ssize_t sharers=_caches.Caches().sharers):
    """Change the caches that are planned for (for tests and measurements). Return those before."""
    global L2, L3, L3_COUNT, L3_SHARERS
    before = L2, L3, L3_COUNT, L3_SHARERS
    L2, L3, L3_COUNT, L3_SHARERS = l2, l3, count, sharers
    return before


def set_stream_min_bytes(Py_ssize_t n):
    """Change that size (for tests and measurements). Return the one before."""
    global STREAM
    before = STREAM
    STREAM = n
    return before


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cpdef Py_ssize_t last_caches(int threads) noexcept nogil:
    """Bytes of the last caches that so many threads have, if they take one after the other."""
    return L3 * min(ceil_div(threads, L3_SHARERS), L3_COUNT)


cdef inline bint overfills(Py_ssize_t size, Py_ssize_t l3) noexcept nogil:
    """Whether arrays of so many bytes do not all stay in last caches of so many. (Five sixths: others use them.)"""
    return size >= l3 // 6 * 5


cpdef bint streams(Py_ssize_t result, Py_ssize_t arrays, bint revisit, Py_ssize_t l3) noexcept nogil:
    """Whether a result of so many bytes, one of so many arrays, is written past last caches of `l3` bytes.

    Arrays that are read twice are still there the second time, unless a result in the cache drives them out. Else one
    that fits is best left there, where who reads it next finds it.
    """
    if STREAM >= 0:
        return result >= STREAM
    return overfills(arrays * result, l3) if revisit else result >= l3


# --------------------------------------------------------------------------------- decomposition: from shape and dtype

cdef inline Py_ssize_t equal_piece(Py_ssize_t n, Py_ssize_t pieces, Py_ssize_t unit) noexcept nogil:
    """What each of at most so many pieces of n has, in whole units; the last one may have less."""
    return ceil_div(ceil_div(n, pieces), unit) * unit


cdef Py_ssize_t gcd(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef void decompose(Job *job) noexcept nogil:
    """Cut (outer, channels, inner) into blocks and slices. Nothing but these three numbers and the type may decide."""
    cdef Py_ssize_t width = job.channels * job.inner, whole
    cdef Py_ssize_t depth = ROWS if job.itemsize == sizeof(float) else FEW_ROWS
    # Rows have accumulators for each of their columns, runs for LANES of them. Runs begin and end more often: where
    # there are seven of 7 x 7 or five of 6 x 6, rows are as fast, below 16 elements always.
    job.rows = job.inner < SHORT and job.outer > (job.inner - LANES) // 5
    job.period = 1
    job.block_inner = job.inner
    if job.rows:
        if width < PERIOD:
            # Several outer indices per row, so that no row ends in a tail if that can be had, as long as there remain
            # rows to sum over; and blocks enough for many threads, which cannot share such a row.
            whole = LANES // gcd(LANES, width)
            if whole * width > LONGEST:
                whole = 1
            job.period = max(1, min(whole * max(1, PERIOD // (whole * width)), job.outer // FEW_ROWS))
            if job.period > whole:
                job.period -= job.period % whole
            if job.period > 1:
                depth = min(depth, max(FEW_ROWS, job.outer // (job.period * BLOCKS)))
        # Equal blocks: the last one would be a thread's whole share.
        job.block_outer = equal_piece(job.outer, ceil_div(job.outer, depth * job.period), job.period)
        job.tile = job.channels if job.period > 1 else max(1, COLUMNS // job.inner)
    else:
        job.tile = COLUMNS // LANES
        job.block_outer = equal_piece(job.outer, ceil_div(job.outer, max(1, PANEL // job.inner)), 1)
        if job.inner > PANEL:
            job.block_inner = equal_piece(job.inner, ceil_div(job.inner, PANEL), LANES)
            # The sums of a run end with a vector of LANES that ends where it does, so no block may be shorter.
            while 0 < job.inner % job.block_inner < LANES:
                job.block_inner -= LANES
    job.blocks_inner = ceil_div(job.inner, job.block_inner)
    job.blocks = ceil_div(job.outer, job.block_outer) * job.blocks_inner
    job.slices = max(1, min(max(PARTIALS // job.channels, LEAST_SLICES), MOST_SLICES, job.blocks))


cdef Py_ssize_t partial_size(const Job *job) noexcept nogil:
    """Doubles of `job.partial` and `job.counts`, whatever groups the schedule makes: see `lay_out_partial`.

    Each of an owner's groups has the room of the widest: all together that of 1.25 times the channels at most (see
    `equal_enough`).
    """
    return 2 * job.slices * (job.channels + job.channels // 4 + LINE) + LINE * job.channels + job.slices


cdef Py_ssize_t slice_count(const Job *job, Py_ssize_t piece) noexcept nogil:
    """Elements per channel."""
    cdef Py_ssize_t block, bo, bi, count = 0
    for block in range(slice_start(job, piece), slice_start(job, piece + 1)):
        bo = block // job.blocks_inner
        bi = block - bo * job.blocks_inner
        count += (min(job.block_outer, job.outer - bo * job.block_outer)
                  * min(job.block_inner, job.inner - bi * job.block_inner))
    return count


cdef double slice_weight(const Job *job, Py_ssize_t piece) noexcept nogil:
    cdef Py_ssize_t block
    cdef double weight = 0
    if job.block_weights == NULL:
        return <double> slice_count(job, piece)
    for block in range(slice_start(job, piece), slice_start(job, piece + 1)):
        weight += job.block_weights[block]
    return weight


cdef Weights weigh_blocks(Job *job, weigher weigh) noexcept nogil:
    """Fill `job.block_weights`: sums of weights, or how many flags are set. Return what is to be known of all.

    A block of weights lies in one piece: it has several outer indices or several pieces of one run, not both.
    """
    cdef Weights total, block
    cdef Py_ssize_t index, bo, o0, i0, n, first
    total.sum = total.pairs = 0
    total.least = INFINITY
    for index in range(job.blocks):
        bo = index // job.blocks_inner
        o0 = bo * job.block_outer
        i0 = (index - bo * job.blocks_inner) * job.block_inner
        n = (min(job.block_outer, job.outer - o0) - 1) * job.inner + min(job.block_inner, job.inner - i0)
        first = o0 * job.inner + i0
        if job.mask != NULL:
            job.block_weights[index] = cybn_count_flags(job.mask + first, n)
        else:
            block = weigh((<const char *> job.weights) + first * job.itemsize, n)
            job.block_weights[index] = block.sum
            total.pairs += block.pairs + total.sum * block.sum
            total.least = min(total.least, block.least)
        total.sum += job.block_weights[index]
    return total


# ------------------------------------------------------------------------------------------------------------ schedule
# Owner: one thread takes a group of channels from their statistics to their results while they are in its cache.
# Cooperative: all threads take slices of a band of channels, meet, and each maps its own slices, from its own cache.
# Two sweeps: the same with all channels in one band, when nothing that is revisited fits a cache.

cdef struct Plan:
    int threads
    Py_ssize_t shares       # that a sweep of a band is cut into, as many for each thread; an owner's: groups, or a few
    bint owner
    Py_ssize_t groups       # of channels whose partial sums lie together: an owner's, or one
    Py_ssize_t step         # channels that a thread's part is rounded to; its shares end with tiles
    Py_ssize_t band         # channels between two meetings of the threads (not owner)
    bint backwards          # whether the second sweep is: no more than what was read last is still in a cache


cdef inline bint equal_enough(Py_ssize_t n, Py_ssize_t pieces, Py_ssize_t piece) noexcept nogil:
    """Whether none of so many pieces of n, of `piece` each, has more than 1.25 times the average."""
    return 4 * pieces * piece <= 5 * n


cdef Py_ssize_t row_share(const Job *job, int threads) noexcept nogil:
    """Outer indices of each thread if it maps whole rows; 0 if its tables would cost too much, or shares be unequal.

    Threads that write parts of the same rows take lines from each other wherever the parts meet.
    """
    cdef Py_ssize_t outer = equal_piece(job.outer, threads, job.period)
    if job.outer * job.inner < MAP_ROWS * threads or not equal_enough(job.outer, threads, outer):
        return 0
    return outer


cdef inline Py_ssize_t work_of(const Job *job, Py_ssize_t operands, bint reduces) noexcept nogil:
    """In bytes of memory moved: what many channels cost counts, too."""
    return job.channels * (job.outer * job.inner * job.itemsize * operands + (CHANNEL if reduces else 0))


cdef inline int threads_for(Py_ssize_t work, int threads) noexcept nogil:
    return <int> min(<Py_ssize_t> threads, work // WORTH_A_THREAD + 1) if work >= SERIAL else 1


cdef inline Py_ssize_t shares_for(Py_ssize_t work, int threads) noexcept nogil:
    """As many for each thread."""
    if threads == 1:
        return 1
    work //= <Py_ssize_t> threads * WORTH_A_SHARE
    return threads * max(1, min(work, <Py_ssize_t> SHARES, MOST_SHARES // threads))


cdef Plan make_plan(const Job *job, Py_ssize_t operands, bint reduces, bint maps, int threads,
                    Py_ssize_t l2, Py_ssize_t l3) noexcept nogil:
    """`operands`: arrays that take room in the caches."""
    cdef Plan plan
    cdef bint revisit = reduces and maps
    cdef Py_ssize_t stretch = job.inner * job.itemsize
    cdef Py_ssize_t channel_bytes = job.outer * stretch * operands
    cdef Py_ssize_t work = work_of(job, operands, reduces)
    cdef Py_ssize_t rounds, least, width, piece, groups
    cdef bint by_rows       # whether the map of two sweeps can be shared so
    plan.threads = threads_for(work, threads)
    plan.band = job.channels
    plan.step = job.channels if job.rows and job.period > 1 else LINE if reduces else 1
    plan.groups = 1
    plan.owner = False
    if plan.threads == 1 and channel_bytes * job.channels <= l2 // 2:
        plan.owner = revisit
        return plan
    if not revisit or (job.rows and job.period > 1):    # (rows of several outer indices cannot be cut)
        return plan
    # A group fills half of L2. If that made it read memory in short pieces it is wider than L2, but takes no more than
    # a quarter of the thread's share of L3, or half if it is one stretch; and not even that, if it is many, where L3
    # holds x and one array more: there two sweeps find both again, in their order. Every thread gets about the same.
    # What all lies in L3 is read faster twice, in the order of memory: one group for each thread, if that fits L2, is
    # one stretch, or shares are channels anyway (and few pieces, or whole rows no choice for the map: see `row_share`).
    least = max(1, STRETCH // stretch)
    rounds = 1
    if job.distant:
        width = l2 // 2 // channel_bytes
        if width * stretch < L2_STRETCH:
            width = max(width, least)
        width = min(width, ceil_div(job.channels, plan.threads))
        rounds = ceil_div(ceil_div(job.channels, width), plan.threads)
    groups = min(rounds * plan.threads, job.channels)
    width = ceil_div(job.channels, groups)
    piece = width * stretch
    by_rows = not job.distant and row_share(job, plan.threads) > 0
    if width * channel_bytes <= l2 // 2:
        plan.owner = piece >= SHORT_PIECE and not (by_rows and piece < LONG_PIECE and job.outer > MANY_PIECES)
    elif job.distant:
        plan.owner = (piece >= LONG_PIECE
                      and width * channel_bytes <= l3 // ((4 if job.outer > 1 else 2) * plan.threads)
                      and (job.outer <= MOST_PIECES or overfills(2 * job.channels * job.outer * stretch, l3)))
    else:
        plan.owner = piece >= LONG_PIECE and (job.outer == 1 or job.slices == 1 and not (
            by_rows and job.inner >= SHORTEST and job.outer > MOST_PIECES))
    plan.owner = (plan.owner and groups >= plan.threads
                  and equal_enough(job.channels, rounds * plan.threads, width))
    if plan.owner:
        plan.groups = groups
    if plan.owner or not job.distant:
        return plan
    plan.band = l2 // 2 * plan.threads // channel_bytes // LINE * LINE
    if (plan.band < max(LINE, least) or BANDS * plan.band < job.channels
            or job.blocks * plan.band < 8 * LINE * plan.threads):   # too few pieces for equal shares
        plan.band = job.channels
    return plan


cdef Plan plan_call(Job *job, Py_ssize_t operands, Py_ssize_t results, bint reduces, bint maps, int threads,
                    Py_ssize_t l2, Py_ssize_t l3) noexcept nogil:
    """The plan of a call with so many arrays, `results` of which it may write past the caches (0: none).

    And into the job: whether it does, and whether the arrays come from memory.
    """
    cdef Plan plan
    cdef Py_ssize_t size = job.outer * job.inner * job.channels * job.itemsize
    cdef Py_ssize_t work = work_of(job, operands, reduces)      # wherever results go
    job.distant = overfills(operands * size, l3)
    job.stream = maps and results > 0 and streams(size, operands, reduces, l3)
    if job.stream:
        operands -= results
    plan = make_plan(job, operands, reduces, maps, threads, l2, l3)
    plan.shares = (min(plan.groups, <Py_ssize_t> MOST_SHARES) if plan.owner
                   else shares_for(work // job.channels * plan.band, plan.threads))
    plan.backwards = reduces and overfills(operands * size, l3)
    lay_out_partial(job, &plan)
    return plan


cdef Py_ssize_t further(const Job *job, const Plan *plan) noexcept nogil:
    """What the sums fetch into the second cache, too, in bytes from what they fetch into the first; 0: nothing.

    From memory, what lies beyond. An owner's x has come with the group before, so it fetches the residual, which the
    map reads next to x, while nothing else wants memory; where L2 holds a group's x, else it would come for nothing.
    """
    cdef Py_ssize_t width = ceil_div(job.channels, plan.groups)
    if not job.distant:
        return 0
    if (plan.owner and job.residual.data != NULL and job.residual.direct and job.x.direct
            and width * job.outer * job.inner * job.itemsize <= L2):
        return job.residual.data - job.x.data
    return FURTHER


cdef bint cut_for_map(const Job *job, Plan *plan, bint revisit, Job *mapped) noexcept nogil:
    """The job of a map, whose blocks sum nothing: it may take memory in longer pieces. False: as it is.

    Where it takes whole rows, the plan gets as many shares as these allow.
    """
    cdef Py_ssize_t outer = job.block_outer, inner = job.inner, most = job.slices
    cdef Py_ssize_t blocks = ceil_div(job.outer, outer), pieces = 1
    cdef Py_ssize_t whole, each = plan.shares // plan.threads
    if job.blocks_inner > 1:
        # Runs as they lie, or in as few pieces as leave places enough to cut shares at.
        if not plan.owner:
            pieces = ceil_div(LEAST_CUTS * plan.threads, blocks * ceil_div(min(plan.band, job.channels), plan.step))
        inner = equal_piece(job.inner, min(pieces, job.blocks_inner), LANES)
    elif plan.threads > 1 and not plan.owner and (job.blocks < 2 * plan.threads or job.rows and not revisit):
        # (Not if that loses the order of the second sweep, backwards.)
        whole = row_share(job, plan.threads)
        if whole == 0:
            return False
        # So many that tables pay, and the threads' parts stay as they are, or nearly so.
        each = max(1, min(each, whole * job.inner // SHARE_ROWS))
        outer = equal_piece(whole, each, job.period)
        while each > 1 and (12 * each * outer > 13 * whole or ceil_div(job.outer, outer) != each * plan.threads):
            each -= 1
            outer = equal_piece(whole, each, job.period)
        plan.shares = each * plan.threads
        blocks = most = ceil_div(job.outer, outer)
    else:
        return False
    mapped[0] = job[0]
    mapped.block_weights = NULL     # (of the job's own blocks)
    mapped.block_outer = outer
    mapped.block_inner = inner
    mapped.blocks_inner = ceil_div(job.inner, inner)
    if job.blocks_inner > 1:
        mapped.tile = 1     # a map of runs ends at any channel
    mapped.blocks = blocks * mapped.blocks_inner
    mapped.slices = min(most, mapped.blocks)
    return True


cdef void lay_out_partial(Job *job, const Plan *plan) noexcept nogil:
    """No cache line of partial sums is written by two threads: groups begin, and shares end, at the end of a line."""
    job.groups = plan.groups
    job.pitch = ceil_div(job.channels, plan.groups)
    if not plan.owner:
        job.pitch = ceil_div(job.pitch, LINE) * LINE
    job.group_pitch = ceil_div(2 * job.slices * job.pitch, LINE) * LINE


cdef struct Cut:
    # Where one share of a band ends and the next one's begins: at a channel of a slice.
    Py_ssize_t piece
    Py_ssize_t channel


cdef Cut cut(const Job *job, const Plan *plan, Py_ssize_t band, Py_ssize_t share) noexcept nogil:
    """Threads have equal numbers of blocks, so far as channels can cut these; their shares end with tiles."""
    cdef Cut end, least
    cdef Py_ssize_t stop = min(band + plan.band, job.channels), n = stop - band
    cdef Py_ssize_t position = job.blocks * n * share // plan.shares
    cdef Py_ssize_t first, size, step = plan.step, further = share % (plan.shares // plan.threads)
    end.piece = slice_of(job, position // n)
    end.channel = band
    if end.piece < job.slices:
        first = slice_start(job, end.piece)
        size = slice_start(job, end.piece + 1) - first
        position = (position - first * n) // size
        if further == 0:
            end.channel += (position + step // 2) // step * step
        else:
            step *= job.tile // gcd(job.tile, step)
            end.channel += position // step * step
        if end.channel >= stop:
            end.channel = band
            end.piece += 1
    if further > 0:     # not before the thread's first
        least = cut(job, plan, band, share - further)
        if end.piece < least.piece or (end.piece == least.piece and end.channel < least.channel):
            return least
    return end


cdef struct Share:
    Cut begin
    Cut end
    Py_ssize_t band         # its first channel, and the one after its last
    Py_ssize_t stop


cdef Share share_of(const Job *job, const Plan *plan, Py_ssize_t band, Py_ssize_t index) noexcept nogil:
    cdef Share share
    share.begin = cut(job, plan, band, index)
    share.end = cut(job, plan, band, index + 1)
    share.band = band
    share.stop = min(band + plan.band, job.channels)
    return share


cdef inline Py_ssize_t first_channel(const Share *share, Py_ssize_t piece) noexcept nogil:
    return share.begin.channel if piece == share.begin.piece else share.band


cdef inline Py_ssize_t last_channel(const Share *share, Py_ssize_t piece) noexcept nogil:
    """The one after it."""
    return share.end.channel if piece == share.end.piece else share.stop


cdef void sweep(const Job *job, const Plan *plan, verb work, Py_ssize_t band, Py_ssize_t share,
                bint backwards) noexcept nogil:
    """A share, in the order of memory or, slice by slice, against it."""
    cdef Share s = share_of(job, plan, band, share)
    cdef Py_ssize_t i, stop, piece = s.begin.piece
    if backwards:
        for i in range(s.end.piece - s.begin.piece + 1):
            piece = s.end.piece - i
            if first_channel(&s, piece) < last_channel(&s, piece):
                work(job, first_channel(&s, piece), last_channel(&s, piece), piece, piece + 1)
        return
    while piece <= s.end.piece:
        # All slices together of which it has all channels.
        stop = s.end.piece if first_channel(&s, piece) == s.band and piece < s.end.piece else piece + 1
        if first_channel(&s, piece) < last_channel(&s, piece):
            work(job, first_channel(&s, piece), last_channel(&s, piece), piece, stop)
        piece = stop


cdef struct Sweeps:
    # What the shares of a call have in common.
    Job *job
    Job *mapped             # the same, perhaps cut for `apply`
    const Channels *v
    verb reduce
    verb apply
    finisher finish
    Plan plan
    Py_ssize_t phases       # of a band: reduce, finish, apply, or those of them that there are
    Py_ssize_t first        # of these three that there is


cdef void finish(const Sweeps *s, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    while c0 < c1:
        s.finish(s.job, s.v, c0, min(c0 + FINISHED, c1))
        c0 += FINISHED


cdef void group(const Sweeps *s, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    s.reduce(s.job, c0, c1, 0, s.job.slices)
    finish(s, c0, c1)
    s.apply(s.mapped, c0, c1, 0, s.mapped.slices)


cdef void own(void *context, Py_ssize_t step, Py_ssize_t share) noexcept nogil:
    """The groups of a share, one after the other."""
    cdef const Sweeps *s = <const Sweeps *> context
    cdef Py_ssize_t g
    for g in range(part_start(s.plan.groups, s.plan.shares, share),
                   part_start(s.plan.groups, s.plan.shares, share + 1)):
        group(s, group_start(s.job, g), group_start(s.job, g + 1))


cdef void meet(void *context, Py_ssize_t step, Py_ssize_t share) noexcept nogil:
    """A share of one phase of a band."""
    cdef const Sweeps *s = <const Sweeps *> context
    cdef Py_ssize_t band = step // s.phases * s.plan.band, phase = step % s.phases + s.first
    cdef Py_ssize_t n = min(s.plan.band, s.job.channels - band), each = s.plan.shares // s.plan.threads
    if phase == 0:
        sweep(s.job, &s.plan, s.reduce, band, share, False)
    elif phase == 1:
        # With the first of a thread's shares all its channels: of a few at a time there are no vectors.
        if share % each == 0:
            finish(s, band + n * share // s.plan.shares, band + n * (share + each) // s.plan.shares)
    else:
        sweep(s.mapped, &s.plan, s.apply, band, share, s.plan.backwards)


cdef struct Marks:
    const Job *job
    marker make
    Py_ssize_t size
    Py_ssize_t shares


cdef void mark_share(void *context, Py_ssize_t step, Py_ssize_t share) noexcept nogil:
    """In whole words of bits, so that no two threads write into one."""
    cdef const Marks *m = <const Marks *> context
    cdef Py_ssize_t words = ceil_div(m.size, WORD)
    m.make(m.job, words * share // m.shares * WORD, min(words * (share + 1) // m.shares * WORD, m.size))


cdef int worth_of(Py_ssize_t work) noexcept nogil:
    return (AWAKE if work < WORTH_CLOSE else CLOSE if work < WORTH_WAKING else WAKE if work < WORTH_COMPETING
            else COMPETE)


cdef void mark(const Job *job, marker make, int threads) noexcept nogil:
    """The bits of `job.output`. `threads`: as in `run`."""
    cdef Marks marks
    cdef Py_ssize_t work = work_of(job, 1, False)
    marks.job = job
    marks.make = make
    marks.size = job.outer * job.channels * job.inner
    threads = threads_for(work, usable_threads(threads) if work >= SERIAL else 1)
    marks.shares = shares_for(work, threads)
    share_out(mark_share, &marks, 1, marks.shares, 0, threads, worth_of(work))


cdef void run(Job *job, const Channels *v, verb reduce, finisher finish, verb apply, int threads) noexcept nogil:
    """reduce -> finish -> apply over the whole array. `threads`: the wish, 0: none.

    There may be no apply, no reduce, and without reduce no finish: NULL.
    """
    cdef Py_ssize_t operands, results = 0, t
    cdef Sweeps sweeps
    cdef Job mapped
    cdef int worth
    operands = (1 + (job.dy.data != NULL) + (job.residual.data != NULL) + (job.out.data != NULL)
                + (job.gated.data != NULL))
    threads = usable_threads(threads) if work_of(job, operands, reduce != NULL) >= SERIAL else 1
    # In place none goes past the caches: there the lines have been read anyway.
    if (job.out.direct and job.out.data != job.x.data and job.out.data != job.dy.data
            and job.out.data != job.residual.data):
        results = 1 + (job.gated.data != NULL)
    sweeps.plan = plan_call(job, operands, results, reduce != NULL, apply != NULL, threads, L2, last_caches(threads))
    # Gradients behind an activation are best written with the sums, while they are at hand; but not past the caches,
    # whence the map would read them again: then it writes them itself.
    job.early = (reduce != NULL and apply != NULL and job.gate != NULL and job.mask == NULL and job.gated.data != NULL
                 and job.gated.direct and not job.stream)
    if reduce != NULL:
        for t in range(job.slices):
            job.counts[t] = slice_weight(job, t)
    sweeps.job = job
    sweeps.v = v
    sweeps.reduce = reduce
    sweeps.finish = finish
    sweeps.apply = apply
    job.owned = sweeps.plan.owner
    job.further = further(job, &sweeps.plan)
    sweeps.mapped = &mapped if apply != NULL and cut_for_map(job, &sweeps.plan, reduce != NULL, &mapped) else job
    worth = worth_of(work_of(job, operands - (results if job.stream else 0), reduce != NULL))
    if sweeps.plan.owner:
        share_out(own, &sweeps, 1, sweeps.plan.shares, 0, sweeps.plan.threads, worth)
    else:
        sweeps.phases = (reduce != NULL) + (finish != NULL) + (apply != NULL)
        sweeps.first = 0 if reduce != NULL else 1 if finish != NULL else 2
        share_out(meet, &sweeps, ceil_div(job.channels, sweeps.plan.band) * sweeps.phases, sweeps.plan.shares,
                  sweeps.phases if sweeps.plan.backwards else 0, sweeps.plan.threads, worth)


# ---------------------------------------------------------------------------------------------- for tests and the model

def plan_of(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, int threads, *, Py_ssize_t itemsize=4,
            Py_ssize_t operands=2, Py_ssize_t results=1, bint reduces=True, bint maps=True, l2=None, l3=None):
    """Who does what: the plan of a call over (outer, channels, inner) with so many arrays, as data.

    `results` of the arrays may be written past the caches.

    Returns
    -------
    dict
        ``kind`` ("owner", "cooperative", "two sweeps"), ``threads``, ``bands`` (the threads meet three times in each),
        ``distant`` (whether the arrays come from memory, not from the last caches), ``streamed`` (whether results go
        past the caches), ``block`` (elements of a run, or of the outer index, that are summed at a time), ``slices``
        and the ``tasks`` of a sweep: thread, elements, and the ranges of doubles of the partial sums that it writes,
        counted from the beginning of a cache line; of so many ``doubles``. A sweep is cut into ``shares``, as many for
        each thread, of which those that have no more take from others; a task is of one share. An owner's shares are
        groups, which go to whichever thread is free; here, in turn.
    """
    cdef Job job, mapped
    cdef Plan plan
    cdef Share share
    cdef Py_ssize_t band = 0, index, piece, c0, c1, start, t
    memset(&job, 0, sizeof(Job))
    job.outer, job.channels, job.inner, job.itemsize = outer, channels, inner, itemsize
    decompose(&job)
    plan = plan_call(&job, operands, results, reduces, maps, threads, L2 if l2 is None else l2,
                     last_caches(threads) if l3 is None else l3)
    if maps and cut_for_map(&job, &plan, reduces, &mapped) and not reduces:
        job = mapped
    tasks = []
    if plan.owner:
        for t in range(plan.groups):
            c0, c1 = group_start(&job, t), group_start(&job, t + 1)
            start = partial_sums(&job, 0, c0) - job.partial
            tasks.append((t % plan.threads, (c1 - c0) * outer * inner,
                          (start, start + 2 * job.slices * job.pitch)))
    while band < channels and not plan.owner:
        for index in range(plan.shares):
            t = index * plan.threads // plan.shares
            share = share_of(&job, &plan, band, index)
            for piece in range(share.begin.piece, share.end.piece + 1):
                c0, c1 = first_channel(&share, piece), last_channel(&share, piece)
                if c0 < c1:
                    start = partial_sums(&job, piece, c0) - job.partial
                    tasks.append((t, (c1 - c0) * slice_count(&job, piece), (start, start + c1 - c0),
                                  (start + job.pitch, start + job.pitch + c1 - c0)))
        band += plan.band
    return {
        "kind": "owner" if plan.owner else "cooperative" if plan.band < channels else "two sweeps",
        "threads": plan.threads,
        "bands": 0 if plan.owner else ceil_div(channels, plan.band),
        "distant": job.distant != 0,
        "streamed": job.stream != 0,
        "block": job.block_outer if job.rows else job.block_inner,
        "slices": job.slices,
        "shares": plan.shares,
        "doubles": partial_size(&job),
        "tasks": tasks,
    }
