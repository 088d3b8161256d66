"""Batch normalization in plain NumPy: what every function of cybn computes, to be read next to a lecture.

The same functions with the same signatures as `cybn` itself, computing in the precision of their input. Given float64
copies they are the oracle of the tests; given the arrays that cybn gets they are the baseline of the benchmarks. The
arguments that steer compiled code (`num_threads`) are accepted and change nothing, and input is trusted: cybn checks
what is not checked here.

The notation is that of Ioffe & Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", algorithm 1, per channel, over the m values of a mini-batch::

    mu      = 1/m sum x
    sigma^2 = 1/m sum (x - mu)^2
    x_hat   = (x - mu) / sqrt(sigma^2 + eps)
    y       = gamma x_hat + beta              gamma: weight, beta: bias
"""

from typing import NamedTuple

import numpy as np

__all__ = [
    "Moments",
    "batch_norm",
    "batch_norm_apply",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_forward",
    "batch_norm_stats",
]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of each channel: what can be merged exactly, unlike a variance.

    Attributes
    ----------
    count : int
        Values per channel.
    mean : ndarray of shape (C,), float64
        ``1/count sum x``.
    m2 : ndarray of shape (C,), float64
        ``sum (x - mean)**2``.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray

    def var(self, correction=0):
        """Variance ``m2 / (count - correction)``: 0 for the biased one that normalizes, 1 for the unbiased one.

        Parameters
        ----------
        correction : int, default 0
            What is taken from the count.

        Returns
        -------
        ndarray of shape (C,), float64
            NaN where no degree of freedom is left.
        """
        freedom = self.count - correction
        return self.m2 / freedom if freedom > 0 else np.full_like(self.m2, np.nan)

    def invstd(self, eps=1e-5):
        """``1 / sqrt(var() + eps)``, the factor that normalizes; 0 where ``var() + eps`` is 0.

        Parameters
        ----------
        eps : float, default 1e-5
            Added to the variance.

        Returns
        -------
        ndarray of shape (C,), float64
        """
        return _inverse_std(self.var(), eps)

    def merge(self, *others):
        """Moments of all the data that `self` and `others` describe.

        Exact up to float64 rounding: Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for
        computing sample variances".

        Parameters
        ----------
        *others : Moments
            Of the same channels, each from its own part of the data. Empty parts change nothing.

        Returns
        -------
        Moments
        """
        total = self
        for other in others:
            count = total.count + other.count
            if other.count == 0:
                continue
            if total.count == 0:
                total = other
                continue
            delta = other.mean - total.mean
            total = Moments(
                count,
                total.mean + delta * (other.count / count),
                total.m2 + other.m2 + delta**2 * (total.count * other.count / count),
            )
        return total


def batch_norm_stats(x, *, axis=1, num_threads=None):
    """Mean and squared deviations of each channel; see `cybn.batch_norm_stats`."""
    others = _other_axes(x, axis)
    count = x.size // x.shape[axis] if x.size else 0
    if count == 0:
        return Moments(0, np.zeros(x.shape[axis]), np.zeros(x.shape[axis]))
    mean = x.mean(axis=others, keepdims=True)
    m2 = ((x - mean) ** 2).sum(axis=others)
    return Moments(count, mean.reshape(-1).astype(np.float64), m2.astype(np.float64))


def batch_norm_apply(x, mean, invstd, weight=None, bias=None, *, axis=1, out=None, num_threads=None):
    """``(x - mean) * invstd * weight + bias``; see `cybn.batch_norm_apply`."""
    x_hat = (x - _along(mean, x, axis)) * _along(invstd, x, axis)
    y = x_hat
    if weight is not None:
        y = y * _along(weight, x, axis)
    if bias is not None:
        y = y + _along(bias, x, axis)
    return _deliver(y, out)


def batch_norm_forward(
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
    *,
    axis=1,
    out=None,
    num_threads=None,
    correction=1,
):
    """Normalize, and keep what `batch_norm_backward` needs; see `cybn.batch_norm_forward`."""
    if training:
        moments = batch_norm_stats(x, axis=axis)
        mean, invstd = moments.mean, moments.invstd(eps) if moments.count else np.zeros_like(moments.mean)
    else:
        mean = np.asarray(running_mean, np.float64)
        invstd = _inverse_std(np.asarray(running_var, np.float64), eps)
    y = batch_norm_apply(x, mean, invstd, weight, bias, axis=axis, out=out)
    if training and running_mean is not None and moments.count:
        running_mean[...] = (1 - momentum) * running_mean + momentum * mean
        running_var[...] = (1 - momentum) * running_var + momentum * moments.var(correction)
    return y, mean, invstd


def batch_norm(
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    axis=1,
    out=None,
    num_threads=None,
    correction=1,
):
    """Normalize; see `cybn.batch_norm`."""
    y, _, _ = batch_norm_forward(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        axis=axis,
        out=out,
        correction=correction,
    )
    return y


def batch_norm_backward_reduce(grad_output, x, mean, *, axis=1, num_threads=None):
    """The two sums of the backward pass; see `cybn.batch_norm_backward_reduce`."""
    others = _other_axes(x, axis)
    sum_dy = grad_output.sum(axis=others)
    sum_dy_xmu = (grad_output * (x - _along(mean, x, axis))).sum(axis=others)
    return sum_dy.astype(np.float64), sum_dy_xmu.astype(np.float64)


def batch_norm_backward_apply(
    grad_output, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count, *, axis=1, out=None, num_threads=None
):
    """The gradient of x from the two sums; see `cybn.batch_norm_backward_apply`."""
    weight = np.ones_like(invstd) if weight is None else weight
    x_hat = (x - _along(mean, x, axis)) * _along(invstd, x, axis)
    mean_dy = _along(np.asarray(sum_dy) / count, x, axis)
    mean_dy_x_hat = _along(np.asarray(sum_dy_xmu) * invstd / count, x, axis)
    return _deliver((grad_output - mean_dy - x_hat * mean_dy_x_hat) * _along(weight * invstd, x, axis), out)


def batch_norm_backward(
    grad_output, x, save_mean, save_invstd, weight=None, training=True, *, axis=1, out=None, num_threads=None
):
    """Gradients of x, weight and bias; see `cybn.batch_norm_backward`."""
    sum_dy, sum_dy_xmu = batch_norm_backward_reduce(grad_output, x, save_mean, axis=axis)
    gamma = np.ones_like(save_invstd) if weight is None else weight
    if training:
        count = max(x.size // max(x.shape[axis], 1), 1)
        grad_input = batch_norm_backward_apply(
            grad_output, x, save_mean, save_invstd, weight, sum_dy, sum_dy_xmu, count, axis=axis, out=out
        )
    else:
        # The statistics are constants: no gradient flows through them.
        grad_input = _deliver(grad_output * _along(gamma * save_invstd, x, axis), out)
    dtype = x.dtype if weight is None else weight.dtype
    return grad_input, (sum_dy_xmu * save_invstd).astype(dtype), sum_dy.astype(dtype)


def _other_axes(x, axis):
    return tuple(d for d in range(x.ndim) if d != axis % x.ndim)


def _along(vector, x, axis):
    """A per-channel vector, in x's precision, shaped to broadcast along x's channel axis."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(vector, x.dtype).reshape(shape)


def _inverse_std(var, eps):
    total = np.asarray(var + eps)
    return np.divide(1, np.sqrt(total), out=np.zeros_like(total), where=total != 0)


def _deliver(result, out):
    if out is None:
        return result
    out[...] = result
    return out
