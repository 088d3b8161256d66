from numpy cimport ndarray

cdef ndarray new_like(ndarray x)
