from numpy cimport ndarray

cdef ndarray new_like(ndarray x)
cdef ndarray dense_copy(ndarray a, ndarray x)
