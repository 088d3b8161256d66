"""From a Python object to what the kernels read: conversion, checks that name argument, expected and got, layout."""
import operator

import numpy as np

cimport numpy as cnp
from libc.math cimport INFINITY, isfinite
from libc.string cimport memcpy
from numpy cimport ndarray

from cybn._kernels.kernels cimport (
    GATE_ROOM,
    Job,
    Operand,
    Weights,
    cybn_flag,
    cybn_outside,
)
from cybn._memory cimport dense_copy, new_bytes, new_dense, new_like

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    cnp.npy_intp *PyArray_STRIDES(ndarray) nogil
    cnp.npy_intp *PyArray_DIMS(ndarray) nogil
    char *PyArray_BYTES(ndarray) nogil
    bint PyArray_ISALIGNED(ndarray) nogil
    bint PyArray_ISCARRAY_RO(ndarray) nogil
    bint PyArray_ISNOTSWAPPED(ndarray) nogil
    bint PyArray_ISWRITEABLE(ndarray) nogil
    bint PyArray_SAMESHAPE(ndarray, ndarray) nogil


cdef str kind_of(ndarray a, object value):
    """What to call a value, and the array that NumPy made of it, in "got ..."."""
    cdef object dtype = a.dtype
    if dtype == object and not isinstance(value, np.ndarray):
        return type(value).__name__
    return f"an array of {dtype}" if dtype.isnative else f"a byte-swapped array of {dtype}"


cdef bint is_real(ndarray a):
    cdef int dtype = cnp.PyArray_TYPE(a)
    return (dtype == cnp.NPY_FLOAT32 or dtype == cnp.NPY_FLOAT64) and PyArray_ISNOTSWAPPED(a)


cdef ndarray view_array(object value, str name, bint writeable, str wanted=None):
    """`value` as a plain ndarray; without a copy if it is to be written to."""
    if type(value) is ndarray:
        return value
    if wanted is None:
        wanted = "a bool array" if name == "mask" else "a float32 or float64 array"
    if issubclass(type(value), np.ma.MaskedArray):
        raise TypeError(f"{name} must be {wanted}, got a masked array (its mask would be lost)")
    kind = type(value).__name__
    try:
        if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value, copy=False if writeable else None)
    except MemoryError:
        raise
    except Exception as error:      # of the object, which may raise what it likes
        if writeable:
            raise TypeError(f"{name} must be viewable as an array without a copy, got {kind}") from error
        raise TypeError(f"{name} must be {wanted}, got {kind} ({error})") from error


cdef ndarray as_data(object value, str name):
    """A float32 or float64 array of any layout."""
    cdef ndarray a = view_array(value, name, False)
    if not is_real(a):
        raise TypeError(f"{name} must be a float32 or float64 array, got {kind_of(a, value)}")
    return a


cdef str shape_of(ndarray a):
    return str((<object> a).shape)


cdef ndarray as_same(object value, str name, ndarray x):
    """An array of x's dtype and shape."""
    cdef ndarray a = as_data(value, name)
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(x):
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {a.dtype}")
    if not PyArray_SAMESHAPE(a, x):
        raise ValueError(f"{name} must have the shape of x, {shape_of(x)}, got {shape_of(a)}")
    return a


cdef object as_integer(object value, str name):
    """As a Python int."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    except Exception as error:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} ({error})") from error


cdef int channel_axis(ndarray x, object axis) except -1:
    cdef Py_ssize_t index, ndim
    axis = as_integer(axis, "axis")
    ndim = cnp.PyArray_NDIM(x)
    if not -ndim <= axis < ndim:
        raise ValueError(f"x must have an axis {axis} for the channels, got shape {shape_of(x)}")
    index = axis
    return index + ndim if index < 0 else index


# -------------------------------------------------------------------------------------------------------------- layout

cdef inline Py_ssize_t magnitude(Py_ssize_t a) noexcept:
    return -a if a < 0 else a


cdef void sort_axes(ndarray a, Layout *layout) noexcept:
    """Axes of size other than 1 by descending stride; equal ones in index order (NumPy's order 'K')."""
    cdef Py_ssize_t d, i
    cdef cnp.npy_intp *strides = PyArray_STRIDES(a)
    layout.ndim = 0
    for d in range(cnp.PyArray_NDIM(a)):
        if PyArray_DIMS(a)[d] == 1:
            continue
        i = layout.ndim
        while i > 0 and magnitude(strides[layout.axes[i - 1]]) < magnitude(strides[d]):
            layout.axes[i] = layout.axes[i - 1]
            i -= 1
        layout.axes[i] = <int> d
        layout.ndim += 1
    for i in range(layout.ndim):
        layout.sides[i] = PyArray_DIMS(a)[layout.axes[i]]


cdef void lay_out(Job *job, Layout *layout, ndarray x, int axis) noexcept:
    """Reduce x, of any rank and memory order, to (outer, channels, inner)."""
    cdef Py_ssize_t d
    cdef bint seen = False
    sort_axes(x, layout)
    layout.rank = cnp.PyArray_NDIM(x)
    layout.type = cnp.PyArray_TYPE(x)
    job.channels = PyArray_DIMS(x)[axis]
    job.outer = 1
    job.inner = 1
    job.itemsize = cnp.PyArray_ITEMSIZE(x)
    if job.channels == 1:
        # No channel axis to speak of: one run.
        job.inner = cnp.PyArray_SIZE(x)
        return
    for d in range(layout.ndim):
        if layout.axes[d] == axis:
            seen = True
        elif seen:
            job.inner *= PyArray_DIMS(x)[layout.axes[d]]
        else:
            job.outer *= PyArray_DIMS(x)[layout.axes[d]]


cdef int check_layout(const Layout *layout, ndarray a) except -1:
    """Whether `a` is what was laid out: code of other arguments, as `__array__`, may have changed it since."""
    cdef Py_ssize_t d
    cdef bint same = cnp.PyArray_NDIM(a) == layout.rank and cnp.PyArray_TYPE(a) == layout.type
    if same:
        for d in range(layout.ndim):
            same &= PyArray_DIMS(a)[layout.axes[d]] == layout.sides[d]
    if not same:
        raise ValueError("x, and what has its shape, must keep shape and dtype during the call, "
                         f"got {a.dtype} of shape {shape_of(a)} in the end")
    return 0


cdef int describe(Operand *op, const Layout *layout, ndarray a) except -1:
    """The operand for an array of x's shape, traversed in x's memory order."""
    cdef Py_ssize_t d, n = 0, size, stride
    check_layout(layout, a)
    op.data = PyArray_BYTES(a)
    for d in range(layout.ndim):
        size = PyArray_DIMS(a)[layout.axes[d]]
        stride = PyArray_STRIDES(a)[layout.axes[d]]
        if n > 0 and op.stride[n - 1] == stride * size:
            op.shape[n - 1] *= size
            op.stride[n - 1] = stride
        else:
            op.shape[n] = size
            op.stride[n] = stride
            n += 1
    if n == 0:
        op.shape[0] = 1
        op.stride[0] = cnp.PyArray_ITEMSIZE(a)
        n = 1
    op.ndim = n
    op.direct = n == 1 and op.stride[0] == cnp.PyArray_ITEMSIZE(a) and PyArray_ISALIGNED(a)
    return 0


# ------------------------------------------------------------------------------------------------------------- weights

cdef tuple spread_shape(ndarray a, str name, tuple rest):
    """The shape with which `a` goes along the axes `rest`: NumPy's rule, or samples first where that does not fit."""
    cdef tuple shape = (<object> a).shape
    cdef tuple ones = (1,) * (len(rest) - len(shape))
    fitting = [candidate for candidate in dict.fromkeys((ones + shape, shape + ones))
               if len(candidate) == len(rest) and all(n in (1, side) for n, side in zip(candidate, rest))]
    if not fitting:
        raise ValueError(f"{name} must broadcast to the shape of x without its channel axis, {rest}, got shape {shape}")
    if len(fitting) > 1:
        raise ValueError(f"{name} must have an axis for each of {rest}, the shape of x without its channel axis, "
                         f"to tell {fitting[0]} from {fitting[1]}, got shape {shape}")
    return fitting[0]


cdef ndarray as_weights(object mask, object sample_weight, ndarray x, int axis, const Layout *layout):
    """Weights as a dense and aligned array of x's dtype, or a mask as one of flags.

    An element for each of x's without the channel axis, in the order in which those lie in memory.
    """
    cdef str name = "mask" if sample_weight is None else "sample_weight"
    cdef object value = mask if sample_weight is None else sample_weight
    cdef ndarray a = view_array(value, name, False)
    cdef Py_ssize_t d, ndim = cnp.PyArray_NDIM(x)
    check_layout(layout, x)
    if mask is not None and sample_weight is not None:
        raise ValueError("mask and sample_weight must not be given together, got both")
    if sample_weight is None and cnp.PyArray_TYPE(a) != cnp.NPY_BOOL:
        raise TypeError(f"mask must be a bool array, got {kind_of(a, value)}")
    if sample_weight is not None and not is_real(a):
        raise TypeError(f"sample_weight must be a float32 or float64 array, got {kind_of(a, value)}")
    cdef bint usual = cnp.PyArray_NDIM(a) == ndim - 1, sorted_axes = True
    for d in range(ndim - 1 if usual else 0):
        usual &= PyArray_DIMS(a)[d] == PyArray_DIMS(x)[d + (d >= axis)]
    for d in range(1, layout.ndim):
        sorted_axes &= layout.axes[d - 1] < layout.axes[d]
    # (Tuples of shapes, and what follows from them, take longer than the normalization of a small array.)
    if not usual:
        rest = (<object> x).shape[:axis] + (<object> x).shape[axis + 1:]
        a = np.broadcast_to((<object> a).reshape(spread_shape(a, name, rest)), rest)
    if not sorted_axes:
        # Memory order: the axes that the layout leaves out have one element.
        order = [layout.axes[d] for d in range(layout.ndim) if layout.axes[d] != axis]
        order = [d for d in range(ndim) if d != axis and d not in order] + order
        a = (<object> a).transpose([d - (d > axis) for d in order])
    if sample_weight is None:
        return as_flags(a)
    if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT64 and cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32:
        with np.errstate(over="ignore", under="ignore"):    # what is too large is refused below
            a = dense_copy(a, (<object> x).dtype)
    elif cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(x) or not PyArray_ISCARRAY_RO(a):
        a = dense_copy(a, (<object> x).dtype)
    return a


cdef cnp.dtype FLAGS = np.dtype(np.int8)


cdef ndarray as_flags(ndarray mask):
    """A copy, of bytes that the kernels widen to masks of bits: a quarter of what numbers take from the caches."""
    cdef bint dense = PyArray_ISCARRAY_RO(mask)
    cdef ndarray flags = new_dense(mask, FLAGS) if dense else dense_copy(mask, FLAGS)
    cybn_flag(PyArray_BYTES(mask if dense else flags), <signed char *> PyArray_BYTES(flags), cnp.PyArray_SIZE(flags))
    return flags


cdef int check_weight_values(ndarray weights, const Weights *found) except -1:
    """(As the kernels have them: in x's type.)"""
    if found.least >= 0 and isfinite(found.sum):
        return 0
    wrong = (<object> weights)[~((weights >= 0) & (weights < np.inf))]
    if wrong.size:
        raise ValueError(f"sample_weight must be finite and not negative, got {wrong[0]}")
    raise ValueError(f"sample_weight must have a finite sum, got {found.sum}")


# ------------------------------------------------------------------------------------------------------------- results

cdef bint overlaps_itself(ndarray a):
    """Whether two elements of `a` may share memory: an axis steps less than the extent of the faster ones."""
    cdef Layout layout
    cdef Py_ssize_t d, axis, extent = cnp.PyArray_ITEMSIZE(a)
    if cnp.PyArray_SIZE(a) == 0:
        return False
    sort_axes(a, &layout)
    d = layout.ndim
    while d > 0:
        d -= 1
        axis = layout.axes[d]
        if magnitude(PyArray_STRIDES(a)[axis]) < extent:
            return True
        extent += (PyArray_DIMS(a)[axis] - 1) * magnitude(PyArray_STRIDES(a)[axis])
    return False


cdef bint same_memory(ndarray a, ndarray b):
    """The same elements at the same places. (Shapes are known to be equal.)"""
    cdef Py_ssize_t d
    if PyArray_BYTES(a) != PyArray_BYTES(b):
        return False
    for d in range(cnp.PyArray_NDIM(a)):
        if PyArray_DIMS(a)[d] != 1 and PyArray_STRIDES(a)[d] != PyArray_STRIDES(b)[d]:
            return False
    return True


cdef void bounds(ndarray a, char **first, char **last) noexcept:
    """The first byte of an array and the one after its last."""
    cdef Py_ssize_t d, extent
    first[0] = PyArray_BYTES(a)
    last[0] = first[0] + cnp.PyArray_ITEMSIZE(a)
    for d in range(cnp.PyArray_NDIM(a)):
        extent = (PyArray_DIMS(a)[d] - 1) * PyArray_STRIDES(a)[d]
        if extent < 0:
            first[0] += extent
        else:
            last[0] += extent


cdef bint overlap(ndarray a, ndarray b):
    cdef char *a_first
    cdef char *a_last
    cdef char *b_first
    cdef char *b_last
    if cnp.PyArray_SIZE(a) == 0:
        return False
    bounds(a, &a_first, &a_last)
    bounds(b, &b_first, &b_last)
    if a_last <= b_first or b_last <= a_first:
        return False    # by far the most usual case: not worth a call to NumPy
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


cdef int check_overlap(ndarray out, ndarray other, str name) except -1:
    if not same_memory(out, other) and overlap(out, other):
        raise ValueError(f"out must be {name} itself or share no memory with it, got a partly overlapping array")
    return 0


cdef int check_apart(ndarray a, str name, ndarray other, str other_name) except -1:
    if overlap(a, other):
        raise ValueError(f"{name} must share no memory with {other_name}, got overlapping arrays")
    return 0


cdef inline Py_ssize_t gate_size(ndarray x) noexcept:
    return cnp.PyArray_SIZE(x) // 8 + 1 + GATE_ROOM


cdef ndarray new_gate(ndarray x):
    """Room for a bit for each element (gate.h)."""
    return new_bytes(gate_size(x))


cdef int check_gate(ndarray gate, ndarray x) except -1:
    """Whether it may be x's: the caller has had x in between."""
    if cnp.PyArray_SIZE(gate) != gate_size(x):
        raise ValueError(f"x must keep its shape until backward, got {shape_of(x)} in the end")
    return 0


cdef ndarray as_out(object out, ndarray x, ndarray grad_output):
    """A new array in x's memory layout, or the caller's `out`, which may be x or grad_output (if any) itself."""
    cdef ndarray a
    if out is None:
        return new_like(x)
    a = view_array(out, "out", True)
    if not is_real(a):
        raise TypeError(f"out must be a float32 or float64 array, got {kind_of(a, out)}")
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(x):
        raise TypeError(f"out must have the dtype of x, {x.dtype}, got {a.dtype}")
    if not PyArray_SAMESHAPE(a, x):
        raise ValueError(f"out must have the shape of x, {shape_of(x)}, got {shape_of(a)}")
    if not PyArray_ISWRITEABLE(a):
        raise ValueError("out must be writeable, got a read-only array")
    if overlaps_itself(a):
        raise ValueError(f"out must not overlap itself, got strides {(<object> a).strides} for shape {shape_of(a)}")
    if grad_output is not None:
        check_overlap(a, grad_output, "grad_output")
    check_overlap(a, x, "x")
    return a


# ------------------------------------------------------------------------------------------------------------- vectors
# Per-channel arrays cost nothing beside the data: they are read into double and written back from it.

cdef ndarray as_vector(object value, str name, Py_ssize_t channels, bint writeable):
    cdef ndarray a = view_array(value, name, writeable)
    if not is_real(a):
        raise TypeError(f"{name} must be a float32 or float64 array, got {kind_of(a, value)}")
    if cnp.PyArray_NDIM(a) != 1 or PyArray_DIMS(a)[0] != channels:
        raise ValueError(f"{name} must have shape ({channels},), one value per channel, got shape {shape_of(a)}")
    return a


cdef bint is_dense_vector(ndarray a, Py_ssize_t channels) noexcept:
    return cnp.PyArray_NDIM(a) == 1 and PyArray_DIMS(a)[0] == channels and PyArray_ISCARRAY_RO(a)


cdef int read_vector(object value, str name, Py_ssize_t channels, double *to, bint negative=True) except -1:
    """Its values, as doubles. Return the type they had. `negative`: whether any may be."""
    cdef ndarray a = as_vector(value, name, channels, False)
    cdef char *p = PyArray_BYTES(a)
    cdef Py_ssize_t c, stride = PyArray_STRIDES(a)[0]
    cdef float single
    if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 and stride == sizeof(float):
        for c in range(channels):
            memcpy(&single, p + c * sizeof(float), sizeof(float))   # a constant step: vectorised
            to[c] = single
    elif cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32:
        for c in range(channels):
            memcpy(&single, p + c * stride, sizeof(float))
            to[c] = single
    elif stride == sizeof(double):
        memcpy(to, p, channels * sizeof(double))
    else:
        for c in range(channels):
            memcpy(to + c, p + c * stride, sizeof(double))
    if not negative and cybn_outside(to, channels, 0, INFINITY):
        for c in range(channels):
            if to[c] < 0:
                raise ValueError(f"{name} must not be negative, got {to[c]} in channel {c}")
    return cnp.PyArray_TYPE(a)


cdef ndarray as_running(object value, str name, Py_ssize_t channels):
    """A per-channel array that the call will update in place."""
    cdef ndarray a = as_vector(value, name, channels, True)
    if not PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name} must be writeable when training, got a read-only array")
    if overlaps_itself(a):
        raise ValueError(f"{name} must not overlap itself, got strides {(<object> a).strides} for shape {shape_of(a)}")
    return a


cdef void write_vector(ndarray to, const double *values) noexcept:
    cdef char *p = PyArray_BYTES(to)
    cdef Py_ssize_t c, channels = PyArray_DIMS(to)[0], stride = PyArray_STRIDES(to)[0]
    cdef float single
    if cnp.PyArray_TYPE(to) == cnp.NPY_FLOAT32 and stride == sizeof(float):
        for c in range(channels):
            single = <float> values[c]
            memcpy(p + c * sizeof(float), &single, sizeof(float))   # a constant step: vectorised
    elif cnp.PyArray_TYPE(to) == cnp.NPY_FLOAT32:
        for c in range(channels):
            single = <float> values[c]
            memcpy(p + c * stride, &single, sizeof(float))
    elif stride == sizeof(double):
        memcpy(p, values, channels * sizeof(double))
    else:
        for c in range(channels):
            memcpy(p + c * stride, values + c, sizeof(double))


cdef ndarray new_vector(Py_ssize_t channels, int dtype, const double *values):
    cdef cnp.npy_intp n = channels
    cdef ndarray a = cnp.PyArray_EMPTY(1, &n, dtype, 0)
    write_vector(a, values)
    return a
