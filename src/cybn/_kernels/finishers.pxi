"""What stands between two sweeps: per channel, in double, slices become statistics, these the coefficients of a map.

For channels of one group, whose partial sums lie side by side. Compiled for each instruction set, as roots and
divisions take their time by the vector. The loops have their pointers in variables: read from a struct that they
might write to, gcc leaves them scalar.
"""
from libc.math cimport fabs
from libc.string cimport memcpy, memset

from cybn._kernels.kernels cimport Channels, Job, cybn_inverse_sqrt, cybn_outside, partial_sums

cdef double EXTREME = 18446744073709551616.0   # 2**64


cdef void finish_moments(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Mean and m2 of each channel from its slices: two passes over the slice means, exact to double rounding.

    Channels inside the loops: they lie side by side.
    """
    cdef const double *first = partial_sums(job, 0, c0)
    cdef const double *p
    cdef double *mean = v.mean + c0
    cdef double *m2 = v.m2 + c0
    cdef Py_ssize_t c, s, pitch = job.pitch, n = c1 - c0
    cdef double count, d, total = 0
    if job.slices == 1:
        for c in range(n):
            d = first[c] - first[c]     # 0, or NaN: what is infinite has no mean, as below
            mean[c] = first[c] + d
            m2[c] = first[pitch + c] + d
        return
    for c in range(n):
        mean[c] = 0
        m2[c] = 0
    for s in range(job.slices):
        p = partial_sums(job, s, c0)
        count = job.counts[s]
        total += count
        for c in range(n):
            mean[c] += count * (p[c] - first[c])
    for c in range(n):
        mean[c] = first[c] + mean[c] / total
    for s in range(job.slices):
        p = partial_sums(job, s, c0)
        count = job.counts[s]
        for c in range(n):
            d = p[c] - mean[c]
            m2[c] += p[pitch + c] + count * (d * d)


cdef bint set_centers(Job *job, const double *mean, const double *invstd, const double *weight,
                      Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """center and factor, and scale = invstd * weight; NULL: mean 0, weight 1. Return whether a factor may not be 1.

    x is scaled by a power of two where x - mean would overflow in float32, or the scale leave its normal range.
    Elsewhere the factor is 1, which costs no bit and no time.
    """
    cdef double *center = job.center
    cdef double *factor = job.factor
    cdef double *scale = job.scale
    cdef double up
    cdef Py_ssize_t c
    if mean != NULL:
        memcpy(center + c0, mean + c0, (c1 - c0) * sizeof(double))
    else:
        memset(center + c0, 0, (c1 - c0) * sizeof(double))
    if weight != NULL:
        for c in range(c0, c1):
            scale[c] = invstd[c] * weight[c]
    else:
        memcpy(scale + c0, invstd + c0, (c1 - c0) * sizeof(double))
    for c in range(c0, c1):
        factor[c] = 1
    if not (cybn_outside(center + c0, c1 - c0, -1e30, 1e30) or cybn_outside(invstd + c0, c1 - c0, 1e-30, 1e30)):
        return False
    for c in range(c0, c1):
        up = 1
        if fabs(center[c]) > 1e30 or fabs(invstd[c]) < 1e-30:
            up = EXTREME
        elif fabs(invstd[c]) > 1e30 and fabs(center[c]) < 1e10:
            up = 1 / EXTREME
        factor[c] = 1 / up
        center[c] *= factor[c]
        scale[c] *= up
    return True


cdef void finish_normalize(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """mean and invstd -> the coefficients of `normalize`."""
    set_centers(job, v.mean, v.invstd, v.weight, c0, c1)
    if v.bias != NULL:
        memcpy(job.offset + c0, v.bias + c0, (c1 - c0) * sizeof(double))
    else:
        memset(job.offset + c0, 0, (c1 - c0) * sizeof(double))


cdef void finish_training(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Slices -> mean, m2, invstd -> the coefficients of `normalize`; and the running statistics."""
    cdef const double *mean = v.mean
    cdef const double *m2 = v.m2
    cdef double *running_mean = v.running_mean
    cdef double *running_var = v.running_var
    cdef double *var = v.invstd
    cdef double new = v.momentum, keep = 1 - new, degrees = v.degrees, count = v.count
    cdef Py_ssize_t c
    finish_moments(job, v, c0, c1)
    if running_mean != NULL:
        for c in range(c0, c1):
            running_mean[c] = keep * running_mean[c] + new * mean[c]
            running_var[c] = keep * running_var[c] + new * (m2[c] / degrees)
    for c in range(c0, c1):
        var[c] = m2[c] / count
    cybn_inverse_sqrt(var + c0, v.eps, v.invstd + c0, c1 - c0)
    finish_normalize(job, v, c0, c1)


cdef void finish_sums(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Slices -> sum_dy, sum_dy_xmu."""
    cdef const double *first = partial_sums(job, 0, c0)
    cdef const double *p
    cdef double *sum_dy = v.sum_dy + c0
    cdef double *sum_dy_xmu = v.sum_dy_xmu + c0
    cdef Py_ssize_t c, s, pitch = job.pitch, n = c1 - c0
    for c in range(n):
        sum_dy[c] = 0 + first[c]    # (of a negative zero, too, the sum is 0)
        sum_dy_xmu[c] = 0 + first[pitch + c]
    for s in range(1, job.slices):
        p = partial_sums(job, s, c0)
        for c in range(n):
            sum_dy[c] += p[c]
            sum_dy_xmu[c] += p[pitch + c]


cdef void finish_backward_input(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sums -> the coefficients of `backward_input`."""
    cdef const double *invstd = v.invstd
    cdef const double *sum_dy = v.sum_dy
    cdef const double *sum_dy_xmu = v.sum_dy_xmu
    cdef double *offset = job.offset
    cdef double *slope = job.slope
    cdef double count = v.count
    cdef Py_ssize_t c
    for c in range(c0, c1):
        offset[c] = sum_dy[c] / count
        slope[c] = invstd[c] * invstd[c] * (sum_dy_xmu[c] / count)
    if set_centers(job, v.mean, invstd, v.weight, c0, c1):
        for c in range(c0, c1):
            slope[c] /= job.factor[c]


cdef void set_grad_weight(const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """sum_dy_xmu -> the gradient of weight, in its place."""
    cdef const double *invstd = v.invstd
    cdef double *products = v.sum_dy_xmu
    cdef Py_ssize_t c
    for c in range(c0, c1):
        products[c] *= invstd[c]


cdef void finish_backward(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Slices -> the coefficients of `backward_input`, and the gradients of the parameters."""
    finish_sums(job, v, c0, c1)
    finish_backward_input(job, v, c0, c1)
    set_grad_weight(v, c0, c1)


cdef void finish_frozen(Job *job, const Channels *v, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Constants as statistics: dx = dy * weight * invstd, which is `normalize` applied to dy with mean 0."""
    cdef const double *invstd = v.invstd
    cdef const double *weight = v.weight
    cdef double *offset = job.offset
    cdef Py_ssize_t c
    finish_sums(job, v, c0, c1)
    for c in range(c0, c1):
        offset[c] = invstd[c] * weight[c] if weight != NULL else invstd[c]
    set_centers(job, NULL, offset, NULL, c0, c1)
    memset(offset + c0, 0, (c1 - c0) * sizeof(double))
    set_grad_weight(v, c0, c1)
