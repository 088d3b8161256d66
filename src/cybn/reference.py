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

With weights w (a mask: 0 and 1), 1/m sum becomes sum w / sum of all w. What has weight 0 is not looked at.
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
    count : int or float
        Values per channel, or the sum of their weights.
    mean : ndarray of shape (C,), float64
        ``1/count sum x``.
    m2 : ndarray of shape (C,), float64
        ``sum (x - mean)**2``.
    """

    count: float  # int, or the sum of weights
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

        Raises
        ------
        ValueError
            For moments of another number of channels.
        """
        total = self
        for other in others:
            if np.shape(other.mean) != np.shape(self.mean) or np.shape(other.m2) != np.shape(self.m2):
                raise ValueError(
                    f"others must have the shape of the moments that they are merged with, {np.shape(self.mean)}, "
                    f"got {np.shape(other.mean)}"
                )
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
                total.m2 + other.m2 + delta**2 * (total.count * (other.count / count)),
            )
        return total


def batch_norm_stats(x, *, axis=1, num_threads=None, mask=None, sample_weight=None):
    """Mean and squared deviations of each channel; see `cybn.batch_norm_stats`."""
    others = _other_axes(x, axis)
    if mask is None and sample_weight is None:
        count = x.size // x.shape[axis] if x.size else 0
        if count == 0:
            return Moments(0, np.zeros(x.shape[axis]), np.zeros(x.shape[axis]))
        mean = x.mean(axis=others, keepdims=True)
        m2 = ((x - mean) ** 2).sum(axis=others)
    else:
        w = _weights(mask, sample_weight, x, axis)
        count = (float if mask is None else int)(w.sum() / x.shape[axis]) if x.size else 0
        if count == 0:
            return Moments(0, np.zeros(x.shape[axis]), np.zeros(x.shape[axis]))
        x = np.where(w > 0, x, 0)
        mean = (w * x).sum(axis=others, keepdims=True) / x.dtype.type(count)
        m2 = (w * (x - mean) ** 2).sum(axis=others)
    return Moments(count, mean.reshape(-1).astype(np.float64), m2.astype(np.float64))


def batch_norm_apply(
    x,
    mean,
    invstd,
    weight=None,
    bias=None,
    *,
    axis=1,
    out=None,
    num_threads=None,
    activation=None,
    negative_slope=0.01,
    residual=None,
    mask=None,
    masked_output="normalize",
):
    """``activation((x - mean) * invstd * weight + bias + residual)``; see `cybn.batch_norm_apply`."""
    x_hat = (x - _along(mean, x, axis)) * _along(invstd, x, axis)
    y = x_hat
    if weight is not None:
        y = y * _along(weight, x, axis)
    if bias is not None:
        y = y + _along(bias, x, axis)
    if residual is not None:
        y = y + residual
    if activation is not None:
        slope = 0 if activation == "relu" else negative_slope
        with np.errstate(invalid="ignore"):  # 0 times infinity, which is not chosen
            y = np.where((y > 0) | np.isnan(y) | (y == 0), y, y * x.dtype.type(slope) if slope else x.dtype.type(0))
    if mask is not None and masked_output == "zero":
        y = np.where(_weights(mask, None, x, axis) > 0, y, x.dtype.type(0))
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
    activation=None,
    negative_slope=0.01,
    residual=None,
    mask=None,
    sample_weight=None,
    masked_output="normalize",
):
    """Normalize, and keep what `batch_norm_backward` needs; see `cybn.batch_norm_forward`."""
    update = False
    if training:
        moments = batch_norm_stats(x, axis=axis, mask=mask, sample_weight=sample_weight)
        mean, invstd = moments.mean, moments.invstd(eps) if moments.count else np.zeros_like(moments.mean)
        update = running_mean is not None and moments.count > 0
        training = moments.count > 0 or x.size == 0
    if not training:
        channels = x.shape[axis]
        mean = np.zeros(channels) if running_mean is None else np.asarray(running_mean, np.float64)
        invstd = _inverse_std(np.ones(channels) if running_var is None else np.asarray(running_var, np.float64), eps)
    y = batch_norm_apply(
        x,
        mean,
        invstd,
        weight,
        bias,
        axis=axis,
        out=out,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        mask=mask,
        masked_output=masked_output,
    )
    if update:
        if sample_weight is None:
            var = moments.var(correction)
        else:
            w = np.take(_weights(mask, sample_weight, x, axis), 0, axis).astype(np.float64)
            # sum w - sum w^2 / sum w, without the digits that it loses where one weight is most of the sum.
            pairs = (w.ravel()[1:] * w.ravel().cumsum()[:-1]).sum()
            var = moments.m2 / (2 * pairs / w.sum() if correction else w.sum())
        running_mean[...] = (1 - momentum) * running_mean + momentum * mean
        running_var[...] = (1 - momentum) * running_var + momentum * var
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
    activation=None,
    negative_slope=0.01,
    residual=None,
    mask=None,
    sample_weight=None,
    masked_output="normalize",
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
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        mask=mask,
        sample_weight=sample_weight,
        masked_output=masked_output,
    )
    return y


def batch_norm_backward_reduce(
    grad_output,
    x,
    mean,
    *,
    axis=1,
    num_threads=None,
    invstd=None,
    weight=None,
    bias=None,
    activation=None,
    negative_slope=0.01,
    output=None,
    mask=None,
):
    """The two sums of the backward pass; see `cybn.batch_norm_backward_reduce`."""
    others = _other_axes(x, axis)
    g = _gated(grad_output, x, mean, invstd, weight, bias, axis, activation, negative_slope, output, mask)
    d = x - _along(mean, x, axis)
    if mask is not None:
        d = np.where(_weights(mask, None, x, axis) > 0, d, 0)
    return g.sum(axis=others).astype(np.float64), (g * d).sum(axis=others).astype(np.float64)


def batch_norm_backward_apply(
    grad_output,
    x,
    mean,
    invstd,
    weight,
    sum_dy,
    sum_dy_xmu,
    count,
    *,
    axis=1,
    out=None,
    num_threads=None,
    bias=None,
    activation=None,
    negative_slope=0.01,
    output=None,
    mask=None,
    sample_weight=None,
    return_grad_residual=False,
):
    """The gradient of x from the two sums; see `cybn.batch_norm_backward_apply`."""
    g = _gated(grad_output, x, mean, invstd, weight, bias, axis, activation, negative_slope, output, mask)
    weight = np.ones_like(invstd) if weight is None else weight
    x_hat = (x - _along(mean, x, axis)) * _along(invstd, x, axis)
    through = _along(np.asarray(sum_dy) / count, x, axis) + x_hat * _along(
        np.asarray(sum_dy_xmu) * invstd / count, x, axis
    )
    if mask is not None or sample_weight is not None:
        w = _weights(mask, sample_weight, x, axis)
        through = np.where(w > 0, w * through, 0) if mask is not None else w * through
    grad_input = _deliver((g - through) * _along(weight * invstd, x, axis), out)
    return (grad_input, g) if return_grad_residual else grad_input


def batch_norm_backward(
    grad_output,
    x,
    save_mean,
    save_invstd,
    weight=None,
    training=True,
    *,
    axis=1,
    out=None,
    num_threads=None,
    bias=None,
    activation=None,
    negative_slope=0.01,
    output=None,
    mask=None,
    sample_weight=None,
    return_grad_residual=False,
):
    """Gradients of x, weight and bias; see `cybn.batch_norm_backward`."""
    g = _gated(grad_output, x, save_mean, save_invstd, weight, bias, axis, activation, negative_slope, output, mask)
    sum_dy, sum_dy_xmu = batch_norm_backward_reduce(g, x, save_mean, axis=axis, mask=mask)
    gamma = np.ones_like(save_invstd) if weight is None else weight
    if training:
        count = x.size // max(x.shape[axis], 1)
        if mask is not None or sample_weight is not None:
            count = _weights(mask, sample_weight, x, axis).sum() / max(x.shape[axis], 1)
        grad_input = batch_norm_backward_apply(
            g,
            x,
            save_mean,
            save_invstd,
            weight,
            sum_dy,
            sum_dy_xmu,
            count or 1,
            axis=axis,
            out=out,
            mask=mask,
            sample_weight=sample_weight,
        )
    else:
        # The statistics are constants: no gradient flows through them.
        grad_input = _deliver(g * _along(gamma * save_invstd, x, axis), out)
    dtype = x.dtype if weight is None else weight.dtype
    gradients = grad_input, (sum_dy_xmu * save_invstd).astype(dtype), sum_dy.astype(dtype)
    return (*gradients, g) if return_grad_residual else gradients


def _weights(mask, sample_weight, x, axis):
    """Mask or weights in x's precision, with x's shape."""
    w = np.asarray(mask if sample_weight is None else sample_weight, x.dtype)
    rest = tuple(np.delete(x.shape, axis))
    try:
        w = np.broadcast_to(w, rest)
    except ValueError:
        # The first axes, (N,) for whole samples.
        w = np.broadcast_to(w.reshape(w.shape + (1,) * (len(rest) - w.ndim)), rest)
    return np.broadcast_to(np.expand_dims(w, axis), x.shape)


def _gated(grad_output, x, mean, invstd, weight, bias, axis, activation, negative_slope, output, mask):
    """The gradient behind the activation and the mask."""
    g = grad_output
    if activation is not None:
        z = batch_norm_apply(x, mean, invstd, weight, bias, axis=axis) if output is None else output
        slope = x.dtype.type(0 if activation == "relu" else negative_slope)
        passes = (z > 0) | (np.isnan(z) if activation == "relu" else False)
        g = np.where(passes, g, g * slope if slope else slope)
    if mask is not None:
        g = np.where(_weights(mask, None, x, axis) > 0, g, x.dtype.type(0))
    return g


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
