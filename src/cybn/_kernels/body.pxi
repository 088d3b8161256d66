"""The loops over elements. Compiled once per instruction set; the bits are the same in each.

Nothing here allocates, checks or knows Python. Three levels:

- leaves touch elements: `accumulate` (in lanes.h, as vectors), `map_columns`. A fixed accumulator per column, never a
  reduction across columns, so plain IEEE rules allow vectors of any width;
- tiles (`reduce_tile`, `map_tile`) prepare the per-column tables of up to COLUMNS columns and walk the panels;
- verbs cut their channels into tiles.

A panel is a few rows of columns. In a run (inner >= 64 contiguous elements of one channel) the columns are the
LANES lanes; in rows of channels they are the elements of the row. Folding is the same for both: each column
belongs to a channel, and columns are added to their channel in order, in double.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport copysign, fabs, isfinite
from libc.string cimport memcpy

from cybn._kernels.kernels cimport (
    COLUMNS,
    LANES,
    PANEL,
    SHORTEST,
    Job,
    Kernels,
    Operand,
    cybn_outside,
    map_width,
    partial_sums,
    slice_start,
)

ctypedef fused real:
    float
    double

cdef extern from "stream.h":
    void cybn_stream(void *to, const void *source, size_t n) noexcept nogil
    void cybn_stream_end() noexcept nogil

cdef extern from "lanes.h" nogil:
    # x and its pitch, dy and its pitch, rows, rest, ahead, line; center; sums, products
    void cybn_stats_f32(const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, const float *,
                        double *, float *) noexcept
    void cybn_stats_f64(const double *, Py_ssize_t, const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                        Py_ssize_t, const double *, double *, double *) noexcept
    void cybn_grads_f32(const float *, Py_ssize_t, const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                        Py_ssize_t, const float *, float *, float *) noexcept
    void cybn_grads_f64(const double *, Py_ssize_t, const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                        Py_ssize_t, const double *, double *, double *) noexcept
    # x and its pitch, dy and its pitch, rows, cols, ahead, line, step; center; sums, products
    void cybn_stats_f32_rows(const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                             const float *, double *, float *) noexcept
    void cybn_stats_f64_rows(const double *, Py_ssize_t, const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                             Py_ssize_t, Py_ssize_t, Py_ssize_t, const double *, double *, double *) noexcept
    void cybn_grads_f32_rows(const float *, Py_ssize_t, const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                             Py_ssize_t, Py_ssize_t, const float *, float *, float *) noexcept
    void cybn_grads_f64_rows(const double *, Py_ssize_t, const double *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                             Py_ssize_t, Py_ssize_t, Py_ssize_t, const double *, double *, double *) noexcept

cdef extern from "<float.h>":
    const double LARGEST_FLOAT "FLT_MAX"
    const double LARGEST_DOUBLE "DBL_MAX"

cdef enum:
    STATS_ROWS = 8      # rows of the rows traversal that a reduction takes at a time: more of them spare loads and
    GRADS_ROWS = 4      # stores of the accumulators, fewer are read in longer stretches (measured: 1 to 64)
    AHEAD = 64          # columns that are fetched ahead where rows do not follow each other, else a panel
    FOLDED = 32         # rows summed in the input's type: more of them lose digits to an outlier among them
    SAMPLES = 8         # elements whose mean is the shift of a block


# ---------------------------------------------------------------------------------------------------------- panels

cdef struct Block:
    Py_ssize_t o0
    Py_ssize_t o1
    Py_ssize_t i0
    Py_ssize_t i1
    Py_ssize_t count    # elements per channel
    Py_ssize_t full     # whole rows (rows traversal)
    Py_ssize_t rest     # outer indices in the last, partial row


cdef struct Panel:
    Py_ssize_t flat     # of the first element
    Py_ssize_t rows
    Py_ssize_t cols
    Py_ssize_t pitch    # elements from row to row
    Py_ssize_t channel  # of the tile, the first (runs)
    bint by_rows        # rows of channels, else runs
    Py_ssize_t least    # rows to take at a time if there are so many
    Py_ssize_t budget   # elements to take at a time if that makes more rows
    Py_ssize_t o        # where the walk is
    Py_ssize_t c


cdef inline void open_block(const Job *job, Py_ssize_t index, Block *block) noexcept nogil:
    cdef Py_ssize_t bo = index // job.blocks_inner
    cdef Py_ssize_t bi = index - bo * job.blocks_inner
    block.o0 = bo * job.block_outer
    block.o1 = min(block.o0 + job.block_outer, job.outer)
    block.i0 = bi * job.block_inner
    block.i1 = min(block.i0 + job.block_inner, job.inner)
    block.count = (block.o1 - block.o0) * (block.i1 - block.i0)
    block.full = (block.o1 - block.o0) // job.period
    block.rest = (block.o1 - block.o0) - block.full * job.period


cdef inline void first_panel(const Block *block, Py_ssize_t c0, bint rows, Py_ssize_t least, Py_ssize_t budget,
                             Panel *panel) noexcept nogil:
    panel.by_rows = rows
    panel.least = least
    panel.budget = budget
    panel.o = 0 if rows else block.o0
    panel.c = c0
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
            # Whatever its width, no panel goes over rows where the sums of products are folded.
            panel.rows = min(max(panel.least, panel.budget // panel.cols // panel.least * panel.least),
                             block.full - panel.o, FOLDED - panel.o % FOLDED)
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
    panel.flat = (panel.o * job.channels + panel.c) * job.inner + block.i0
    panel.cols = block.i1 - block.i0
    panel.pitch = job.inner
    panel.rows = max(1, min(panel.budget // panel.cols, c1 - panel.c))
    panel.channel = panel.c - c0
    panel.c += panel.rows
    return True


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


# ---------------------------------------------------------------------------------------------------------- leaves

# Statistics: x_sums += x, dots += (x - center)^2. The sum is double: with it the mean is exact to double rounding,
# and so is y near 0, for which every error of the mean counts. float64 input sums x - center instead, which serves
# data with a large offset the same way. Gradients: dy_sums += dy, dots += dy * (x - center), in the input's type.

cdef inline void reduce_rows(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                             Py_ssize_t rows, Py_ssize_t cols, const real *center,
                             double *x_sums, real *dy_sums, real *dots, bint backward) noexcept nogil:
    """Rows of `cols` columns."""
    # Fetched ahead: the next rows in the order of memory if there they follow these, else columns of these rows.
    cdef bint linear = x_pitch == cols
    cdef Py_ssize_t ahead = rows * cols if linear else AHEAD
    cdef Py_ssize_t line = LANES if linear else x_pitch
    cdef Py_ssize_t step = rows * LANES if linear else LANES
    cdef Py_ssize_t r, j
    cdef real d
    if real is float:
        if backward:
            cybn_grads_f32_rows(x, x_pitch, dy, dy_pitch, rows, cols, ahead, line, step, center, dy_sums, dots)
        else:
            cybn_stats_f32_rows(x, x_pitch, rows, cols, ahead, line, step, center, x_sums, dots)
    else:
        if backward:
            cybn_grads_f64_rows(x, x_pitch, dy, dy_pitch, rows, cols, ahead, line, step, center, dy_sums, dots)
        else:
            cybn_stats_f64_rows(x, x_pitch, x, x_pitch, rows, cols, ahead, line, step, center, x_sums, dots)
    for j in range(cols // 4 * 4, cols):
        for r in range(rows):
            d = x[r * x_pitch + j] - center[j]
            if backward:
                dy_sums[j] += dy[r * dy_pitch + j]
                dots[j] += dy[r * dy_pitch + j] * d
            else:
                x_sums[j] += d if sizeof(real) == 8 else x[r * x_pitch + j]
                dots[j] += d * d


cdef inline void reduce_run(const real *x, const real *dy, Py_ssize_t inner, Py_ssize_t ahead, const real *center,
                            double *x_sums, real *dy_sums, real *dots, bint backward) noexcept nogil:
    """A run: element i belongs to column i % LANES, those of the tail to the last columns."""
    cdef Py_ssize_t rows = inner // LANES
    cdef Py_ssize_t rest = inner - rows * LANES
    if real is float:
        if backward:
            cybn_grads_f32(x, LANES, dy, LANES, rows, rest, ahead, LANES, center, dy_sums, dots)
        else:
            cybn_stats_f32(x, LANES, rows, rest, ahead, LANES, center, x_sums, dots)
    else:
        if backward:
            cybn_grads_f64(x, LANES, dy, LANES, rows, rest, ahead, LANES, center, dy_sums, dots)
        else:
            cybn_stats_f64(x, LANES, x, LANES, rows, rest, ahead, LANES, center, x_sums, dots)


cdef inline void map_columns(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                             Py_ssize_t rows, Py_ssize_t cols, const real *center, const real *scale,
                             const real *offset, const real *slope,
                             real *out, Py_ssize_t out_pitch, bint backward, bint uniform) noexcept nogil:
    """y = d * scale + offset, or dx = ((dy - offset) - d * slope) * scale, with d = x - center.

    `uniform`: each row is one channel, and the tables have an element per row.
    """
    cdef Py_ssize_t r, j
    cdef real d, c0, s0, o0, t0
    for r in range(rows):
        c0 = center[r] if uniform else 0
        s0 = scale[r] if uniform else 0
        o0 = offset[r] if uniform else 0
        t0 = slope[r] if uniform and backward else 0
        for j in range(cols):
            d = x[r * x_pitch + j]
            if uniform:
                d = d - c0
                if backward:
                    out[r * out_pitch + j] = ((dy[r * dy_pitch + j] - o0) - d * t0) * s0
                else:
                    out[r * out_pitch + j] = d * s0 + o0
            else:
                d = d - center[j]
                if backward:
                    out[r * out_pitch + j] = ((dy[r * dy_pitch + j] - offset[j]) - d * slope[j]) * scale[j]
                else:
                    out[r * out_pitch + j] = d * scale[j] + offset[j]


cdef inline void map_panel(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                           Py_ssize_t rows, Py_ssize_t cols, const real *center, const real *scale,
                           const real *offset, const real *slope,
                           real *out, Py_ssize_t out_pitch, bint backward, bint uniform) noexcept nogil:
    """map_columns, told when it works in place: with one name for both gcc needs no overlap check to vectorise."""
    if out == x:
        map_columns(out, out_pitch, dy, dy_pitch, rows, cols, center, scale, offset, slope,
                    out, out_pitch, backward, uniform)
    elif backward and out == dy:
        map_columns(x, x_pitch, out, out_pitch, rows, cols, center, scale, offset, slope,
                    out, out_pitch, backward, uniform)
    else:
        map_columns(x, x_pitch, dy, dy_pitch, rows, cols, center, scale, offset, slope,
                    out, out_pitch, backward, uniform)


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


cdef inline real mean_of_samples(real a, real b, real c, real d, real e, real f, real g, real h) noexcept nogil:
    """In double, and each divided first: the sum of eight of the largest doubles would overflow."""
    cdef double w = 1.0 / SAMPLES
    return <real> (((w * a + w * b) + (w * c + w * d)) + ((w * e + w * f) + (w * g + w * h)))


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
        o = i // width
        flat[e] = ((block.o0 + o) * job.channels + c0) * job.inner + block.i0 + (i - o * width)
    if job.x.direct:
        # The same without `element`, so that the compiler sees the whole loop.
        x = <const real *> job.x.data
        for c in range(tile):
            i = c * job.inner
            shift[c] = mean_of_samples[real](x[flat[0] + i], x[flat[1] + i], x[flat[2] + i], x[flat[3] + i],
                                             x[flat[4] + i], x[flat[5] + i], x[flat[6] + i], x[flat[7] + i])
        return
    for c in range(tile):
        for e in range(SAMPLES):
            v[e] = element(&job.x, flat[e] + c * job.inner, shift)
        shift[c] = mean_of_samples[real](v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])


cdef void repair_block(const Job *job, const Block *block, Py_ssize_t c, double *first, double *second,
                       bint backward, real *kind) noexcept nogil:
    """One channel of one block again, in double: (mean, m2) in two passes, or (sum_dy, sum_dy_xmu)."""
    cdef Py_ssize_t o, i, flat
    cdef double a = 0, q = 0, d, mean = job.mean[c] if backward else 0, count = <double> block.count
    if not backward:
        for o in range(block.o0, block.o1):
            flat = (o * job.channels + c) * job.inner
            for i in range(block.i0, block.i1):
                # Divided first: near the largest double the plain sum would overflow.
                mean += element(&job.x, flat + i, kind) / count
    for o in range(block.o0, block.o1):
        flat = (o * job.channels + c) * job.inner
        for i in range(block.i0, block.i1):
            d = element(&job.x, flat + i, kind) - mean
            if backward:
                a += element(&job.dy, flat + i, kind)
                q += element(&job.dy, flat + i, kind) * d
            else:
                a += d
                q += d * d
    first[0] = a if backward else mean + a / count
    # An infinite m2 is right when the variance exceeds the largest double; inf - inf would make it NaN.
    second[0] = q if backward or not isfinite(q) else q - a * a / count


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


cdef void close_block(const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t piece, double before,
                      const Columns *columns, const double *sums, const double *products,
                      const real *shift, bint backward, real *kind) noexcept nogil:
    """Fold the columns into their channels and the block into the slice (Chan, Golub, LeVeque 1979).

    Loops along the channels, the rare repair in one of its own, so that gcc vectorises the rest.
    """
    cdef double first[COLUMNS]
    cdef double second[COLUMNS]
    cdef double again[COLUMNS]
    cdef double a, q, delta, count = <double> block.count
    cdef double share = count / (before + count)
    # Accumulators of type real have overflowed or underflowed: no products at all but a sum of dy, they may have
    # vanished. (So do those of a constant channel, at no harm.)
    cdef double tiny = 1e-30 if sizeof(real) == 4 else 1e-290
    cdef double most = LARGEST_DOUBLE
    cdef double *means = partial_sums(job, piece, c0)
    cdef double *squares = means + job.pitch
    cdef Py_ssize_t c, tile = columns.tile
    fold_columns(columns, sums, first)
    fold_columns(columns, products, second)
    for c in range(tile):
        a = first[c]
        q = second[c]
        again[c] = 0 if (fabs(a) <= most) & (fabs(q) <= most) else 1
        if backward:
            again[c] = 1 if (fabs(q) < tiny) & (a != 0) else again[c]
            second[c] = q - (job.mean[c0 + c] - <double> shift[c]) * a
        else:
            # Sum and squares -> mean and m2. They are useless if the shift is more than two standard deviations off (m2
            # would be the small difference of large numbers), or if squares vanished though the values differ.
            again[c] = 1 if (fabs(q) < tiny) & (q != 0) else again[c]
            a = a / count
            delta = a if sizeof(real) == 8 else a - <double> shift[c]
            again[c] = 1 if count * delta * delta > 0.75 * q else again[c]
            first[c] = <double> shift[c] + a if sizeof(real) == 8 else a
            second[c] = q - count * delta * delta
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


cdef inline void reduce_tile(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                             bint backward, real *kind) noexcept nogil:
    cdef double sums[COLUMNS]
    cdef double products[COLUMNS]
    cdef real dy_sums[COLUMNS]
    cdef real dots[COLUMNS]
    cdef real center[COLUMNS]
    cdef real shift[COLUMNS]
    cdef real x_stage[PANEL]
    cdef real dy_stage[PANEL]
    cdef Block block, following
    cdef Panel panel, walk
    cdef const real *x
    cdef const real *dy
    cdef Py_ssize_t x_pitch, dy_pitch, rows, j, r, index, ahead, distance, tile = c1 - c0
    cdef Py_ssize_t last = slice_start(job, piece + 1) - 1
    cdef Columns columns = layout_columns(job, tile)
    cdef double before = 0
    cdef double *partial = partial_sums(job, piece, c0)
    cdef bint more, direct = job.x.direct and (not backward or job.dy.direct)
    cdef Py_ssize_t least = 1, budget = PANEL       # a stage holds no more
    if direct:
        least = GRADS_ROWS if backward else STATS_ROWS
        budget = PANEL // 2 if backward and job.rows else PANEL if job.rows else job.inner * tile
    if backward:
        for j in range(tile):
            shift[j] = <real> job.mean[c0 + j]
        spread(&columns, shift, center)
    for j in range(tile):
        partial[j] = 0
        partial[job.pitch + j] = 0
    for index in range(slice_start(job, piece), last + 1):
        open_block(job, index, &block)
        open_block(job, min(index + 1, last), &following)
        if not backward:
            sample_shifts(job, &block, c0, tile, shift)
            spread(&columns, shift, center)
        for j in range(columns.count):
            sums[j] = 0
            products[j] = 0
            dy_sums[j] = 0
            dots[j] = 0
        rows = 0
        first_panel(&block, c0, job.rows, least, budget, &panel)
        more = next_panel(job, &block, c0, c1, &panel)
        while more:
            x = fetch(&job.x, &panel, x_stage, &x_pitch)
            dy = x
            dy_pitch = x_pitch
            if backward:
                dy = fetch(&job.dy, &panel, dy_stage, &dy_pitch)
            walk = panel
            more = next_panel(job, &block, c0, c1, &walk)
            ahead = (walk.flat if more else (following.o0 * job.channels + c0) * job.inner + following.i0) - panel.flat
            if job.rows:
                reduce_rows(x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, center, sums, dy_sums, dots, backward)
            else:
                for r in range(panel.rows):
                    # Fetched ahead: the run after the next one.
                    distance = 2 * panel.pitch
                    if r + 2 >= panel.rows:
                        distance = ahead + (min(max(r + 2 - panel.rows, 0), panel.rows - 1) - r) * panel.pitch
                    j = (panel.channel + r) * LANES
                    reduce_run(x + r * x_pitch, dy + r * dy_pitch, panel.cols, distance, center + j,
                               sums + j, dy_sums + j, dots + j, backward)
            rows += panel.rows
            if not more or (job.rows and rows == FOLDED):
                for j in range(columns.count):
                    products[j] += dots[j]
                    dots[j] = 0
                if backward:
                    for j in range(columns.count):
                        sums[j] += dy_sums[j]
                        dy_sums[j] = 0
                rows = 0
            panel = walk
        close_block(job, &block, c0, piece, before, &columns, sums, products, shift, backward, kind)
        before += block.count


cdef inline void map_tile(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                          bint backward, real *kind) noexcept nogil:
    # One after the other: center, scale, offset, slope, factor; per channel, and for rows per column.
    cdef real channel[5 * COLUMNS]
    cdef real column[5 * COLUMNS]
    cdef real x_stage[PANEL]
    cdef real dy_stage[PANEL]
    cdef Block block
    cdef Panel panel
    cdef const real *x
    cdef const real *dy
    cdef const real *table = channel
    cdef real *out
    cdef Py_ssize_t x_pitch, dy_pitch, out_pitch, j, r, index, n = c1 - c0
    cdef double low
    # A map needs no columns to sum over, so all but the shortest runs are taken as they lie.
    cdef bint direct, rows = job.rows and job.inner < SHORTEST
    cdef bint scaled = cybn_outside(job.factor + c0, n, 1, 1)
    cdef const Operand *source = &job.x if backward else job.source
    cdef Columns columns = layout_columns(job, n)
    for j in range(n):
        channel[j] = <real> job.center[c0 + j]
        channel[COLUMNS + j] = <real> job.scale[c0 + j]
        # What the center loses by its rounding goes into the offset, unless that is 0 times infinity.
        low = (job.center[c0 + j] - <double> channel[j]) * (job.slope[c0 + j] if backward else job.scale[c0 + j])
        low = low if low == low else 0
        channel[2 * COLUMNS + j] = <real> (job.offset[c0 + j] - low)
    if backward:
        for j in range(n):
            channel[3 * COLUMNS + j] = <real> job.slope[c0 + j]
    if scaled:
        for j in range(n):
            channel[4 * COLUMNS + j] = <real> job.factor[c0 + j]
    if sizeof(real) == 4 and cybn_outside(job.scale + c0, n, -LARGEST_FLOAT, LARGEST_FLOAT):
        # A constant channel with a tiny eps: d is 0 and must not meet an infinity.
        for j in range(n):
            if isfinite(job.scale[c0 + j]) and not isfinite(channel[COLUMNS + j]):
                channel[COLUMNS + j] = <real> copysign(LARGEST_FLOAT, job.scale[c0 + j])
    if rows and columns.count > columns.tile:
        table = column
        for j in range(5 if scaled else 4 if backward else 3):
            spread(&columns, channel + j * COLUMNS, column + j * COLUMNS)
    for index in range(slice_start(job, piece), slice_start(job, piece + 1)):
        open_block(job, index, &block)
        first_panel(&block, c0, rows, 1, PANEL, &panel)
        while next_panel(job, &block, c0, c1, &panel):
            x = fetch(source, &panel, x_stage, &x_pitch)
            dy = x
            dy_pitch = x_pitch
            if backward:
                dy = fetch(&job.dy, &panel, dy_stage, &dy_pitch)
            direct = job.out.direct and not job.stream
            out = (<real *> job.out.data) + panel.flat if direct else x_stage
            out_pitch = panel.pitch if direct else panel.cols
            j = panel.channel
            if scaled:
                multiply(x, x_pitch, panel.rows, panel.cols, table + 4 * COLUMNS + j, not rows, x_stage, panel.cols)
                x = x_stage
                x_pitch = panel.cols
            if rows:
                map_panel(x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, table, table + COLUMNS,
                          table + 2 * COLUMNS, table + 3 * COLUMNS, out, out_pitch, backward, False)
            else:
                map_panel(x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, table + j, table + COLUMNS + j,
                          table + 2 * COLUMNS + j, table + 3 * COLUMNS + j, out, out_pitch, backward, True)
            if scaled and backward:
                multiply(out, out_pitch, panel.rows, panel.cols, table + 4 * COLUMNS + j, not rows, out, out_pitch)
            if job.stream and panel.pitch == panel.cols:
                cybn_stream((<real *> job.out.data) + panel.flat, out, panel.rows * panel.cols * sizeof(real))
            elif job.stream:
                for r in range(panel.rows):
                    cybn_stream((<real *> job.out.data) + panel.flat + r * panel.pitch, out + r * panel.cols,
                                panel.cols * sizeof(real))
            elif not direct:
                for r in range(panel.rows):
                    transfer(&job.out, panel.flat + r * panel.pitch, panel.cols, out + r * panel.cols, True)
    if job.stream:
        cybn_stream_end()


# ----------------------------------------------------------------------------------------------------------- verbs

cdef void reduce_tiles(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                       bint backward, real *kind) noexcept nogil:
    while c0 < c1:
        if backward:
            reduce_tile(job, c0, min(c0 + job.tile, c1), piece, True, kind)
        else:
            reduce_tile(job, c0, min(c0 + job.tile, c1), piece, False, kind)
        c0 += job.tile


cdef void map_tiles(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                    bint backward, real *kind) noexcept nogil:
    cdef Py_ssize_t width = map_width(job)
    while c0 < c1:
        if backward:
            map_tile(job, c0, min(c0 + width, c1), piece, True, kind)
        else:
            map_tile(job, c0, min(c0 + width, c1), piece, False, kind)
        c0 += width


cdef void collect_stats_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, False, <float *> NULL)


cdef void collect_stats_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, False, <double *> NULL)


cdef void normalize_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    map_tiles(job, c0, c1, piece, False, <float *> NULL)


cdef void normalize_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    map_tiles(job, c0, c1, piece, False, <double *> NULL)


cdef void backward_reduce_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, True, <float *> NULL)


cdef void backward_reduce_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    reduce_tiles(job, c0, c1, piece, True, <double *> NULL)


cdef void backward_input_f32(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    map_tiles(job, c0, c1, piece, True, <float *> NULL)


cdef void backward_input_f64(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece) noexcept nogil:
    map_tiles(job, c0, c1, piece, True, <double *> NULL)


cdef Kernels table
table.collect_stats[0] = collect_stats_f32
table.collect_stats[1] = collect_stats_f64
table.normalize[0] = normalize_f32
table.normalize[1] = normalize_f64
table.backward_reduce[0] = backward_reduce_f32
table.backward_reduce[1] = backward_reduce_f64
table.backward_input[0] = backward_input_f32
table.backward_input[1] = backward_input_f64

kernels = PyCapsule_New(&table, "cybn._kernels", NULL)
