"""What a kernel build and its callers share: the job, the verbs and the finishers, the table of them.

Arrays of any rank and layout arrive as (outer, channels, inner) in the order in which x lies in memory;
`flat = (o * channels + c) * inner + i` numbers the elements. The decomposition (blocks, slices, rows) is
computed once, in `_schedule.pyx`, from shape and dtype alone: it is what fixes the bits.
"""

cdef extern from "vectors.h":
    void cybn_inverse_sqrt(const double *var, double eps, double *invstd, Py_ssize_t n) noexcept nogil
    bint cybn_outside(const double *values, Py_ssize_t n, double least, double most) noexcept nogil
    ctypedef struct Weights "cybn_weights":
        double sum
        double pairs        # the sum of the products of any two
        double least
    Weights cybn_weigh_float(const float *weights, Py_ssize_t n) noexcept nogil
    Weights cybn_weigh_double(const double *weights, Py_ssize_t n) noexcept nogil
    void cybn_flag(const char *values, signed char *flags, Py_ssize_t n) noexcept nogil
    double cybn_count_flags(const signed char *flags, Py_ssize_t n) noexcept nogil
    void cybn_bound_flags(const signed char *flags, Py_ssize_t n, Py_ssize_t *whole,
                          Py_ssize_t *end) noexcept nogil

cdef extern from "gate.h":
    enum:
        GATE_ROOM "CYBN_GATE_ROOM"  # bytes behind the bits of a gate that may be read

cdef enum:
    LANES = 16          # accumulators of a run: element i of a block goes to lane i % LANES
    COLUMNS = 1024      # accumulators of a tile: 64 channels of LANES, or a row of so many columns
    SHORTEST = 16       # runs shorter than this are mapped as rows of columns, each with its own coefficients
    PANEL = 2048        # elements handled at a time: a block of a run; the size of a staging buffer


cdef enum:
    # activations
    RELU = 1
    LEAKY_RELU = 2


cdef struct Operand:
    # One array, its axes in x's memory order, neighbours merged where the strides allow.
    char *data
    Py_ssize_t ndim
    Py_ssize_t *shape
    Py_ssize_t *stride          # bytes
    bint direct                 # dense and aligned: element `flat` is data[flat]


cdef struct Job:
    Operand x
    Operand dy
    Operand out

    # What comes with a normalization. (data NULL: not.)
    Operand residual            # added to y before the activation
    int activation
    double negative_slope
    void *weights               # (outer, inner), of x's type, dense: of the elements in the statistics; NULL: all 1
    bint positive               # none is 0
    const signed char *mask     # instead of weights: -1 for those elements, 0 for the rest, which backward leaves out
    bint zeroed                 # y is 0 there
    double *block_weights       # the sums of either; NULL: of no use, elements are counted
    unsigned char *gate         # bits of which gradients pass it: forward writes, backward reads; NULL: x tells
    Operand output              # y, of which the bits are still to be made
    Operand gated               # where backward leaves the gradients that have passed mask and activation
    bint early                  # the sums do that, and the map reads them from there

    bint stream                 # whether results go past the caches
    bint distant                # whether the arrays come from memory, not from the last cache
    Py_ssize_t further          # bytes from what sums fetch into the first cache to what goes into the second; 0: none
    bint owned                  # whether the next channels come next, from their statistics on

    Py_ssize_t outer
    Py_ssize_t channels
    Py_ssize_t inner
    Py_ssize_t itemsize

    # The decomposition. A block is [o0, o1) x [i0, i1) of every channel; a slice is a few blocks in a row.
    bint rows                   # traversal: rows of channels, or runs of `inner` elements
    Py_ssize_t period           # outer indices per row (rows traversal)
    Py_ssize_t tile             # channels that sums are taken of at a time
    Py_ssize_t block_outer
    Py_ssize_t block_inner
    Py_ssize_t blocks_inner
    Py_ssize_t blocks
    Py_ssize_t slices
    double *partial             # (groups, slices, 2, pitch): means and m2s, or sum_dys and sum_dy_xmus, of a slice
    double *counts              # (slices,): elements per channel
    Py_ssize_t groups
    Py_ssize_t pitch            # doubles; at least the channels of a group
    Py_ssize_t group_pitch      # doubles from group to group

    # Per channel, always double; the kernels round what they use to their own type.
    double *mean                # what backward_reduce subtracts
    # The map: d = x * factor - center; y = d * scale + offset, dx = ((dy - offset) - d * slope) * scale * factor.
    # Factors are 1 but for extreme channels.
    double *center
    double *factor
    double *scale
    double *offset
    double *slope
    # The same of the forward pass, for the activation's gradient.
    double *gate_center
    double *gate_factor
    double *gate_scale
    double *gate_offset


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


cdef inline Py_ssize_t part_start(Py_ssize_t n, Py_ssize_t parts, Py_ssize_t part) noexcept nogil:
    """The first of n that is in this part: parts differ by one at most."""
    return part if parts == n else n * part // parts


cdef inline Py_ssize_t part_of(Py_ssize_t n, Py_ssize_t parts, Py_ssize_t i) noexcept nogil:
    """The part that the i-th of n belongs to."""
    cdef Py_ssize_t part
    if parts == n:
        return i
    part = i * parts // n
    return part + 1 if part_start(n, parts, part + 1) <= i else part


cdef inline Py_ssize_t slice_start(const Job *job, Py_ssize_t piece) noexcept nogil:
    """The first block of a slice."""
    return part_start(job.blocks, job.slices, piece)


cdef inline Py_ssize_t slice_of(const Job *job, Py_ssize_t block) noexcept nogil:
    """The slice that a block belongs to."""
    return part_of(job.blocks, job.slices, block)


cdef inline Py_ssize_t group_start(const Job *job, Py_ssize_t group) noexcept nogil:
    """The first channel of a group."""
    return part_start(job.channels, job.groups, group)


cdef inline Py_ssize_t map_width(const Job *job) noexcept nogil:
    """Channels that a map takes at a time: with runs there is no table of columns to fit.

    Rows of float32 of up to one and five eighths of COLUMNS are taken whole, wider ones in nearly equal parts: a short
    rest costs more than the room that it leaves in the first cache. (Wider tables leave too little of it, as those of
    float64 would.)
    """
    cdef Py_ssize_t tiles, width
    if not job.rows or job.inner >= SHORTEST:
        return COLUMNS
    if job.itemsize == sizeof(double):
        return job.tile
    tiles = (job.channels * job.inner + COLUMNS // 8 * 3 - 1) // COLUMNS
    if tiles <= 1 or job.period > 1:
        return job.channels
    width = (job.channels + tiles - 1) // tiles
    return (width + LANES - 1) // LANES * LANES if job.inner == 1 else width


cdef inline double *partial_sums(const Job *job, Py_ssize_t piece, Py_ssize_t c) noexcept nogil:
    """Where a slice's sums of the channels from c on stand; the second ones `pitch` further on."""
    cdef Py_ssize_t group = part_of(job.channels, job.groups, c)
    return job.partial + group * job.group_pitch + 2 * piece * job.pitch + (c - group_start(job, group))


# A verb does the channels [c0, c1) of the slices [piece, stop).
ctypedef void (*verb)(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece, Py_ssize_t stop) noexcept nogil

# A finisher does the channels [c0, c1), of one group, between two verbs.
ctypedef void (*finisher)(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil

ctypedef Weights (*weigher)(const void *weights, Py_ssize_t n) noexcept nogil

# Makes the bits of the elements [first, stop) of output.
ctypedef void (*marker)(const Job *job, Py_ssize_t first, Py_ssize_t stop) noexcept nogil


cdef struct Kernels:
    # Each pair: float32, float64.
    weigher weigh[2]
    marker mark[2]
    verb collect_stats[2]
    verb normalize[2]
    verb backward_reduce[2]
    verb backward_input[2]
    finisher finish_moments
    finisher finish_normalize
    finisher finish_training
    finisher finish_sums
    finisher finish_backward
    finisher finish_backward_input
    finisher finish_frozen
