"""Every loop of cybn. Compiled once per instruction set; the bits are the same in each.

Nothing here allocates, checks or knows Python. Three levels:

- leaves (`accumulate`, `map_columns`) touch elements. Written so that gcc vectorises
  them under plain IEEE rules: a fixed accumulator per column, never a reduction across columns;
- tiles (`reduce_tile`, `map_tile`) prepare the per-column tables of up to COLUMNS columns and walk the panels;
- verbs cut their channels into tiles.

A panel is a few rows of columns. In a run (inner >= 64 contiguous elements of one channel) the columns are the
LANES lanes; in rows of channels they are the elements of the row. Folding is the same for both: each column
belongs to a channel, and columns are added to their channel in order, in double.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport copysign, fabs, isfinite
from libc.string cimport memcpy

from cybn._kernels.kernels cimport COLUMNS, LANES, PANEL, Job, Kernels, Operand

ctypedef fused real:
    float
    double

cdef extern from "stream.h":
    void cybn_stream(void *to, const void *source, size_t n) noexcept nogil
    void cybn_stream_end() noexcept nogil

cdef extern from "<float.h>":
    const double LARGEST_FLOAT "FLT_MAX"

cdef enum:
    STATS_ROWS = 8      # rows of the rows traversal that a reduction takes at a time: more of them spare loads and
    GRADS_ROWS = 4      # stores of the accumulators, fewer are read in longer stretches (measured: 1 to 64)
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
    Py_ssize_t column   # of the tile's tables
    Py_ssize_t least    # rows to take at a time if there are so many
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


cdef inline void first_panel(const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t least,
                             Panel *panel) noexcept nogil:
    panel.least = least
    panel.o = 0 if job.rows else block.o0
    panel.c = c0
    panel.column = 0


cdef inline bint next_panel(const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t c1,
                            Panel *panel) noexcept nogil:
    cdef Py_ssize_t width
    if job.rows:
        width = job.channels * job.inner
        panel.flat = (block.o0 + panel.o * job.period) * width + c0 * job.inner
        panel.pitch = job.period * width
        if panel.o < block.full:
            # A period above 1 means that the tile is the whole row.
            panel.cols = job.period * (c1 - c0) * job.inner
            panel.rows = min(max(panel.least, PANEL // panel.cols), block.full - panel.o)
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
    panel.rows = 1
    panel.cols = block.i1 - block.i0
    panel.pitch = panel.cols
    panel.column = (panel.c - c0) * LANES
    panel.c += 1
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

cdef inline void accumulate_stats(const real *x, Py_ssize_t pitch, Py_ssize_t rows, Py_ssize_t cols,
                                  const real *shift, double *sums, real *dots) noexcept nogil:
    """Per column: sums += x, dots += (x - shift)^2.

    The sum is double: with it the mean is exact to double rounding, and so is y near 0, for which every error of the
    mean counts. float64 input sums x - shift instead, which serves data with a large offset the same way.
    Local arrays, because gcc keeps those in registers; through pointers it would have to fear that they overlap.
    """
    cdef double a[LANES]
    cdef real q[LANES]
    cdef real k[LANES]
    cdef Py_ssize_t r, j
    cdef real d
    for j in range(cols):
        a[j] = sums[j]
        q[j] = dots[j]
        k[j] = shift[j]
    for r in range(rows):
        for j in range(cols):
            d = x[r * pitch + j] - k[j]
            q[j] += d * d
        # A loop of its own: with both widths in one, gcc cuts the vectors short.
        for j in range(cols):
            a[j] += x[r * pitch + j] - k[j] if sizeof(real) == 8 else x[r * pitch + j]
    for j in range(cols):
        sums[j] = a[j]
        dots[j] = q[j]


cdef inline void accumulate_grads(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                                  Py_ssize_t rows, Py_ssize_t cols, const real *hi, const real *lo,
                                  real *sums, real *dots) noexcept nogil:
    """Per column: sums += dy, dots += dy * ((x - hi) - lo), both in the input's type."""
    cdef real a[LANES]
    cdef real q[LANES]
    cdef real h[LANES]
    cdef real l[LANES]
    cdef Py_ssize_t r, j
    cdef real t
    for j in range(cols):
        a[j] = sums[j]
        q[j] = dots[j]
        h[j] = hi[j]
        l[j] = lo[j]
    for r in range(rows):
        for j in range(cols):
            t = dy[r * dy_pitch + j]
            a[j] += t
            q[j] += t * ((x[r * x_pitch + j] - h[j]) - l[j])
    for j in range(cols):
        sums[j] = a[j]
        dots[j] = q[j]


cdef inline void accumulate(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                            Py_ssize_t rows, Py_ssize_t cols, const real *hi, const real *lo,
                            double *x_sums, real *dy_sums, real *dots, bint backward) noexcept nogil:
    if backward:
        accumulate_grads(x, x_pitch, dy, dy_pitch, rows, cols, hi, lo, dy_sums, dots)
    else:
        accumulate_stats(x, x_pitch, rows, cols, hi, x_sums, dots)


cdef inline void reduce_panel(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                              Py_ssize_t rows, Py_ssize_t cols, const real *hi, const real *lo,
                              double *x_sums, real *dy_sums, real *dots, bint backward) noexcept nogil:
    """Groups of LANES columns: with a constant number of them gcc makes whole vectors."""
    cdef Py_ssize_t g, j = cols - cols % LANES
    for g in range(cols // LANES):
        accumulate(x + g * LANES, x_pitch, dy + g * LANES, dy_pitch, rows, LANES, hi + g * LANES, lo + g * LANES,
                   x_sums + g * LANES, dy_sums + g * LANES, dots + g * LANES, backward)
    if j < cols:
        accumulate(x + j, x_pitch, dy + j, dy_pitch, rows, cols - j, hi + j, lo + j, x_sums + j, dy_sums + j, dots + j,
                   backward)


cdef inline void map_columns(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                             Py_ssize_t rows, Py_ssize_t cols, const real *factor, const real *hi, const real *lo,
                             const real *scale, const real *offset, const real *slope,
                             real *out, Py_ssize_t out_pitch, bint backward, bint uniform) noexcept nogil:
    """y = d * scale + offset, or dx = ((dy - offset) - d * slope) * scale * factor, with d = (x * factor - hi) - lo.

    `uniform`: one channel, its coefficients in element 0 of each table.
    """
    cdef Py_ssize_t r, j
    cdef real d
    cdef real f0 = factor[0], h0 = hi[0], l0 = lo[0], s0 = scale[0], o0 = offset[0], t0 = slope[0]
    for r in range(rows):
        for j in range(cols):
            d = x[r * x_pitch + j]
            if uniform:
                d = (d * f0 - h0) - l0
                if backward:
                    out[r * out_pitch + j] = ((dy[r * dy_pitch + j] - o0) - d * t0) * s0 * f0
                else:
                    out[r * out_pitch + j] = d * s0 + o0
            else:
                d = (d * factor[j] - hi[j]) - lo[j]
                if backward:
                    out[r * out_pitch + j] = ((dy[r * dy_pitch + j] - offset[j]) - d * slope[j]) * scale[j] * factor[j]
                else:
                    out[r * out_pitch + j] = d * scale[j] + offset[j]


cdef inline void map_panel(const real *x, Py_ssize_t x_pitch, const real *dy, Py_ssize_t dy_pitch,
                           Py_ssize_t rows, Py_ssize_t cols, const real *factor, const real *hi, const real *lo,
                           const real *scale, const real *offset, const real *slope,
                           real *out, Py_ssize_t out_pitch, bint backward, bint uniform) noexcept nogil:
    """map_columns, told when it works in place: with one name for both gcc needs no overlap check to vectorise."""
    if out == x:
        map_columns(out, out_pitch, dy, dy_pitch, rows, cols, factor, hi, lo, scale, offset, slope,
                    out, out_pitch, backward, uniform)
    elif backward and out == dy:
        map_columns(x, x_pitch, out, out_pitch, rows, cols, factor, hi, lo, scale, offset, slope,
                    out, out_pitch, backward, uniform)
    else:
        map_columns(x, x_pitch, dy, dy_pitch, rows, cols, factor, hi, lo, scale, offset, slope,
                    out, out_pitch, backward, uniform)


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


cdef inline bint lost(double a, double q, bint backward, real *kind) noexcept nogil:
    """Whether accumulators of type real have overflowed or underflowed."""
    cdef double tiny = 1e-30 if sizeof(real) == 4 else 1e-290
    # No products at all but a sum of dy: they may have vanished. (So do those of a constant channel, at no harm.)
    return not (isfinite(a) and isfinite(q)) or (fabs(q) < tiny and (q != 0 or (backward and a != 0)))


cdef void close_block(const Job *job, const Block *block, Py_ssize_t c0, Py_ssize_t tile, Py_ssize_t piece,
                      double before, const Columns *columns, const double *sums, const real *dots,
                      const real *shift, bint backward, real *kind) noexcept nogil:
    """Fold the columns into their channels and the block into the slice (Chan, Golub, LeVeque 1979)."""
    cdef double s1[COLUMNS]
    cdef double s2[COLUMNS]
    cdef double first, second, delta, count = <double> block.count
    cdef double *partial = job.partial + (piece * job.channels + c0) * 2
    cdef Py_ssize_t c, i, j, p
    cdef bint again
    for c in range(tile):
        s1[c] = 0
        s2[c] = 0
    for p in range(columns.repeats):
        if columns.span == 1:
            for c in range(tile):
                s1[c] += sums[p * tile + c]
                s2[c] += dots[p * tile + c]
            continue
        for c in range(tile):
            for i in range(columns.span):
                j = (p * tile + c) * columns.span + i
                s1[c] += sums[j]
                s2[c] += dots[j]
    for c in range(tile):
        first = s1[c]
        second = s2[c]
        again = lost(first, second, backward, kind)
        if not backward:
            # Sum and squares -> mean and m2. They are useless if the shift is more than two standard deviations off (m2
            # would be the small difference of large numbers), or if squares vanished though the values differ.
            first = first / count
            delta = first if sizeof(real) == 8 else first - shift[c]
            again = again or count * delta * delta > 0.75 * second
            first = shift[c] + delta
            second -= count * delta * delta
        if again:
            repair_block(job, block, c0 + c, &first, &second, backward, kind)
        if backward:
            partial[2 * c] += first
            partial[2 * c + 1] += second
        elif before == 0:
            partial[2 * c] = first
            partial[2 * c + 1] = second
        else:
            delta = first - partial[2 * c]
            partial[2 * c] += delta * (count / (before + count))
            partial[2 * c + 1] += second + delta * delta * (before * count / (before + count))


cdef inline void reduce_tile(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                             bint backward, real *kind) noexcept nogil:
    cdef double sums[COLUMNS]
    cdef real dy_sums[COLUMNS]
    cdef real dots[COLUMNS]
    cdef real hi[COLUMNS]
    cdef real lo[COLUMNS]
    cdef real shift[COLUMNS]
    cdef real x_stage[PANEL]
    cdef real dy_stage[PANEL]
    cdef real rest[COLUMNS]
    cdef Block block
    cdef Panel panel
    cdef const real *x
    cdef const real *dy
    cdef Py_ssize_t x_pitch, dy_pitch, whole, j, index, tile = c1 - c0
    cdef Columns columns = layout_columns(job, tile)
    cdef double before = 0
    cdef Py_ssize_t least = GRADS_ROWS if backward else STATS_ROWS
    if not job.x.direct or (backward and not job.dy.direct):
        least = 1       # a stage holds PANEL elements only
    if backward:
        for j in range(tile):
            shift[j] = <real> job.mean[c0 + j]
            rest[j] = <real> (job.mean[c0 + j] - <double> shift[j])
        spread(&columns, shift, hi)
        spread(&columns, rest, lo)
    for j in range(2 * tile):
        job.partial[(piece * job.channels + c0) * 2 + j] = 0
    for index in range(piece * job.slice_blocks, min((piece + 1) * job.slice_blocks, job.blocks)):
        open_block(job, index, &block)
        if not backward:
            sample_shifts(job, &block, c0, tile, shift)
            spread(&columns, shift, hi)
        for j in range(columns.count):
            sums[j] = 0
            dy_sums[j] = 0
            dots[j] = 0
        first_panel(job, &block, c0, least, &panel)
        while next_panel(job, &block, c0, c1, &panel):
            x = fetch(&job.x, &panel, x_stage, &x_pitch)
            dy = x
            dy_pitch = x_pitch
            if backward:
                dy = fetch(&job.dy, &panel, dy_stage, &dy_pitch)
            j = panel.column
            if job.rows:
                reduce_panel(x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, hi, lo, sums, dy_sums, dots, backward)
                continue
            # A run: rows of LANES, then what is left.
            whole = panel.cols // LANES
            reduce_panel(x, LANES, dy, LANES, whole, LANES, hi + j, lo + j, sums + j, dy_sums + j, dots + j, backward)
            if whole * LANES < panel.cols:
                reduce_panel(x + whole * LANES, LANES, dy + whole * LANES, LANES, 1, panel.cols - whole * LANES,
                             hi + j, lo + j, sums + j, dy_sums + j, dots + j, backward)
        if backward:
            for j in range(columns.count):
                sums[j] = dy_sums[j]
        close_block(job, &block, c0, tile, piece, before, &columns, sums, dots, shift, backward, kind)
        before += block.count


cdef inline void map_tile(const Job *job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t piece,
                          bint backward, real *kind) noexcept nogil:
    # One after the other: factor, hi, lo, scale, offset, slope; per channel, and for rows per column.
    cdef real channel[6 * COLUMNS]
    cdef real column[6 * COLUMNS]
    cdef real x_stage[PANEL]
    cdef real dy_stage[PANEL]
    cdef Block block
    cdef Panel panel
    cdef const real *x
    cdef const real *dy
    cdef real *out
    cdef Py_ssize_t x_pitch, dy_pitch, out_pitch, c, j, r, index
    cdef bint direct
    cdef const Operand *source = &job.x if backward else job.source
    cdef Columns columns = layout_columns(job, c1 - c0)
    for c in range(c0, c1):
        j = c - c0
        channel[j] = <real> job.factor[c]
        channel[COLUMNS + j] = <real> job.center[c]
        channel[2 * COLUMNS + j] = <real> (job.center[c] - <double> channel[COLUMNS + j])
        channel[3 * COLUMNS + j] = <real> job.scale[c]
        channel[4 * COLUMNS + j] = <real> job.offset[c]
        channel[5 * COLUMNS + j] = <real> job.slope[c]
        if not isfinite(channel[3 * COLUMNS + j]) and isfinite(job.scale[c]):
            # A constant channel with a tiny eps: d is 0 and must not meet an infinity.
            channel[3 * COLUMNS + j] = <real> copysign(LARGEST_FLOAT, job.scale[c])
    if job.rows:
        for j in range(6):
            spread(&columns, channel + j * COLUMNS, column + j * COLUMNS)
    for index in range(piece * job.slice_blocks, min((piece + 1) * job.slice_blocks, job.blocks)):
        open_block(job, index, &block)
        first_panel(job, &block, c0, 1, &panel)
        while next_panel(job, &block, c0, c1, &panel):
            x = fetch(source, &panel, x_stage, &x_pitch)
            dy = x
            dy_pitch = x_pitch
            if backward:
                dy = fetch(&job.dy, &panel, dy_stage, &dy_pitch)
            direct = job.out.direct and not job.stream
            out = (<real *> job.out.data) + panel.flat if direct else x_stage
            out_pitch = panel.pitch if direct else panel.cols
            j = 0 if job.rows else panel.column // LANES
            if job.rows:
                map_panel(x, x_pitch, dy, dy_pitch, panel.rows, panel.cols, column, column + COLUMNS,
                          column + 2 * COLUMNS, column + 3 * COLUMNS, column + 4 * COLUMNS, column + 5 * COLUMNS,
                          out, out_pitch, backward, False)
            else:
                map_panel(x, x_pitch, dy, dy_pitch, 1, panel.cols, channel + j, channel + COLUMNS + j,
                          channel + 2 * COLUMNS + j, channel + 3 * COLUMNS + j, channel + 4 * COLUMNS + j,
                          channel + 5 * COLUMNS + j, out, out_pitch, backward, True)
            if direct:
                continue
            if job.stream:
                for r in range(panel.rows):
                    cybn_stream((<real *> job.out.data) + panel.flat + r * panel.pitch, out + r * panel.cols,
                                panel.cols * sizeof(real))
            else:
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
    while c0 < c1:
        if backward:
            map_tile(job, c0, min(c0 + job.tile, c1), piece, True, kind)
        else:
            map_tile(job, c0, min(c0 + job.tile, c1), piece, False, kind)
        c0 += job.tile


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
