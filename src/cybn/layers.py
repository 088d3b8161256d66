"""The layers: parameters, running statistics and modes around the functions, named as in PyTorch."""

import copyreg
from collections.abc import Mapping

import numpy as np

from cybn import _layer, _ops

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

IN_PLACE_LEAST_WEIGHT = 1e-3
"""The smallest ``abs(weight)`` of `BatchNorm` in place. A division by it costs three of float32's seven digits."""

IN_PLACE_SLOPES = 1e-6, 1e6
"""The smallest and the largest `negative_slope` in place: products with it and with its inverse stay in float32."""

MOST_FEATURES = 2**48
MOST_BATCHES = 2**62  # that may be loaded; state_dict has an int64


class BatchNorm(_layer.Layer):
    """Batch normalization over inputs of any rank: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), ...

    Training: ``y = weight * (x - mu) / sqrt(sigma^2 + eps) + bias`` with the mean and biased variance of the batch, per
    channel; evaluation: the same with `running_mean` and `running_var` (Ioffe & Szegedy 2015, algorithms 1 and 2).

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float, default 1e-5
        Added to the variance. 0 is allowed in evaluation only.
    momentum : float or None, default 0.1
        Weight of the new batch in the running statistics, from 0 to 1. None: the cumulative average of all batches.
    affine : bool, default True
        Whether to learn `weight` and `bias`.
    track_running_stats : bool, default True
        Whether to keep `running_mean` and `running_var`. Without them the batch's own statistics are used in evaluation
        too.
    axis : int, default 1
        The channel axis of the input.
    dtype : {numpy.float32, numpy.float64}, default float32
        Of the parameters and running statistics. Inputs may be of either, whatever this is.
    bias : bool, default True
        With ``affine``: whether there is a `bias`. False where the next layer adds a constant anyway.
    activation : {None, "relu", "leaky_relu"}, default None
        Applied to the result, in the same pass over memory, as to its gradient.
    negative_slope : float, default 0.01
        Of the leaky ReLU; not negative.
    in_place : bool, default False
        Write the result over the input and keep that alone for `backward`, which computes the input from it: half of
        the memory, for two more passes (Rota Bulo, Porzi & Kontschieder 2018, "In-Place Activated BatchNorm"). The
        activation must have an inverse (None, or leaky ReLU with a slope from 1e-6 to 1e6), every ``abs(weight)`` must
        be at least `IN_PLACE_LEAST_WEIGHT`, there can be no residual, and the result must not be changed before
        `backward`, which overwrites it with the input (with ``masked_output="zero"``: but for the masked elements).

    Attributes
    ----------
    weight, bias : ndarrays of shape (C,), or None
        gamma, initially 1, and beta, initially 0.
    grad_weight, grad_bias : ndarrays of shape (C,), or None
        Set by `backward`; None before, and where there is no such parameter.
    running_mean, running_var : ndarrays of shape (C,), or None
        Initially 0 and 1. Updated in place by every training forward pass; `running_var` with the unbiased variance.
    num_batches_tracked : int or None
        Training forward passes that updated the running statistics.
    training : bool
        The mode, set by `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or out of range, with argument, expected and got.

    Notes
    -----
    A training forward pass keeps references to what `backward` needs (its input, mask and weights): do not change them
    in between. Behind a residual it keeps a bit for each element, whether its gradient passes the activation, not the
    result. An evaluation pass keeps nothing unless asked to.

    Threads may share a layer in evaluation mode, without a lock and with the same bits. Training passes of several
    threads wait for one another. A pass may be one thread's and its `backward` another's; but a thread whose own pass
    has been replaced before it went backward is refused.

    Attributes may be set at any time, and hold from the next call on. (Set, not written into the ``__dict__`` of a
    layer that has been called: what calls have read is kept until something is set.)

    A subclass may override `forward`, which is then what a call runs (unless it, or a base of it, has a `__call__` of
    its own); it goes on with ``super().forward``.

    Examples
    --------
    >>> import numpy as np, cybn
    >>> bn = cybn.BatchNorm(8)
    >>> x = np.random.default_rng(0).normal(size=(32, 8, 5, 5)).astype(np.float32)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> dx.shape, bn.grad_bias.shape
    ((32, 8, 5, 5), (8,))
    """

    _ranks = None  # the ranks a subclass accepts

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        *,
        axis=1,
        dtype=np.float32,
        bias=True,
        activation=None,
        negative_slope=0.01,
        in_place=False,
    ):
        self.num_features = _ops.integer(num_features, "num_features")
        if self.num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if self.num_features > MOST_FEATURES:
            raise ValueError(f"num_features must be at most {MOST_FEATURES}, got {num_features}")
        self.eps = _ops.real_number(eps, "eps")
        if not 0 <= self.eps < np.inf:
            raise ValueError(f"eps must be a finite number and not negative, got {eps}")
        self.momentum = None if momentum is None else _ops.real_number(momentum, "momentum")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, or None, got {momentum}")
        self.affine = _ops.truth(affine, "affine")
        self.track_running_stats = _ops.truth(track_running_stats, "track_running_stats")
        self.axis = _ops.integer(axis, "axis")
        try:
            self.dtype = np.dtype(dtype)
        except Exception as error:
            raise TypeError(f"dtype must be float32 or float64, got {type(dtype).__name__} ({error})") from error
        if self.dtype not in (np.float32, np.float64) or not self.dtype.isnative:
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        _ops.activation_number(activation)  # refuses what is none
        self.activation = activation
        self.negative_slope = _ops.check_slope(negative_slope)
        self.in_place = _ops.truth(in_place, "in_place")
        least, most = IN_PLACE_SLOPES
        leaky = self.activation == "leaky_relu" and least <= self.negative_slope <= most
        if self.in_place and self.activation is not None and not leaky:
            slope = f" with negative_slope {self.negative_slope}" if self.activation == "leaky_relu" else ""
            raise ValueError(
                "activation must have an inverse in place, None or 'leaky_relu' with a negative_slope from "
                f"{least:g} to {most:g}, got {self.activation!r}{slope}"
            )
        self.training = True
        self._drop()  # (`__init__` may be called again, and a subclass have a `reset_parameters` of its own)
        self.weight = np.empty(self.num_features, self.dtype) if self.affine else None
        self.bias = np.empty(self.num_features, self.dtype) if self.affine and _ops.truth(bias, "bias") else None
        self.running_mean = np.empty(self.num_features, self.dtype) if self.track_running_stats else None
        self.running_var = np.empty(self.num_features, self.dtype) if self.track_running_stats else None
        self.reset_parameters()

    # ---------------------------------------------------------------------------- in place, for the passes (_layer.pyx)

    def _check_in_place(self, x, residual, out, given):
        """Return x, where the result goes, if it can be computed back. `given`: what x is an array of."""
        if residual is not None:
            raise ValueError("residual must be None in place: x cannot be computed from the sum")
        if out is not None and out is not x and not (out is given and isinstance(out, np.ndarray)):
            raise ValueError("out must be None or x itself in place, got another array")
        if not x.flags.writeable:
            raise ValueError("x must be writeable in place, got a read-only array")
        if self.weight is not None:
            small = np.flatnonzero(~(np.abs(self.weight) >= IN_PLACE_LEAST_WEIGHT))
            if small.size:
                raise ValueError(
                    f"weight must be at least {IN_PLACE_LEAST_WEIGHT} or at most -{IN_PLACE_LEAST_WEIGHT} in place, "
                    f"got {self.weight[small[0]]} in channel {small[0]}"
                )
        return x

    def _restore_input(self, saved, num_threads):
        """x from y, in its memory: the activation's inverse is a leaky ReLU too, the normalization's a normalization.

        ``x = (z - bias) / invstd / weight + mean``.
        """
        y, none = saved.output, np.zeros(self.num_features)
        with np.errstate(all="ignore"):
            inverse = none + 1 if self.weight is None else 1 / np.asarray(self.weight, np.float64)
            std = 1 / saved.invstd
        if self.activation is not None:
            _ops.batch_norm_apply(
                y, none, none + 1, None, None, self.axis, y, num_threads,
                self.activation, 1 / self.negative_slope, None, None, "normalize",
            )  # fmt: skip
        return _ops.batch_norm_apply(
            y, none if self.bias is None else self.bias, std, inverse, saved.mean, self.axis, y,
            num_threads, None, 0.0, None, None, "normalize",
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- the mode

    def train(self, mode=True):
        """Set training mode, or with False evaluation mode; return the layer."""
        self.training = _ops.truth(mode, "mode")
        return self

    def eval(self):
        """Set evaluation mode; return the layer."""
        return self.train(False)

    # ------------------------------------------------------------------------------------------------------ the state

    def reset_running_stats(self):
        """Set `running_mean` to 0, `running_var` to 1 and `num_batches_tracked` to 0."""
        with self._lock:
            self._reset({})

    def reset_parameters(self):
        """Set `weight` to 1, `bias` to 0, and forget running statistics, gradients and the last pass."""
        with self._lock:
            self._reset({"weight": 1, "bias": 0})
            self.grad_weight = self.grad_bias = None
            self._drop()

    def state_dict(self):
        """Return copies of the parameters and running statistics, under PyTorch's names.

        Returns
        -------
        dict
            Of those that the layer has: ``weight``, ``bias``, ``running_mean``, ``running_var`` (arrays of shape (C,))
            and ``num_batches_tracked`` (int64 array of shape ()).
        """
        with self._lock:
            state = {name: array.copy() for name, array in self._arrays().items()}
            if self.track_running_stats:
                state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state):
        """Take over parameters and running statistics; all of them or, on an error, none.

        Parameters
        ----------
        state : mapping
            As `state_dict` returns it; values may be anything NumPy can view, of any real dtype. Without
            ``num_batches_tracked`` the counter stays.

        Raises
        ------
        KeyError
            For missing and unexpected names, all of them in one message.
        TypeError, ValueError
            For values that are not real numbers, have another shape, or a negative ``running_var``.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        arrays = self._arrays()
        missing = [name for name in arrays if name not in state]
        known = {*arrays, "num_batches_tracked"} if self.track_running_stats else set(arrays)
        unexpected = [name for name in state if name not in known]
        if missing or unexpected:
            raise KeyError(f"state must have the names {sorted(arrays)}, missing {missing}, unexpected {unexpected}")
        new = {}
        for name, array in arrays.items():
            value = _ops.view(state[name], name, "an array of real numbers")
            if value.dtype.kind not in "fiu":
                raise TypeError(f"{name} must be an array of real numbers, got an array of {value.dtype}")
            if value.shape != np.shape(array):
                raise ValueError(f"{name} must have shape {np.shape(array)}, got shape {value.shape}")
            with np.errstate(under="ignore"):
                new[name] = value.astype(self.dtype)
        if "running_var" in new and np.any(new["running_var"] < 0):
            raise ValueError(f"running_var must not be negative, got {new['running_var'].min()}")
        counter = None
        if "num_batches_tracked" in state:
            counter = _ops.view(state["num_batches_tracked"], "num_batches_tracked", "an integer")[()]
            counter = _ops.integer(counter, "num_batches_tracked")
            if not 0 <= counter <= MOST_BATCHES:
                raise ValueError(f"num_batches_tracked must be from 0 to {MOST_BATCHES}, got {counter}")
        with self._lock:
            self._set(new)
            if counter is not None:
                self.num_batches_tracked = counter

    def _reset(self, parameters):
        """These, and the running statistics; all of them or none."""
        self._set(parameters | ({"running_mean": 0, "running_var": 1} if self.track_running_stats else {}))
        self.num_batches_tracked = 0 if self.track_running_stats else None

    def _set(self, values):
        """Write into those of the layer's arrays that it has; into all of them or none."""
        arrays = self._arrays()
        arrays = {name: arrays[name] for name in values if name in arrays}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or not array.flags.writeable:
                got = "a read-only array" if isinstance(array, np.ndarray) else type(array).__name__
                raise ValueError(f"{name} of the layer must be a writeable array, got {got}")
        for name, array in arrays.items():
            array[...] = values[name]

    def _arrays(self):
        names = ("weight", "bias", "running_mean", "running_var")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __repr__(self):
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, axis={self.axis}, "
            f"dtype={self.dtype}, bias={self.bias is not None}"
            + (f", activation={self.activation!r}" if self.activation else "")
            + (f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else "")
            + (", in_place=True" if self.in_place else "")
            + ")"
        )

    def __reduce__(self):
        # As copyreg does it from protocol 2 on. The older ones know no way to make the compiled part.
        return copyreg.__newobj__, (type(self),), self.__getstate__()

    def __getstate__(self):
        # A pickled or copied layer carries its state, not the activations of its last pass.
        return self.__dict__.copy()

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._drop()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.forward is not BatchNorm.forward and cls.__call__ is _layer.Layer.__call__:
            cls.__call__ = _call_forward


def _call_forward(self, x, **options):
    """See `forward`."""
    return self.forward(x, **options)


class BatchNorm1d(BatchNorm):
    """`BatchNorm` that accepts (N, C) and (N, C, L) only."""

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` that accepts (N, C, H, W) only."""

    _ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` that accepts (N, C, D, H, W) only."""

    _ranks = (5,)
