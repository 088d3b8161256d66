"""What the test modules share: problems, places in memory, exact arithmetic, and how to compare."""

import inspect
import math
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

import cybn
from cybn import _kernels

DTYPES = (np.float32, np.float64)
FUNCTIONS = {name: getattr(cybn, name) for name in cybn.reference.__all__ if name.startswith("batch_norm")}
TRAINABLE = [name for name, function in FUNCTIONS.items() if "training" in inspect.signature(function).parameters]
WITH_OUT = [name for name, function in FUNCTIONS.items() if "out" in inspect.signature(function).parameters]
VARIANTS = [(name, mode) for name in FUNCTIONS for mode in ((True, False) if name in TRAINABLE else (None,))]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
# For tests of what is the same code in all builds: instead of the fixture's every one.
one_build = pytest.mark.parametrize("kernels", [_kernels.default], indirect=True)

every_variant = pytest.mark.parametrize(
    ("name", "training"), VARIANTS, ids=[n if t is None else f"{n}-{'train' if t else 'eval'}" for n, t in VARIANTS]
)

# Shapes, channel axes and memory orders (slowest axis first) that take every path through the schedules. All are far
# above the size under which no team of threads is started. The comments say (outer, channels, inner).
GEOMETRIES = {
    "rows, short period": ((20_011, 24), 1, None),  # several rows side by side; two sweeps
    "rows, odd period": ((90_001, 3), 1, None),
    "rows, one per row": ((170, 1500), 1, None),  # wider than a tile; owner
    "rows, one per row, long": ((3001, 130), 1, None),
    "rows, inner": ((64, 96, 7, 7), 1, None),  # (64, 96, 49)
    "rows, channels last": ((8, 48, 25, 33), 1, (0, 2, 3, 1)),  # (6600, 48, 1)
    "runs, owner": ((8, 64, 24, 25), 1, None),  # (8, 64, 600)
    "runs, few channels": ((16, 3, 83, 67), 1, None),  # (16, 3, 5561): two sweeps, several pieces per run
    "runs, one channel": ((7, 1, 40_003), 1, None),
    "runs, channels first": ((70, 4001), 0, None),  # (1, 70, 4001)
    "runs, shortest": ((40, 100, 64), 1, None),
    "runs, of few samples": ((5, 1100, 45), 1, None),  # as rows from six samples on
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


# ------------------------------------------------------------------------------------------------------------- refusals


@contextmanager
def raises(kind, message, *untouched):
    """The block must raise exactly this, and leave the arrays `untouched` as they are."""
    before = [a.tobytes() for a in untouched]
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert caught.value.args == (message,)
    assert [a.tobytes() for a in untouched] == before


def clean_environment(**changes):
    """The environment without what sets cybn's threads, and with `changes`."""
    return {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("CYBN_")} | changes


def python(code, wrapper=(), **environment):
    """Run code in a fresh interpreter, `wrapper` before it; what it prints."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", textwrap.dedent(code)],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------- problems


def rows_of(x, axis):
    """x as one row per channel."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def problem(shape, axis=1, dtype=np.float32, order=None, seed=0):
    """Consistent arguments for every function, by name."""
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    x = arrange(rng.normal(3, 2, shape).astype(dtype), order)
    grad_output = arrange(rng.normal(1, 1, shape).astype(dtype), order)
    arguments = {"x": x, "grad_output": grad_output, "axis": axis}
    for name in ("weight", "bias", "running_mean", "running_var"):
        arguments[name] = rng.uniform(0.5, 2, channels).astype(dtype)
    count, mean, m2 = cybn.reference.batch_norm_stats(x.astype(np.float64), axis=axis)
    arguments["save_mean"] = arguments["mean"] = mean
    arguments["save_invstd"] = arguments["invstd"] = 1 / np.sqrt(m2 / max(count, 1) + 1e-5)
    arguments["sum_dy"] = rng.normal(size=channels)
    arguments["sum_dy_xmu"] = rng.normal(size=channels)
    arguments["count"] = max(count, 1)
    return arguments


def call(name, arguments, training=None, function=None, **changes):
    """Call the function `name` with those of the arguments that it has."""
    known = inspect.signature(FUNCTIONS[name]).parameters
    given = {key: value for key, value in arguments.items() if key in known}
    if training is not None:
        given["training"] = training
    return (function or FUNCTIONS[name])(**given | changes)


def outcome(name, arguments, training=None, **changes):
    """All that a call produces, as arrays: its results and the running statistics, of which it gets copies."""
    state = {key: arguments[key].copy() for key in ("running_mean", "running_var") if key in arguments}
    result = call(name, arguments | state, training, **changes)
    results = result if isinstance(result, tuple) else (result,)
    return [np.asarray(value) for value in (*results, *state.values())]


def bits(arrays):
    return [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]


# ----------------------------------------------------------------------------------------------------- places in memory


def arrange(values, order):
    """The same array with its axes in this order in memory, slowest first."""
    if order is None:
        return values
    return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))


def place(values, order=None, steps=None, shift=0):
    """The same array somewhere else: axes in `order`, a step (also negative) along each, `shift` bytes off alignment.

    What lies between the elements is NaN, so that a result that depends on it shows.
    """
    order = tuple(range(values.ndim)) if order is None else order
    steps = (1,) * values.ndim if steps is None else steps
    sides = [values.shape[d] * abs(steps[d]) for d in order]
    memory = np.empty(math.prod(sides) * values.itemsize + shift, np.uint8)
    whole = np.ndarray(sides, values.dtype, buffer=memory, offset=shift)
    whole[...] = np.nan
    view = whole[tuple(slice(None, None, steps[d]) for d in order)].transpose(np.argsort(order))
    view[...] = values
    return view


def surroundings(view, order, steps, shift):
    """All the memory of what `place` made, as elements: the view's and those between."""
    memory = view
    while memory.base is not None:
        memory = memory.base
    sides = [view.shape[d] * abs(steps[d]) for d in order]
    return np.ndarray(sides, view.dtype, buffer=memory, offset=shift)


@st.composite
def places(draw, ndim, itemsize):
    """Arguments of `place`."""
    return {
        "order": tuple(draw(st.permutations(range(ndim)))),
        "steps": tuple(draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, -1, -2]), min_size=ndim, max_size=ndim))),
        "shift": draw(st.sampled_from([0, 0, 1, itemsize // 2])),
    }


class Drawn(NamedTuple):
    arguments: dict
    count: int  # values per channel

    def placed(self, data, *names):
        """The arguments with these arrays somewhere else in memory, each for itself."""
        moved = dict(self.arguments)
        for name in names:
            a = moved[name]
            moved[name] = place(a, **data.draw(places(a.ndim, a.itemsize), label=name))
            moved[name].flags.writeable = data.draw(st.booleans(), label=f"{name} writeable")
        return moved


@st.composite
def problems(draw, min_count=0, max_size=20_000, dtypes=DTYPES):
    """Problems of any rank and channel axis; sides of 0, 1, around the lanes, and odd."""
    shape = draw(
        st.lists(
            st.integers(0, 9) | st.sampled_from([1, 1, 2, 16, 31, 32, 33, 63, 64, 65, 129]), min_size=1, max_size=5
        ).filter(lambda s: math.prod(max(side, 2) for side in s) <= max_size)
    )
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    count = math.prod(shape) // shape[axis] if shape[axis] else 0
    if count < min_count:
        # Not filtered: longer in the first axis that is not the channels'.
        if len(shape) == 1 or not shape[axis]:
            shape, axis = [2, *shape, 1], axis - 1 if axis < 0 else axis + 1
            shape[axis] = max(shape[axis], 1)
        shape = [side if d == axis % len(shape) else max(side, 2) for d, side in enumerate(shape)]
        count = math.prod(shape) // shape[axis]
    seed = draw(st.integers(0, 2**32 - 1))
    return Drawn(problem(tuple(shape), axis, draw(st.sampled_from(dtypes)), seed=seed), count)


# ----------------------------------------------------------------------------------------------------- exact arithmetic


def exact(a):
    return np.asarray(a, np.longdouble)


class Exact:
    """Batch normalization in extended precision, one row per channel, and how far cybn may be off (design, 2.1)."""

    def __init__(self, x, axis=1, weight=None, bias=None, eps=1e-5):
        channels = x.shape[axis]
        self.axis = axis
        self.double = x.dtype == np.float64
        self.unit = 1e-13 if self.double else 1e-6
        self.x = exact(rows_of(x, axis))
        self.count = self.x.shape[1]
        self.weight = exact(np.ones(channels) if weight is None else weight)[:, None]
        self.bias = exact(np.zeros(channels) if bias is None else bias)[:, None]
        self.mean = self.x.mean(axis=1, keepdims=True)
        # The second term takes back what rounding left in the mean.
        d = self.x - self.mean
        self.mean = self.mean + d.mean(axis=1, keepdims=True)
        d = self.x - self.mean
        self.var = (d**2).mean(axis=1, keepdims=True)
        self.std = np.sqrt(self.var)
        self.invstd = 1 / np.sqrt(self.var + exact(eps))
        self.x_hat = d * self.invstd
        # The mean is a double, and merged from doubles of its size and of the deviations'.
        self.mean_rounding = 4 * exact(np.spacing((np.abs(self.mean) + self.std).astype(np.float64)))

    def ulp(self, values):
        return exact(np.spacing(np.abs(values).astype(np.float64 if self.double else np.float32)))

    def mean_bar(self):
        return (1e-13 if self.double else 1e-6) * self.std + self.mean_rounding

    def variance_bar(self, adversarial):
        """Relative. In float64, rounding of the mean shows in the variance in proportion to mean / std."""
        if not self.double:
            return 2e-5 if adversarial else 1e-6
        with np.errstate(invalid="ignore"):
            return np.where(self.std > 0, 1e-13 + self.mean_rounding / self.std, 0)

    def check_moments(self, moments, adversarial=False):
        assert moments.count == self.count
        assert moments.mean.dtype == moments.m2.dtype == np.float64
        within(moments.mean[:, None], self.mean, self.mean_bar(), "mean")
        within(moments.var()[:, None], self.var, self.variance_bar(adversarial) * self.var, "variance")

    def check_saved(self, mean, invstd, adversarial=False):
        assert mean.dtype == invstd.dtype == np.float64
        within(mean[:, None], self.mean, self.mean_bar(), "save_mean")
        bar = self.variance_bar(adversarial) / 2 + 1e-15
        within(invstd[:, None], self.invstd, bar * self.invstd, "save_invstd")

    def y_bar(self, want, x_hat):
        return 2 * self.ulp(want) + 2 * self.ulp(self.bias) + self.unit * np.abs(self.weight * x_hat)

    def check_y(self, y, mean, invstd, adversarial=False):
        """For the statistics that were returned, and for the exact ones (on adversarial data with their variance)."""
        got = rows_of(y, self.axis)
        x_hat = (self.x - exact(mean)[:, None]) * exact(invstd)[:, None]
        want = x_hat * self.weight + self.bias
        within(got, want, self.y_bar(want, x_hat), "y for the saved statistics")
        want = self.x_hat * self.weight + self.bias
        bar = self.y_bar(want, self.x_hat) + self.rounding(self.weight)
        if adversarial:
            bar = bar + self.variance_bar(adversarial) / 2 * np.abs(self.weight * self.x_hat)
        within(got, want, bar, "y")

    def rounding(self, factor):
        """What a mean rounded to double costs in units of x_hat (nothing to speak of for float32)."""
        return np.abs(factor) * self.invstd * self.mean_rounding

    def check_backward(self, grad_output, grad_input, grad_weight, grad_bias, training=True):
        g = exact(rows_of(grad_output, self.axis))
        terms = g * self.x_hat
        sums, size = g.sum(axis=1, keepdims=True), np.abs(g).sum(axis=1, keepdims=True)
        dots, dots_size = terms.sum(axis=1, keepdims=True), np.abs(terms).sum(axis=1, keepdims=True)
        unit = 1e-13 if self.double else 5e-6
        within(grad_bias[:, None], sums, unit * size, "grad_bias")
        within(grad_weight[:, None], dots, unit * dots_size + self.rounding(size), "grad_weight")
        scale = self.weight * self.invstd
        want = g * scale
        bar = np.abs(want).max(axis=1, keepdims=True)
        if training:
            want = (g - sums / self.count - self.x_hat * (dots / self.count)) * scale
        # An ulp, because a subnormal result has fewer digits than the bar asks for.
        bar = (1e-13 if self.double else 2e-6) * bar + self.rounding(bar) + self.ulp(want)
        within(rows_of(grad_input, self.axis), want, bar, "grad_input")


def within(got, want, bar, name):
    """|got - want| <= bar everywhere; where not, say by how much."""
    error = np.abs(exact(got) - want)
    bar = np.broadcast_to(bar, error.shape)
    bad = ~(error <= bar)
    if bad.any():
        with np.errstate(all="ignore"):
            excess = np.where(bad, np.where(np.isnan(error), np.inf, error / bar), 0)
        i = np.unravel_index(np.argmax(excess), error.shape)
        raise AssertionError(
            f"{name}: {bad.sum()} of {bad.size} outside; worst at {tuple(map(int, i))}: got {got[i]!r}, want "
            f"{np.broadcast_to(want, error.shape)[i]!r}, error {error[i]:.3e}, allowed {bar[i]:.3e}"
        )


def doubled(arguments):
    return {k: v.astype(np.float64) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def assert_like_reference(name, training, arguments, **changes):
    """Against the reference on float64 copies; the running statistics too."""
    state = ("running_mean", "running_var")
    got_state = {k: arguments[k].copy() for k in state}
    want_state = {k: arguments[k].astype(np.float64) for k in state}
    got = call(name, arguments | got_state, training, **changes)
    want = call(name, doubled(arguments) | want_state, training, function=getattr(cybn.reference, name), **changes)
    if not isinstance(got, tuple):
        got, want = (got,), (want,)
    assert len(got) == len(want)
    results = zip((*got, *got_state.values()), (*want, *want_state.values()), strict=True)
    for a, b in results:
        single = np.float32 in (arguments["x"].dtype, np.asarray(a).dtype)
        scale = max(np.abs(b).max(initial=0), size_of_terms(arguments) if "backward" in name else 1)
        # The sums over a batch are as exact as their terms; test_kernels has the exact bars.
        scale *= max(1, rows_of(arguments["x"], arguments["axis"]).shape[1]) if np.ndim(a) < 2 else 1
        np.testing.assert_allclose(a, b, rtol=0, atol=(4e-6 if single else 1e-12) * scale)


def size_of_terms(p):
    """The largest that is added up in a gradient (the result may be much smaller)."""
    per_channel = {k: np.abs(v).max(initial=0) for k, v in p.items() if isinstance(v, np.ndarray)}
    invstd, weight = per_channel["invstd"], per_channel.get("weight", 1)
    x_hat = np.abs(rows_of(p["x"], p["axis"]) - p["mean"][:, None]).max(initial=0) * invstd
    mean_terms = (per_channel["sum_dy"] + x_hat * invstd * per_channel["sum_dy_xmu"]) / p["count"]
    return max(1, invstd) * max(1, weight) * (per_channel["grad_output"] * (1 + x_hat**2) + mean_terms)


# ------------------------------------------------------------------------------------------------------------ protocols


class HasArray:
    """Viewable through ``__array__`` alone."""

    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return np.array(self.a, dtype, copy=copy)


class HasDLPack:
    """Viewable through ``__dlpack__`` alone."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


def skip_where_views_cannot_be_written_to(wrap):
    if wrap is HasDLPack and np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("from_dlpack gives read-only arrays")


PROTOCOLS = {"buffer": memoryview, "__array__": HasArray, "__dlpack__": HasDLPack}
every_protocol = pytest.mark.parametrize("wrap", PROTOCOLS.values(), ids=PROTOCOLS.keys())
