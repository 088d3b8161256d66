"""The arithmetic: the accuracy contract (design, 2.1) in both traversals, and the bits of every build."""

import numpy as np
import pytest
from hypothesis import given
from support import DTYPES, Exact, bits, dtypes, every_geometry, every_variant, outcome, problem, problems

import cybn
from cybn import _kernels, _ops

pytestmark = pytest.mark.usefixtures("kernels")

# Shape, channel axis: rows and runs, with several blocks and slices, odd tails, more than one tile.
TRAVERSALS = {
    "rows, short period": ((3001, 24), 1),
    "rows, one per row": ((517, 700), 1),
    "rows, inner": ((67, 20, 5, 5), 1),
    "rows, channels last": ((9, 15, 17, 10), -1),
    "runs": ((9, 20, 13, 11), 1),
    "runs, in pieces": ((3, 5, 5003), 1),
    "runs, one block": ((2, 33, 64), 1),
    "one channel": ((5000, 1), 1),
}
every_traversal = pytest.mark.parametrize(("shape", "axis"), TRAVERSALS.values(), ids=TRAVERSALS.keys())


def along_batch(x, axis):
    """0 to 1 in the order of the values of a channel."""
    count = x.size // x.shape[axis]
    ramp = np.broadcast_to(np.linspace(0, 1, count), (x.shape[axis], count))
    return np.moveaxis(ramp.reshape(np.moveaxis(x, axis, 0).shape), 0, axis)


def with_first(x, axis, value):
    rows = np.moveaxis(x, axis, 0)
    rows[(slice(None), *(0,) * (x.ndim - 1))] = value
    return x


def with_middle_block(x, axis, value):
    """A stretch as long as a block, and more, far away from the rest."""
    where = along_batch(x, axis)
    return np.where((where > 0.4) & (where < 0.6), x + value, x)


# name -> (data from standard normal numbers, eps)
ADVERSARIAL = {
    "mean/std 1e7": (lambda z, axis: 1e7 + z, 1e-5),
    "mean/std -1e7, small": (lambda z, axis: -1e-3 + 1e-10 * z, 1e-30),
    "mean/std 1e4": (lambda z, axis: 1e4 + z, 1e-5),
    "drift": (lambda z, axis: z + 1e4 * along_batch(z, axis), 1e-5),
    "drift far away": (lambda z, axis: 1e6 + z + 1e3 * along_batch(z, axis), 1e-5),
    "step": (lambda z, axis: with_middle_block(z, axis, 1e5), 1e-5),
    "outlier first": (lambda z, axis: with_first(z, axis, 1e7), 1e-5),
    "outlier first, negative": (lambda z, axis: with_first(1e3 + z, axis, -1e8), 1e-5),
    "two values": (lambda z, axis: np.where(z > 0, 1e3, 1e3 + 2**-10), 1e-12),
    "near overflow": (lambda z, axis: np.clip(1e38 * z, -3.4e38, 3.4e38), 1e-5),
    "all near overflow": (lambda z, axis: 3.2e38 + 1e36 * z, 1e-5),
    "sums overflow": (lambda z, axis: 1e37 * z, 1e-5),
    "squares overflow": (lambda z, axis: 1e25 * z, 1e-5),
    "squares underflow": (lambda z, axis: 1e-25 * z, 1e-55),
    "squares vanish": (lambda z, axis: np.where(z > 0, 1e-25, -1e-25), 1e-55),
    "squares vanish around a value": (lambda z, axis: 1e-30 * (2 + np.sign(z)), 1e-65),
    "squares nearly underflow": (lambda z, axis: 1e-18 * z, 1e-40),
    "scale overflows nearly": (lambda z, axis: 1e-36 * z, 1e-76),
    "heavy tails": (lambda z, axis: z**9, 1e-5),
}


def gradients(name, shape, dtype, rng):
    """grad_output: ordinary, with a mean far from 0, or of the size that makes products underflow."""
    g = rng.normal(size=shape)
    scale = {"squares underflow": 1e-25, "squares vanish": 1e-25, "near overflow": 1e10}.get(name, 1)
    return (scale * (g + (5 if name.startswith("mean") else 0))).astype(dtype)


def check(x, axis, grad_output, eps, adversarial, weight, bias):
    oracle = Exact(x, axis, weight, bias, eps)
    oracle.check_moments(cybn.batch_norm_stats(x, axis=axis), adversarial)
    y, mean, invstd = cybn.batch_norm_forward(x, weight=weight, bias=bias, eps=eps, axis=axis)
    oracle.check_saved(mean, invstd, adversarial)
    oracle.check_y(y, mean, invstd, adversarial)
    for training in (True, False):
        grads = cybn.batch_norm_backward(grad_output, x, mean, invstd, weight, training, axis=axis)
        oracle.check_backward(grad_output, *grads, training)


@dtypes
@every_traversal
@pytest.mark.parametrize("affine", [True, False])
def test_ordinary_data_is_accurate(shape, axis, dtype, affine):
    p = problem(shape, axis, dtype, seed=1)
    parameters = (p["weight"], p["bias"]) if affine else (None, None)
    check(p["x"], axis, p["grad_output"], 1e-5, False, *parameters)


@every_traversal
@pytest.mark.parametrize("data", ADVERSARIAL)
def test_adversarial_data_is_accurate(data, shape, axis):
    rng = np.random.default_rng(2)
    make, eps = ADVERSARIAL[data]
    x = make(rng.normal(size=shape), axis).astype(np.float32)
    weight, bias = rng.uniform(-2, 2, (2, shape[axis])).astype(np.float32)
    check(x, axis, gradients(data, shape, np.float32, rng), eps, True, weight, bias)


@every_traversal
@pytest.mark.parametrize("data", ["mean/std 1e7", "drift", "step", "outlier first", "near overflow", "heavy tails"])
def test_adversarial_double_data_is_accurate(data, shape, axis):
    rng = np.random.default_rng(3)
    make, eps = ADVERSARIAL[data]
    x = make(rng.normal(size=shape), axis)
    check(x, axis, gradients(data, shape, np.float64, rng), eps, True, None, None)


@given(drawn=problems(min_count=2, max_size=4000))
def test_any_shape_is_accurate(drawn):
    p = drawn.arguments
    check(p["x"], p["axis"], p["grad_output"], 1e-5, False, p["weight"], p["bias"])


@every_traversal
@dtypes
def test_channels_of_very_different_scale_do_not_disturb_each_other(shape, axis, dtype):
    rng = np.random.default_rng(4)
    scale = 10.0 ** rng.integers(-15, 15, shape[axis])
    x = np.moveaxis(np.moveaxis(rng.normal(1, 1, shape), axis, -1) * scale, -1, axis).astype(dtype)
    check(x, axis, gradients("", shape, dtype, rng), 1e-40, True, None, None)


@every_traversal
@dtypes
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e7, 1e-30, 3e38])
@pytest.mark.parametrize("eps", [1e-5, 1e-8, 1e-90])
def test_a_constant_channel_gives_the_bias(shape, axis, dtype, value, eps):
    x = np.full(shape, value, dtype)
    bias = np.linspace(-1, 1, shape[axis]).astype(dtype)
    y, mean, invstd = cybn.batch_norm_forward(x, bias=bias, eps=eps, axis=axis)
    assert np.array_equal(np.moveaxis(y, axis, -1), np.broadcast_to(bias, np.moveaxis(y, axis, -1).shape))
    assert np.array_equal(mean, np.full(shape[axis], x.flat[0], np.float64))
    np.testing.assert_allclose(invstd, 1 / np.sqrt(eps), rtol=1e-15)


@every_traversal
@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_stays_in_its_channel(shape, axis, dtype, value):
    p = problem(shape, axis, dtype)
    channels = shape[axis]
    poisoned = dict(p)
    victims = {0, channels // 2, channels - 1}
    others = [c for c in range(channels) if c not in victims]
    for name in ("x", "grad_output"):
        a = poisoned[name] = p[name].copy()
        for c, k in zip(sorted(victims), (0, -1, a.size // channels // 2), strict=False):
            rows = np.moveaxis(a, axis, 0)[c]
            rows[np.unravel_index(k % rows.size, rows.shape)] = value
        clean_forward, clean_stats = (
            outcome(n, p, t) for n, t in (("batch_norm_forward", True), ("batch_norm_stats", None))
        )
        forward, stats = (
            outcome(n, poisoned, t) for n, t in (("batch_norm_forward", True), ("batch_norm_stats", None))
        )
        clean_backward, backward = (outcome("batch_norm_backward", q, True) for q in (p, poisoned))
        if name == "x":
            y = np.moveaxis(forward[0], axis, 0)
            assert np.isnan(y[sorted(victims)]).all()
            assert not np.isfinite(stats[1][sorted(victims)]).any()
        for got, clean in zip(
            (*forward, *stats[1:], *backward), (*clean_forward, *clean_stats[1:], *clean_backward), strict=True
        ):
            along = axis if got.ndim > 1 else 0
            got, clean = np.moveaxis(got, along, 0), np.moveaxis(clean, along, 0)
            assert got[others].tobytes() == clean[others].tobytes()
        dx = np.moveaxis(backward[0], axis, 0)
        assert not np.isfinite(dx[sorted(victims)]).any()


@dtypes
def test_gradient_values_that_are_not_finite_stay_in_their_element_when_statistics_are_frozen(dtype):
    p = problem((40, 5, 30), dtype=dtype)
    p["grad_output"][3, 2, 7] = np.nan
    dx, dw, db = cybn.batch_norm_backward(p["grad_output"], p["x"], p["save_mean"], p["save_invstd"], training=False)
    assert np.argwhere(np.isnan(dx)).tolist() == [[3, 2, 7]]
    assert np.flatnonzero(np.isnan(dw)).tolist() == np.flatnonzero(np.isnan(db)).tolist() == [2]


@pytest.mark.parametrize("shape", [(4000, 10), (40, 10, 100)])
def test_subnormal_input_is_not_flushed(shape):
    """Large enough for a team: the floating-point mode of every thread is plain IEEE."""
    for dtype in DTYPES:
        tiny = np.finfo(dtype).smallest_subnormal
        x = (np.arange(np.prod(shape)).reshape(shape) % 1000).astype(dtype) * tiny
        y = cybn.batch_norm_apply(x, np.zeros(10), np.ones(10), num_threads=3)
        assert y.tobytes() == x.tobytes()
        assert np.count_nonzero(y) > 0.9 * y.size


@dtypes
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (3, 2, 70)])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_central_differences(shape, axis, dtype, training):
    rng = np.random.default_rng(5)
    x, g = rng.normal(1, 2, (2, *shape))
    channels = shape[axis]
    weight, bias, running_mean = rng.normal(1, 1, (3, channels))
    running_var = rng.uniform(0.5, 2, channels)

    def loss(x, weight, bias):
        return np.vdot(g, cybn.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, axis=axis))

    def numerical(arrays, index, step=1e-5):
        gradient = np.empty_like(arrays[index])
        for i in np.ndindex(gradient.shape):
            up, down = ([a.copy() for a in arrays] for _ in range(2))
            up[index][i] += step
            down[index][i] -= step
            gradient[i] = (loss(*up) - loss(*down)) / (2 * step)
        return gradient

    _, mean, invstd = cybn.batch_norm_forward(
        x, None if training else running_mean, None if training else running_var, training=training, axis=axis
    )
    got = cybn.batch_norm_backward(
        g.astype(dtype), x.astype(dtype), mean, invstd, weight.astype(dtype), training, axis=axis
    )
    for index, gradient in enumerate(got):
        assert gradient.dtype == dtype
        want = numerical((x, weight, bias), index)
        unit = 2e-8 if dtype == np.float64 else 5e-6
        np.testing.assert_allclose(gradient, want, rtol=0, atol=unit * max(1, np.abs(want).max()))


@pytest.mark.parametrize("kernels", [build for build in _kernels.builds if build != "baseline"], indirect=True)
@every_geometry
@every_variant
def test_every_build_gives_the_same_bits(name, training, geometry, kernels):
    shape, axis, order = geometry
    arguments = [problem(shape, axis, dtype, order) for dtype in DTYPES]
    got = [bits(outcome(name, a, training)) for a in arguments]
    _ops.select_kernels("baseline")
    try:
        assert got == [bits(outcome(name, a, training)) for a in arguments]
    finally:
        _ops.select_kernels(kernels)


def test_the_builds_of_the_fixture_are_all_and_in_use(kernels):
    assert "baseline" in _kernels.builds
    assert _ops.selected_kernels() == kernels


def test_select_kernels_returns_the_build_before(kernels):
    assert _ops.select_kernels("baseline") == kernels
    assert _ops.select_kernels(kernels) == "baseline"
    with pytest.raises(KeyError):
        _ops.select_kernels("no such build")
    assert _ops.selected_kernels() == kernels
