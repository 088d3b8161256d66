"""The stateless functions, named and ordered as in PyTorch.

Throughout, ``x`` has its channels along `axis`; statistics are taken over all other axes. With C channels and m values
per channel::

    mu      = 1/m sum x                       mean
    sigma^2 = 1/m sum (x - mu)^2              biased variance
    x_hat   = (x - mu) / sqrt(sigma^2 + eps)  invstd = 1 / sqrt(sigma^2 + eps)
    y       = gamma x_hat + beta              gamma: weight, beta: bias

(Ioffe & Szegedy 2015, algorithm 1.) The results have x's dtype and memory layout and do not depend, in any bit, on the
number of threads, the instruction set, gaps between elements or rows, alignment or `out`. (They do on the order of the
axes in memory: channels-last is summed as it lies, in another order than channels-first.)
"""

from cybn import _ops
from cybn.reference import Moments

__all__ = [
    "batch_norm",
    "batch_norm_apply",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_forward",
    "batch_norm_stats",
]


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
    """Batch normalization in one call, as ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    x : array of shape (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or any other with an `axis`
        float32 or float64, any strides, read-only or not. Anything NumPy can view: a buffer, ``__array__``, a CPU
        ``__dlpack__``.
    running_mean, running_var : arrays of shape (C,), float32 or float64, or None
        Both or neither. With ``training=False`` they are the statistics used and must be given. With
        ``training=True`` the batch's own statistics are used and these, if given, are updated in place:
        ``running = (1 - momentum) * running + momentum * batch``, once, after everything else has succeeded.
    weight, bias : arrays of shape (C,), float32 or float64, optional
        gamma and beta. None is 1 and 0.
    training : bool, default False
        Whether to use the statistics of this batch.
    momentum : float, default 0.1
        Weight of the new value, from 0 to 1 (PyTorch's meaning; Keras's is one minus this).
    eps : float, default 1e-5
        Added to the variance. Must be positive when training.
    axis : int, default 1
        The channel axis.
    out : array of x's shape and dtype, optional
        Receives the result. It may be `x` itself; memory that overlaps `x` partly is refused.
    num_threads : int, optional
        For this call only; see `cybn.set_num_threads`. Results do not depend on it.
    correction : {1, 0}, default 1
        `running_var` receives the variance with divisor ``m - correction``: 1 is PyTorch's rule, 0 that of Keras and
        ONNX. Normalization itself always uses the biased variance.
    activation : {None, "relu", "leaky_relu"}, default None
        Applied to the result: ``max(y, 0)``, or ``y`` where it is positive and ``negative_slope * y`` elsewhere. NaN
        stays NaN.
    negative_slope : float, default 0.01
        Of the leaky ReLU; not negative.
    residual : array of x's shape and dtype, optional
        Added before the activation: ``activation(gamma x_hat + beta + residual)``.
    mask : bool array, optional
        What is False does not count in the statistics, and may be NaN. Of any shape that broadcasts to that of x
        without its channel axis: (N, L) or (N, 1) for x of shape (N, C, L). An array with fewer axes may also go along
        the first of them, (N,) for whole samples, where that is the only way in which it fits.
    sample_weight : array of float32 or float64, optional
        Weights w >= 0 of the elements in the statistics, of any shape that `mask` may have, rounded to x's dtype:
        ``mu = sum w x / sum w``, ``sigma^2 = sum w (x - mu)^2 / sum w``, as ``numpy.average``. `running_var` receives
        ``sum w (x - mu)^2 / (sum w - correction sum w^2 / sum w)``, as ``numpy.cov`` with aweights: it does not depend
        on the scale of the weights, and weights of 0 and 1 are a mask. In training they must add up to a number from
        1e-18 to 1e18 (float64: 1e-140 to 1e140). Not together with `mask`. Evaluation does not use them.
    masked_output : {"normalize", "zero"}, default "normalize"
        What becomes of the masked elements: the same as of the others, or 0.

    Returns
    -------
    ndarray
        y, of x's shape, dtype and memory layout, or `out`. Empty for an empty batch, which updates nothing.

    Warns
    -----
    RuntimeWarning
        When training and `mask` leaves nothing: `running_mean` and `running_var` are used (0 and 1 without them) and
        nothing is updated.

    Raises
    ------
    TypeError
        For an array that is not float32 or float64 (or whose dtype is not x's, for `out`), with argument, expected
        and got.
    ValueError
        For a wrong shape, a missing or half-given pair of statistics, a negative `running_var` or `eps`, an `out` or
        running array that cannot be written to, an unknown `activation` or `masked_output`, a negative, infinite or NaN
        weight or none that is positive, and, when training, one value per channel. A failed call changes nothing.

    Notes
    -----
    Statistics are accumulated in short fixed blocks around a shift and combined in float64; x is centred before it is
    scaled, with the mean kept as two floats: ``y = (x - mean_hi) * scale + (bias - mean_lo * scale)``. A NaN or an
    infinity makes its own channel NaN and no other.

    Examples
    --------
    >>> import numpy as np, cybn
    >>> x = np.random.default_rng(0).normal(5, 3, (32, 8)).astype(np.float32)
    >>> y = cybn.batch_norm(x, None, None, training=True)
    >>> bool(abs(y.mean()) < 1e-6), round(float(y.std()), 3)
    (True, 1.0)
    """
    return _ops.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads, correction,
        activation, negative_slope, residual, mask, sample_weight, masked_output,
    )  # fmt: skip


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
    """Batch normalization that also returns what `batch_norm_backward` needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads, correction, \
    activation, negative_slope, residual, mask, sample_weight, masked_output
        As in `batch_norm`.

    Returns
    -------
    y : ndarray
        Of x's shape, dtype and memory layout, or `out`.
    save_mean, save_invstd : ndarrays of shape (C,), float64
        The statistics that were used: the batch's, or ``running_mean`` and ``1 / sqrt(running_var + eps)``. float64
        whatever the input, because a mean rounded to float32 spoils the backward pass of data with a large offset.
        0 for an empty batch when training.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`.
    """
    return _ops.batch_norm_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, axis, out, num_threads, correction,
        activation, negative_slope, residual, mask, sample_weight, masked_output,
    )  # fmt: skip


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
    """Gradients of x, weight and bias.

    With ``g`` for `grad_output` and sums over the m values of a channel (the reverse of algorithm 1, section 3 of
    Ioffe & Szegedy 2015, simplified)::

        grad_bias   = sum g
        grad_weight = sum g x_hat
        grad_input  = gamma invstd (g - grad_bias / m - x_hat grad_weight / m)   training
        grad_input  = gamma invstd g                                             frozen statistics

    With an activation, g is first multiplied by its derivative: 1 where its input z is positive, elsewhere 0 or the
    negative slope (as PyTorch also at 0; ReLU passes the gradient where z is NaN). With a mask, g is 0 where that is
    False, and m is the number of the others. With weights w, m is their sum, and ``grad_bias / m`` and
    ``grad_weight / m`` are multiplied by w.

    Parameters
    ----------
    grad_output : array of x's shape and dtype
        Gradient of the loss with respect to y, in any memory layout.
    x : array
        The input of the forward pass.
    save_mean, save_invstd : arrays of shape (C,), float64 or float32
        From `batch_norm_forward`.
    weight : array of shape (C,), float32 or float64, optional
        As in the forward pass.
    training : bool, default True
        As in the forward pass. False: the statistics are constants.
    axis : int, default 1
        The channel axis.
    out : array of x's shape and dtype, optional
        Receives grad_input; may be `grad_output` or `x` itself.
    num_threads : int, optional
        For this call only.
    bias, activation, negative_slope, mask, sample_weight
        As in the forward pass.
    output : array of x's shape and dtype, optional
        y of the forward pass. Needed where an activation followed a residual; otherwise the activation's input is
        computed again from x, with the same bits.
    return_grad_residual : bool, default False
        Whether to return the gradient of the residual: g behind mask and activation.

    Returns
    -------
    grad_input : ndarray
        Of x's shape, dtype and memory layout, or `out`.
    grad_weight, grad_bias : ndarrays of shape (C,)
        Of weight's dtype, x's where weight is None.
    grad_residual : ndarray
        As grad_input. Only with `return_grad_residual`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; also where `grad_output` has not the shape and dtype of `x`.
    """
    return _ops.batch_norm_backward(
        grad_output, x, save_mean, save_invstd, weight, training, axis, out, num_threads,
        bias, activation, negative_slope, output, mask, sample_weight, return_grad_residual,
    )  # fmt: skip


def batch_norm_stats(x, *, axis=1, num_threads=None, mask=None, sample_weight=None):
    """Count, mean and squared deviations of each channel.

    The first half of the forward pass, for callers who merge statistics over several batches or processes
    (``a.merge(b)``), as ``torch.batch_norm_stats`` is used by synchronized batch normalization.

    Parameters
    ----------
    x : array
        As in `batch_norm`; one value per channel is enough, none gives zeros.
    axis : int, default 1
        The channel axis.
    num_threads : int, optional
        For this call only.
    mask, sample_weight
        As in `batch_norm`. A mask that leaves nothing gives zeros.

    Returns
    -------
    Moments
        ``(count, mean, m2)``: an int and float64 arrays of shape (C,), with methods ``var``, ``invstd``, ``merge``.
        With `sample_weight` the count is the sum of the weights, and m2 is weighted.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`.
    """
    return Moments(*_ops.batch_norm_stats(x, axis, num_threads, mask, sample_weight))


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
    """Normalize with given statistics: ``y = (x - mean) * invstd * weight + bias``.

    The second half of the forward pass.

    Parameters
    ----------
    x : array
        As in `batch_norm`.
    mean, invstd : arrays of shape (C,), float64 or float32
        Of `batch_norm_stats`, or any others; invstd must not be negative.
    weight, bias : arrays of shape (C,), float32 or float64, optional
        None is 1 and 0.
    axis, out, num_threads, activation, negative_slope, residual, mask, masked_output
        As in `batch_norm`.

    Returns
    -------
    ndarray
        Of x's shape, dtype and memory layout, or `out`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`.
    """
    return _ops.batch_norm_apply(
        x, mean, invstd, weight, bias, axis, out, num_threads, activation, negative_slope, residual, mask, masked_output
    )


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
    """The two sums of the backward pass, before they are exchanged or scaled.

    Parameters
    ----------
    grad_output, x : arrays of one shape and dtype
        As in `batch_norm_backward`.
    mean : array of shape (C,), float64 or float32
        As in the forward pass.
    axis : int, default 1
        The channel axis.
    num_threads : int, optional
        For this call only.
    invstd, weight, bias : arrays of shape (C,), optional
        As in the forward pass. Used where an activation's input is to be computed again; then invstd must be given.
    activation, negative_slope, output, mask
        As in `batch_norm_backward`: with them `grad_output` stands for what passes mask and activation.

    Returns
    -------
    sum_dy, sum_dy_xmu : ndarrays of shape (C,), float64
        ``sum grad_output`` and ``sum grad_output * (x - mean)``. The first is grad_bias, the second times invstd is
        grad_weight.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_backward`.
    """
    return _ops.batch_norm_backward_reduce(
        grad_output, x, mean, axis, num_threads, invstd, weight, bias, activation, negative_slope, output, mask
    )


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
    """The gradient of x from the sums of `batch_norm_backward_reduce`.

    ``grad_input = weight * invstd * (dy - sum_dy / count - (x - mean) * invstd**2 * sum_dy_xmu / count)``.

    Parameters
    ----------
    grad_output, x : arrays of one shape and dtype
        As in `batch_norm_backward`.
    mean, invstd : arrays of shape (C,), float64 or float32
        As in the forward pass.
    weight : array of shape (C,), float32 or float64, or None
        As in the forward pass.
    sum_dy, sum_dy_xmu : arrays of shape (C,), float64 or float32
        Over the whole batch: added up over the parts where there are several.
    count : int or float
        Values per channel of the whole batch, or the sum of their weights.
    axis, out, num_threads, bias, activation, negative_slope, output, mask, sample_weight, return_grad_residual
        As in `batch_norm_backward`.

    Returns
    -------
    grad_input : ndarray
        Of x's shape, dtype and memory layout, or `out`.
    grad_residual : ndarray
        Only with `return_grad_residual`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_backward`; also where `count` is not positive.
    """
    return _ops.batch_norm_backward_apply(
        grad_output, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count, axis, out, num_threads,
        bias, activation, negative_slope, output, mask, sample_weight, return_grad_residual,
    )  # fmt: skip
