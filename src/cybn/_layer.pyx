"""What runs when a layer is called: the passes, what one keeps for the next, and the locks and threads around them.

Without a line of Python: its frames took a third of a training step of (32, 64), and behind large arrays, which leave
nothing else in the caches, the interpreter had to come from memory. And because what one call has found serves the
next: coefficients, and attributes, of which each takes 20 ns to read.
"""
import os
from threading import RLock, local
from weakref import WeakSet

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.object cimport PyObject
from numpy cimport ndarray

from cybn._arrays cimport as_data, as_integer, channel_axis, shape_of, view_array
from cybn._coefficients cimport NAMES, Coefficients
from cybn._ops cimport (
    activation_number,
    backward_call,
    evaluate,
    find_coefficients,
    forward_call,
    given,
    gradient_input,
    real_number,
    slope_of,
    truth,
)

cnp.import_array()

cdef extern from "Python.h":
    int PyObject_GenericSetAttr(object, object, PyObject *) except -1

cdef struct Settings:
    # What a call reads of its layer, but for the arrays.
    Py_ssize_t num_features
    Py_ssize_t axis
    bint training
    bint track_running_stats
    bint in_place
    bint cumulative     # no momentum: the average of all batches
    double momentum
    double eps
    int activation
    double negative_slope
    Py_ssize_t changes  # of the layer when its attributes were read

cdef tuple SETTINGS = ("num_features", "axis", "training", "track_running_stats", "in_place", "momentum", "eps",
                       "activation", "negative_slope")
cdef tuple UNCHANGING = (int, float, bool, str, type(None))     # and NumPy's scalars
cdef tuple RESULTS = ("num_batches_tracked", "grad_weight", "grad_bias")    # what calls set; nothing is kept of it
cdef Py_ssize_t FAR = <Py_ssize_t> 1 << 62      # no axis, and no number of channels, is so large


# ---------------------------------------------------------------------------------------------------- threads and forks

class Thread:
    """Stands for a thread as long as it lives. (Its identifier is the next one's when it has ended.)"""


cdef object here = local()


cdef object this_thread():
    try:
        return here.thread
    except AttributeError:
        here.thread = Thread()
        return here.thread


cdef long forks = 1     # and one: processes between the first that has imported this and the present one


def count_fork():
    """In a forked child nobody is left to release what another thread held."""
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=count_fork)


# ------------------------------------------------------------------------------------------------------------ the layer

@cython.final
@cython.freelist(8)
@cython.auto_pickle(False)
cdef class Saved:
    """What `backward` needs of a forward pass."""
    cdef readonly ndarray x, mean, invstd, output, gate     # output: in place; None where there is none
    cdef object mask, sample_weight, thread
    cdef bint training, residual, used


@cython.auto_pickle(False)
cdef class Layer:
    """The passes. State and modes are the subclass's: see `cybn.layers.BatchNorm`."""
    cdef readonly Coefficients _coefficients    # of the last inference
    cdef readonly Saved _saved  # of the last pass, for `backward`, or None
    cdef object lost            # None, or the threads whose pass another thread's has replaced
    cdef object lock            # held by training and `backward`; an inference needs none
    cdef long forks             # when the lock was made
    cdef Py_ssize_t changes     # how often attributes have been set
    cdef Py_ssize_t seen        # `changes` and one, when they were last read ...
    cdef Py_ssize_t tried       # ... and when it was last found out whether they can be kept
    cdef Settings settings      # what they said, with the vectors; these are None where that may no longer hold
    cdef tuple vectors

    def __setattr__(self, name, value):
        cdef tuple vectors = self.vectors
        PyObject_GenericSetAttr(self, name, <PyObject *> value)
        # (What is updated in place is set, too, as in `bn.weight -= step`. Not if another thread has come between.)
        if not (name in RESULTS or vectors is not None and is_among(vectors, name, value) and self.vectors is vectors):
            self.forget()

    def __delattr__(self, name):
        PyObject_GenericSetAttr(self, name, NULL)
        self.forget()

    cdef void forget(self) noexcept:
        """After a change: who has read attributes before it must not take them for those that hold."""
        with cython.critical_section(self):
            _before = self.vectors      # (lives until there is none here: code that its end runs may call the layer)
            self.changes += 1
            self.vectors = None

    cdef tuple kept(self, Settings *settings):
        """The settings, and the vectors or None: what holds of what calls have read before."""
        with cython.critical_section(self):
            settings[0] = self.settings
            settings.changes = self.changes
            return self.vectors

    cdef tuple look(self, Settings *settings, bint training=False):
        """The settings and the vectors, as the last call has found them, or from the attributes.

        `training`: with the momentum, whatever the mode is now.
        """
        cdef tuple vectors = self.kept(settings)
        cdef object running_mean = None, running_var = None, momentum
        if vectors is not None and (settings.training or not training):
            return vectors
        settings.num_features = clip(as_integer(self.num_features, "num_features"))
        settings.training = self.training
        settings.track_running_stats = self.track_running_stats
        settings.in_place = self.in_place
        settings.eps = real_number(self.eps, "eps")
        if settings.training or training:
            momentum = self.momentum
            settings.cumulative = momentum is None
            settings.momentum = 0 if momentum is None else real_number(momentum, "momentum")
        if settings.track_running_stats:
            running_mean, running_var = self.running_mean, self.running_var
        vectors = running_mean, running_var, *self.look_back(settings)
        self.remember(settings, vectors)
        return vectors

    cdef tuple look_back(self, Settings *settings):
        """weight and bias, and such settings as `backward` needs."""
        settings.axis = clip(as_integer(self.axis, "axis"))
        settings.activation = activation_number(self.activation)
        settings.negative_slope = slope_of(settings.activation, self.negative_slope)
        return self.weight, self.bias

    cdef int remember(self, const Settings *settings, tuple vectors) except -1:
        """For the next call, if nothing has been set since the one before this: to find out whether they can be kept
        takes 2 us, to read them 0.3, and there are those who set some in each step."""
        if self.seen != settings.changes + 1:
            self.seen = settings.changes + 1
        elif self.tried != settings.changes + 1:
            self.tried = settings.changes + 1
            if in_dictionary(self):
                with cython.critical_section(self):
                    if self.changes == settings.changes:
                        self.settings = settings[0]
                        self.vectors = vectors
        return 0

    # ------------------------------------------------------------------------------------------------------ the passes

    def __call__(self, x, *, residual=None, mask=None, sample_weight=None, masked_output="normalize", out=None,
                 num_threads=None, save_for_backward=None):
        """See `forward`."""
        return self.call(x, residual, mask, sample_weight, masked_output, out, num_threads, save_for_backward)

    def forward(self, x, *, residual=None, mask=None, sample_weight=None, masked_output="normalize", out=None,
                num_threads=None, save_for_backward=None):
        """Normalize `x`; when training, update the running statistics.

        Parameters
        ----------
        x : array with C channels along `axis`
            float32 or float64, any strides.
        residual : array of x's shape and dtype, optional
            Added before the activation.
        mask, sample_weight : arrays, optional
            Which elements count in the statistics, or how much; see `cybn.batch_norm`. A mask that leaves nothing
            updates nothing, and warns.
        masked_output : {"normalize", "zero"}, default "normalize"
            What becomes of the elements that `mask` leaves out.
        out : array of x's shape and dtype, optional
            Receives the result; may be `x` itself (then `backward`, which needs x, refuses).
        num_threads : int, optional
            For this call only.
        save_for_backward : bool, optional
            Whether to keep what `backward` needs. By default that is done when training and not in evaluation.

        Returns
        -------
        ndarray
            y, of x's shape, dtype and memory layout, or `out`.

        Raises
        ------
        TypeError, ValueError
            As `cybn.batch_norm`; also for a wrong rank (`BatchNorm1d`, ...) or number of channels. A failed call
            changes nothing.
        """
        check_self(self)
        return self.call(x, residual, mask, sample_weight, masked_output, out, num_threads, save_for_backward)

    cdef object call(self, object x, object residual, object mask, object sample_weight, object masked_output,
                     object out, object num_threads, object save_for_backward):
        cdef ndarray data = as_data(x, "x"), y
        cdef object to = out
        cdef bint save
        cdef Settings settings
        cdef tuple vectors = self.look(&settings)
        save = settings.training if save_for_backward is None else truth(save_for_backward, "save_for_backward")
        check_input(data, &settings, self)
        if settings.in_place:
            to = self._check_in_place(data, residual, out, x)
        if settings.training or save or not settings.track_running_stats:
            y = self.run(data, &settings, vectors, save, residual, mask, sample_weight, masked_output, to, num_threads)
        else:
            y = evaluate(data, settings.axis, to, num_threads, self.coefficients(&settings, vectors),
                         settings.activation, settings.negative_slope, residual, mask, sample_weight, masked_output)
            if self._saved is not None:
                with self.guard():
                    self.keep(None)
        return given(out, y)

    cdef Coefficients coefficients(self, const Settings *settings, tuple vectors):
        cdef Coefficients before, found
        with cython.critical_section(self):
            before = self._coefficients
        found = find_coefficients(before, vectors, settings.eps, settings.num_features)
        if found is not before:
            with cython.critical_section(self):
                self._coefficients = found
        return found

    cdef ndarray run(self, ndarray x, Settings *settings, tuple vectors, bint save, object residual, object mask,
                     object sample_weight, object masked_output, object out, object num_threads):
        """The passes that change something, or keep it for `backward`."""
        cdef bint training = settings.training, in_place = settings.in_place, update, batch_stats
        cdef double momentum
        cdef Saved saved = None
        cdef ndarray y
        if mask is not None:
            mask = view_array(mask, "mask", False)
        with self.guard():
            if self.changes != settings.changes:    # while another thread had the lock
                vectors = self.look(settings, training)
            running_mean, running_var, weight, bias = vectors
            update = training and settings.track_running_stats
            batch_stats = training or not settings.track_running_stats
            momentum = settings.momentum if update else 0
            if update and settings.cumulative:
                momentum = real_number(1 / (self.num_batches_tracked + 1), "momentum")
            y, mean, invstd, gate, taken = forward_call(
                x, running_mean, running_var, weight, bias, batch_stats, momentum, settings.eps, settings.axis, out,
                num_threads, 1, settings.activation, settings.negative_slope, residual, mask, sample_weight,
                masked_output, save, save, 1)
            if save:
                saved = Saved.__new__(Saved)
                saved.x = None if out is not None and np.shares_memory(x, y) else x
                saved.mean = mean
                saved.invstd = invstd
                saved.training = batch_stats
                saved.output = y if in_place else None
                saved.gate = gate
                saved.mask = mask
                saved.sample_weight = sample_weight
                saved.residual = residual is not None
                saved.thread = this_thread()
            self.keep(saved)
            if update and taken:
                self.num_batches_tracked += 1
        return y

    cdef int keep(self, Saved saved) except -1:
        """For `backward`, or None. A thread whose pass another's has replaced, unfinished, must not get that one's."""
        cdef object thread = this_thread() if saved is None else saved.thread
        cdef Saved before = self._saved
        if before is not None and before.thread is not thread and not before.used:
            self.lost = self.lost or WeakSet()
            self.lost.add(before.thread)
        if self.lost is not None:
            self.lost.discard(thread)
        self._saved = saved
        return 0

    def _drop(self):
        """Forget the last pass, and all that has been read."""
        check_self(self)
        self._saved = None
        self.lost = None
        self.forget()

    @property
    def _lock(self):
        """Held by training and `backward`; an inference needs none."""
        return self.guard()

    cdef object guard(self):
        """The lock, in a forked child a new one."""
        cdef object lock = None
        with cython.critical_section(self):
            if self.forks == forks:
                lock = self.lock
        if lock is None:
            lock = RLock()
            with cython.critical_section(self):
                if self.forks != forks:
                    self.lock = lock
                    self.forks = forks
                lock = self.lock
        return lock

    def backward(self, grad_output, *, out=None, num_threads=None):
        """Gradient of the loss with respect to the last `forward`'s x; sets `grad_weight` and `grad_bias`.

        Parameters
        ----------
        grad_output : array of the input's shape and dtype
            Gradient with respect to y.
        out : array of the input's shape and dtype, optional
            Receives the result; may be `grad_output` itself.
        num_threads : int, optional
            For this call only.

        Returns
        -------
        grad_input : ndarray
            Of the input's shape, dtype and memory layout, or `out`.
        grad_residual : ndarray
            As grad_input. Only if a residual went in.

        Raises
        ------
        RuntimeError
            If no `forward` has kept what is needed, or another thread's has replaced it.
        TypeError, ValueError
            As `cybn.batch_norm_backward`.
        """
        cdef Settings settings
        cdef tuple vectors, grads
        cdef object to = out
        cdef Saved saved
        check_self(self)
        with self.guard():
            if self.lost is not None and this_thread() in self.lost:
                raise RuntimeError(
                    "backward needs the last forward: another thread has called forward on this layer since"
                )
            saved = self._saved
            if saved is None:
                raise RuntimeError(
                    "backward needs a forward before it: call forward(x) in training mode, "
                    "or forward(x, save_for_backward=True) in evaluation mode"
                )
            vectors = self.kept(&settings)
            weight, bias = self.look_back(&settings) if vectors is None else vectors[2:]
            if saved.output is not None:
                # Checked before the result is overwritten: a failed call changes nothing.
                grad_output, to = gradient_input(grad_output, saved.output, out, num_threads, weight, bias,
                                                 self.num_features)
                saved.x, saved.output = self._restore_input(saved, num_threads), None
            if saved.x is None:
                raise RuntimeError("backward needs the input of forward, which out=x has overwritten")
            grads = backward_call(
                grad_output, saved.x, saved.mean, saved.invstd, weight, saved.training, settings.axis, to, num_threads,
                bias, settings.activation, settings.negative_slope, None, saved.mask, saved.sample_weight,
                saved.residual, saved.gate)
            saved.used = True
            grad_input = grads[0]
            if out is not None:
                if np.shares_memory(grad_input, saved.x):
                    saved.x = None
                grad_input = given(out, grad_input)
            self.grad_weight = None if weight is None else grads[1]
            self.grad_bias = None if bias is None else grads[2]
            return (grad_input, grads[3]) if saved.residual else grad_input


cdef Py_ssize_t clip(object n) except? -1:
    return min(max(n, -FAR), FAR)


cdef int check_self(object layer) except -1:
    """Whether it is one. (Python calls a method as a function of anything; Cython's do not look.)"""
    if not isinstance(layer, Layer):
        raise TypeError(f"self must be a layer of cybn, got {type(layer).__name__}")
    return 0


cdef bint is_among(tuple vectors, object name, object value) except -1:
    cdef Py_ssize_t i
    for i in range(4):
        if NAMES[i] == name:
            return vectors[i] is value
    return False


cdef bint in_dictionary(Layer layer) except -1:
    """Whether what `look` reads changes by being set: attributes of the object, not of its class, and settings that are
    nothing but numbers."""
    cdef object own = layer.__dict__, value
    if type(layer).__getattribute__ is not object.__getattribute__ or type(own) is not dict:
        return False
    for name in SETTINGS:
        value = own.get(name)
        if type(value) not in UNCHANGING and not isinstance(value, np.generic):
            return False
    for name in SETTINGS + NAMES:
        if name not in own:
            return False
        for kind in type(layer).__mro__:
            if name in kind.__dict__:
                return False
    return True


cdef int check_input(ndarray x, const Settings *settings, object layer) except -1:
    """Whether x has a rank that the layer takes and its number of channels."""
    cdef Py_ssize_t ndim = cnp.PyArray_NDIM(x), channels
    cdef object ranks = layer._ranks
    if ranks is not None and ndim not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ValueError(f"x must be {expected} for {type(layer).__name__}, got {ndim}D of shape {shape_of(x)}")
    channels = cnp.PyArray_DIM(x, channel_axis(x, settings.axis))
    if channels != settings.num_features:
        raise ValueError(f"x must have {settings.num_features} channels along axis {settings.axis}, "
                         f"got {channels} in shape {shape_of(x)}")
    return 0
