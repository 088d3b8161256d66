"""The only door to compiled code. Every entry: check everything -> allocate -> choose threads -> run -> update state.

Nothing the caller owns is touched before the last check has passed, and `running_mean`, `running_var` only after the
arithmetic is done.
"""
import numbers

from cybn import _kernels
from cybn.reference import Moments

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, isfinite
from libc.string cimport memset
from numpy cimport ndarray

from cybn._arrays cimport (
    Layout,
    as_data,
    as_out,
    as_running,
    as_same,
    channel_axis,
    describe,
    lay_out,
    new_vector,
    read_vector,
    vector_dtype,
    write_vector,
)
from cybn._kernels.kernels cimport Job, Kernels, Operand, cybn_inverse_sqrt, cybn_outside, verb
from cybn._schedule cimport (
    Channels,
    decompose,
    finish_backward,
    finish_backward_input,
    finish_frozen,
    finish_moments,
    finish_normalize,
    finish_sums,
    finish_training,
    finisher,
    partial_size,
    run,
)
from cybn._threads cimport choose_threads

cnp.import_array()

cdef extern from *:
    """
    #if defined(__clang__) || defined(_MSC_VER) || !defined(__GNUC__)
    #define CYBN_GCC ""
    #else
    #define CYBN_GCC "gcc "
    #endif
    #if defined(_MSC_VER) && !defined(__clang__)
    #define CYBN_STRING_(x) #x
    #define CYBN_STRING(x) CYBN_STRING_(x)
    #define CYBN_COMPILER "MSVC " CYBN_STRING(_MSC_FULL_VER)
    #elif defined(__VERSION__)
    #define CYBN_COMPILER CYBN_GCC __VERSION__
    #else
    #define CYBN_COMPILER "unknown"
    #endif
    """
    const char *CYBN_COMPILER

cdef enum:
    WITH_GIL = 32 * 1024    # bytes below which giving up the GIL costs more than other threads gain

compiler = CYBN_COMPILER.decode()
"""Name and version of the compiler that built this module."""

cdef const Kernels *kernels
cdef str kernels_name


def select_kernels(str name):
    """Use the build `name` of `cybn._kernels.builds` from now on (for tests and benchmarks). Return the one before."""
    global kernels, kernels_name
    before = kernels_name
    kernels = <const Kernels *> PyCapsule_GetPointer(_kernels.builds[name], "cybn._kernels")
    kernels_name = name
    return before


def selected_kernels():
    """Name of the kernel build in use."""
    return kernels_name


select_kernels(_kernels.default)


# -------------------------------------------------------------------------------------------------------------- a call

@cython.final
@cython.freelist(8)
cdef class Call:
    """The job of one call and the memory of its per-channel vectors."""
    cdef Job job
    cdef Channels v
    cdef Layout layout
    cdef double *memory
    cdef Py_ssize_t channels
    cdef Py_ssize_t count
    cdef Py_ssize_t size
    cdef int type
    cdef int threads

    def __dealloc__(self):
        PyMem_RawFree(self.memory)


cdef inline double *line_start(double *p) noexcept:
    """p, or the first address after it where a cache line begins."""
    return <double *> ((<size_t> p + 63) & ~<size_t> 63)


cdef Py_ssize_t *place_axes(Operand *op, Py_ssize_t axes, Py_ssize_t *p) noexcept:
    """Memory for an operand's axes, from p on. Return what follows it."""
    op.shape = p
    op.stride = p + axes
    return p + 2 * axes


cdef Call open_call(ndarray x, object axis, object num_threads):
    """Geometry and memory for a call over x."""
    cdef Call self = Call.__new__(Call)
    cdef Job *job = &self.job
    cdef Py_ssize_t axes, n, partial = 0
    cdef Py_ssize_t *q
    cdef double *p
    lay_out(job, &self.layout, x, channel_axis(x, axis))
    self.threads = choose_threads(num_threads)
    self.channels = n = job.channels
    self.size = cnp.PyArray_SIZE(x)
    self.count = job.outer * job.inner
    self.v.count = <double> self.count
    self.type = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64
    if self.size > 0:
        decompose(job)
        partial = partial_size(job)
    axes = max(self.layout.ndim, 1)
    self.memory = <double *> PyMem_RawMalloc((13 * n + 6 * axes + 8 + partial) * sizeof(double))
    if self.memory == NULL:
        raise MemoryError(f"no memory for the statistics of {n} channels")
    p = self.memory
    if self.size == 0:
        memset(p, 0, 13 * n * sizeof(double))   # what no arithmetic will overwrite
    self.v.mean = job.mean = p
    self.v.m2 = p + n
    self.v.invstd = p + 2 * n
    self.v.sum_dy = p + 3 * n
    self.v.sum_dy_xmu = p + 4 * n
    job.center = p + 5 * n
    job.factor = p + 6 * n
    job.scale = p + 7 * n
    job.offset = p + 8 * n
    job.slope = p + 9 * n
    # 10, 11: weight and bias, 12: for checks (`spare`).
    q = <Py_ssize_t *> (p + 13 * n)
    q = place_axes(&job.x, axes, q)
    q = place_axes(&job.dy, axes, q)
    q = place_axes(&job.out, axes, q)
    job.counts = <double *> q
    job.partial = line_start(job.counts + job.slices)
    describe(&job.x, &self.layout, x)
    job.source = &job.x
    return self


cdef inline double *spare(Call call) noexcept:
    return call.memory + 12 * call.channels


cdef int read_parameters(Call call, object weight, object bias) except -1:
    if weight is not None:
        read_vector(weight, "weight", call.channels, call.memory + 10 * call.channels)
        call.v.weight = call.memory + 10 * call.channels
    if bias is not None:
        read_vector(bias, "bias", call.channels, call.memory + 11 * call.channels)
        call.v.bias = call.memory + 11 * call.channels
    return 0


cdef void execute(Call call, verb reduce, finisher finish, verb apply) noexcept:
    cdef Job *job = &call.job
    if call.size == 0:
        return
    if call.size * job.itemsize < WITH_GIL:
        run(job, &call.v, reduce, finish, apply, 1)
    else:
        with nogil:
            run(job, &call.v, reduce, finish, apply, call.threads)


cdef double real_number(object value, str name) except? -1:
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, cnp.ndarray):
        if value.ndim != 0 or value.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be a real number, got an array of {value.dtype} and shape {value.shape}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    return float(value)


cdef double check_eps(object eps, bint training) except? -1:
    cdef double value = real_number(eps, "eps")
    if not value >= 0 or not isfinite(value):
        raise ValueError(f"eps must be a finite number and not negative, got {value}")
    if training and value == 0:
        raise ValueError("eps must be positive when training, got 0.0")
    return value


cdef double check_momentum(object momentum) except? -1:
    cdef double value = real_number(momentum, "momentum")
    if not 0 <= value <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {value}")
    return value


cdef int check_not_negative(const double *values, str name, Py_ssize_t channels) except -1:
    cdef Py_ssize_t c
    if not cybn_outside(values, channels, 0, INFINITY):
        return 0
    for c in range(channels):
        if values[c] < 0:
            raise ValueError(f"{name} must not be negative, got {values[c]} in channel {c}")
    return 0


cdef void update_running(double *running, const double *new, double share, double divisor, Py_ssize_t n) noexcept:
    """running = (1 - share) * running + share * new / divisor"""
    cdef Py_ssize_t c
    for c in range(n):
        running[c] = (1 - share) * running[c] + share * (new[c] / divisor)


# ------------------------------------------------------------------------------------------------------------- entries

def layer_input(x, axis, num_features, ranks, layer):
    """x as an array, if it has one of the `ranks` (None: any) and `num_features` channels; `layer`: for the message."""
    cdef ndarray data = as_data(x, "x")
    cdef Py_ssize_t ndim = cnp.PyArray_NDIM(data)
    if ranks is not None and ndim not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ValueError(f"x must be {expected} for {layer}, got {ndim}D of shape {(<object> data).shape}")
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis(data, axis))
    if channels != num_features:
        raise ValueError(f"x must have {num_features} channels along axis {axis}, "
                         f"got {channels} in shape {(<object> data).shape}")
    return data


cdef tuple forward_call(object x, object running_mean, object running_var, object weight, object bias,
                        object training, object momentum, object eps, object axis, object out, object num_threads,
                        object correction, bint save):
    cdef ndarray data = as_data(x, "x")
    cdef ndarray y, mean_array = None, var_array = None
    cdef Call call = open_call(data, axis, num_threads)
    cdef Channels *v = &call.v
    cdef bint train = bool(training), track = running_mean is not None
    cdef double share, spread, degrees
    if track != (running_var is not None):
        raise ValueError("running_mean and running_var must be given together, got only "
                         + ("running_mean" if track else "running_var"))
    if not train and not track:
        raise ValueError("running_mean and running_var must be given when not training, got None")
    v.eps = check_eps(eps, train)
    share = check_momentum(momentum)
    spread = real_number(correction, "correction")
    if spread != 0 and spread != 1:
        raise ValueError(f"correction must be 0 or 1, got {correction}")
    read_parameters(call, weight, bias)
    if track:
        read_vector(running_var, "running_var", call.channels, spare(call))
        check_not_negative(spare(call), "running_var", call.channels)
        # (When training it is only checked here: into memory that is still free.)
        read_vector(running_mean, "running_mean", call.channels, call.job.center if train else v.mean)
    if train:
        if call.count == 1 and call.size > 0:
            raise ValueError(f"Expected more than 1 value per channel when training, "
                             f"got input shape {(<object> data).shape}")
        if track:
            mean_array = as_running(running_mean, "running_mean", call.channels)
            var_array = as_running(running_var, "running_var", call.channels)
    y = as_out(out, data, None)
    describe(&call.job.out, &call.layout, y)

    if train:
        execute(call, kernels.collect_stats[call.type], finish_training, kernels.normalize[call.type])
        if track and call.size > 0:
            degrees = max(v.count - spread, 1)
            read_vector(running_mean, "running_mean", call.channels, call.job.offset)   # free again
            update_running(call.job.offset, v.mean, share, 1, call.channels)
            write_vector(mean_array, call.job.offset)
            update_running(spare(call), v.m2, share, degrees, call.channels)
            write_vector(var_array, spare(call))
    else:
        cybn_inverse_sqrt(spare(call), v.eps, v.invstd, call.channels)
        execute(call, NULL, finish_normalize, kernels.normalize[call.type])
    if not save:
        return y, None, None
    return (y, new_vector(call.channels, cnp.NPY_FLOAT64, v.mean),
            new_vector(call.channels, cnp.NPY_FLOAT64, v.invstd))


def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads, correction):
    return forward_call(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads,
                        correction, False)[0]


def batch_norm_forward(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads,
                       correction):
    return forward_call(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads,
                        correction, True)


def batch_norm_backward(grad_output, x, save_mean, save_invstd, weight, training, axis, out, num_threads):
    cdef ndarray data = as_data(x, "x")
    cdef ndarray dy = as_same(grad_output, "grad_output", data), dx
    cdef Call call = open_call(data, axis, num_threads)
    cdef Channels *v = &call.v
    cdef Py_ssize_t c
    cdef int dtype
    read_parameters(call, weight, None)
    dtype = vector_dtype(weight, data)
    read_vector(save_mean, "save_mean", call.channels, v.mean)
    read_vector(save_invstd, "save_invstd", call.channels, v.invstd)
    check_not_negative(v.invstd, "save_invstd", call.channels)
    dx = as_out(out, data, dy)
    describe(&call.job.dy, &call.layout, dy)
    describe(&call.job.out, &call.layout, dx)
    if training:
        execute(call, kernels.backward_reduce[call.type], finish_backward, kernels.backward_input[call.type])
    else:
        call.job.source = &call.job.dy
        execute(call, kernels.backward_reduce[call.type], finish_frozen, kernels.normalize[call.type])
    for c in range(call.channels):
        v.sum_dy_xmu[c] *= v.invstd[c]
    return dx, new_vector(call.channels, dtype, v.sum_dy_xmu), new_vector(call.channels, dtype, v.sum_dy)


def batch_norm_stats(x, axis, num_threads):
    cdef ndarray data = as_data(x, "x")
    cdef Call call = open_call(data, axis, num_threads)
    execute(call, kernels.collect_stats[call.type], finish_moments, NULL)
    return Moments(call.count if call.size else 0, new_vector(call.channels, cnp.NPY_FLOAT64, call.v.mean),
                   new_vector(call.channels, cnp.NPY_FLOAT64, call.v.m2))


def batch_norm_apply(x, mean, invstd, weight, bias, axis, out, num_threads):
    cdef ndarray data = as_data(x, "x"), y
    cdef Call call = open_call(data, axis, num_threads)
    read_vector(mean, "mean", call.channels, call.v.mean)
    read_vector(invstd, "invstd", call.channels, call.v.invstd)
    check_not_negative(call.v.invstd, "invstd", call.channels)
    read_parameters(call, weight, bias)
    y = as_out(out, data, None)
    describe(&call.job.out, &call.layout, y)
    execute(call, NULL, finish_normalize, kernels.normalize[call.type])
    return y


def batch_norm_backward_reduce(grad_output, x, mean, axis, num_threads):
    cdef ndarray data = as_data(x, "x")
    cdef ndarray dy = as_same(grad_output, "grad_output", data)
    cdef Call call = open_call(data, axis, num_threads)
    read_vector(mean, "mean", call.channels, call.v.mean)
    describe(&call.job.dy, &call.layout, dy)
    execute(call, kernels.backward_reduce[call.type], finish_sums, NULL)
    return (new_vector(call.channels, cnp.NPY_FLOAT64, call.v.sum_dy),
            new_vector(call.channels, cnp.NPY_FLOAT64, call.v.sum_dy_xmu))


def batch_norm_backward_apply(grad_output, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count, axis, out, num_threads):
    cdef ndarray data = as_data(x, "x")
    cdef ndarray dy = as_same(grad_output, "grad_output", data), dx
    cdef Call call = open_call(data, axis, num_threads)
    cdef Channels *v = &call.v
    read_vector(mean, "mean", call.channels, v.mean)
    read_vector(invstd, "invstd", call.channels, v.invstd)
    check_not_negative(v.invstd, "invstd", call.channels)
    read_parameters(call, weight, None)
    read_vector(sum_dy, "sum_dy", call.channels, v.sum_dy)
    read_vector(sum_dy_xmu, "sum_dy_xmu", call.channels, v.sum_dy_xmu)
    v.count = real_number(count, "count")
    if not v.count > 0 or not isfinite(v.count):
        raise ValueError(f"count must be a positive number of values per channel, got {count}")
    dx = as_out(out, data, dy)
    describe(&call.job.dy, &call.layout, dy)
    describe(&call.job.out, &call.layout, dx)
    execute(call, NULL, finish_backward_input, kernels.backward_input[call.type])
    return dx
