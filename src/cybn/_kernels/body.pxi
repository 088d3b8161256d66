"""The loops over elements. Compiled once per instruction set; the bits are the same in each.

Nothing here allocates, checks or knows Python. Three levels:

- leaves touch elements: `cybn_sum_*` (in lanes.h, as vectors), `map_columns`. A fixed accumulator per column, never a
  reduction across columns, so plain IEEE rules allow vectors of any width;
- tiles (`reduce_tile`, `map_tile`) prepare the per-column tables (of COLUMNS or fewer; a map's: `map_width`) and walk
  the panels;
- verbs cut their channels into tiles.

A panel is a few rows of columns. In a run (`inner` contiguous elements of one channel) the columns are the
LANES lanes; in rows of channels they are the elements of the row. Folding is the same for both: each column
belongs to a channel, and columns are added to their channel in order, in double.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport copysign, fabs, isfinite
from libc.string cimport memcpy, memset

from cybn._kernels.kernels cimport (
    COLUMNS,
    LANES,
    LEAKY_RELU,
    PANEL,
    RELU,
    SHORTEST,
    Job,
    Kernels,
    Operand,
    Weights,
    cybn_bound_flags,
    cybn_outside,
    cybn_weigh_double,
    cybn_weigh_float,
    map_width,
    partial_sums,
    slice_of,
    slice_start,
)

ctypedef fused real:
    float
    double

ctypedef signed char flag   # -1: set, 0: not

# What stands once for all channels: weights, or a mask.
ctypedef fused weight:
    float
    double
    flag

# Tiles are compiled twice, so that what comes with few calls does not weigh on the others.
ctypedef fused features:
    char        # none
    short       # activation, residual, mask, weights

cdef extern from "stream.h":
    void cybn_stream_float(float *to, const float *source, Py_ssize_t n, const float *next, const float *other,
                           bint relu, unsigned char *gate, Py_ssize_t bit) noexcept nogil
    void cybn_stream_double(double *to, const double *source, Py_ssize_t n, const double *next, const double *other,
                            bint relu, unsigned char *gate, Py_ssize_t bit) noexcept nogil
    void cybn_stream_end() noexcept nogil

cdef extern from "select.h" nogil:
    float cybn_keep_float(bint condition, float value) noexcept
    float cybn_choose_float(bint condition, float value, float other) noexcept
    double cybn_keep_double(bint condition, double value) noexcept
    double cybn_choose_double(bint condition, double value, double other) noexcept
    float cybn_flagged_float(flag condition, float value) noexcept
    double cybn_flagged_double(flag condition, double value) noexcept

cdef extern from "gate.h" nogil:
    void cybn_mark_float(const float *y, Py_ssize_t n, bint relu, unsigned char *gate, Py_ssize_t bit) noexcept
    void cybn_mark_double(const double *y, Py_ssize_t n, bint relu, unsigned char *gate, Py_ssize_t bit) noexcept
    void cybn_fetch_gate(const unsigned char *gate, Py_ssize_t bit, Py_ssize_t n) noexcept
    unsigned cybn_bits(const unsigned char *gate, Py_ssize_t bit) noexcept
    void cybn_pass_float(const float *dy, Py_ssize_t n, bint relu, float slope, const unsigned char *gate,
                         Py_ssize_t bit, float *to) noexcept
    void cybn_pass_double(const double *dy, Py_ssize_t n, bint relu, double slope, const unsigned char *gate,
                          Py_ssize_t bit, double *to) noexcept

cdef extern from "lanes.h" nogil:
    enum:
        PLAIN "CYBN_PLAIN"
        WEIGHTED "CYBN_WEIGHTED"
        POSITIVE "CYBN_POSITIVE"
        COUNTED "CYBN_COUNTED_ONLY"
        BACKWARD "CYBN_BACKWARD"
        BY_RELU_X "CYBN_BY_RELU_X"
        BY_LEAKY_X "CYBN_BY_LEAKY_X"
        BY_RELU_BITS "CYBN_BY_RELU_BITS"
        BY_LEAKY_BITS "CYBN_BY_LEAKY_BITS"
        KEPT_RELU "CYBN_KEPT_RELU"
        KEPT_LEAKY "CYBN_KEPT_LEAKY"
        BY_MASK "CYBN_BY_MASK"
    void cybn_sum_float(bint apart, int kind, Py_ssize_t cols, Py_ssize_t step, Py_ssize_t wrap, const float *x,
                        Py_ssize_t x_pitch, const float *dy, Py_ssize_t dy_pitch, const flag *flags,
                        Py_ssize_t flags_pitch, Py_ssize_t bit, Py_ssize_t rows, Py_ssize_t rest, Py_ssize_t ahead,
                        Py_ssize_t line, Py_ssize_t further, const float *center, const float *scale,
                        const float *offset, float slope, float *passed, Py_ssize_t passed_pitch, double *x_sums,
                        float *dy_sums, float *products) noexcept
    void cybn_sum_double(bint apart, int kind, Py_ssize_t cols, Py_ssize_t step, Py_ssize_t wrap, const double *x,
                         Py_ssize_t x_pitch, const double *dy, Py_ssize_t dy_pitch, const flag *flags,
                         Py_ssize_t flags_pitch, Py_ssize_t bit, Py_ssize_t rows, Py_ssize_t rest, Py_ssize_t ahead,
                         Py_ssize_t line, Py_ssize_t further, const double *center, const double *scale,
                         const double *offset, double slope, double *passed, Py_ssize_t passed_pitch, double *x_sums,
                         double *dy_sums, double *products) noexcept

cdef extern from "<float.h>":
    const double LARGEST_FLOAT "FLT_MAX"
    const double LARGEST_DOUBLE "DBL_MAX"

cdef enum:
    # Rows that sums take at a time where these do not follow each other (more of them spare loads and stores of the
    # accumulators, fewer are read in longer stretches; measured: 1 to 64): of x alone; of gradients, of all arrays
    # together, which is also what maps take; or as many as the first cache has places for lines, and those fetched
    # ahead, that are whole SETS (bytes) apart.
    STATS_ROWS = 8
    LINES = 12
    WAYS = 8
    SETS = 4096
    # Bytes of all arrays that sums take at a time where rows do follow each other: half of that cache.
    CACHED = 16384
    # Rows summed in the input's type: more of them lose digits to an outlier among them.
    FOLDED = 32
    # Columns of the same rows that are fetched ahead where these do not follow each other (else a panel).
    AHEAD = 64
    # Bytes of a panel that goes past the caches at a time: while they go out nothing is read (measured: 256 to 8192).
    STREAMED = 2048
    # Columns that a map takes of rows that do not follow each other, each of them a stream.
    MAP_COLUMNS = 64
    # Elements from table to table of a map, 8 KB and a few lines; rows that follow each other are mapped as WIDE ones,
    # MANY elements at a time. (Tables on one page or the next, and short rows of them, take the prefetchers off the
    # trail of what they serve: 1.5 times as long from memory.)
    TABLE = 2112
    WIDE = 512
    MANY = 65536
    # Results of runs that are finished, that is, become bits or go past the caches, at a time (measured: 256 to 1024),
    # in whole words of bits, which are whole lines; and how far ahead a line of bits is fetched. Bits alone are not
    # worth it with runs below MARKED_RUN (7 x 7 took 1.2 times as long).
    PIECE = 512
    PIECE_WORD = 32
    BITS_AHEAD = 1024
    MARKED_RUN = 128
    # Columns of weights that repeat, as the sums read them: a run's, and 16 more.
    UNWRAPPED = 80
    # Elements of a block whose mean is its shift.
    SAMPLES = 8
    # Whether a channel of a block must be summed again: not known yet.
    UNSURE = 2


# ---------------------------------------------------------------------------------------------------------- panels

cdef struct Block:
    Py_ssize_t o0
    Py_ssize_t o1
    Py_ssize_t i0
    Py_ssize_t i1
    Py_ssize_t count    # elements per channel
    double weight       # the sum of theirs
    Py_ssize_t full     # whole rows (rows traversal)
    Py_ssize_t rest     # outer indices in the last, partial row


cdef struct Panel:
    Py_ssize_t flat     # of the first element
    Py_ssize_t rows
    Py_ssize_t cols
    Py_ssize_t pitch    # elements from row to row
    Py_ssize_t channel  # of the tile, the first (runs)
    bint by_rows        # rows of channels, else runs
    Py_ssize_t least    # rows to take at a time, or a multiple; runs: up to a channel that is one; if there are so many
    Py_ssize_t budget   # elements to take at a time: of a run, or in rows if that makes more of them
    Py_ssize_t folded   # rows after which a panel ends in any case
    Py_ssize_t o        # where the walk is
    Py_ssize_t c
    Py_ssize_t i


cdef inline void open_block(const Job *job, Py_ssize_t index, Block *block) noexcept nogil:
    cdef Py_ssize_t bo = index // job.blocks_inner
    cdef Py_ssize_t bi = index - bo * job.blocks_inner
    block.o0 = bo * job.block_outer
    block.o1 = min(block.o0 + job.block_outer, job.outer)
    block.i0 = bi * job.block_inner
    block.i1 = min(block.i0 + job.block_inner, job.inner)
    block.count = (block.o1 - block.o0) * (block.i1 - block.i0)
    block.weight = <double> block.count if job.block_weights == NULL else job.block_weights[index]
    block.full = block.o1 - block.o0
    block.rest = 0
    if job.period > 1:
        block.full //= job.period
        block.rest = (block.o1 - block.o0) - block.full * job.period


cdef inline Py_ssize_t first_element(const Job *job, Py_ssize_t index, Py_ssize_t c) noexcept nogil:
    """Of channel c in block `index`."""
    cdef Py_ssize_t bo = index // job.blocks_inner
    cdef Py_ssize_t bi = index - bo * job.blocks_inner
    return (bo * job.block_outer * job.channels + c) * job.inner + bi * job.block_inner


cdef inline void first_panel(const Block *block, Py_ssize_t c0, bint rows, Py_ssize_t least, Py_ssize_t budget,
                             Py_ssize_t folded, Panel *panel) noexcept nogil:
    panel.by_rows = rows
    panel.least = least
    panel.budget = budget
    panel.folded = folded
    panel.o = 0 if rows else block.o0
    panel.c = c0
    panel.i = block.i0
    panel.channel = 0


cdef inline bint next_panel(const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t c1,
                            Panel *panel) noexcept nogil:
    cdef Py_ssize_t width
    if panel.by_rows:
        width = job.channels * job.inner
        panel.flat = (block.o0 + panel.o * job.period) * width + c0 * job.inner
        panel.pitch = job.period * width
        if panel.o < block.full:
            # A period above 1 means that the tile is the whole row.
            panel.cols = job.period * (c1 - c0) * job.inner
            # Whatever its width, no panel of sums goes over rows where the sums of products are folded.
            panel.rows = min(max(panel.least, panel.budget // panel.cols // panel.least * panel.least),
                             block.full - panel.o, panel.folded - panel.o % panel.folded)
        elif panel.o == block.full and block.rest:
            panel.cols = block.rest * width
            panel.rows = 1
        else:
            return False
        panel.o += panel.rows
        return True
    if panel.c == c1:
        panel.c = c0
        panel.o += 1
    if panel.o == block.o1:
        return False
    panel.flat = (panel.o * job.channels + panel.c) * job.inner + panel.i
    panel.cols = min(block.i1 - panel.i, panel.budget)
    panel.pitch = job.inner
    panel.rows = 1
    panel.channel = panel.c - c0
    if panel.cols == block.i1 - block.i0:
        panel.rows = panel.budget // panel.cols
        if panel.rows >= panel.least:
            panel.rows -= (panel.c + panel.rows) % panel.least
        panel.rows = max(1, min(panel.rows, c1 - panel.c))
    panel.i += panel.cols
    if panel.i == block.i1:     # (a block of a reduction is no longer than a panel)
        panel.i = block.i0
        panel.c += panel.rows
    return True


cdef inline Panel in_one(const Panel *panel) noexcept nogil:
    """The same elements; rows that follow each other are one."""
    cdef Panel lines = panel[0]
    if panel.rows == 1 or panel.pitch == panel.cols:
        lines.cols *= panel.rows
        lines.rows = 1
    return lines


# --------------------------------------------------------------------------------------------------------- staging
# Arrays that are not dense go through a small buffer, a panel at a time: never a second array.

cdef char *locate(const Operand *op, Py_ssize_t flat, Py_ssize_t *index) noexcept nogil:
    """Address of element `flat`, and its index along each axis."""
    cdef char *p = op.data
    cdef Py_ssize_t d = op.ndim, quotient
    while d > 0:
        d -= 1
        quotient = flat // op.shape[d]
        index[d] = flat - quotient * op.shape[d]
        p += index[d] * op.stride[d]
        flat = quotient
    return p


cdef real element(const Operand *op, Py_ssize_t flat, real *kind) noexcept nogil:
    cdef Py_ssize_t index[64]
    cdef real value
    if op.direct:
        return (<real *> op.data)[flat]
    memcpy(&value, locate(op, flat, index), sizeof(real))
    return value


cdef void transfer(const Operand *op, Py_ssize_t flat, Py_ssize_t n, real *buffer, bint store) noexcept nogil:
    """n elements from number `flat` on, to the buffer or (store) from it; memcpy because op may be unaligned."""
    cdef Py_ssize_t index[64]
    cdef Py_ssize_t i, d, count, last = op.ndim - 1
    cdef Py_ssize_t stride = op.stride[last]
    cdef char *p = locate(op, flat, index)
    while n > 0:
        count = min(n, op.shape[last] - index[last])
        if store:
            for i in range(count):
                memcpy(p + i * stride, buffer + i, sizeof(real))
        else:
            for i in range(count):
                memcpy(buffer + i, p + i * stride, sizeof(real))
        buffer += count
        n -= count
        # On to the next row along the last axis: an odometer.
        p -= index[last] * stride
        index[last] = 0
        d = last - 1
        while d >= 0:
            index[d] += 1
            p += op.stride[d]
            if index[d] < op.shape[d]:
                break
            p -= index[d] * op.stride[d]
            index[d] = 0
            d -= 1


cdef inline real *fetch(const Operand *op, const Panel *panel, real *stage, Py_ssize_t *pitch) noexcept nogil:
    """The panel's elements: where they lie, or copied to the stage."""
    cdef Py_ssize_t r
    if op.direct:
        pitch[0] = panel.pitch
        return (<real *> op.data) + panel.flat
    for r in range(panel.rows):
        transfer(op, panel.flat + r * panel.pitch, panel.cols, stage + r * panel.cols, False)
    pitch[0] = panel.cols
    return stage


cdef inline void stream(real *to, const real *source, Py_ssize_t n, const real *next, const real *other, bint relu,
                        unsigned char *gate, Py_ssize_t bit) noexcept nogil:
    if real is float:
        cybn_stream_float(to, source, n, next, other, relu, gate, bit)
    else:
        cybn_stream_double(to, source, n, next, other, relu, gate, bit)


cdef inline void deliver(const Operand *op, const Panel *panel, const real *stage, bint streamed,
                         const real *next, const real *other) noexcept nogil:
    """A panel from the stage to where its elements lie. Streamed in one, it brings such at `next` and `other` to L2."""
    cdef Panel lines = in_one(panel)
    cdef bint one = lines.rows == 1
    cdef real *to = (<real *> op.data) + panel.flat
    cdef Py_ssize_t r, n = lines.cols
    for r in range(lines.rows):
        if streamed:
            stream(to + r * panel.pitch, stage + r * n, n, next if one else NULL, other if one else NULL, False, NULL,
                   0)
        elif op.direct:
            memcpy(to + r * panel.pitch, stage + r * n, n * sizeof(real))
        else:
            transfer(op, panel.flat + r * panel.pitch, n, <real *> stage + r * n, True)


# ---------------------------------------------------------------------------------------------------------- leaves

cdef inline real keep(bint condition, real value) noexcept nogil:
    """The value, or 0."""
    return cybn_keep_float(condition, value) if real is float else cybn_keep_double(condition, value)


cdef inline real choose(bint condition, real value, real other) noexcept nogil:
    if real is float:
        return cybn_choose_float(condition, value, other)
    else:
        return cybn_choose_double(condition, value, other)


cdef inline real flagged(flag condition, real value) noexcept nogil:
    """The value where the flag is set, or 0."""
    return cybn_flagged_float(condition, value) if real is float else cybn_flagged_double(condition, value)


cdef inline void mark_bits(const real *y, Py_ssize_t n, bint relu, unsigned char *gate, Py_ssize_t bit) noexcept nogil:
    if real is float:
        cybn_mark_float(y, n, relu, gate, bit)
    else:
        cybn_mark_double(y, n, relu, gate, bit)


cdef inline real activated(real v, int activation, real negative_slope) noexcept nogil:
    """NaN and -0.0 pass."""
    if activation == 0:
        return v
    return keep(not v < 0, v) if activation == RELU else choose(v > 0, v, v * negative_slope)


cdef inline real passed(real g, real z, int activation, real negative_slope) noexcept nogil:
    """The gradient before the activation of z: PyTorch's rules at 0 and NaN."""
    return keep(not z <= 0, g) if activation == RELU else choose(z > 0, g, g * negative_slope)


cdef inline real bit_passed(real g, const unsigned char *gate, Py_ssize_t bit, bint relu,
                            real negative_slope) noexcept nogil:
    """The same where a bit tells."""
    cdef bint passes = cybn_bits(gate, bit) & 1
    return keep(passes, g) if relu else choose(passes, g, g * negative_slope)


cdef inline void pass_bits(const real *dy, Py_ssize_t n, bint relu, real negative_slope, const unsigned char *gate,
                           Py_ssize_t bit, real *to) noexcept nogil:
    """And for n of them, of which bits from number `bit` on tell."""
    if real is float:
        cybn_pass_float(dy, n, relu, negative_slope, gate, bit, to)
    else:
        cybn_pass_double(dy, n, relu, negative_slope, gate, bit, to)


# Statistics: x_sums += x, dots += (x - center)^2. The sum is double: with it the mean is exact to double rounding,
# and so is y near 0, for which every error of the mean counts. float64 input sums x - center instead, which serves
# data with a large offset the same way. Weighted ones: both times a weight, which takes the place of dy, or where flags
# are set.
# Gradients: dy_sums += dy, dots += dy * (x - center), in the input's type.

cdef inline void reduce_rows(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                             const flag *flags, Py_ssize_t flags_pitch, Py_ssize_t bit, Py_ssize_t rows,
                             Py_ssize_t cols, Py_ssize_t wrap, const real *center, const real *scale,
                             const real *offset, real negative_slope, real *passed_dy, Py_ssize_t passed_pitch,
                             double *x_sums, real *dy_sums, real *dots, int kind, Py_ssize_t further,
                             bint apart) noexcept nogil:
    """Rows of `cols` columns. Flags, and weights in the place of dy, repeat every `wrap` columns; bits, from number
    `bit` on, do not."""
    # Fetched ahead: the next rows in the order of memory if there they follow these, else columns of these rows; and
    # from memory what follows, or these columns of the next rows.
    cdef bint linear = x_pitch == cols
    cdef Py_ssize_t ahead = rows * cols if linear else AHEAD
    cdef Py_ssize_t line = LANES if linear else x_pitch
    cdef Py_ssize_t step = rows * LANES if linear else LANES
    cdef Py_ssize_t r, j
    cdef real d, w, g
    if further and not linear:
        further = rows * x_pitch - AHEAD
    if real is float:
        cybn_sum_float(apart, kind, cols, step, wrap, x, x_pitch, dy, dy_pitch, flags, flags_pitch, bit, rows, 0,
                       ahead, line, further, center, scale, offset, negative_slope, passed_dy, passed_pitch, x_sums,
                       dy_sums, dots)
    else:
        cybn_sum_double(apart, kind, cols, step, wrap, x, x_pitch, dy, dy_pitch, flags, flags_pitch, bit, rows, 0,
                        ahead, line, further, center, scale, offset, negative_slope, passed_dy, passed_pitch, x_sums,
                        dy_sums, dots)
    for j in range(cols // 4 * 4, cols):
        for r in range(rows):
            d = x[r * x_pitch + j] - center[j]
            if kind < BACKWARD:
                w = 1
                if kind == COUNTED:
                    w = -flags[r * flags_pitch + j % wrap]
                elif kind != PLAIN:
                    w = dy[r * dy_pitch + j % wrap]
                if w != 0:
                    x_sums[j] += <double> (d if sizeof(real) == 8 else x[r * x_pitch + j]) * w
                    dots[j] += d * w * d
                continue
            g = dy[r * dy_pitch + j]
            if kind == BY_RELU_X or kind == BY_LEAKY_X:
                g = passed[real](g, d * scale[j] + offset[j], RELU if kind == BY_RELU_X else LEAKY_RELU, negative_slope)
            elif kind == BY_RELU_BITS or kind == KEPT_RELU:
                g = bit_passed[real](g, <const unsigned char *> flags, bit + r * flags_pitch + j, True, 0)
            elif kind == BY_LEAKY_BITS or kind == KEPT_LEAKY:
                g = bit_passed[real](g, <const unsigned char *> flags, bit + r * flags_pitch + j, False,
                                     negative_slope)
            elif kind == BY_MASK and flags[r * flags_pitch + j % wrap] == 0:
                continue
            if kind == KEPT_RELU or kind == KEPT_LEAKY:
                passed_dy[r * passed_pitch + j] = g
            dy_sums[j] += g
            dots[j] += g * d


cdef inline void reduce_run(const real *x, const real *dy, const flag *flags, Py_ssize_t bit, Py_ssize_t inner,
                            Py_ssize_t ahead, const real *center, const real *scale, const real *offset,
                            real negative_slope, real *passed_dy, double *x_sums, real *dy_sums, real *dots, int kind,
                            Py_ssize_t further) noexcept nogil:
    """A run: element i belongs to column i % LANES, those of the tail to the last columns."""
    cdef Py_ssize_t rows = inner // LANES
    cdef Py_ssize_t rest = inner - rows * LANES
    if real is float:
        cybn_sum_float(False, kind, LANES, 0, LANES, x, LANES, dy, LANES, flags, LANES, bit, rows, rest, ahead,
                       LANES, further, center, scale, offset, negative_slope, passed_dy, LANES, x_sums, dy_sums, dots)
    else:
        cybn_sum_double(False, kind, LANES, 0, LANES, x, LANES, dy, LANES, flags, LANES, bit, rows, rest, ahead,
                        LANES, further, center, scale, offset, negative_slope, passed_dy, LANES, x_sums, dy_sums, dots)


cdef struct Extras:
    # What comes with a map; all zero: nothing.
    const void *residual    # forward: added before the activation
    Py_ssize_t residual_pitch
    const void *weights     # backward: of the elements in the statistics
    const flag *mask        # instead of them: where the result is 0
    bint even               # a weight for each row
    Py_ssize_t weights_pitch    # of weights or mask
    const void *gate        # backward: the forward pass's offsets, for the activation that dy passes
    void *passed            # where all of dy is copied to, or (staged) what passes the bits; NULL: nowhere
    Py_ssize_t passed_pitch
    # Runs in pieces: bits of the activation, made of the results, or backward read (NULL: not).
    unsigned char *bits
    # Runs whose results go past the caches (NULL: they do not): where they wait for each other, and what has passed the
    # bits; and arrays of which, at the place of each line that goes out, one comes to the second cache (NULL: none).
    # These and `passed` stand here from their first elements on.
    void *stage
    void *passed_stage
    const void *next
    const void *other
    int activation
    double negative_slope
    Py_ssize_t wide         # columns of the tables where all rows follow each other; 0: not, a row's


cdef enum companion:
    # What a map of gradients reads beside x and dy: nothing, what tells which pass the activation, weights (or one for
    # each row), flags. Or it copies dy.
    ALONE
    GATE
    COPIED
    WEIGHTS
    ROW_WEIGHTS
    FLAGS


cdef inline companion companion_of(const Extras *extras) noexcept nogil:
    if extras.gate != NULL:
        return GATE
    if extras.passed != NULL and extras.stage == NULL:
        return COPIED
    if extras.weights != NULL:
        return ROW_WEIGHTS if extras.even else WEIGHTS
    return FLAGS if extras.mask != NULL else ALONE


cdef inline void move_on(Extras *extras, Py_ssize_t n, bint gate, const real *kind) noexcept nogil:
    """By n elements, and the gate's table by as many columns."""
    if extras.residual != NULL:
        extras.residual = <const real *> extras.residual + n
    if extras.weights != NULL and not extras.even:
        extras.weights = <const real *> extras.weights + n
    if extras.mask != NULL:
        extras.mask += n
    if extras.passed != NULL:
        extras.passed = <real *> extras.passed + n
    if gate and extras.gate != NULL:
        extras.gate = <const real *> extras.gate + n


cdef inline Py_ssize_t set_flags(const flag *flags, Py_ssize_t *first, Py_ssize_t end) noexcept nogil:
    """How many flags in a row are set from the first on that is, and where that is."""
    cdef Py_ssize_t i = first[0]
    while i < end and flags[i] == 0:
        i += 1
    first[0] = i
    while i < end and flags[i] != 0:
        i += 1
    return i - first[0]


# Rows. What follows `extras` is constant where they are called, so that gcc makes a loop of its own for each.

cdef inline void normalize_columns(const real *x, const real *residual, Py_ssize_t cols, const real *table, real *out,
                                   real negative_slope, bint added, int activation, bint uniform) noexcept nogil:
    cdef real c0 = table[0], s0 = table[TABLE], o0 = table[2 * TABLE], v
    cdef Py_ssize_t j
    for j in range(cols):
        v = (x[j] - (c0 if uniform else table[j])) * (s0 if uniform else table[TABLE + j])
        v = v + (o0 if uniform else table[2 * TABLE + j])
        if added:
            v = v + residual[j]
        out[j] = activated(v, activation, negative_slope)


cdef inline void normalize_rows(const real *x, Py_ssize_t x_pitch, Py_ssize_t rows, Py_ssize_t cols,
                                const real *table, real *out, Py_ssize_t out_pitch, const Extras *extras, bint plain,
                                bint added, int activation, bint uniform) noexcept nogil:
    cdef const real *residual = <const real *> extras.residual if added else NULL
    cdef real negative = 0 if plain else <real> extras.negative_slope
    cdef Py_ssize_t r
    for r in range(rows):
        normalize_columns(x, residual, cols, table, out, negative, added, activation, uniform)
        x += x_pitch
        out += out_pitch
        if added:
            residual += extras.residual_pitch
        if uniform:
            table += 1


cdef inline void input_columns(const real *x, const real *dy, Py_ssize_t cols, const real *table, const real *gate,
                               real *passed_dy, const real *weights, const flag *mask, real *out, real negative,
                               companion beside, int activation, bint uniform) noexcept nogil:
    cdef real c0 = table[0], s0 = table[TABLE], o0 = table[2 * TABLE], t0 = table[3 * TABLE]
    cdef real g0 = gate[0] if beside == GATE else 0, w0 = weights[0] if beside == ROW_WEIGHTS else 0, d, v
    cdef Py_ssize_t j
    for j in range(cols):
        d = x[j] - (c0 if uniform else table[j])
        v = dy[j]
        if beside == GATE:
            v = passed(v, d * (s0 if uniform else table[TABLE + j]) + (g0 if uniform else gate[j]), activation,
                       negative)
        if beside == COPIED:
            passed_dy[j] = v
        if beside == WEIGHTS or beside == ROW_WEIGHTS:
            v = v - (o0 if uniform else table[2 * TABLE + j]) * (w0 if beside == ROW_WEIGHTS else weights[j])
            v = v - d * (t0 if uniform else table[3 * TABLE + j]) * (w0 if beside == ROW_WEIGHTS else weights[j])
        else:
            v = (v - (o0 if uniform else table[2 * TABLE + j])) - d * (t0 if uniform else table[3 * TABLE + j])
        v = v * (s0 if uniform else table[TABLE + j])
        out[j] = flagged(mask[j], v) if beside == FLAGS else v


cdef inline void input_rows(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch, Py_ssize_t rows,
                            Py_ssize_t cols, const real *table, real *out, Py_ssize_t out_pitch, const Extras *extras,
                            companion beside, int activation, bint uniform) noexcept nogil:
    cdef const real *weights = <const real *> extras.weights if beside == WEIGHTS or beside == ROW_WEIGHTS else NULL
    cdef const flag *mask = extras.mask if beside == FLAGS else NULL
    cdef const real *gate = <const real *> extras.gate if beside == GATE else NULL
    cdef real *passed_dy = <real *> extras.passed if beside == COPIED else NULL
    cdef real negative = 0 if activation == 0 else <real> extras.negative_slope
    cdef Py_ssize_t r
    for r in range(rows):
        input_columns(x, dy, cols, table, gate, passed_dy, weights, mask, out, negative, beside, activation, uniform)
        x += x_pitch
        dy += dy_pitch
        out += out_pitch
        if uniform:
            table += 1
            if beside == GATE:
                gate += 1
        if beside == COPIED:
            passed_dy += extras.passed_pitch
        if beside == WEIGHTS or beside == ROW_WEIGHTS:
            weights += extras.weights_pitch
        if beside == FLAGS:
            mask += extras.weights_pitch


# Runs that follow each other, PIECE elements at a time, wherever they begin and end: of these bits are made, or they go
# past the caches, while the processor waits for what is read next. (Panel by panel, with all that a panel costs, steps
# from memory took 1.1 to 1.2 times as long.)

cdef inline const real *at_number(const void *array, Py_ssize_t n, const real *kind) noexcept nogil:
    """Element n of an array, if there is one."""
    return NULL if array == NULL else <const real *> array + n


cdef inline Py_ssize_t piece_at(Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Elements of the piece that begins with this one: up to a whole word of bits, which is a whole line."""
    return min(PIECE - first % PIECE_WORD, end - first)


cdef inline void normalize_runs(const real *x, Py_ssize_t n, Py_ssize_t cols, const real *table, real *out,
                                Py_ssize_t first, const Extras *extras, bint plain, bint added, int activation,
                                bint staged) noexcept nogil:
    """n elements, of runs of `cols`; the first is number `first` of all. `staged`: they go past the caches."""
    cdef real negative = 0 if plain else <real> extras.negative_slope
    cdef const real *residual = <const real *> extras.residual if added else NULL
    cdef unsigned char *bits = NULL if plain else extras.bits
    cdef const real *ahead
    cdef real *y
    cdef Py_ssize_t at = 0, i = 0, size, j, m
    while at < n:
        size = piece_at(first + at, first + n)
        y = <real *> extras.stage if staged else out + at
        j = 0
        while j < size:
            m = min(size - j, cols - i)
            normalize_columns(x + at + j, residual + at + j if added else NULL, m, table, y + j, negative, added,
                              activation, True)
            j += m
            i += m
            if i == cols:
                i = 0
                table += 1
        if bits != NULL:
            cybn_fetch_gate(bits, first + at + BITS_AHEAD, 0)
        if staged:
            # (With the lines that go out, those of the residual that are read next come.)
            ahead = residual + at + size if added and at + size < n else NULL
            stream(out + at, y, size, at_number(extras.next, first + at, x), ahead, activation == RELU, bits,
                   first + at)
        else:
            mark_bits(y, size, activation == RELU, bits, first + at)
        at += size


cdef inline void input_runs(const real *x, const real *dy, Py_ssize_t n, Py_ssize_t cols, const real *table, real *out,
                            Py_ssize_t first, const Extras *extras, bint plain, companion beside,
                            int activation) noexcept nogil:
    """The same for gradients, which go past the caches; and so does what passes the bits, or all of dy, if wanted."""
    cdef bint gated = not plain and beside == ALONE and extras.bits != NULL
    cdef bint kept = not plain and beside == ALONE and extras.passed != NULL
    cdef const real *gate = <const real *> extras.gate if beside == GATE else NULL
    cdef const real *weights = NULL
    cdef const flag *mask = NULL
    cdef const real *g
    cdef const real *next
    cdef const real *other
    cdef real *stage = <real *> extras.stage
    cdef real *passed_stage = <real *> extras.passed_stage
    cdef real negative = 0 if plain else <real> extras.negative_slope
    cdef Py_ssize_t at = 0, i = 0, size, j, m
    while at < n:
        size = piece_at(first + at, first + n)
        g = dy + at
        if gated:
            cybn_fetch_gate(extras.bits, first + at + BITS_AHEAD, 0)
            pass_bits(g, size, extras.activation == RELU, negative, extras.bits, first + at, passed_stage)
            g = passed_stage
        j = 0
        while j < size:
            m = min(size - j, cols - i)
            if beside == WEIGHTS:
                weights = <const real *> extras.weights + i
            if beside == FLAGS:
                mask = extras.mask + i
            input_columns(x + at + j, g + j, m, table, gate, NULL, weights, mask, stage + j, negative, beside,
                          activation, True)
            j += m
            i += m
            if i == cols:
                i = 0
                table += 1
                if beside == GATE:
                    gate += 1
        if kept:
            stream(<real *> extras.passed + first + at, g, size, <const real *> NULL, NULL, False, NULL, 0)
        # (Where no other group's lines come with those that go out, the next ones of these runs do.)
        next = at_number(extras.next, first + at, x)
        other = at_number(extras.other, first + at, x)
        if next == NULL and at + size < n:
            next = x + at + size
            other = dy + at + size
        stream(out + at, stage, size, next, other, False, NULL, 0)
        at += size


cdef inline void zero_rows(Py_ssize_t rows, Py_ssize_t cols, const flag *mask, Py_ssize_t mask_pitch, real *out,
                           Py_ssize_t out_pitch) noexcept nogil:
    """Where no flag is set."""
    cdef Py_ssize_t r, j
    for r in range(rows):
        for j in range(cols):
            out[j] = flagged(mask[j], out[j])
        mask += mask_pitch
        out += out_pitch


cdef inline void map_columns(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                             Py_ssize_t rows, Py_ssize_t cols, const real *table, const Extras *extras,
                             real *out, Py_ssize_t out_pitch, bint backward, bint uniform, bint plain) noexcept nogil:
    """y = d * scale + offset, or dx = ((dy - offset) - d * slope) * scale, with d = x - center.

    `uniform`: each row is one channel, and the tables have an element per row. `plain`: no extras.
    """
    cdef int activation = 0 if plain else extras.activation
    cdef bint added = not plain and extras.residual != NULL
    cdef companion beside = ALONE if plain else companion_of(extras)
    if backward and beside == ALONE:
        input_rows(x, x_pitch, dy, dy_pitch, rows, cols, table, out, out_pitch, extras, ALONE, 0, uniform)
    elif backward and beside == GATE and activation == RELU:
        input_rows(x, x_pitch, dy, dy_pitch, rows, cols, table, out, out_pitch, extras, GATE, RELU, uniform)
    elif backward and beside == GATE:
        input_rows(x, x_pitch, dy, dy_pitch, rows, cols, table, out, out_pitch, extras, GATE, LEAKY_RELU, uniform)
    elif backward and beside == COPIED:
        input_rows(x, x_pitch, dy, dy_pitch, rows, cols, table, out, out_pitch, extras, COPIED, 0, uniform)
    elif backward and beside == FLAGS:
        input_rows(x, x_pitch, dy, dy_pitch, rows, cols, table, out, out_pitch, extras, FLAGS, 0, uniform)
    elif backward and beside == WEIGHTS:
        input_rows(x, x_pitch, dy, dy_pitch, rows, cols, table, out, out_pitch, extras, WEIGHTS, 0, uniform)
    elif backward and not uniform:
        input_rows(x, x_pitch, dy, dy_pitch, rows, cols, table, out, out_pitch, extras, ROW_WEIGHTS, 0, False)
    elif not backward and added:
        if activation == 0:
            normalize_rows(x, x_pitch, rows, cols, table, out, out_pitch, extras, plain, True, 0, uniform)
        elif activation == RELU:
            normalize_rows(x, x_pitch, rows, cols, table, out, out_pitch, extras, plain, True, RELU, uniform)
        else:
            normalize_rows(x, x_pitch, rows, cols, table, out, out_pitch, extras, plain, True, LEAKY_RELU, uniform)
    elif not backward:
        if activation == 0:
            normalize_rows(x, x_pitch, rows, cols, table, out, out_pitch, extras, plain, False, 0, uniform)
        elif activation == RELU:
            normalize_rows(x, x_pitch, rows, cols, table, out, out_pitch, extras, plain, False, RELU, uniform)
        else:
            normalize_rows(x, x_pitch, rows, cols, table, out, out_pitch, extras, plain, False, LEAKY_RELU, uniform)
    if not backward and not plain and extras.mask != NULL:
        zero_rows(rows, cols, extras.mask, extras.weights_pitch, out, out_pitch)


cdef inline void map_runs(const real *x, const real *dy, Py_ssize_t n, Py_ssize_t cols, const real *table,
                          const Extras *extras, real *out, Py_ssize_t first, bint backward, bint plain,
                          bint staged) noexcept nogil:
    """map_columns of runs in pieces: what is not `staged` are results behind a residual, of which bits are made."""
    cdef int activation = 0 if plain else extras.activation
    cdef companion beside = ALONE if plain else companion_of(extras)
    if backward and beside == ALONE:
        input_runs(x, dy, n, cols, table, out, first, extras, plain, ALONE, 0)
    elif backward and beside == GATE and activation == RELU:
        input_runs(x, dy, n, cols, table, out, first, extras, plain, GATE, RELU)
    elif backward and beside == GATE:
        input_runs(x, dy, n, cols, table, out, first, extras, plain, GATE, LEAKY_RELU)
    elif backward and beside == FLAGS:
        input_runs(x, dy, n, cols, table, out, first, extras, plain, FLAGS, 0)
    elif backward:
        input_runs(x, dy, n, cols, table, out, first, extras, plain, WEIGHTS, 0)
    elif not staged or (not plain and extras.residual != NULL):
        if staged and activation == 0:
            normalize_runs(x, n, cols, table, out, first, extras, plain, True, 0, staged)
        elif activation == RELU:
            normalize_runs(x, n, cols, table, out, first, extras, plain, True, RELU, staged)
        else:
            normalize_runs(x, n, cols, table, out, first, extras, plain, True, LEAKY_RELU, staged)
    elif activation == 0:
        normalize_runs(x, n, cols, table, out, first, extras, plain, False, 0, True)
    elif activation == RELU:
        normalize_runs(x, n, cols, table, out, first, extras, plain, False, RELU, True)
    else:
        normalize_runs(x, n, cols, table, out, first, extras, plain, False, LEAKY_RELU, True)


cdef inline void map_panel(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                           Py_ssize_t rows, Py_ssize_t cols, const real *table, const Extras *extras,
                           real *out, Py_ssize_t out_pitch, bint backward, bint uniform, bint plain) noexcept nogil:
    """map_columns, told when it works in place: with one name for both gcc needs no overlap check to vectorise.

    `joined`: rows that follow each other, as rows of all columns that the tables have, and a shorter one at the end.
    """
    cdef Extras here = extras[0]
    cdef Py_ssize_t n = cols if uniform or x_pitch == cols else MAP_COLUMNS, step
    cdef bint joined = not uniform and extras.wide > 0
    if joined:
        cols *= rows
        n = extras.wide
        x_pitch = dy_pitch = out_pitch = here.residual_pitch = here.passed_pitch = n
    while cols > 0:
        n = min(n, cols)
        if joined:
            rows = cols // n
        if out == x:
            map_columns(out, out_pitch, dy, dy_pitch, rows, n, table, &here, out, out_pitch, backward, uniform, plain)
        elif backward and out == dy:
            map_columns(x, x_pitch, out, out_pitch, rows, n, table, &here, out, out_pitch, backward, uniform, plain)
        else:
            map_columns(x, x_pitch, dy, dy_pitch, rows, n, table, &here, out, out_pitch, backward, uniform, plain)
        step = rows * n if joined else n
        if step == cols:
            return
        cols -= step
        x += step
        dy += step
        out += step
        if not joined:
            table += n
        if not plain:
            move_on(&here, step, not joined, table)


cdef inline void map_pieces(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch, Py_ssize_t rows,
                            Py_ssize_t cols, const real *table, const Extras *extras, real *out, Py_ssize_t out_pitch,
                            Py_ssize_t first, bint backward, bint plain) noexcept nogil:
    """map_panel of runs in pieces; as `map_runs`."""
    cdef Extras here = extras[0]
    cdef Py_ssize_t n = cols, r
    if out_pitch == cols:
        n *= rows
        rows = 1
    for r in range(rows):
        if here.stage != NULL:
            map_runs(x, dy, n, cols, table, &here, out, first, backward, plain, True)
        elif not backward and out == x:
            map_runs(out, dy, n, cols, table, &here, out, first, backward, plain, False)
        elif not backward:
            map_runs(x, dy, n, cols, table, &here, out, first, backward, plain, False)
        x += x_pitch
        dy += dy_pitch
        out += out_pitch
        first += out_pitch
        table += 1
        if here.residual != NULL:
            here.residual = <const real *> here.residual + here.residual_pitch
        if here.gate != NULL:
            here.gate = <const real *> here.gate + 1


cdef void map_rows(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch, Py_ssize_t rows,
                   Py_ssize_t cols, const real *table, const Extras *extras, real *out, Py_ssize_t out_pitch,
                   bint backward) noexcept nogil:
    """Rows of channels with extras, not in the midst of a tile: these loops read up to nine arrays."""
    if backward:
        map_panel(x, x_pitch, dy, dy_pitch, rows, cols, table, extras, out, out_pitch, True, False, False)
    else:
        map_panel(x, x_pitch, dy, dy_pitch, rows, cols, table, extras, out, out_pitch, False, False, False)


cdef void map_set_rows(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch, Py_ssize_t rows,
                       Py_ssize_t cols, const real *table, const Extras *extras, const flag *mask, real *out,
                       Py_ssize_t out_pitch, bint backward) noexcept nogil:
    """map_rows where the flag of a row is set; the others become 0 and are not read."""
    cdef Extras here = extras[0]
    cdef Py_ssize_t r = 0, done = 0, n, i
    while done < rows:
        n = set_flags(mask, &r, rows)
        for i in range(done, r):
            memset(out + i * out_pitch, 0, cols * sizeof(real))
        if extras.residual != NULL:
            here.residual = (<const real *> extras.residual) + r * extras.residual_pitch
        if n > 0:
            map_rows(x + r * x_pitch, x_pitch, dy + r * dy_pitch, dy_pitch, n, cols, table, &here, out + r * out_pitch,
                     out_pitch, backward)
        r += n
        done = r


cdef void multiply(const real *source, Py_ssize_t pitch, Py_ssize_t rows, Py_ssize_t cols, const real *factor,
                   bint uniform, real *to, Py_ssize_t to_pitch) noexcept nogil:
    """to = source * factor, for the few channels whose arithmetic needs another scale."""
    cdef Py_ssize_t r, j
    for r in range(rows):
        for j in range(cols):
            to[r * to_pitch + j] = source[r * pitch + j] * factor[r if uniform else j]


# ----------------------------------------------------------------------------------------------------------- tiles

cdef struct Columns:
    # A tile's columns: for each of `repeats`, for each channel, `span` of them.
    Py_ssize_t repeats
    Py_ssize_t tile     # channels
    Py_ssize_t span
    Py_ssize_t count


cdef inline Columns layout_columns(const Job *job, Py_ssize_t tile) noexcept nogil:
    cdef Columns columns
    columns.repeats = job.period if job.rows else 1
    columns.tile = tile
    columns.span = job.inner if job.rows else LANES
    columns.count = columns.repeats * tile * columns.span
    return columns


cdef inline void spread(const Columns *columns, const real *values, real *table) noexcept nogil:
    """A value per channel to all columns of the channel."""
    cdef Py_ssize_t p, i, c
    for p in range(columns.repeats):
        if columns.span == 1:
            memcpy(table, values, columns.tile * sizeof(real))
            table += columns.tile
            continue
        for c in range(columns.tile):
            for i in range(columns.span):
                table[i] = values[c]
            table += columns.span


cdef inline void spread_tables(const Columns *columns, real *tables, Py_ssize_t n) noexcept nogil:
    """The first n tables, in place: from a value per channel to one per column."""
    cdef real values[COLUMNS]
    cdef Py_ssize_t i
    if columns.count == columns.tile:
        return
    for i in range(n):
        memcpy(values, tables + i * TABLE, columns.tile * sizeof(real))
        spread(columns, values, tables + i * TABLE)


cdef inline real weight_of(const Job *job, Py_ssize_t o, Py_ssize_t i, real *kind) noexcept nogil:
    if job.mask != NULL:
        return -job.mask[o * job.inner + i]
    return 1 if job.weights == NULL else (<const real *> job.weights)[o * job.inner + i]


cdef inline real mean_of_samples(real a, real b, real c, real d, real e, real f, real g, real h) noexcept nogil:
    """In double, and each divided first: the sum of eight of the largest doubles would overflow."""
    cdef double w = 1.0 / SAMPLES
    return <real> (((w * a + w * b) + (w * c + w * d)) + ((w * e + w * f) + (w * g + w * h)))


cdef inline real mean_at(const real *x, const Py_ssize_t *flat) noexcept nogil:
    return mean_of_samples(x[flat[0]], x[flat[1]], x[flat[2]], x[flat[3]],
                           x[flat[4]], x[flat[5]], x[flat[6]], x[flat[7]])


cdef inline void sample_shifts(const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t tile,
                               real *shift) noexcept nogil:
    """Shift of each channel: the mean of a few elements spread over the block.

    One sample (the usual choice is the first element) may be an outlier and then costs the variance its digits;
    the mean of eight is near enough for all but adversarial blocks, which `close_block` finds and repairs.
    """
    cdef Py_ssize_t flat[SAMPLES]
    cdef Py_ssize_t e, i, o, c, width = block.i1 - block.i0
    cdef real v[SAMPLES]
    cdef const real *x
    for e in range(SAMPLES):
        i = e * block.count // SAMPLES
        if job.weights != NULL or job.mask != NULL:
            # The next that counts. (There is one, unless somebody writes into the weights meanwhile.)
            for o in range(block.count):
                if weight_of(job, block.o0 + i // width, block.i0 + i % width, shift) != 0:
                    break
                i = i + 1 if i + 1 < block.count else 0
        o = i // width if i >= width else 0
        flat[e] = ((block.o0 + o) * job.channels + c0) * job.inner + block.i0 + (i - o * width)
    if job.x.direct:
        # The same without `element`, so that the compiler sees the whole loop.
        x = <const real *> job.x.data
        if job.inner == 1:
            for c in range(tile):       # side by side: as vectors
                shift[c] = mean_at(x + c, flat)
        else:
            for c in range(tile):
                shift[c] = mean_at(x + c * job.inner, flat)
        return
    for c in range(tile):
        for e in range(SAMPLES):
            v[e] = element(&job.x, flat[e] + c * job.inner, shift)
        shift[c] = mean_of_samples[real](v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])


# What comes with a panel: weights, and the gradients that pass the mask and the activation.

cdef inline const weight *weigh(const Job *job, const weight *weights, const Panel *panel, bint rows,
                                Py_ssize_t repeats, Py_ssize_t size, weight *stage, Py_ssize_t *pitch) noexcept nogil:
    """The weights (or flags) of a panel's elements. In runs they are the same for each run; in rows those of an outer
    index are repeated to `size` of them, `repeats` such in a row."""
    cdef Py_ssize_t width = job.channels * job.inner, o = panel.flat // width
    cdef Py_ssize_t r, p, i, j, filled, more
    cdef weight *to = stage
    cdef weight value
    if not rows:
        pitch[0] = 0
        return weights + o * job.inner + panel.flat % job.inner
    pitch[0] = size * repeats
    for r in range(panel.rows):
        for p in range(repeats):
            if job.inner == 1:
                # As vectors, the last one over what is written next (or nothing: stages are a vector longer).
                value = weights[o + p]
                for j in range((size + LANES - 1) // LANES):
                    for i in range(LANES):
                        to[j * LANES + i] = value
                to += size
                continue
            filled = min(job.inner, size)
            memcpy(to, weights + (o + p) * job.inner, filled * sizeof(weight))
            while filled < size:
                more = min(filled, size - filled)
                memcpy(to + filled, to, more * sizeof(weight))
                filled += more
            to += size
        o += panel.pitch // width
    return stage


cdef inline real to_scale(double scale, real *kind) noexcept nogil:
    """Rounded, but finite if it is: a constant channel with a tiny eps has d = 0, which must not meet an infinity."""
    cdef real rounded = <real> scale
    return rounded if isfinite(rounded) or not isfinite(scale) else <real> copysign(LARGEST_FLOAT, scale)


cdef inline real to_offset(double offset, double center, real rounded, double slope) noexcept nogil:
    """Rounded, with what the center loses by its rounding, unless that is 0 times infinity."""
    cdef double low = (center - <double> rounded) * slope
    return <real> (offset - cybn_keep_double(low == low, low))


cdef inline void read_gate(const Job *job, Py_ssize_t c, real *factor, real *center, real *scale,
                           real *offset) noexcept nogil:
    """A channel's coefficients as `map_tile` rounds them in the forward pass."""
    factor[0] = <real> job.gate_factor[c]
    center[0] = <real> job.gate_center[c]
    scale[0] = to_scale(job.gate_scale[c], factor)
    offset[0] = to_offset(job.gate_offset[c], job.gate_center[c], center[0], job.gate_scale[c])


cdef double gated_element(const Job *job, Py_ssize_t c, Py_ssize_t flat, real *kind) noexcept nogil:
    """Element `flat` of dy behind the activation."""
    cdef real g = element(&job.dy, flat, kind), z
    cdef real factor, center, scale, offset
    if job.activation == 0:
        return g
    if job.gate != NULL:
        return bit_passed[real](g, job.gate, flat, job.activation == RELU, <real> job.negative_slope)
    read_gate[real](job, c, &factor, &center, &scale, &offset)
    z = (element(&job.x, flat, kind) * factor - center) * scale + offset
    return passed[real](g, z, job.activation, <real> job.negative_slope)


cdef inline void gate_row(const real *x, const real *dy, Py_ssize_t cols, const real *table, real *to,
                          int activation, real negative_slope, bint uniform) noexcept nogil:
    """dy behind the activation of x."""
    cdef real f0 = table[0], c0 = table[TABLE], s0 = table[2 * TABLE], o0 = table[3 * TABLE], z
    cdef Py_ssize_t j
    for j in range(cols):
        z = x[j] * (f0 if uniform else table[j]) - (c0 if uniform else table[TABLE + j])
        z = z * (s0 if uniform else table[2 * TABLE + j]) + (o0 if uniform else table[3 * TABLE + j])
        to[j] = passed(dy[j], z, activation, negative_slope)


cdef void gate_panel(const Job *job, const Panel *panel, const real *x, Py_ssize_t x_pitch,
                     const real *dy, Py_ssize_t dy_pitch, const flag *flags, Py_ssize_t flags_pitch,
                     const real *table, bint uniform, real *to, Py_ssize_t to_pitch) noexcept nogil:
    """dy behind activation and mask (NULL: none) -> to."""
    cdef Py_ssize_t r, j, cols = panel.cols
    cdef real negative = <real> job.negative_slope
    for r in range(panel.rows):
        if job.activation and job.gate != NULL:
            pass_bits(dy, cols, job.activation == RELU, negative, job.gate, panel.flat + r * panel.pitch, to)
        elif job.activation == RELU and uniform:
            gate_row(x, dy, cols, table, to, RELU, 0, True)
        elif job.activation == RELU:
            gate_row(x, dy, cols, table, to, RELU, 0, False)
        elif job.activation and uniform:
            gate_row(x, dy, cols, table, to, LEAKY_RELU, negative, True)
        elif job.activation:
            gate_row(x, dy, cols, table, to, LEAKY_RELU, negative, False)
        elif to != dy:
            memcpy(to, dy, cols * sizeof(real))
        if flags != NULL:
            for j in range(cols):
                to[j] = flagged(flags[j], to[j])
            flags += flags_pitch
        x += x_pitch
        dy += dy_pitch
        to += to_pitch
        table += uniform


cdef inline bint gates(const Job *job) noexcept nogil:
    """Whether gradients must pass something."""
    return job.dy.data != NULL and (job.activation != 0 or job.mask != NULL)


cdef inline void fetch_bits(const Job *job, const Panel *panel, Py_ssize_t ahead) noexcept nogil:
    cdef Panel lines = in_one(panel)
    cdef Py_ssize_t r
    for r in range(lines.rows):
        cybn_fetch_gate(job.gate, panel.flat + ahead + r * panel.pitch, lines.cols)


cdef inline void make_bits(const Job *job, const Panel *panel, const real *y, Py_ssize_t pitch) noexcept nogil:
    """A panel's bits, of its results."""
    cdef Panel lines = in_one(panel)
    cdef Py_ssize_t r
    for r in range(lines.rows):
        mark_bits(y + r * pitch, lines.cols, job.activation == RELU, job.gate, panel.flat + r * panel.pitch)


cdef inline bint only_activated(const Job *job, Py_ssize_t c0, Py_ssize_t n) noexcept nogil:
    """Whether gradients pass the activation of d * scale + offset, or one of which bits tell, and nothing else."""
    return (job.activation != 0 and job.mask == NULL
            and (job.gate != NULL or not cybn_outside(job.gate_factor + c0, n, 1, 1)))


cdef void open_gate(const Job *job, Py_ssize_t c0, const Columns *columns, bint rows, real *table) noexcept nogil:
    """The tables of `gate_panel`: factor, center, scale, offset; per channel in runs, per column in rows."""
    cdef Py_ssize_t j
    for j in range(columns.tile):
        read_gate[real](job, c0 + j, &table[j], &table[TABLE + j], &table[2 * TABLE + j], &table[3 * TABLE + j])
    if rows:
        spread_tables(columns, table, 4)


cdef void repair_block(const Job *job, const Block *block, Py_ssize_t c, double *first, double *second,
                       bint backward, real *kind) noexcept nogil:
    """One channel of one block again, in double: (mean, m2) in two passes, or (sum_dy, sum_dy_xmu)."""
    cdef Py_ssize_t o, i, flat
    cdef double a = 0, q = 0, d, g, w, mean = job.mean[c] if backward else 0
    if not backward:
        for o in range(block.o0, block.o1):
            flat = (o * job.channels + c) * job.inner
            for i in range(block.i0, block.i1):
                w = weight_of(job, o, i, kind)
                if w != 0:
                    # Divided first: near the largest double the plain sum would overflow.
                    mean += element(&job.x, flat + i, kind) / block.weight * w
    for o in range(block.o0, block.o1):
        flat = (o * job.channels + c) * job.inner
        for i in range(block.i0, block.i1):
            w = weight_of(job, o, i, kind)
            if w == 0 and (job.mask != NULL or not backward):
                continue
            d = element(&job.x, flat + i, kind) - mean
            if backward:
                g = gated_element(job, c, flat + i, kind)
                a += g
                q += g * d
            else:
                a += w * d
                q += w * d * d
    first[0] = a if backward else mean + a / block.weight
    # An infinite m2 is right when the variance exceeds the largest double; inf - inf would make it NaN. What rounding
    # leaves of a constant channel must not be negative.
    second[0] = q if backward or not isfinite(q) else max(q - a * a / block.weight, 0.0)


cdef inline double fold(const double *values, Py_ssize_t n) noexcept nogil:
    """Their sum: four sums side by side, then those in order."""
    cdef double t[4]
    cdef Py_ssize_t i, j
    for j in range(4):
        t[j] = 0
    for i in range(n // 4):
        for j in range(4):
            t[j] += values[4 * i + j]
    for i in range(n - n % 4, n):
        t[i % 4] += values[i]
    return (t[0] + t[1]) + (t[2] + t[3])


cdef inline void fold_columns(const Columns *columns, const double *values, double *to) noexcept nogil:
    """Columns -> their channels."""
    cdef Py_ssize_t p, c
    for c in range(columns.tile):
        to[c] = 0
    for p in range(columns.repeats):
        if columns.span == 1:
            for c in range(columns.tile):
                to[c] += values[c]
        else:
            for c in range(columns.tile):
                to[c] += fold(values + c * columns.span, columns.span)
        values += columns.tile * columns.span


cdef void look_again(const Operand *op, const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t tile,
                     const real *values, bint skips, double *again) noexcept nogil:
    """Of channels that are UNSURE: 1 where the block has another value than this one, else 0. `skips`: not among those
    of weight 0."""
    cdef int found[COLUMNS]
    cdef const real *x = <const real *> op.data
    cdef Py_ssize_t o, i, c, flat, unsure = 0
    cdef bint together
    for c in range(tile):
        found[c] = 0
        unsure += again[c] == UNSURE
    # Rows of channels side by side, as vectors, unless only a few are asked for.
    together = op.direct and not skips and job.inner == 1 and 8 * unsure > tile
    for o in range(block.o0, block.o1 if together else block.o0):
        for c in range(tile):
            found[c] |= x[o * job.channels + c0 + c] != values[c]
    for c in range(tile):
        if again[c] != UNSURE:
            continue
        for o in range(block.o0, block.o0 if together else block.o1):
            flat = (o * job.channels + c0 + c) * job.inner
            if op.direct and not skips:
                for i in range(block.i0, block.i1):
                    found[c] |= x[flat + i] != values[c]
            else:
                for i in range(block.i0, block.i1):
                    if not skips or weight_of(job, o, i, <real *> NULL) != 0:
                        found[c] |= element(op, flat + i, <real *> NULL) != values[c]
        again[c] = found[c]


cdef void close_block(const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t piece, double before,
                      const Columns *columns, const double *sums, const double *products,
                      const real *shift, bint backward, real *kind) noexcept nogil:
    """Fold the columns into their channels and the block into the slice (Chan, Golub, LeVeque 1979).

    Loops along the channels, so that gcc vectorises them; the rare repair is looked for four channels at a time.
    """
    cdef double first[COLUMNS]
    cdef double second[COLUMNS]
    cdef double again[COLUMNS]
    cdef real values[COLUMNS]
    cdef double a, q, delta, count = block.weight
    cdef double share = count / (before + count)
    # Accumulators of type real have overflowed or underflowed: where products are next to nothing they may have
    # vanished. (They are nothing in a constant channel, too.)
    cdef double tiny = 1e-30 if sizeof(real) == 4 else 1e-290
    cdef double unsure = UNSURE
    cdef double most = LARGEST_DOUBLE
    cdef double *means = partial_sums(job, piece, c0)
    cdef double *squares = means + job.pitch
    cdef Py_ssize_t c, tile = columns.tile
    fold_columns(columns, sums, first)
    fold_columns(columns, products, second)
    for c in range(tile):
        a = first[c]
        q = second[c]
        again[c] = unsure if fabs(q) < tiny else 0.0
        again[c] = again[c] if (fabs(a) <= most) & (fabs(q) <= most) else 1.0
        if backward:
            second[c] = q - (job.mean[c0 + c] - <double> shift[c]) * a
        else:
            # Sum and squares -> mean and m2. They are useless if the shift is more than 1.7 standard deviations off (m2
            # would be the small difference of large numbers), or if squares vanished though the values differ.
            a = a / count
            delta = a if sizeof(real) == 8 else a - <double> shift[c]
            again[c] = 1.0 if count * delta * delta > 0.75 * q else again[c]
            first[c] = <double> shift[c] + a if sizeof(real) == 8 else a
            second[c] = q - count * delta * delta
    if cybn_outside(again, tile, 0, 0):
        for c in range(tile):
            values[c] = 0 if backward else shift[c]
            if backward and again[c] == UNSURE and (first[c] != 0 or job.activation != 0):
                # (What an activation has stopped as a whole, a dead unit, is no rarity, and dear to look at.)
                again[c] = first[c] != 0
        look_again(&job.dy if backward else &job.x, job, block, c0, tile, values,
                   job.mask != NULL or job.weights != NULL and not backward, again)
        for c in range(tile):
            if again[c] != 0:
                repair_block(job, block, c0 + c, &first[c], &second[c], backward, kind)
    if backward:
        for c in range(tile):
            means[c] += first[c]
            squares[c] += second[c]
    elif before == 0:
        for c in range(tile):
            means[c] = first[c]
            squares[c] = second[c]
    else:
        for c in range(tile):
            delta = first[c] - means[c]
            means[c] += delta * share
            squares[c] += second[c] + delta * delta * (before * share)


cdef inline bint run_by_run(const Job *job) noexcept nogil:
    """Whether sums take runs of several blocks as they lie: they come from memory, which is fastest in its order."""
    return job.distant and job.blocks_inner > 1


cdef double weight_before(const Job *job, Py_ssize_t index) noexcept nogil:
    """The sum of the weights of the blocks that stand before this one in its slice."""
    cdef Py_ssize_t other
    cdef Block block
    cdef double weight = 0
    for other in range(slice_start(job, slice_of(job, index)), index):
        open_block(job, other, &block)
        weight += block.weight
    return weight


cdef double close_blocks(const Job *job, Py_ssize_t index, Py_ssize_t side, Py_ssize_t c0, double before,
                         const Columns *columns, const double *sums, const double *products, const real *shift,
                         bint backward, real *kind) noexcept nogil:
    """`side` blocks whose columns stand side by side. `before`: the weights that stand before the first in its slice;
    return that of the block that follows the last."""
    cdef Block block
    cdef double *partial
    cdef Py_ssize_t b, c, piece
    for b in range(side):
        open_block(job, index + b, &block)
        piece = slice_of(job, index + b)
        if index + b == slice_start(job, piece):
            before = 0
            partial = partial_sums(job, piece, c0)
            for c in range(columns.tile):
                partial[c] = 0
                partial[job.pitch + c] = 0
        if backward or block.weight != 0:
            close_block(job, &block, c0, piece, before, columns, sums + b * columns.count,
                        products + b * columns.count, shift if backward else shift + b * columns.tile, backward, kind)
        before += block.weight
    return before


cdef inline void widen_sums(Py_ssize_t n, bint further, bint backward, double *sums, double *products, real *dy_sums,
                            real *dots) noexcept nogil:
    """Sums of the input's type to those in double, `further` than the first ones; they begin again."""
    cdef Py_ssize_t j
    for j in range(n):
        products[j] = products[j] + dots[j] if further else dots[j]
        dots[j] = 0
    if backward:
        for j in range(n):
            sums[j] += dy_sums[j]
            dy_sums[j] = 0


cdef inline void reduce_tile(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t first, Py_ssize_t stop,
                             Py_ssize_t then, bint backward, real *kind, features *what) noexcept nogil:
    """The blocks [first, stop), one after the other, of a slice; or side by side, of a run or of a few whole ones.

    `then`: the first element that is read after these.
    """
    cdef double sums[COLUMNS]
    cdef double products[COLUMNS]
    cdef real dy_sums[COLUMNS]
    cdef real dots[COLUMNS]
    cdef real center[COLUMNS]
    cdef real shift[COLUMNS]
    cdef real x_stage[PANEL]
    cdef real dy_stage[PANEL]
    cdef Block block, one
    cdef Panel panel, walk
    cdef const real *x
    cdef const real *dy
    cdef Py_ssize_t x_pitch, dy_pitch, rows, j, r, b, index, ahead, tile = c1 - c0
    cdef Columns columns = layout_columns(job, tile)    # of a block
    cdef Columns beside = columns                       # of all blocks that are taken side by side
    cdef Columns single = layout_columns(job, 1)
    cdef Py_ssize_t side = stop - first if run_by_run(job) else 1
    cdef Py_ssize_t pieces = min(side, job.blocks_inner)    # of a run
    cdef Py_ssize_t run, place      # the first block of a run, and the columns of a panel
    cdef double before = 0
    cdef bint more, folded, whole, gated = features is short and backward
    cdef bint masked = features is short and job.mask != NULL
    cdef bint weighted = features is short and job.weights != NULL and not backward
    # Weights of FOLDED rows; or flags of a panel, a byte each: no more than STATS_ROWS rows of COLUMNS. (Bits of a gate
    # are read as they lie.)
    cdef real w_stage[FOLDED * UNWRAPPED]
    cdef real gate[4 * TABLE]
    cdef const flag *flags = NULL       # of a mask, bytes; or a gate, bits from number `bit` on, with a pitch of bits
    cdef Py_ssize_t flags_pitch = 0, bit = 0
    # An activation or a mask is passed on the way, the two of them before.
    cdef bint active = gated and only_activated(job, c0, tile)
    cdef bint by_gate = active and job.gate != NULL
    cdef bint keeps = by_gate and job.early
    cdef real *kept = dy_stage
    cdef Py_ssize_t kept_pitch = 0
    cdef real negative_slope = <real> job.negative_slope
    cdef bint before_sums = gated and not active and job.activation != 0
    # Rows that a mask leaves out as a whole are not read, nor the end of a run; what it lets pass as a whole is summed
    # as without it.
    cdef bint sparse = masked and not before_sums and job.rows and job.inner == 1 and job.period == 1
    cdef bint by_flags = masked and job.rows and not sparse
    cdef Py_ssize_t all_set, end = 0
    cdef int kind_of_sum = PLAIN, usual
    cdef const real *scale = gate + 2 * TABLE
    cdef const real *offset = gate + 3 * TABLE
    cdef Py_ssize_t least = 1, budget = PANEL       # a stage holds no more
    cdef Py_ssize_t arrays = 1 + backward + keeps
    cdef Py_ssize_t span = job.period * job.channels * job.inner * <Py_ssize_t> sizeof(real)    # of a row
    cdef Py_ssize_t further = job.further // <Py_ssize_t> sizeof(real)
    # Columns after which weights repeat, where that is soon.
    cdef Py_ssize_t wrap = COLUMNS, size = tile * job.inner
    if (weighted or by_flags) and not before_sums and job.rows and job.period == 1:
        wrap = (LANES + job.inner - 1) // job.inner * job.inner
        size = wrap + LANES
    if backward:
        kind_of_sum = BY_MASK if by_flags else BACKWARD
        if active and job.activation == RELU:
            kind_of_sum = KEPT_RELU if keeps else BY_RELU_BITS if by_gate else BY_RELU_X
        elif active:
            kind_of_sum = KEPT_LEAKY if keeps else BY_LEAKY_BITS if by_gate else BY_LEAKY_X
    elif weighted:
        kind_of_sum = POSITIVE if job.positive else WEIGHTED
    elif by_flags:
        kind_of_sum = COUNTED
    if (job.x.direct and (not backward or job.dy.direct) and not before_sums
            and not ((weighted or by_flags) and job.rows and wrap == COLUMNS)):
        least = STATS_ROWS if job.rows else 1
        budget = PANEL // arrays if job.rows else job.inner * tile
        if job.rows and tile == job.channels and span % (SETS // 2) != 0:
            budget = CACHED // (arrays * <Py_ssize_t> sizeof(real))
        elif job.rows and backward:
            least = (WAYS if span % SETS == 0 else LINES) // arrays
    if side > 1:
        budget = job.block_inner
        beside.repeats = side
        beside.count *= side
    if backward:
        for j in range(tile):
            shift[j] = <real> job.mean[c0 + j]
        spread(&beside, shift, center)
        if gated and job.activation != 0 and job.gate == NULL:
            # Per column, for the sums that pass it on the way also where columns are lanes.
            open_gate[real](job, c0, &beside, active or job.rows, gate)
    if by_gate:
        flags = <const flag *> job.gate
    usual = kind_of_sum
    index = first
    while index < stop:
        open_block(job, index, &block)
        if side > 1:
            open_block(job, index + side - 1, &one)
            block.o1 = one.o1
            block.i1 = one.i1
        if features is short:
            if by_flags:
                whole = block.weight == <double> block.count
                kind_of_sum = usual if not whole else BACKWARD if backward else PLAIN     # as without a mask
        if not backward and side == 1 and block.weight != 0:
            sample_shifts(job, &block, c0, tile, shift)
            spread(&columns, shift, center)
        for j in range(beside.count):
            sums[j] = 0
            dots[j] = 0
        for j in range(beside.count if backward else 0):
            dy_sums[j] = 0
        rows = run = b = 0
        folded = False
        first_panel(&block, c0, job.rows, least, budget, FOLDED, &panel)
        # A block in which nothing counts is not read.
        more = (backward or side > 1 or block.weight != 0) and next_panel(job, &block, c0, c1, &panel)
        while more:
            place = panel.channel + (run + b) * tile
            if not backward and side > 1:
                # Here, where what is sampled has been fetched.
                open_block(job, index + run + b, &one)
                shift[place] = 0
                if one.weight != 0:
                    sample_shifts(job, &one, c0 + panel.channel, 1, shift + place)
                spread(&single, shift + place, center + place * LANES)
            x = fetch(&job.x, &panel, x_stage, &x_pitch)
            # Sums that do not read dy move it along.
            dy = x
            dy_pitch = x_pitch
            if backward:
                dy = fetch(&job.dy, &panel, dy_stage, &dy_pitch)
            if features is short:
                j = max(1, panel.cols // (tile * job.inner))
                if weighted:
                    dy = weigh[real](job, <const real *> job.weights, &panel, job.rows, j, size, w_stage, &dy_pitch)
                if masked and not sparse:
                    flags = weigh[flag](job, job.mask, &panel, job.rows, j, size, <flag *> w_stage, &flags_pitch)
                if keeps:
                    kept = (<real *> job.gated.data) + panel.flat
                    kept_pitch = panel.pitch
                if by_gate:
                    bit = panel.flat
                    flags_pitch = panel.pitch
                if before_sums:
                    gate_panel[real](job, &panel, x, x_pitch, dy, dy_pitch, flags, flags_pitch,
                                     gate + (0 if job.rows else panel.channel), not job.rows, dy_stage, panel.cols)
                    dy = dy_stage
                    dy_pitch = panel.cols
            walk = panel
            more = next_panel(job, &block, c0, c1, &walk)
            ahead = walk.flat if more else first_element(job, index + side, c0) if index + side < stop else then
            ahead -= panel.flat
            if features is short:
                if by_gate and more and job.rows:
                    fetch_bits(job, &walk, 0)
                elif by_gate:
                    cybn_fetch_gate(job.gate, panel.flat + ahead, walk.cols)
            if job.rows:
                r = 0
                while r < panel.rows:
                    j = panel.rows
                    if sparse:
                        j = set_flags(job.mask + panel.flat // job.channels, &r, panel.rows)
                    if j == 0:
                        break
                    reduce_rows(x + r * x_pitch, x_pitch, dy + r * dy_pitch, dy_pitch, flags, flags_pitch, bit, j,
                                panel.cols, wrap, center, scale, offset, negative_slope, kept, kept_pitch, sums,
                                dy_sums, dots, kind_of_sum, further, features is short)
                    r += j
            else:
                # Fetched ahead: the run after the next one, at last of the next panel.
                # (Two loops: with both calls in one, sums without a mask took 3 % longer.)
                ahead -= max(panel.rows - 2, 0) * panel.pitch
                all_set = panel.cols
                if masked:
                    cybn_bound_flags(flags, panel.cols, &all_set, &end)
                for r in range(panel.rows if all_set > 0 else 0):
                    j = (place + r) * LANES
                    if features is short:
                        if by_gate and r + 1 < panel.rows:
                            cybn_fetch_gate(job.gate, bit + (r + 1) * panel.pitch, panel.cols)
                    reduce_run(x + r * x_pitch, dy + r * dy_pitch, flags, bit + r * panel.pitch, all_set,
                               2 * panel.pitch if r + 2 < panel.rows else ahead, center + j, scale + j, offset + j,
                               negative_slope, kept + r * kept_pitch, sums + j, dy_sums + j, dots + j, kind_of_sum,
                               further)
                for r in range(panel.rows if masked and all_set < end else 0):
                    j = (place + r) * LANES
                    reduce_run(x + r * x_pitch + all_set, dy + r * dy_pitch + all_set, flags + all_set, 0,
                               end - all_set, 2 * panel.pitch if r + 2 < panel.rows else ahead, center + j, scale + j,
                               offset + j, negative_slope, kept, sums + j, dy_sums + j, dots + j,
                               BY_MASK if backward else COUNTED, further)
            rows += panel.rows
            if not more or (job.rows and rows == FOLDED):
                widen_sums(beside.count, folded, backward, sums, products, dy_sums, dots)
                rows = 0
                folded = True
            b += side > 1
            if b == pieces:
                b = 0
                if panel.channel == tile - 1:
                    run += pieces
            panel = walk
        before = close_blocks(job, index, side, c0, weight_before(job, index) if index == first else before, &columns,
                              sums, products, shift, backward, kind)
        index += side


cdef void make_tables(const Job *job, Py_ssize_t c0, Py_ssize_t n, const Columns *columns, bint rows, bint scaled,
                      bint backward, real *table) noexcept nogil:
    """Center, scale, offset, slope, factor; per channel, or for rows per column."""
    cdef Py_ssize_t j
    for j in range(n):
        table[j] = <real> job.center[c0 + j]
        table[TABLE + j] = <real> job.scale[c0 + j]
        table[2 * TABLE + j] = to_offset(job.offset[c0 + j], job.center[c0 + j], table[j],
                                         job.slope[c0 + j] if backward else job.scale[c0 + j])
    if backward:
        for j in range(n):
            table[3 * TABLE + j] = <real> job.slope[c0 + j]
    if scaled:
        for j in range(n):
            table[4 * TABLE + j] = <real> job.factor[c0 + j]
    if sizeof(real) == 4 and cybn_outside(job.scale + c0, n, -LARGEST_FLOAT, LARGEST_FLOAT):
        for j in range(n):
            table[TABLE + j] = to_scale(job.scale[c0 + j], table)
    if rows:
        spread_tables(columns, table, 5 if scaled else 4 if backward else 3)


cdef inline void map_tile(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece, Py_ssize_t stop,
                          bint backward, real *kind, features *what) noexcept nogil:
    cdef real room[7 * TABLE]    # nothing else is near the tables
    cdef real *table = room + TABLE
    cdef real x_stage[PANEL]
    cdef real dy_stage[PANEL]
    cdef Block block
    cdef Panel panel
    cdef const real *x
    cdef const real *dy
    cdef real *passed_dy
    cdef real *out
    cdef Py_ssize_t x_pitch, dy_pitch, out_pitch, j, r, index, n = c1 - c0
    # A map needs no columns to sum over, so all but the shortest runs are taken as they lie.
    cdef bint rows = job.rows and job.inner < SHORTEST
    cdef bint scaled = cybn_outside(job.factor + c0, n, 1, 1)
    cdef bint plain = features is char
    # Gradients pass the activation before, and a mask if what has passed is wanted; else a mask is passed on the way,
    # and so is an activation of x, where it is alone.
    cdef bint kept = not plain and job.gated.data != NULL and not job.early
    cdef bint gated = kept or (not plain and job.dy.data != NULL and job.activation != 0 and not job.early)
    cdef bint weighted = not plain and backward and job.weights != NULL
    cdef bint masked = not plain and job.mask != NULL and (job.dy.data != NULL or job.zeroed)
    # Bits are made of results that are still in the first cache: by the map as it goes, or when a panel is done.
    cdef bint marks = not plain and job.dy.data == NULL and job.gate != NULL
    cdef bint copied = False    # whether what is kept is all of dy, which the map copies
    cdef real gate[4 * TABLE]
    cdef real w_stage[PANEL + LANES]
    cdef Py_ssize_t pitch, least = 1, budget = PANEL    # a stage holds no more
    cdef Extras extras
    # (With frozen statistics dy is what is mapped; x is read for the gate alone.)
    cdef bint two = backward or (gated and job.activation != 0 and job.gate == NULL)
    cdef const Operand *gradients = &job.gated if job.early else &job.dy
    cdef const Operand *source = &job.x if two or job.dy.data == NULL else gradients
    cdef const flag *flags = NULL
    cdef Py_ssize_t flags_pitch = 0
    cdef Columns columns = layout_columns(job, n)
    # One weight for each row.
    cdef bint even = rows and job.inner == 1 and job.period == 1
    # Whether arrays are read and written where they lie, and nothing is passed or made before. Results of such runs go
    # past the caches in pieces, and then bits are passed on the way, too; others go past them panel by panel.
    cdef bint lies = source.direct and job.out.direct and not scaled and not (two and not gradients.direct)
    cdef bint staged
    memset(&extras, 0, sizeof(extras))
    extras.even = even
    if features is short:
        if backward or job.dy.data == NULL:
            extras.activation = job.activation
            extras.negative_slope = job.negative_slope
        lies = (lies and not ((weighted or masked) and rows and not even)
                and (job.residual.data == NULL or job.residual.direct and job.residual.data != job.out.data))
        if gated and backward and not weighted and job.mask == NULL:
            if job.activation != 0 and job.gate == NULL:
                if not kept and only_activated(job, c0, n):
                    extras.gate = gate + 3 * TABLE
            elif lies and (job.gated.direct or not kept):
                if job.activation == 0:
                    copied = not (job.stream and rows)
                elif job.stream and not rows:
                    extras.bits = job.gate
            gated = not (copied or extras.bits != NULL or extras.gate != NULL)
        lies = lies and not gated
    staged = job.stream and not rows and lies and (backward or not masked)  # (what is zeroed is still in L1)
    cdef bint direct = job.out.direct and (staged or not job.stream)
    # Whether what has passed before is written where it belongs, not to a stage.
    cdef bint stays = gated and kept and job.gated.direct and not job.stream
    # (Bits are made behind a residual; and what a mask zeroes is zeroed after the map.)
    cdef bint marked = (marks and job.residual.data != NULL and not (masked or rows) and direct
                        and (staged or job.inner >= MARKED_RUN))
    if rows and lies and direct and n < job.channels:
        least = LINES // (2 + two + (not plain and (copied or job.residual.data != NULL)))
    elif marks and not marked:
        pass    # what is made of a panel beside its map should find it in the first cache
    elif rows and lies and direct and not (weighted or masked) and job.outer * n * job.inner >= MANY:
        j = max(1, WIDE // columns.count)
        columns.repeats *= j
        columns.count *= j
        extras.wide = columns.count
        budget = MANY
    elif not rows and lies and direct and (backward or not masked):
        budget = MANY
    make_tables(job, c0, n, &columns, rows, scaled, backward, table)
    if features is short:
        if (gated and job.activation != 0 and job.gate == NULL) or extras.gate != NULL:
            open_gate[real](job, c0, &columns, rows, gate)
    if job.stream and not rows:
        # Runs that end with a cache line: of a line in two panels no part could be streamed.
        least = LANES // min(<Py_ssize_t> LANES, job.inner & -job.inner)
    if job.stream and not staged:
        budget = min(max(STREAMED // <Py_ssize_t> sizeof(real), least * job.inner), <Py_ssize_t> PANEL)
    # An owner's next group follows this one in each run of channels.
    cdef const real *next = NULL
    cdef const real *other = NULL
    if job.owned and c1 < job.channels and source.direct:
        next = (<const real *> source.data) + n * job.inner
        if two and gradients.direct:
            other = (<const real *> gradients.data) + n * job.inner
    if staged:
        extras.stage = x_stage
        extras.passed_stage = dy_stage
        extras.passed = job.gated.data if kept else NULL
        extras.next = next
        extras.other = other
    if marked:
        extras.bits = job.gate
    for index in range(slice_start(job, piece), slice_start(job, stop)):
        open_block(job, index, &block)
        first_panel(&block, c0, rows, least, budget, block.full, &panel)
        while next_panel(job, &block, c0, c1, &panel):
            if features is short:
                if marks and not marked:
                    fetch_bits(job, &panel, 0)
                elif gated and job.gate != NULL:
                    fetch_bits(job, &panel, panel.rows * panel.cols)    # which are read with the next one
            x = fetch(source, &panel, x_stage, &x_pitch)
            dy = x
            dy_pitch = x_pitch
            if two:
                dy = fetch(gradients, &panel, dy_stage, &dy_pitch)
            if features is short:
                j = n * job.inner
                if weighted and even:
                    extras.weights = (<const real *> job.weights) + panel.flat // job.channels
                    extras.weights_pitch = 1
                elif weighted:
                    extras.weights = weigh[real](job, <const real *> job.weights, &panel, rows, panel.cols // j, j,
                                                 w_stage, &extras.weights_pitch)
                elif masked and (kept or not even):
                    flags = weigh[flag](job, job.mask, &panel, rows, panel.cols // j, j, <flag *> w_stage, &flags_pitch)
                    if not even:
                        extras.mask = flags
                        extras.weights_pitch = flags_pitch
                if copied and not staged:
                    extras.passed = (<real *> job.gated.data) + panel.flat
                    extras.passed_pitch = panel.pitch
                if gated:
                    passed_dy = (<real *> job.gated.data) + panel.flat if stays else dy_stage
                    pitch = panel.pitch if stays else panel.cols
                    gate_panel[real](job, &panel, x, x_pitch, dy, dy_pitch, flags if kept else NULL, flags_pitch,
                                     gate + (0 if rows else panel.channel), not rows, passed_dy, pitch)
                    dy = passed_dy
                    dy_pitch = pitch
                    if not backward:
                        x = dy
                        x_pitch = dy_pitch
                elif job.residual.data != NULL:
                    extras.residual = fetch(&job.residual, &panel, dy_stage, &pitch)
                    extras.residual_pitch = pitch
                    if job.residual.data == job.out.data:
                        for r in range(panel.rows):
                            memcpy(dy_stage + r * panel.cols, (<const real *> extras.residual) + r * pitch,
                                   panel.cols * sizeof(real))
                        extras.residual = dy_stage
                        extras.residual_pitch = panel.cols
            out = (<real *> job.out.data) + panel.flat if direct else x_stage
            out_pitch = panel.pitch if direct else panel.cols
            j = panel.channel
            if scaled:
                multiply(x, x_pitch, panel.rows, panel.cols, table + 4 * TABLE + j, not rows, x_stage, panel.cols)
                x = x_stage
                x_pitch = panel.cols
            if extras.gate != NULL and not rows:
                extras.gate = gate + 3 * TABLE + j
            if masked and even:
                map_set_rows[real](x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, table, &extras,
                                   job.mask + panel.flat // job.channels, out, out_pitch, backward)
            elif rows and features is short:
                map_rows[real](x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, table, &extras, out, out_pitch,
                               backward)
            elif rows:
                map_panel[real](x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, table, &extras, out, out_pitch,
                                backward, False, True)
            elif staged or marked:
                map_pieces[real](x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, table + j, &extras, out, out_pitch,
                                 panel.flat, backward, plain)
            else:
                map_panel[real](x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, table + j, &extras, out, out_pitch,
                                backward, True, plain)
            if scaled and backward:
                multiply(out, out_pitch, panel.rows, panel.cols, table + 4 * TABLE + j, not rows, out, out_pitch)
            if gated and kept and not stays:
                deliver[real](&job.gated, &panel, dy_stage, job.stream and job.gated.direct, NULL, NULL)
            if marks and not marked:
                make_bits(job, &panel, out, out_pitch)
            if not direct:
                deliver[real](&job.out, &panel, out, job.stream, next + panel.flat if next != NULL else NULL,
                              other + panel.flat if other != NULL else NULL)
    if job.stream:
        cybn_stream_end()


# ----------------------------------------------------------------------------------------------------------- verbs

cdef void reduce_tiles(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece, Py_ssize_t stop,
                       bint backward, real *kind) noexcept nogil:
    """Slice by slice; runs of several blocks one after the other where they come from memory, in its order."""
    cdef bint plain = not gates(job) if backward else job.weights == NULL and job.mask == NULL
    cdef Py_ssize_t first = slice_start(job, piece), end = slice_start(job, stop), last, start, c, then
    cdef Py_ssize_t width = job.tile, run = job.blocks_inner, most = run
    if run_by_run(job):
        # As many channels, and whole runs, as there are columns for their blocks.
        width = max(1, job.tile // run)
        most = max(1, job.tile // (run * min(width, c1 - c0))) * run
    while first < end:
        if run_by_run(job):
            last = min((first // run + 1) * run, end, first + job.tile)
            if first % run == 0 and last - first == run:
                last = first + min(most, end - first) // run * run
        else:
            piece += 1
            last = slice_start(job, piece)
        start = c0
        while start < c1:
            c = min(start + width, c1)
            # The next channels, or the first ones of what comes next.
            then = first_element(job, first, c) if c < c1 else first_element(job, min(last, job.blocks - 1), c0)
            if backward and plain:
                reduce_tile(job, start, c, first, last, then, True, kind, <char *> NULL)
            elif backward:
                reduce_tile(job, start, c, first, last, then, True, kind, <short *> NULL)
            elif plain:
                reduce_tile(job, start, c, first, last, then, False, kind, <char *> NULL)
            else:
                reduce_tile(job, start, c, first, last, then, False, kind, <short *> NULL)
            start = c
        first = last


cdef void map_tiles(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece, Py_ssize_t end,
                    bint backward, real *kind) noexcept nogil:
    cdef bint plain = ((job.early or not (gates(job) or job.gated.data != NULL)) and
                       (job.weights == NULL and job.mask == NULL if backward or job.dy.data != NULL else
                        job.residual.data == NULL and job.activation == 0 and not job.zeroed))
    cdef Py_ssize_t width = map_width(job), stop
    while c0 < c1:
        stop = min(c0 + width, c1)
        if backward and plain:
            map_tile(job, c0, stop, piece, end, True, kind, <char *> NULL)
        elif backward:
            map_tile(job, c0, stop, piece, end, True, kind, <short *> NULL)
        elif plain:
            map_tile(job, c0, stop, piece, end, False, kind, <char *> NULL)
        else:
            map_tile(job, c0, stop, piece, end, False, kind, <short *> NULL)
        c0 = stop


cdef void collect_stats_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                            Py_ssize_t stop) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, stop, False, <float *> NULL)


cdef void collect_stats_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                            Py_ssize_t stop) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, stop, False, <double *> NULL)


cdef void normalize_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                        Py_ssize_t stop) noexcept nogil:
    map_tiles(job, c0, c1, piece, stop, False, <float *> NULL)


cdef void normalize_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                        Py_ssize_t stop) noexcept nogil:
    map_tiles(job, c0, c1, piece, stop, False, <double *> NULL)


cdef void backward_reduce_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                              Py_ssize_t stop) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, stop, True, <float *> NULL)


cdef void backward_reduce_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                              Py_ssize_t stop) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, stop, True, <double *> NULL)


cdef void backward_input_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                             Py_ssize_t stop) noexcept nogil:
    map_tiles(job, c0, c1, piece, stop, True, <float *> NULL)


cdef void backward_input_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                             Py_ssize_t stop) noexcept nogil:
    map_tiles(job, c0, c1, piece, stop, True, <double *> NULL)


cdef void mark_tiles(const Job *job, Py_ssize_t first, Py_ssize_t stop, real *kind) noexcept nogil:
    cdef real stage[PANEL]
    cdef const real *y
    cdef Py_ssize_t n
    while first < stop:
        n = min(stop - first, <Py_ssize_t> PANEL)
        if job.output.direct:
            y = (<const real *> job.output.data) + first
        else:
            transfer(&job.output, first, n, stage, False)
            y = stage
        mark_bits(y, n, job.activation == RELU, job.gate, first)
        first += n


cdef void mark_f32(const Job *job, Py_ssize_t first, Py_ssize_t stop) noexcept nogil:
    mark_tiles(job, first, stop, <float *> NULL)


cdef void mark_f64(const Job *job, Py_ssize_t first, Py_ssize_t stop) noexcept nogil:
    mark_tiles(job, first, stop, <double *> NULL)


cdef Weights weigh_f32(const void *weights, Py_ssize_t n) noexcept nogil:
    return cybn_weigh_float(<const float *> weights, n)


cdef Weights weigh_f64(const void *weights, Py_ssize_t n) noexcept nogil:
    return cybn_weigh_double(<const double *> weights, n)


cdef Kernels table
table.weigh[0] = weigh_f32
table.weigh[1] = weigh_f64
table.mark[0] = mark_f32
table.mark[1] = mark_f64
table.collect_stats[0] = collect_stats_f32
table.collect_stats[1] = collect_stats_f64
table.normalize[0] = normalize_f32
table.normalize[1] = normalize_f64
table.backward_reduce[0] = backward_reduce_f32
table.backward_reduce[1] = backward_reduce_f64
table.backward_input[0] = backward_input_f32
table.backward_input[1] = backward_input_f64
table.finish_moments = finish_moments
table.finish_normalize = finish_normalize
table.finish_training = finish_training
table.finish_sums = finish_sums
table.finish_backward = finish_backward
table.finish_backward_input = finish_backward_input
table.finish_frozen = finish_frozen

kernels = PyCapsule_New(&table, "cybn._kernels", NULL)
