cimport numpy as cnp
from numpy cimport ndarray

cdef ndarray new_like(ndarray x)
cdef ndarray new_bytes(cnp.npy_intp n)
cdef ndarray new_dense(ndarray a, cnp.dtype dtype)
cdef ndarray dense_copy(ndarray a, cnp.dtype dtype)
