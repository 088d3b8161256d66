"""The only door to compiled code. Every entry: check everything -> allocate -> choose threads -> run -> update state.

Nothing the caller owns is touched before the last check has passed, and `running_mean`, `running_var` only after the
arithmetic is done.
"""
import numbers
import warnings

import numpy as np

from cybn import _kernels

cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport isfinite
from libc.string cimport memcpy, memset
from numpy cimport ndarray

from cybn._arrays cimport (
    Layout,
    as_data,
    as_integer,
    as_out,
    as_running,
    as_same,
    as_vector,
    as_weights,
    channel_axis,
    check_apart,
    check_gate,
    check_overlap,
    check_weight_values,
    describe,
    lay_out,
    new_gate,
    new_vector,
    read_vector,
    view_array,
    write_vector,
)
from cybn._coefficients cimport Coefficients, coefficients_of
from cybn._kernels.kernels cimport (
    LEAKY_RELU,
    RELU,
    Channels,
    Job,
    Kernels,
    Operand,
    Weights,
    cybn_inverse_sqrt,
    finisher,
    verb,
)
from cybn._schedule cimport decompose, mark, partial_size, run, weigh_blocks
from cybn._threads cimport wished_threads

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

cdef Py_ssize_t MOST_CHANNELS = <Py_ssize_t> 1 << 48     # a stride of 0 can claim more than bytes can be counted

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
    cdef int axis
    cdef int dtype          # of the parameters' gradients: weight's, x's where there is none
    # Held until the kernels have read them: the caller may have given a list, another thread replaced them.
    cdef ndarray x
    cdef ndarray weights
    cdef ndarray block_weights
    cdef double pairs       # of weights, the sum of the products of any two
    cdef ndarray residual
    cdef ndarray output
    cdef ndarray gate
    cdef Coefficients coefficients

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
    self.threads = wished_threads(num_threads)
    self.axis = channel_axis(x, axis)
    self.x = as_data(x, "x")    # again: an object that is an integer may have done anything to it
    lay_out(job, &self.layout, x, self.axis)
    self.channels = n = job.channels
    if n > MOST_CHANNELS:
        raise MemoryError(f"no memory for the statistics of {n} channels")
    self.size = cnp.PyArray_SIZE(x)
    self.count = job.outer * job.inner
    self.v.count = <double> self.count
    self.type = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64
    self.dtype = cnp.PyArray_TYPE(x)
    if self.size > 0:
        decompose(job)
        partial = partial_size(job)
    axes = max(self.layout.ndim, 1)
    self.memory = <double *> PyMem_RawMalloc((17 * n + 12 * axes + 8 + partial) * sizeof(double))
    if self.memory == NULL:
        raise MemoryError(f"no memory for the statistics of {n} channels")
    p = self.memory
    if self.size == 0:
        memset(p, 0, 17 * n * sizeof(double))   # what no arithmetic will overwrite
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
    job.gate_center = p + 13 * n
    job.gate_factor = p + 14 * n
    job.gate_scale = p + 15 * n
    job.gate_offset = p + 16 * n
    q = <Py_ssize_t *> (p + 17 * n)
    q = place_axes(&job.x, axes, q)
    q = place_axes(&job.dy, axes, q)
    q = place_axes(&job.out, axes, q)
    q = place_axes(&job.residual, axes, q)
    q = place_axes(&job.output, axes, q)
    q = place_axes(&job.gated, axes, q)
    job.counts = <double *> q
    job.partial = line_start(job.counts + job.slices)
    return self


cdef ndarray give_vector(Call call, double **values):
    """An array for the caller, where the call has `values` from now on."""
    cdef cnp.npy_intp n = call.channels
    cdef ndarray a = cnp.PyArray_EMPTY(1, &n, cnp.NPY_FLOAT64, 0)
    values[0] = <double *> cnp.PyArray_DATA(a)
    if call.size == 0:
        memset(values[0], 0, n * sizeof(double))    # (as in `open_call`)
    return a


cdef inline double *spare(Call call) noexcept:
    return call.memory + 12 * call.channels


cdef int read_parameters(Call call, object weight, object bias) except -1:
    if weight is not None:
        call.dtype = read_vector(weight, "weight", call.channels, call.memory + 10 * call.channels)
        call.v.weight = call.memory + 10 * call.channels
    if bias is not None:
        read_vector(bias, "bias", call.channels, call.memory + 11 * call.channels)
        call.v.bias = call.memory + 11 * call.channels
    return 0


cdef int read_statistics(Call call, object mean, str mean_name, object invstd, str invstd_name) except -1:
    read_vector(mean, mean_name, call.channels, call.v.mean)
    read_vector(invstd, invstd_name, call.channels, call.v.invstd, negative=False)
    return 0


cdef int find_weights(Call call) except -1:
    """Where they are now: code of other arguments may have resized them. (Flags are a copy.)"""
    if call.job.weights == NULL:
        return 0
    if (cnp.PyArray_SIZE(call.weights) * call.job.channels != call.size
            or cnp.PyArray_TYPE(call.weights) != call.layout.type):
        raise ValueError("sample_weight must keep shape and dtype during the call, "
                         f"got {call.weights.dtype} of shape {(<object> call.weights).shape} in the end")
    call.job.weights = cnp.PyArray_DATA(call.weights)
    return 0


cdef int execute(Call call, verb reduce, finisher finish, verb apply) except -1:
    cdef Job *job = &call.job
    describe(&job.x, &call.layout, call.x)
    if call.size == 0:
        return 0
    find_weights(call)
    if call.size * job.itemsize < WITH_GIL:
        if job.output.data != NULL:
            mark(job, kernels.mark[call.type], 1)
        run(job, &call.v, reduce, finish, apply, 1)
    else:
        with nogil:
            if job.output.data != NULL:
                mark(job, kernels.mark[call.type], call.threads)
            run(job, &call.v, reduce, finish, apply, call.threads)
    return 0


cpdef double real_number(object value, str name) except? -1:
    """float(value), if it is a number; whatever that may raise."""
    if type(value) is float:
        return value
    if isinstance(value, cnp.ndarray):
        if value.ndim != 0 or value.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be a real number, got an array of {value.dtype} and shape {value.shape}")
    elif type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        kind = type(value).__name__
        raise ValueError(f"{name} must be a number that a float can hold, got a larger {kind}") from None
    except Exception as error:
        raise TypeError(f"{name} must be a real number, got {type(value).__name__} ({error})") from error


cpdef bint truth(object value, str name) except -1:
    """bool(value), whatever that may raise."""
    if value is True or value is False:
        return value
    try:
        return bool(value)
    except Exception as error:
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} ({error})") from error


cdef int check_eps(double eps, bint training) except -1:
    if not eps >= 0 or not isfinite(eps):
        raise ValueError(f"eps must be a finite number and not negative, got {eps}")
    if training and eps == 0:
        raise ValueError("eps must be positive when training, got 0.0")
    return 0


cdef int check_running(object running_mean, object running_var, bint training) except -1:
    cdef bint track = running_mean is not None
    if track != (running_var is not None):
        raise ValueError("running_mean and running_var must be given together, got only "
                         + ("running_mean" if track else "running_var"))
    if not training and not track:
        raise ValueError("running_mean and running_var must be given when not training, got None")
    return 0


cdef int check_momentum(double momentum) except -1:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
    return 0


cpdef double check_slope(object negative_slope) except? -1:
    cdef double value = real_number(negative_slope, "negative_slope")
    if not value >= 0 or not isfinite(value):
        raise ValueError(f"negative_slope must be a finite number and not negative, got {negative_slope}")
    return value


cpdef int activation_number(object activation) except -1:
    """Which of the kernels' it is; 0: none."""
    if activation is None:
        return 0
    if isinstance(activation, str):     # (an array's == has no truth value)
        if activation == "relu":
            return RELU
        if activation == "leaky_relu":
            return LEAKY_RELU
    raise ValueError(f"activation must be None, 'relu' or 'leaky_relu', got {activation!r}")


cdef double slope_of(int activation, object negative_slope) except? -1:
    """Of a leaky ReLU; no other activation has one."""
    return check_slope(negative_slope) if activation == LEAKY_RELU else 0


cdef void use_activation(Call call, int activation, double negative_slope) noexcept:
    call.job.activation = activation
    call.job.negative_slope = negative_slope


cdef int read_activation(Call call, object activation, object negative_slope) except -1:
    cdef int number = activation_number(activation)
    use_activation(call, number, slope_of(number, negative_slope))
    return 0


cdef int read_weights(Call call, ndarray x, object mask, object sample_weight, bint taken) except -1:
    """mask or sample_weight, if there is one: the job's, and their sum as the count.

    `taken`: the statistics are taken with them. Where their sum is no ordinary number of x's type, quotients of sums
    would leave it.
    """
    cdef Weights found
    cdef cnp.npy_intp blocks
    cdef double least = 1e-140 if call.type else 1e-18
    if mask is None and sample_weight is None:
        return 0
    call.weights = as_weights(mask, sample_weight, x, call.axis, &call.layout)
    if mask is not None:
        call.job.mask = <const signed char *> cnp.PyArray_DATA(call.weights)
    else:
        call.job.weights = cnp.PyArray_DATA(call.weights)
    if call.size > 0:
        blocks = call.job.blocks
        call.block_weights = cnp.PyArray_EMPTY(1, &blocks, cnp.NPY_FLOAT64, 0)
        call.job.block_weights = <double *> cnp.PyArray_DATA(call.block_weights)
        found = weigh_blocks(&call.job, kernels.weigh[call.type])
        call.v.count = found.sum
    elif mask is None:
        found = kernels.weigh[call.type](call.job.weights, cnp.PyArray_SIZE(call.weights))
    if mask is not None:
        return 0
    check_weight_values(call.weights, &found)
    if call.size > 0 and found.sum == 0:
        raise ValueError("sample_weight must have a positive value, got zeros only")
    if taken and call.size > 0 and not least <= found.sum <= 1 / least:
        raise ValueError(f"sample_weight must add up to a number from {least:g} to {1 / least:g} in "
                         f"{'float64' if call.type else 'float32'}, got {found.sum:g}")
    call.job.positive = found.least > 0
    call.pairs = found.pairs
    return 0


cdef int check_weights(Call call, ndarray out) except -1:
    """They are read until the end."""
    if call.weights is not None:
        check_apart(out, "out", call.weights, "sample_weight")
    return 0


cdef bint single(Call call) noexcept:
    """Whether no more than one value has weight."""
    if call.count == 1 or call.job.block_weights == NULL:
        return call.count == 1
    return call.v.count == 1 if call.job.mask != NULL else call.pairs == 0


cdef double degrees_of_freedom(Call call, double correction) noexcept:
    """What m2 is divided by for running_var: of weights sum w - correction * sum w^2 / sum w."""
    if call.job.weights == NULL or call.size == 0:
        return max(call.v.count - correction, 1)
    return call.v.count if correction == 0 else 2 * call.pairs / call.v.count


cdef str NORMALIZE = "normalize"    # the default, by far the most usual: two comparisons take 40 ns


cdef bint read_masked_output(object masked_output) except -1:
    if masked_output is NORMALIZE:
        return False
    if not isinstance(masked_output, str) or masked_output not in ("normalize", "zero"):
        raise ValueError(f"masked_output must be 'normalize' or 'zero', got {masked_output!r}")
    return masked_output == "zero"


cdef int describe_residual(Call call, object residual, ndarray x, ndarray y) except -1:
    if residual is None:
        return 0
    call.residual = as_same(residual, "residual", x)
    check_overlap(y, call.residual, "residual")
    describe(&call.job.residual, &call.layout, call.residual)
    return 0


cdef void use_gate(Call call, ndarray gate) noexcept:
    call.gate = gate
    call.job.gate = <unsigned char *> cnp.PyArray_DATA(gate)


cdef int open_gate(Call call, object output, ndarray gate, ndarray x, ndarray dx) except -1:
    """What the backward pass of an activation needs: its bits, the output that tells them, or the coefficients to
    compute its input again."""
    cdef Job *job = &call.job
    cdef Py_ssize_t n = call.channels
    if job.activation == 0 or call.size == 0:
        return 0
    if gate is not None:
        check_gate(gate, x)
        use_gate(call, gate)
        return 0
    if output is not None:
        use_gate(call, new_gate(x))
        call.output = as_same(output, "output", x)
        if dx is not None:
            check_overlap(dx, call.output, "output")
        describe(&job.output, &call.layout, call.output)
        return 0
    kernels.finish_normalize(job, &call.v, 0, n)
    memcpy(job.gate_center, job.center, n * sizeof(double))
    memcpy(job.gate_factor, job.factor, n * sizeof(double))
    memcpy(job.gate_scale, job.scale, n * sizeof(double))
    memcpy(job.gate_offset, job.offset, n * sizeof(double))
    return 0


cdef ndarray new_gated(Call call, ndarray x):
    """Where the gradient of the residual goes: what has passed mask and activation."""
    cdef ndarray a = as_out(None, x, None)
    describe(&call.job.gated, &call.layout, a)
    return a


cdef void set_unit(double *mean, double *var, Py_ssize_t n) noexcept:
    """The statistics of a layer that has seen nothing."""
    cdef Py_ssize_t c
    for c in range(n):
        mean[c] = 0
        var[c] = 1


# ------------------------------------------------------------------------------------------------------------- entries

def view(value, name, wanted=None):
    """`value` as an array that later calls need not convert again. `wanted`: what errors say that it should be."""
    return view_array(value, name, False, wanted)


def integer(value, name):
    """`value` as a Python int."""
    return as_integer(value, name)


cdef object given(object out, ndarray result):
    """What the caller gets back: the array that it gave, of whatever class, else the result."""
    return out if out is not None and isinstance(out, ndarray) else result


cdef tuple gradient_input(object grad_output, ndarray output, object out, object num_threads, object weight,
                          object bias, Py_ssize_t channels):
    """grad_output and out as arrays, if they, and the parameters, fit `output`, which will become the input again."""
    cdef ndarray dy = as_same(grad_output, "grad_output", output)
    wished_threads(num_threads)
    if weight is not None:
        as_vector(weight, "weight", channels, False)
    if bias is not None:
        as_vector(bias, "bias", channels, False)
    check_apart(dy, "grad_output", output, "the layer's output in place")
    return dy, None if out is None else as_out(out, output, dy)


cdef tuple forward_call(object x, object running_mean, object running_var, object weight, object bias, bint train,
                        double momentum, double eps, object axis, object out, object num_threads, double correction,
                        int activation, double negative_slope, object residual, object mask, object sample_weight,
                        object masked_output, bint save, bint marks, int stacklevel):
    """y, save_mean, save_invstd, gate, taken: see `batch_norm_forward`.

    Of the numbers that many calls have in common it is known that they are some, not that they are in range.
    """
    cdef ndarray data = as_data(x, "x")
    cdef ndarray y, mean_array = None, var_array = None, save_mean = None, save_invstd = None
    cdef Call call = open_call(data, axis, num_threads)
    cdef Channels *v = &call.v
    cdef bint track = running_mean is not None, empty, taken
    check_running(running_mean, running_var, train)
    check_eps(eps, train)
    check_momentum(momentum)
    if correction != 0 and correction != 1:
        raise ValueError(f"correction must be 0 or 1, got {correction:g}")
    if save:
        save_mean = give_vector(call, &v.mean)
        save_invstd = give_vector(call, &v.invstd)
    v.eps = eps
    v.momentum = momentum
    read_parameters(call, weight, bias)
    use_activation(call, activation, negative_slope)
    read_weights(call, data, mask, sample_weight, train)
    call.job.zeroed = read_masked_output(masked_output) and call.job.mask != NULL
    empty = call.job.block_weights != NULL and v.count == 0     # nothing to take statistics of
    if track:
        read_vector(running_var, "running_var", call.channels, spare(call), negative=False)
        # (When training it is kept for the update, where the backward pass would keep something else.)
        read_vector(running_mean, "running_mean", call.channels, v.mean if not train or empty else call.job.gate_center)
    if train:
        if call.size > 0 and single(call):
            raise ValueError(f"Expected more than 1 value per channel when training, "
                             f"got input shape {(<object> data).shape}"
                             + ("" if call.count == 1 else " with 1 value of positive weight"
                                if call.job.mask != NULL or np.count_nonzero(call.weights) == 1
                                else " with 1 value of weight, beside which those of the others vanish"))
        if track:
            mean_array = as_running(running_mean, "running_mean", call.channels)
            var_array = as_running(running_var, "running_var", call.channels)
    y = as_out(out, data, None)
    describe_residual(call, residual, data, y)
    if marks and residual is not None and call.job.activation != 0:
        use_gate(call, new_gate(data))
    describe(&call.job.out, &call.layout, y)
    check_weights(call, y)
    if mean_array is not None:
        # Again, because an object that is an array may have done anything to them.
        as_running(mean_array, "running_mean", call.channels)
        as_running(var_array, "running_var", call.channels)
        check_apart(mean_array, "running_mean", var_array, "running_var")
        check_apart(y, "out", mean_array, "running_mean")
        check_apart(y, "out", var_array, "running_var")
    if empty and train:
        warnings.warn("mask leaves no value to normalize with: used "
                      + ("running_mean and running_var" if track else "mean 0 and variance 1") + ", updated nothing",
                      RuntimeWarning, stacklevel=stacklevel)

    taken = train and not empty and call.size > 0
    if train and not empty:
        if track:
            v.running_mean = call.job.gate_center
            v.running_var = spare(call)
            v.degrees = degrees_of_freedom(call, correction)
        execute(call, kernels.collect_stats[call.type], kernels.finish_training, kernels.normalize[call.type])
        if track and taken:
            write_vector(mean_array, v.running_mean)
            write_vector(var_array, v.running_var)
    else:
        if empty and not track:
            set_unit(v.mean, spare(call), call.channels)
        cybn_inverse_sqrt(spare(call), v.eps, v.invstd, call.channels)
        execute(call, NULL, kernels.finish_normalize, kernels.normalize[call.type])
    return y, save_mean, save_invstd, call.gate, taken


cdef tuple forward(object x, object running_mean, object running_var, object weight, object bias, object training,
                   object momentum, object eps, object axis, object out, object num_threads, object correction,
                   object activation, object negative_slope, object residual, object mask, object sample_weight,
                   object masked_output, bint save):
    """`forward_call` with numbers as they are given."""
    cdef bint train = truth(training, "training")
    cdef int number = activation_number(activation)
    return forward_call(x, running_mean, running_var, weight, bias, train, real_number(momentum, "momentum"),
                        real_number(eps, "eps"), axis, out, num_threads, real_number(correction, "correction"), number,
                        slope_of(number, negative_slope), residual, mask, sample_weight, masked_output, save, False, 2)


def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads, correction,
               activation, negative_slope, residual, mask, sample_weight, masked_output):
    y, *_ = forward(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads,
                    correction, activation, negative_slope, residual, mask, sample_weight, masked_output, False)
    return given(out, y)


def batch_norm_forward(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads,
                       correction, activation, negative_slope, residual, mask, sample_weight, masked_output):
    y, mean, invstd, *_ = forward(x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out,
                                  num_threads, correction, activation, negative_slope, residual, mask, sample_weight,
                                  masked_output, True)
    return given(out, y), mean, invstd


cdef tuple backward_call(object grad_output, object x, object save_mean, object save_invstd, object weight, bint train,
                         object axis, object out, object num_threads, object bias, int activation,
                         double negative_slope, object output, object mask, object sample_weight, bint with_residual,
                         ndarray gate):
    """grad_input, grad_weight, grad_bias, and with a residual its gradient. `gate`: as `forward_call` has made it."""
    cdef ndarray data = as_data(x, "x")
    cdef ndarray dy = as_same(grad_output, "grad_output", data), dx, gated = None
    cdef Call call = open_call(data, axis, num_threads)
    cdef Channels *v = &call.v
    read_parameters(call, weight, bias)
    read_statistics(call, save_mean, "save_mean", save_invstd, "save_invstd")
    use_activation(call, activation, negative_slope)
    read_weights(call, data, mask, sample_weight, train)
    # (First, since it is written first: the memory that died last may still be in a cache.)
    if with_residual:
        gated = new_gated(call, data)
    dx = as_out(out, data, dy)
    check_weights(call, dx)
    open_gate(call, output, gate, data, dx)
    describe(&call.job.dy, &call.layout, dy)
    describe(&call.job.out, &call.layout, dx)
    if v.count == 0:
        v.count = 1     # all is masked, and every sum 0
    if train:
        execute(call, kernels.backward_reduce[call.type], kernels.finish_backward, kernels.backward_input[call.type])
    else:
        execute(call, kernels.backward_reduce[call.type], kernels.finish_frozen, kernels.normalize[call.type])
    cdef ndarray grad_weight = new_vector(call.channels, call.dtype, v.sum_dy_xmu)
    cdef ndarray grad_bias = new_vector(call.channels, call.dtype, v.sum_dy)
    if gated is None:
        return dx, grad_weight, grad_bias
    return dx, grad_weight, grad_bias, gated


def batch_norm_backward(grad_output, x, save_mean, save_invstd, weight, training, axis, out, num_threads, bias,
                        activation, negative_slope, output, mask, sample_weight, return_grad_residual):
    cdef bint train = truth(training, "training"), with_residual = truth(return_grad_residual, "return_grad_residual")
    cdef int number = activation_number(activation)
    dx, *others = backward_call(grad_output, x, save_mean, save_invstd, weight, train, axis, out, num_threads, bias,
                                number, slope_of(number, negative_slope), output, mask, sample_weight, with_residual,
                                None)
    return given(out, dx), *others


def batch_norm_stats(x, axis, num_threads, mask, sample_weight):
    cdef ndarray data = as_data(x, "x")
    cdef Call call = open_call(data, axis, num_threads)
    read_weights(call, data, mask, sample_weight, True)
    if call.job.block_weights != NULL and call.v.count == 0:
        return 0, np.zeros(call.channels), np.zeros(call.channels)
    mean, m2 = give_vector(call, &call.v.mean), give_vector(call, &call.v.m2)
    execute(call, kernels.collect_stats[call.type], kernels.finish_moments, NULL)
    count = 0 if call.size == 0 else call.v.count if sample_weight is not None else int(call.v.count)
    return count, mean, m2


cdef Coefficients find_coefficients(Coefficients before, tuple vectors, double eps, Py_ssize_t channels):
    """Of running_mean, running_var, weight and bias: those of the call `before`, where they still hold."""
    check_running(vectors[0], vectors[1], False)
    check_eps(eps, False)
    return coefficients_of(before, vectors, eps, channels, kernels.finish_normalize)


cdef ndarray evaluate(ndarray x, object axis, object out, object num_threads, Coefficients coefficients, int activation,
                      double negative_slope, object residual, object mask, object sample_weight, object masked_output):
    """Normalize x with them."""
    cdef Call call = open_call(x, axis, num_threads)
    if call.channels != coefficients.channels:  # (num_threads may have been an object that does anything)
        raise ValueError(f"x must keep its shape during the call, got {(<object> x).shape} in the end")
    call.coefficients = coefficients
    coefficients.use(&call.job)
    use_activation(call, activation, negative_slope)
    return apply(call, x, NULL, residual, mask, sample_weight, masked_output, out)


def batch_norm_apply(x, mean, invstd, weight, bias, axis, out, num_threads, activation, negative_slope, residual, mask,
                     masked_output):
    cdef ndarray data = as_data(x, "x")
    cdef Call call = open_call(data, axis, num_threads)
    read_statistics(call, mean, "mean", invstd, "invstd")
    read_parameters(call, weight, bias)
    read_activation(call, activation, negative_slope)
    return given(out, apply(call, data, kernels.finish_normalize, residual, mask, None, masked_output, out))


cdef ndarray apply(Call call, ndarray x, finisher finish, object residual, object mask, object sample_weight,
                   object masked_output, object out):
    """Normalize x with statistics that are known: as `finish` makes coefficients of them, or as they have been made."""
    cdef ndarray y
    read_weights(call, x, mask, sample_weight, False)
    call.job.zeroed = read_masked_output(masked_output) and call.job.mask != NULL
    y = as_out(out, x, None)
    describe_residual(call, residual, x, y)
    describe(&call.job.out, &call.layout, y)
    check_weights(call, y)
    execute(call, NULL, finish, kernels.normalize[call.type])
    return y


def batch_norm_backward_reduce(grad_output, x, mean, axis, num_threads, invstd, weight, bias, activation,
                               negative_slope, output, mask):
    cdef ndarray data = as_data(x, "x")
    cdef ndarray dy = as_same(grad_output, "grad_output", data)
    cdef Call call = open_call(data, axis, num_threads)
    read_vector(mean, "mean", call.channels, call.v.mean)
    read_parameters(call, weight, bias)
    read_activation(call, activation, negative_slope)
    if invstd is not None:
        read_vector(invstd, "invstd", call.channels, call.v.invstd, negative=False)
    elif call.job.activation != 0 and output is None:
        raise ValueError("invstd or output must be given with an activation, got neither")
    read_weights(call, data, mask, None, False)
    open_gate(call, output, None, data, None)
    describe(&call.job.dy, &call.layout, dy)
    sums = give_vector(call, &call.v.sum_dy), give_vector(call, &call.v.sum_dy_xmu)
    execute(call, kernels.backward_reduce[call.type], kernels.finish_sums, NULL)
    return sums


def batch_norm_backward_apply(grad_output, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count, axis, out, num_threads,
                              bias, activation, negative_slope, output, mask, sample_weight, return_grad_residual):
    cdef ndarray data = as_data(x, "x")
    cdef ndarray dy = as_same(grad_output, "grad_output", data), dx, gated = None
    cdef Call call = open_call(data, axis, num_threads)
    cdef Channels *v = &call.v
    cdef bint with_residual = truth(return_grad_residual, "return_grad_residual")
    read_statistics(call, mean, "mean", invstd, "invstd")
    read_parameters(call, weight, bias)
    read_vector(sum_dy, "sum_dy", call.channels, v.sum_dy)
    read_vector(sum_dy_xmu, "sum_dy_xmu", call.channels, v.sum_dy_xmu)
    read_activation(call, activation, negative_slope)
    read_weights(call, data, mask, sample_weight, True)
    v.count = real_number(count, "count")
    if not v.count > 0 or not isfinite(v.count):
        raise ValueError(f"count must be a positive number of values per channel, got {count}")
    dx = as_out(out, data, dy)
    check_weights(call, dx)
    open_gate(call, output, None, data, dx)
    describe(&call.job.dy, &call.layout, dy)
    if with_residual:
        gated = new_gated(call, data)
    describe(&call.job.out, &call.layout, dx)
    execute(call, NULL, kernels.finish_backward_input, kernels.backward_input[call.type])
    return given(out, dx) if gated is None else (given(out, dx), gated)
