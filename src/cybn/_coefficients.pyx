"""What an evaluation needs of a layer's vectors, made once and kept for as long as they hold the same bytes.

Conversions, a root and a division take 4 ns a channel, as much as some ten rows of x; to compare the vectors with those
of the call before takes half a nanosecond. Compared they must be, all of them in every call: their owner may write
into them at any time, and no array tells.
"""
cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.string cimport memcmp, memset
from numpy cimport ndarray

from cybn._arrays cimport as_vector, is_dense_vector, read_vector
from cybn._kernels.kernels cimport Channels, Job, cybn_inverse_sqrt, finisher

cnp.import_array()

NAMES = ("running_mean", "running_var", "weight", "bias")


@cython.final
cdef class Coefficients:
    """Never changed once it is made: threads may use it while others replace it."""

    def __dealloc__(self):
        PyMem_RawFree(self.memory)

    cdef void use(self, Job *job) noexcept:
        job.center = self.memory
        job.factor = self.memory + self.channels
        job.scale = self.memory + 2 * self.channels
        job.offset = self.memory + 3 * self.channels


cdef bint same(ndarray kept, object vector, Py_ssize_t channels):
    """Whether a vector has the type and the bytes of the copy that was kept of it."""
    if kept is None:
        return vector is None
    return (type(vector) is ndarray and is_dense_vector(vector, channels)
            and cnp.PyArray_TYPE(kept) == cnp.PyArray_TYPE(vector)
            and memcmp(cnp.PyArray_DATA(kept), cnp.PyArray_DATA(vector), channels * cnp.PyArray_ITEMSIZE(kept)) == 0)


cdef Coefficients coefficients_of(Coefficients before, tuple vectors, double eps, Py_ssize_t channels,
                                  finisher finish_normalize):
    """Those of running_mean, running_var, weight and bias: the ones of `before`, if that may be."""
    if (before is None or before.channels != channels or before.eps != eps
            or not (same(before.vectors[0], vectors[0], channels) and same(before.vectors[1], vectors[1], channels)
                    and same(before.vectors[2], vectors[2], channels)
                    and same(before.vectors[3], vectors[3], channels))):
        return new_coefficients(vectors, eps, channels, finish_normalize)
    return before


cdef Coefficients new_coefficients(tuple vectors, double eps, Py_ssize_t channels, finisher finish_normalize):
    cdef Coefficients self = Coefficients.__new__(Coefficients)
    cdef Channels v
    cdef Job job
    cdef double *given      # mean, invstd, weight, bias
    cdef Py_ssize_t i
    # Of copies: who writes into the vectors meanwhile must not make coefficients of other values than are kept.
    self.vectors = tuple([None if vector is None else as_vector(vector, name, channels, False).copy()
                          for vector, name in zip(vectors, NAMES)])
    self.eps = eps
    self.channels = channels
    self.memory = <double *> PyMem_RawMalloc(8 * channels * sizeof(double))
    if self.memory == NULL:
        raise MemoryError(f"no memory for the coefficients of {channels} channels")
    memset(&v, 0, sizeof(Channels))
    memset(&job, 0, sizeof(Job))
    self.use(&job)
    given = self.memory + 4 * channels
    for i in range(4):
        if self.vectors[i] is not None:
            read_vector(self.vectors[i], NAMES[i], channels, given + i * channels, negative=i != 1)
    v.mean = given
    v.invstd = given + channels
    v.weight = given + 2 * channels if vectors[2] is not None else NULL
    v.bias = given + 3 * channels if vectors[3] is not None else NULL
    cybn_inverse_sqrt(v.invstd, eps, v.invstd, channels)
    finish_normalize(&job, &v, 0, channels)
    return self
