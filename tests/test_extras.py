"""What comes with a normalization: activation, residual, masks, weights. In every function, shape and mode."""

import contextlib
import itertools
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    Exact,
    arrange,
    bits,
    dtypes,
    every_geometry,
    place,
    places,
    problem,
    problems,
    python,
    raises,
    rows_of,
    within,
)

import cybn
from cybn import _schedule

pytestmark = pytest.mark.usefixtures("kernels")

SLOPE = 0.2
ACTIVATIONS = (None, "relu", "leaky_relu")
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def doubled(value):
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def on_doubles(name, *arguments, **named):
    """The reference's answer in float64."""
    function = getattr(cybn.reference, name)
    return function(*map(doubled, arguments), **{k: doubled(v) for k, v in named.items()})


def agree(got, want, x, size=1.0):
    got = got if isinstance(got, tuple) else (got,)
    want = want if isinstance(want, tuple) else (want,)
    for a, b in zip(got, want, strict=True):
        single = np.float32 in (x.dtype, np.asarray(a).dtype)
        largest = np.abs(np.asarray(b)[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=0, atol=(1e-5 if single else 1e-11) * max(largest, size))


def shape_without_channels(x, axis):
    return tuple(np.delete(x.shape, axis))


@st.composite
def extras(draw, x, axis):
    """Activation, residual and a mask or weights, as arguments of a forward pass."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rest = shape_without_channels(x, axis)
    shape = tuple(1 if draw(st.integers(0, 3)) == 0 else side for side in rest)
    chosen = {"activation": draw(st.sampled_from(ACTIVATIONS)), "negative_slope": SLOPE}
    if draw(st.booleans()):
        chosen["residual"] = rng.normal(0, 1, x.shape).astype(x.dtype)
    kind = draw(st.sampled_from(["none", "mask", "weights"]))
    if kind == "mask":
        chosen["mask"] = rng.random(shape) < draw(st.sampled_from([0.3, 0.9, 1]))
        if shape and draw(st.booleans()):
            chosen["mask"][: len(chosen["mask"]) // 2] = True  # blocks of which all counts
        chosen["masked_output"] = draw(st.sampled_from(["normalize", "zero"]))
    elif kind == "weights":
        chosen["sample_weight"] = (rng.random(shape) * rng.integers(draw(st.integers(0, 1)), 3, shape)).astype(x.dtype)
    return chosen


def counting(chosen, x, axis):
    """Values per channel that count."""
    given = chosen.get("mask", chosen.get("sample_weight"))
    rest = shape_without_channels(x, axis)
    return int(np.prod(rest)) if given is None else int((np.broadcast_to(given, rest) > 0).sum())


def backward_arguments(chosen, y):
    """The same as arguments of the backward pass."""
    known = ("activation", "negative_slope", "mask", "sample_weight")
    named = {key: chosen[key] for key in known if key in chosen}
    return named | ({"output": y} if "residual" in chosen else {})


# ----------------------------------------------------------------------------------------------------- the reference


@given(drawn=problems(min_count=3, max_size=4000), data=st.data())
def test_every_combination_is_what_the_reference_computes(drawn, data):
    p, axis = drawn.arguments, drawn.arguments["axis"]
    x = p["x"]
    chosen = data.draw(extras(x, axis))
    training = data.draw(st.booleans(), label="training")
    if counting(chosen, x, axis) < 2:
        return
    if "mask" in chosen and data.draw(st.booleans(), label="NaN behind the mask"):
        keep = np.broadcast_to(np.expand_dims(chosen["mask"], axis), x.shape)
        x = np.where(keep, x, np.nan).astype(x.dtype)
        p["grad_output"] = np.where(keep, p["grad_output"], np.nan).astype(x.dtype)
    state = [p[k].copy() for k in ("running_mean", "running_var")]
    want_state = [doubled(a) if a.dtype == np.float32 else a.copy() for a in state]
    parameters = p["weight"], p["bias"], training
    got = cybn.batch_norm_forward(x, *state, *parameters, axis=axis, **chosen)
    agree(got, on_doubles("batch_norm_forward", x, *want_state, *parameters, axis=axis, **chosen), x)
    agree(tuple(state), tuple(want_state), x)

    y, mean, invstd = got
    size = 1 + np.abs(np.nan_to_num(p["grad_output"])).max() * max(1, invstd.max()) * 2 * max(
        1, (np.abs(np.nan_to_num(rows_of(x, axis)) - mean[:, None]).max() * invstd.max()) ** 2
    )
    size *= max(1, drawn.count / 10)
    named = backward_arguments(chosen, y) | {"axis": axis, "bias": p["bias"], "return_grad_residual": True}
    arguments = p["grad_output"], x, mean, invstd, p["weight"], training
    # In float64 the input of an activation may lie on the other side of 0: which side it was is read from the result.
    sides = {"output": y}
    got = cybn.batch_norm_backward(*arguments, **named)
    agree(got, on_doubles("batch_norm_backward", *arguments, **named | sides), x, size)

    # And the halves.
    named = {k: chosen[k] for k in ("mask", "sample_weight") if k in chosen}
    got = cybn.batch_norm_stats(x, axis=axis, **named)
    want = on_doubles("batch_norm_stats", x, axis=axis, **named)
    assert type(got.count) is (float if "sample_weight" in chosen else int)
    agree(tuple(got), tuple(want), x)
    named = {k: v for k, v in chosen.items() if k != "sample_weight"}
    arguments = x, mean, invstd, p["weight"], p["bias"]
    got = cybn.batch_norm_apply(*arguments, axis=axis, **named)
    agree(got, on_doubles("batch_norm_apply", *arguments, axis=axis, **named), x)
    named = backward_arguments(chosen, y) | {"bias": p["bias"], "axis": axis}
    weights = named.pop("sample_weight", None)
    arguments = p["grad_output"], x, mean
    sums = cybn.batch_norm_backward_reduce(*arguments, invstd=invstd, weight=p["weight"], **named)
    want = on_doubles("batch_norm_backward_reduce", *arguments, invstd=invstd, weight=p["weight"], **named | sides)
    agree(sums, want, x, size)
    named |= {"sample_weight": weights, "return_grad_residual": True}
    arguments = *arguments, invstd, p["weight"], *sums, drawn.count
    got = cybn.batch_norm_backward_apply(*arguments, **named)
    agree(got, on_doubles("batch_norm_backward_apply", *arguments, **named | sides), x, size * 10)


@pytest.mark.parametrize(
    "extra", ["relu", "leaky_relu", "add", "add relu", "mask", "mask relu", "weights", "weights relu"]
)
def test_gradients_are_those_of_central_differences(extra):
    rng = np.random.default_rng(1)
    shape = (5, 3, 4)
    x, residual, g = (rng.normal(0.3, 1, shape) for _ in range(3))
    parameters = [rng.uniform(0.5, 2, 3), rng.normal(size=3)]
    kept = rng.random((5, 4)) < 0.7
    named = {"activation": "leaky_relu" if "leaky" in extra else "relu" if "relu" in extra else None}
    named |= {"negative_slope": SLOPE}
    if "mask" in extra:
        named["mask"] = kept
        g = g * kept[:, None]  # what is masked has no part in the loss
    if "weights" in extra:
        named["sample_weight"] = kept * rng.uniform(0.5, 2, kept.shape)

    def forward(x, residual, weight, bias):
        with_residual = {"residual": residual} if "add" in extra else {}
        return cybn.batch_norm_forward(x, None, None, weight, bias, **named, **with_residual)

    inputs = [x, residual, *parameters]
    y, mean, invstd = forward(*inputs)
    dx, dweight, dbias, dresidual = cybn.batch_norm_backward(
        g, x, mean, invstd, parameters[0], bias=parameters[1], output=y, return_grad_residual=True, **named
    )
    step = 1e-6
    for value, gradient in zip(inputs, (dx, dresidual, dweight, dbias), strict=True):
        if value is residual and "add" not in extra:
            continue
        for index in np.ndindex(value.shape):
            before = value[index]
            value[index] = before + step
            above = (forward(*inputs)[0] * g).sum()
            value[index] = before - step
            below = (forward(*inputs)[0] * g).sum()
            value[index] = before
            assert abs((above - below) / (2 * step) - gradient[index]) < 1e-7


# ----------------------------------------------------------------------------------------------------- special values


@dtypes
@pytest.mark.parametrize("add", [False, True])
def test_activations_treat_special_values_as_pytorch(add, dtype):
    special = np.array([-0.0, 0.0, np.nan, np.inf, -np.inf, -1, 1], dtype)
    x = np.tile(special, 40)[:, None]
    one = np.ones(1)
    named = {"bias": -0.0 * one} | ({"residual": np.full_like(x, -0.0)} if add else {})
    relu = cybn.batch_norm_apply(x, 0 * one, one, activation="relu", **named)[:7, 0]
    np.testing.assert_array_equal(relu, np.array([0, 0, np.nan, np.inf, 0, 0, 1], dtype))
    assert np.signbit(relu).tolist() == [True] + [False] * 6
    named |= {"activation": "leaky_relu", "negative_slope": 0.5}
    leaky = cybn.batch_norm_apply(x, 0 * one, one, **named)[:7, 0]
    np.testing.assert_array_equal(leaky, np.array([0, 0, np.nan, np.inf, -np.inf, -0.5, 1], dtype))
    assert np.signbit(leaky).tolist() == [True, False, False, False, True, True, False]


@dtypes
@pytest.mark.parametrize("from_output", [False, True])
def test_derivatives_at_special_values_are_pytorchs(from_output, dtype):
    """0 at 0 (the slope, if leaky); a ReLU lets the gradient through where its input is NaN."""
    x = np.tile(np.array([-0.0, 0.0, np.nan, np.inf, -np.inf, -1, 1], dtype), 40)[:, None]
    g = np.full_like(x, 3)
    for activation, want in (("relu", [0, 0, 3, 3, 0, 0, 3]), ("leaky_relu", [1.5, 1.5, 1.5, 3, 1.5, 1.5, 3])):
        got = cybn.batch_norm_backward(
            g, x, np.zeros(1), np.ones(1), training=False, output=x if from_output else None,
            activation=activation, negative_slope=0.5, return_grad_residual=True,
        )  # fmt: skip
        for gradient in (got[0], got[3]):
            np.testing.assert_array_equal(gradient[:7, 0], np.array(want, dtype))


# --------------------------------------------------------------------------------------------- what must not matter


def every_result(*arguments, **named):
    return bits(every_array(*arguments, **named))


def every_array(p, chosen, training, order=None, steps=None, shift=0, threads=None, in_place=False):
    """Results of forward and backward with the arrays placed somewhere."""

    def put(a):
        return a if order is None or a is None else place(a, order, steps, shift)

    x, residual, g = put(p["x"]), put(chosen.get("residual")), put(p["grad_output"])
    named = chosen | ({"residual": residual} if residual is not None else {})
    state = [p[k].copy() for k in ("running_mean", "running_var")]
    target = x.copy(order="K") if in_place else x
    y, mean, invstd = cybn.batch_norm_forward(
        target,
        *state,
        p["weight"],
        p["bias"],
        training,
        axis=p["axis"],
        num_threads=threads,
        out=target if in_place else None,
        **named,
    )
    gradients = cybn.batch_norm_backward(
        g.copy(order="K") if in_place else g,
        x,
        mean,
        invstd,
        p["weight"],
        training,
        axis=p["axis"],
        bias=p["bias"],
        num_threads=threads,
        return_grad_residual=True,
        **backward_arguments(chosen, y),
    )
    return [y, mean, invstd, *state, *gradients]


@given(drawn=problems(min_count=3, max_size=6000), data=st.data())
def test_bits_do_not_depend_on_threads_or_places(drawn, data):
    p, axis = drawn.arguments, drawn.arguments["axis"]
    chosen = data.draw(extras(p["x"], axis))
    if counting(chosen, p["x"], axis) < 2:
        return
    # The order of axes in memory makes bits; what it is made of does not.
    here = data.draw(places(p["x"].ndim, p["x"].itemsize))
    dense = {"order": here["order"], "steps": None, "shift": 0}
    want = every_result(p, chosen, True, **dense, threads=1)
    assert every_result(p, chosen, True, **here, threads=data.draw(st.integers(1, 5))) == want
    assert every_result(p, chosen, True, **dense, in_place=True) == want
    with streamed():
        assert every_result(p, chosen, True, **here, threads=data.draw(st.integers(1, 5))) == want


def named_extras(extra, shape, axis, dtype, order=None):
    """What the words of `extra` stand for, for an array of this shape."""
    rng = np.random.default_rng(3)
    rest = tuple(np.delete(shape, axis))
    chosen = {"activation": "relu" if "relu" in extra else "leaky_relu" if "leaky" in extra else None}
    if "add" in extra:
        chosen["residual"] = arrange(rng.normal(size=shape).astype(dtype), order)
    if "mask" in extra:
        chosen |= {"mask": rng.random(rest) < 0.8, "masked_output": "zero"}
    if "weights" in extra:
        chosen["sample_weight"] = rng.random(rest).astype(dtype)
    return chosen


@contextlib.contextmanager
def streamed():
    """Results of any size past the caches."""
    before = _schedule.set_stream_min_bytes(0)
    try:
        yield
    finally:
        _schedule.set_stream_min_bytes(before)


@dtypes
@every_geometry
@pytest.mark.parametrize("extra", ["relu", "add relu", "mask", "weights", "mask leaky add"])
def test_bits_do_not_depend_on_threads_in_any_plan(extra, geometry, dtype):
    shape, axis, order = geometry
    p = problem(shape, axis, dtype, order)
    chosen = named_extras(extra, shape, axis, dtype, order)
    want = every_result(p, chosen, True, threads=1)
    for threads in (2, 7):
        assert every_result(p, chosen, True, threads=threads) == want


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", ["mask", "sample_weight"])
def test_shares_of_rows_of_one_block_do_not_show(extra, training):
    # Maps are cut into more pieces than there are blocks.
    counted = np.random.default_rng(5).random(250) < 0.8
    p = problem((250, 600), 1)
    chosen = {extra: counted if extra == "mask" else counted.astype(np.float32), "masked_output": "zero"}
    want = every_result(p, chosen, training, threads=1)
    for threads in (2, 7):
        assert every_result(p, chosen, training, threads=threads) == want


@dtypes
@pytest.mark.parametrize("extra", ["none", "relu", "add relu", "mask"])
@pytest.mark.parametrize("shape", [(67, 1040), (67, 2047), (67, 2600), (67, 540, 3), (67, 682, 3)], ids=str)
def test_other_channels_and_the_distance_of_rows_do_not_show(shape, extra, dtype):
    # Of rows that are whole 4 KB apart a reduction takes fewer at a time; maps take those of up to 1664 columns of
    # float32 whole, wider ones in nearly equal parts.
    rng = np.random.default_rng(6)
    wide = problem(shape, 1, dtype)
    chosen = {"activation": "relu" if "relu" in extra else None}
    if extra == "mask":
        chosen["mask"] = rng.random(67) < 0.8
    residual = rng.normal(size=shape).astype(dtype)
    added = "add" in extra
    want = every_array(wide, chosen | ({"residual": residual} if added else {}), True)
    few = 1024 // (len(shape) * 2 - 3)
    for part in (slice(few), slice(-few, None)):

        def cut(a, part=part):
            return a[part] if a.ndim == 1 else np.ascontiguousarray(a[:, part])

        near = {name: cut(a) if np.ndim(a) else a for name, a in wide.items()}
        got = every_array(near, chosen | ({"residual": cut(residual)} if added else {}), True)
        assert bits(got) == bits([cut(a) for a in want])


@dtypes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", ["none", "relu", "add", "leaky add", "mask"])
@pytest.mark.parametrize("shape", [(22003, 3), (1511, 48), (131, 600), (29, 9, 9, 48)])
def test_rows_that_follow_each_other_do_not_show(shape, extra, training, dtype):
    # Many of them are mapped as longer ones, but not where results go through a stage.
    assert np.prod(shape) >= 65536
    p = problem(shape, -1, dtype)
    chosen = named_extras(extra, shape, -1, dtype)
    want = every_result(p, chosen, training)
    with streamed():
        assert every_result(p, chosen, training) == want


@dtypes
@every_geometry
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_streaming_and_the_place_of_gradients_do_not_show(activation, masked, geometry, dtype):
    p = problem(*geometry[:2], dtype, geometry[2])
    # The residual's gradient goes through a stage where it is streamed, grad_output where it is not dense.
    strided = p | {"grad_output": np.repeat(p["grad_output"], 2, axis=-1)[..., ::2]}
    chosen = {"activation": activation, "negative_slope": SLOPE, "residual": p["grad_output"]}
    if masked:
        chosen["mask"] = np.random.default_rng(2).random(shape_without_channels(p["x"], p["axis"])) < 0.7
    want = every_result(p, chosen, True)
    assert every_result(strided, chosen, True) == want
    with streamed():
        assert every_result(p, chosen, True) == want
        assert every_result(strided, chosen, True) == want


# Pieces that end within runs and hold many of them, runs longer than what is mapped at a time.
@dtypes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", ["none", "relu", "leaky", "add", "add relu", "add leaky", "mask", "weights"])
@pytest.mark.parametrize("inner", [16, 49, 196, 511, 512, 2050, 66000])
def test_pieces_of_runs_past_the_caches_do_not_show(inner, extra, training, dtype):
    shape = (3, 7 if inner < 60000 else 2, inner)
    p = problem(shape, 1, dtype)
    chosen = named_extras(extra, shape, 1, dtype)
    want = every_result(p, chosen, training)
    with streamed():
        for threads in (1, 3):
            assert every_result(p, chosen, training, threads=threads) == want


@dtypes
@pytest.mark.parametrize("offset", [1, 7, 13, 31])
@pytest.mark.parametrize("inner", [49, 784, 1030])
def test_results_past_the_caches_may_begin_within_a_line(inner, offset, dtype):
    shape = (3, 7, inner)
    p = problem(shape, 1, dtype)
    residual = p["grad_output"] - 1
    layer = cybn.BatchNorm(7, axis=1, dtype=dtype, activation="relu")
    y = layer(p["x"], residual=residual)
    gradients = layer.backward(p["grad_output"])
    want = bits([y, *gradients])
    room = np.full(y.size + 64, np.nan, dtype)
    out = room[offset : offset + y.size].reshape(shape)
    with streamed():
        got = [layer(p["x"], residual=residual, out=out).copy()]
        dx, dr = layer.backward(p["grad_output"], out=out)
    assert bits([*got, dx, dr]) == want
    assert np.isnan(room[:offset]).all()
    assert np.isnan(room[offset + y.size :]).all()


def test_bits_do_not_depend_on_the_kernels():
    from cybn import _kernels, _ops

    p = problem((6, 20, 9, 11))
    rng = np.random.default_rng(3)
    results = set()
    for activation in ACTIVATIONS:
        for extra in ({}, {"mask": rng.random((6, 9, 11)) < 0.7}, {"sample_weight": rng.random((6, 1, 11))}):
            for residual in ({}, {"residual": p["grad_output"]}):
                outcomes = []
                for name in _kernels.builds:
                    before = _ops.select_kernels(name)
                    outcomes.append(every_result(p, {"activation": activation, **extra, **residual}, True))
                    _ops.select_kernels(before)
                assert all(outcome == outcomes[0] for outcome in outcomes)
                results.add(outcomes[0][0][2])
    assert len(results) == 18


# ----------------------------------------------------------------------------------------------------- masks, weights


@dtypes
@every_geometry
def test_trivial_masks_and_weights_change_no_bit(geometry, dtype):
    shape, axis, order = geometry
    p = problem(shape, axis, dtype, order)
    rest = tuple(np.delete(shape, axis))
    want = every_result(p, {}, True)
    assert every_result(p, {"mask": np.ones((1,) * len(rest), bool)}, True) == want
    assert every_result(p, {"mask": np.ones(rest, bool), "masked_output": "zero"}, True) == want
    assert every_result(p, {"sample_weight": np.ones(rest, dtype)}, True) == want


@dtypes
@every_geometry
def test_statistics_under_a_mask_are_those_of_what_is_left(geometry, dtype):
    """To the bar of contract 1, also where the rest is NaN."""
    shape, axis, order = geometry
    p = problem(shape, axis, dtype, order)
    rng = np.random.default_rng(5)
    mask = rng.random(tuple(np.delete(shape, axis))) < 0.6
    mask.flat[: mask.size // 3] = False  # whole blocks too
    x = np.moveaxis(p["x"], axis, 0)
    left = np.ascontiguousarray(x[:, mask].T)
    x[:, ~mask] = np.nan
    exact = Exact(left)
    moments = cybn.batch_norm_stats(p["x"], axis=axis, mask=mask)
    exact.check_moments(moments)
    y, mean, invstd = cybn.batch_norm_forward(p["x"], axis=axis, mask=mask)
    exact.check_saved(mean, invstd)
    exact.check_y(np.moveaxis(y, axis, 0)[:, mask].T, mean, invstd)


@dtypes
@every_geometry
def test_weighted_statistics_are_exact(geometry, dtype):
    shape, axis, order = geometry
    p = problem(shape, axis, dtype, order)
    rng = np.random.default_rng(5)
    w = rng.random(tuple(np.delete(shape, axis))).astype(dtype)
    rows = rows_of(p["x"], axis).astype(np.longdouble)
    flat = w.reshape(1, -1).astype(np.longdouble)
    mean = (rows * flat).sum(axis=1, keepdims=True) / flat.sum()
    var = ((rows - mean) ** 2 * flat).sum(axis=1, keepdims=True) / flat.sum()
    moments = cybn.batch_norm_stats(p["x"], axis=axis, sample_weight=w)
    np.testing.assert_allclose(moments.count, float(flat.sum()), rtol=1e-13)
    single = dtype == np.float32
    within(moments.mean[:, None], mean, (1e-9 if single else 1e-13) * np.sqrt(var) + 1e-14 * np.abs(mean), "mean")
    within(moments.var()[:, None], var, (1e-6 if single else 1e-13) * var, "variance")


@dtypes
def test_weighted_moments_are_numpys(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (50, 4, 6)).astype(dtype)
    w = rng.random((50, 6)).astype(dtype)
    running_mean, running_var = np.zeros(4), np.zeros(4)
    cybn.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, sample_weight=w)
    rows = x.transpose(1, 0, 2).reshape(4, -1).astype(np.float64)
    np.testing.assert_allclose(running_mean, np.average(rows, axis=1, weights=w.ravel()), rtol=1e-6)
    np.testing.assert_allclose(running_var, np.diag(np.cov(rows, aweights=w.ravel())), rtol=1e-6)
    cybn.batch_norm(x, running_mean, running_var, training=True, momentum=1.0, sample_weight=w, correction=0)
    np.testing.assert_allclose(running_var, np.diag(np.cov(rows, aweights=w.ravel(), ddof=0)), rtol=1e-6)


@dtypes
@pytest.mark.parametrize("small", [1e-13, 1e-16])
def test_running_var_is_unbiased_where_one_weight_is_nearly_all(dtype, small):
    """sum w - sum w^2 / sum w would have no digit left. Of two values the variance is half of (b - a)^2."""
    x = np.array([[0.0], [2.0]], dtype)
    for module in (cybn, cybn.reference):
        running_var = np.ones(1)
        weights = np.array([1, small], dtype)
        module.batch_norm(x, np.zeros(1), running_var, training=True, momentum=1.0, sample_weight=weights)
        np.testing.assert_allclose(running_var, 2, rtol=1e-6)


@dtypes
def test_what_has_no_weight_does_not_show_in_a_constant_channel(dtype):
    """Whose squares are nothing, so that it is looked at: but not at these."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = np.full((40, 3), rng.normal() * 10.0 ** rng.integers(-10, 12), dtype)
        w = rng.random(40).astype(dtype)
        w[::4] = 0
        holes = x.copy()
        holes[::4] = 7
        whole, other = (cybn.batch_norm_stats(a, sample_weight=w) for a in (x, holes))
        assert bits(whole[1:]) == bits(other[1:])
        assert (other.m2 >= 0).all()
        masked = cybn.batch_norm_stats(holes, mask=w > 0)
        assert (masked.m2 == 0).all()


@pytest.mark.parametrize("shape", [(64, 4, 64), (64, 4)])
def test_a_full_mask_changes_no_bit_where_products_vanish(shape):
    x = np.where(np.random.default_rng(0).random(shape) < 0.5, -1e-25, 1e-25).astype(np.float32)
    x[: len(x) // 2] = -x[len(x) // 2 :]  # sums of exactly 0
    plain, masked = cybn.BatchNorm(4, eps=1e-55), cybn.BatchNorm(4, eps=1e-55)
    y = plain(x)
    assert bits([masked(x, mask=np.ones((len(x), *shape[2:]), bool))]) == bits([y])
    assert np.abs(y).max() == pytest.approx(1, rel=1e-4)
    assert bits([plain.backward(x), plain.grad_weight]) == bits([masked.backward(x), masked.grad_weight])
    assert (plain.grad_weight > 0).all()


@dtypes
def test_the_scale_of_weights_does_not_show(dtype):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 9, 4, 5)).astype(dtype)
    w = (rng.integers(0, 16, (9, 5)) / 16).astype(dtype)
    want = None
    for scale in (1, 2.0**55, 2.0**-55):
        bn = cybn.BatchNorm(4, dtype=dtype)
        y = bn(x, sample_weight=(w * scale).astype(dtype))
        results = bits([y, bn.backward(g), bn.grad_weight, bn.running_mean, bn.running_var])
        want = want or results
        assert results == want


@pytest.mark.parametrize(("dtype", "least"), [(np.float32, 1e-18), (np.float64, 1e-140)])
def test_weights_of_no_ordinary_size_are_refused(dtype, least):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(dtype)
    bn = cybn.BatchNorm(4, dtype=dtype)
    for value in (least / 100, 100 / least):
        total = float(np.full(8, value, dtype).astype(np.float64).sum())
        message = (
            f"sample_weight must add up to a number from {least:g} to {1 / least:g} in {np.dtype(dtype)}, got {total:g}"
        )
        with raises(ValueError, message, x, bn.running_var):
            bn(x, sample_weight=np.full(8, value, dtype))


def test_weights_that_vanish_beside_one_are_none():
    """Their products with it are less than the least double."""
    x = np.random.default_rng(0).normal(size=(2, 4))
    bn = cybn.BatchNorm(4, dtype=np.float64)
    message = (
        "Expected more than 1 value per channel when training, got input shape (2, 4) "
        "with 1 value of weight, beside which those of the others vanish"
    )
    with raises(ValueError, message, x, bn.running_var):
        bn(x, sample_weight=np.array([1e-100, 1e-250]))


def test_limits_of_weights_are_for_statistics_that_are_taken():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    w = np.full(8, 1e20, np.float32)
    want = cybn.batch_norm(x, np.zeros(4), np.ones(4))
    assert bits([cybn.batch_norm(x, np.zeros(4), np.ones(4), sample_weight=w)]) == bits([want])


def test_weights_that_vanish_during_a_call_do_not_hang_it():
    x = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    w = np.ones((8, 6), np.float32)  # as the kernels read it: not copied

    class Residual:
        def __array__(self, dtype=None, copy=None):
            w[...] = 0
            return x

    cybn.batch_norm(x, None, None, training=True, sample_weight=w, residual=Residual())  # something, and an end


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 2, 510, 510), (1, 1, 260097), (1, 1, 514, 514)])
def test_runs_that_would_end_with_a_block_of_a_few_elements(shape, dtype):
    """The sums of such a block took flags from before the panel's, and wrote gradients into the block before."""
    rng = np.random.default_rng(0)
    x, r, g = rng.standard_normal((3, *shape)).astype(dtype)
    bn = cybn.BatchNorm(shape[1], activation="relu", dtype=dtype)
    y = bn(x, residual=r)
    dx, dr = bn.backward(g)
    want = np.where(y > 0, g, 0)
    assert bits([dr]) == bits([want])
    oracle = Exact(x, 1, None, None, 1e-5)
    oracle.check_moments(cybn.batch_norm_stats(x), False)
    plain = cybn.BatchNorm(shape[1], dtype=dtype)
    plain(x)
    np.testing.assert_allclose(dx, plain.backward(want), atol=1e-6)
    apart = np.zeros((*shape, 2), dtype)[..., 0]
    apart[...] = x
    assert bits(cybn.batch_norm_stats(apart)[1:]) == bits(cybn.batch_norm_stats(x)[1:])


def test_a_weight_that_rounds_to_0_is_0():
    """In float32, where what has weight 0 may be no number."""
    x = np.random.default_rng(0).normal(size=(40, 3, 70)).astype(np.float32)
    x[7, :, 3] = np.nan
    weights = np.ones((40, 70))
    weights[7, 3] = 1e-60
    got = cybn.batch_norm_stats(x, sample_weight=weights)
    want = cybn.batch_norm_stats(x, sample_weight=weights.astype(np.float32))
    assert bits(got[1:]) == bits(want[1:])
    assert np.isfinite(got.m2).all()


@dtypes
def test_the_scale_of_weights_does_not_matter(dtype):
    p = problem((40, 5, 7), dtype=dtype)
    w = np.random.default_rng(0).random((40, 7)).astype(dtype)
    want = every_result(p, {"sample_weight": w}, True)
    assert every_result(p, {"sample_weight": w * 4}, True) == want


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1), (6, 5, 4), (1, 5, 1), (6, 1, 4), (5, 4), (), (4,)])
def test_masks_broadcast(shape):
    p = problem((6, 3, 5, 4))
    mask = np.random.default_rng(0).random(shape) < 0.8
    if not mask.any():
        mask = ~mask
    full = np.broadcast_to(mask[:, None, None] if shape == (6,) else mask, (6, 5, 4))
    assert every_result(p, {"mask": mask}, True) == every_result(p, {"mask": full}, True)


@dtypes
def test_masked_elements_get_no_gradient_and_are_normalized_or_zero(dtype):
    p = problem((8, 5, 30), dtype=dtype)
    mask = np.random.default_rng(0).random((8, 30)) < 0.7
    keep = np.broadcast_to(mask[:, None], p["x"].shape)
    y, mean, invstd = cybn.batch_norm_forward(p["x"], mask=mask)
    np.testing.assert_allclose(y, (p["x"] - mean[:, None]) * invstd[:, None], rtol=1e-5, atol=1e-6)
    zeroed = cybn.batch_norm(p["x"], None, None, training=True, mask=mask, masked_output="zero")
    np.testing.assert_array_equal(zeroed, np.where(keep, y, 0))
    for training in (True, False):
        for activation in ACTIVATIONS:
            gradients = cybn.batch_norm_backward(
                p["grad_output"], p["x"], mean, invstd, None, training, mask=mask, activation=activation,
                return_grad_residual=True,
            )  # fmt: skip
            assert (gradients[0][~keep] == 0).all()
            assert (gradients[3][~keep] == 0).all()
            assert (gradients[0][keep] != 0).mean() > 0.4


def test_a_mask_that_leaves_nothing_updates_nothing_and_warns():
    p = problem((6, 3, 5))
    nothing = np.zeros((6, 1), bool)
    state = [p[k].copy() for k in ("running_mean", "running_var")]
    message = "mask leaves no value to normalize with: used running_mean and running_var, updated nothing"
    with pytest.warns(RuntimeWarning) as caught:
        y = cybn.batch_norm(p["x"], *state, training=True, mask=nothing)
    assert [str(w.message) for w in caught] == [message]
    assert caught[0].filename == __file__
    assert bits(state) == bits([p["running_mean"], p["running_var"]])
    assert bits([y]) == bits([cybn.batch_norm(p["x"], *state)])
    message = "mask leaves no value to normalize with: used mean 0 and variance 1, updated nothing"
    with pytest.warns(RuntimeWarning) as caught:
        y, mean, invstd = cybn.batch_norm_forward(p["x"], mask=nothing)
    assert [str(w.message) for w in caught] == [message]
    assert (mean == 0).all()
    np.testing.assert_allclose(invstd, 1 / np.sqrt(1 + 1e-5))
    for gradient in cybn.batch_norm_backward(p["grad_output"], p["x"], mean, invstd, mask=nothing):
        assert (gradient == 0).all()
    assert [np.asarray(v).any() for v in cybn.batch_norm_stats(p["x"], mask=nothing)] == [False] * 3
    layer = cybn.BatchNorm(3)
    for call in (layer, layer.forward):
        with pytest.warns(RuntimeWarning, match="updated nothing") as caught:
            call(p["x"], mask=nothing)
        assert caught[0].filename == __file__
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()


def masks(n, rng):
    """Masks of n places: set up to a place, from it on, but between two, here and there, everywhere, nowhere."""
    at = np.arange(n)
    some = sorted({0, 1, 15, 16, 17, n // 2, n - 17, n - 16, n - 1, n} & set(range(n + 1)))
    yield from (at < k for k in some)
    yield from (at >= k for k in some)
    yield from ((at < a) | (at >= b) for a, b in itertools.pairwise(some))
    yield from (rng.random(n) < share for share in (0.1, 0.5, 0.9))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 3, 64), (3, 2, 90), (1, 2, 2500), (70, 40), (600, 3), (9, 5, 7), (40, 17, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_where_a_mask_is_set_in_a_row_does_not_show(dtype, shape, last):
    rng = np.random.default_rng(3)
    n = int(np.prod(shape)) // shape[1]
    x, dy = (rng.standard_normal(shape).astype(dtype) + 3 for _ in range(2))
    if last:
        x, dy = (np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) for a in (x, dy))
    for mask in masks(n, rng):
        mask = mask.reshape(shape[:1] + shape[2:])
        if not mask.any():
            continue
        shown = np.broadcast_to(np.expand_dims(mask, 1), shape)
        holed = np.where(shown, x, np.nan).astype(dtype)
        zeroed = np.where(shown, dy, 0).astype(dtype)
        if last:
            holed, zeroed = (np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) for a in (holed, zeroed))
        weighed = cybn.batch_norm_stats(holed, sample_weight=mask.astype(dtype))
        masked = cybn.batch_norm_stats(holed, mask=mask)
        assert [a.tobytes() for a in masked[1:]] == [a.tobytes() for a in weighed[1:]]
        sums = cybn.batch_norm_backward_reduce(zeroed, x, masked.mean)
        masked = cybn.batch_norm_backward_reduce(dy, holed, masked.mean, mask=mask)
        assert [a.tobytes() for a in masked] == [a.tobytes() for a in sums]


# ----------------------------------------------------------------------------------------------------------- refusals


def bad_extras():
    x = problem((6, 3, 5))["x"]
    shape = "the shape of x without its channel axis"
    w = np.ones((6, 5), np.float32)
    negative, nan, infinite, large = w.copy(), w.copy(), w.copy(), w.astype(np.float64)
    negative[2, 3], nan[0, 0], infinite[5, 4], large[0, 1] = -1, np.nan, np.inf, 1e300
    one = np.zeros((6, 5), bool)
    one[3, 2] = True
    finite = "sample_weight must be finite and not negative, got "
    return [
        ({"activation": "gelu"}, ValueError, "activation must be None, 'relu' or 'leaky_relu', got 'gelu'"),
        (
            {"activation": "leaky_relu", "negative_slope": -0.5},
            ValueError,
            "negative_slope must be a finite number and not negative, got -0.5",
        ),
        (
            {"activation": "leaky_relu", "negative_slope": "steep"},
            TypeError,
            "negative_slope must be a real number, got str",
        ),
        ({"residual": x[:2]}, ValueError, "residual must have the shape of x, (6, 3, 5), got (2, 3, 5)"),
        (
            {"residual": x.astype(np.float64)},
            TypeError,
            "residual must have the dtype of x, float32, got float64",
        ),
        ({"mask": w}, TypeError, "mask must be a bool array, got an array of float32"),
        ({"mask": np.ones((6, 3), bool)}, ValueError, f"mask must broadcast to {shape}, (6, 5), got shape (6, 3)"),
        (
            {"mask": np.ones((6, 3, 5), bool)},
            ValueError,
            f"mask must broadcast to {shape}, (6, 5), got shape (6, 3, 5)",
        ),
        (
            {"sample_weight": w > 0},
            TypeError,
            "sample_weight must be a float32 or float64 array, got an array of bool",
        ),
        ({"sample_weight": negative}, ValueError, finite + "-1.0"),
        ({"sample_weight": nan}, ValueError, finite + "nan"),
        ({"sample_weight": infinite}, ValueError, finite + "inf"),
        ({"sample_weight": large}, ValueError, finite + "inf"),
        ({"sample_weight": 0 * w}, ValueError, "sample_weight must have a positive value, got zeros only"),
        (
            {"sample_weight": w, "mask": w > 0},
            ValueError,
            "mask and sample_weight must not be given together, got both",
        ),
        ({"masked_output": "drop"}, ValueError, "masked_output must be 'normalize' or 'zero', got 'drop'"),
        (
            {"mask": one},
            ValueError,
            "Expected more than 1 value per channel when training, got input shape (6, 3, 5) "
            "with 1 value of positive weight",
        ),
    ]


@pytest.mark.parametrize(("extra", "kind", "message"), bad_extras(), ids=lambda v: None)
def test_wrong_extras_are_refused_and_nothing_is_changed(extra, kind, message):
    p = problem((6, 3, 5))
    out = np.full_like(p["x"], 7)
    state = p["running_mean"], p["running_var"]
    with raises(kind, message, *state, out):
        cybn.batch_norm(p["x"], *state, training=True, out=out, **extra)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 7, 8, 19, 64])
def test_a_bad_weight_is_found_wherever_it_stands(dtype, n):
    x = np.ones((n, 3), dtype)
    for where in range(n):
        for bad in (-1.0, np.nan, -np.inf, np.inf):
            w = np.ones(n, dtype)
            w[where] = bad
            with raises(ValueError, f"sample_weight must be finite and not negative, got {bad}"):
                cybn.batch_norm_stats(x, sample_weight=w)


def test_weights_have_a_finite_sum():
    with raises(ValueError, "sample_weight must have a finite sum, got inf"):
        cybn.batch_norm_stats(np.ones((4, 3)), sample_weight=np.full(4, 1e308))


def test_an_ambiguous_mask_is_refused():
    x = np.zeros((4, 2, 4), np.float32)
    message = (
        "mask must have an axis for each of (4, 4), the shape of x without its channel axis, "
        "to tell (1, 4) from (4, 1), got shape (4,)"
    )
    with raises(ValueError, message):
        cybn.batch_norm_stats(x, mask=np.ones(4, bool))


def test_overlapping_memory_is_refused():
    memory = np.zeros((7, 3, 5), np.float32)
    x, residual = np.ones((6, 3, 5), np.float32), memory[1:]
    message = "out must be residual itself or share no memory with it, got a partly overlapping array"
    with raises(ValueError, message, memory):
        cybn.batch_norm_apply(x, np.zeros(3), np.ones(3), residual=residual, out=memory[:-1])
    message = "out must be output itself or share no memory with it, got a partly overlapping array"
    with raises(ValueError, message, memory):
        cybn.batch_norm_backward(x, x, np.zeros(3), np.ones(3), activation="relu", output=residual, out=memory[:-1])


def test_a_gate_needs_what_it_computes_with():
    x = np.ones((6, 3, 5), np.float32)
    with raises(ValueError, "invstd or output must be given with an activation, got neither"):
        cybn.batch_norm_backward_reduce(x, x, np.zeros(3), activation="relu")


@dtypes
@activations
def test_a_residual_may_be_where_the_result_goes(activation, dtype):
    p = problem((16, 20, 80), dtype=dtype)
    named = {"activation": activation}
    want = cybn.batch_norm_apply(p["x"], p["mean"], p["invstd"], residual=p["grad_output"], **named)
    here = p["grad_output"].copy()
    got = cybn.batch_norm_apply(p["x"], p["mean"], p["invstd"], residual=here, out=here, **named)
    assert got is here
    assert bits([got]) == bits([want])


# ------------------------------------------------------------------------------------------------------------- layers


@activations
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("extra", ["none", "mask", "weights"])
def test_layers_pass_everything_on(activation, add, extra):
    p = problem((6, 4, 5, 7))
    rng = np.random.default_rng(0)
    layer = cybn.BatchNorm2d(4, activation=activation, negative_slope=SLOPE)
    layer.weight[...], layer.bias[...] = p["weight"], p["bias"]
    named = {"residual": p["grad_output"] - 1} if add else {}
    if extra == "mask":
        named |= {"mask": rng.random((6, 5, 7)) < 0.7, "masked_output": "zero"}
    elif extra == "weights":
        named["sample_weight"] = rng.random((6, 1, 7)).astype(np.float32)
    state = np.zeros(4, np.float32), np.ones(4, np.float32)
    chosen = named | {"activation": activation, "negative_slope": SLOPE}
    want = cybn.batch_norm_forward(p["x"], *state, p["weight"], p["bias"], **chosen)
    y = layer(p["x"], **named)
    assert bits([y, layer.running_mean, layer.running_var]) == bits([want[0], *state])
    assert layer.num_batches_tracked == 1
    result = layer.backward(p["grad_output"])
    wanted = cybn.batch_norm_backward(
        p["grad_output"], p["x"], *want[1:], p["weight"], bias=p["bias"],
        return_grad_residual=add, **backward_arguments(chosen, y),
    )  # fmt: skip
    gradients = result if add else (result,)
    assert isinstance(result, tuple) == add
    assert bits([*gradients, layer.grad_weight, layer.grad_bias]) == bits([wanted[0], *wanted[3:], *wanted[1:3]])
    layer.eval()
    named.pop("sample_weight", None)
    want = cybn.batch_norm(p["x"], *state, p["weight"], p["bias"], **(chosen | {"sample_weight": None}))
    assert bits([layer(p["x"], **named)]) == bits([want])


@dtypes
@every_geometry
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_the_bits_that_a_layer_keeps_behind_a_residual_do_as_the_output_does(activation, geometry, dtype):
    shape, axis, order = geometry
    p = problem(shape, axis, dtype, order)
    named = {"activation": activation, "negative_slope": SLOPE}
    residual = p["grad_output"] - 1
    layer = cybn.BatchNorm(p["x"].shape[axis], axis=axis, dtype=dtype, **named)
    layer.weight[...], layer.bias[...] = p["weight"], p["bias"]
    for training, threads, stream in ((True, 1, False), (True, 2, False), (True, 7, True), (False, 2, False)):
        layer.train(training).reset_running_stats()
        with streamed() if stream else contextlib.nullcontext():
            y = layer(p["x"], residual=residual, num_threads=threads, save_for_backward=True)
            saved = layer._saved
            want = cybn.batch_norm_backward(
                p["grad_output"], p["x"], saved.mean, saved.invstd, p["weight"], training, axis=axis, bias=p["bias"],
                output=y, return_grad_residual=True, **named,
            )  # fmt: skip
            y[...] = np.nan  # is nobody's business any more
            dx, dr = layer.backward(p["grad_output"], num_threads=threads)
        assert bits([dx, layer.grad_weight, layer.grad_bias, dr]) == bits(want)


@dtypes
@every_geometry
def test_behind_a_residual_alone_all_gradients_pass(geometry, dtype):
    p = problem(*geometry[:2], dtype, geometry[2])
    dy = p["grad_output"]
    dy.flat[:3] = np.nan, np.inf, -0.0
    layer = cybn.BatchNorm(dy.shape[p["axis"]], axis=p["axis"], dtype=dtype)
    layer(p["x"], residual=p["x"])
    with np.errstate(invalid="ignore"):
        want, dr = layer.backward(dy.copy(order="K"))
    assert bits([dr]) == bits([dy])
    layer(p["x"], residual=p["x"])
    here = dy.copy(order="K")  # becomes the gradient of x
    dx, dr = layer.backward(here, out=here)
    assert dx is here
    assert bits([dx, dr]) == bits([want, dy])


# Runs shorter and longer than those whose bits are made by the map, and pieces of it; runs that end within a byte.
@dtypes
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("inner", [49, 127, 128, 129, 196, 511, 512, 513, 1030, 2050])
def test_a_layer_keeps_a_bit_for_each_result_behind_a_residual(inner, activation, dtype):
    shape = (9, 11, inner)
    rng = np.random.default_rng(inner)
    x, r = rng.normal(size=(2, *shape)).astype(dtype)
    r.flat[::13], r.flat[::17], r.flat[::19] = np.nan, np.inf, -np.inf
    layer = cybn.BatchNorm(11, activation=activation, dtype=dtype)
    layer.weight[::3] = 0  # so that there are results of 0 ...
    r[:, ::3].flat[::5] = 0
    r[:, 3].flat[::5] = -0.0  # ... of either sign
    for where in "new", "apart", "x", "residual":
        for threads in 1, 2:
            given = {"x": x.copy(), "residual": r.copy()}
            out = None if where == "new" else given.get(where, np.empty_like(x))
            y = layer(**given, out=out, num_threads=threads)
            passes = ~(y <= 0) if activation == "relu" else y > 0
            want = np.packbits(passes, bitorder="little")
            got = layer._saved.gate[: len(want)].copy()
            got[-1] &= 0xFF >> (-y.size % 8)
            assert got.tobytes() == want.tobytes()


def test_behind_a_residual_a_layer_keeps_a_bit_for_each_element():
    x = np.ones((64, 8, 30, 30), np.float32)
    layer = cybn.BatchNorm2d(8, activation="relu")
    tracemalloc.start()
    try:
        layer(x, residual=x)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert x.nbytes / 32 <= kept < x.nbytes / 20


def test_an_input_that_has_another_size_since_is_refused():
    x = np.ones((6, 3, 50), np.float32)
    layer = cybn.BatchNorm(3, activation="relu")
    layer(x, residual=x.copy())
    x.resize((60, 3, 50), refcheck=False)
    with raises(ValueError, "x must keep its shape until backward, got (60, 3, 50) in the end"):
        layer.backward(x.copy())
    assert layer.grad_weight is None


def test_layers_refuse_wrong_activations():
    with raises(ValueError, "activation must be None, 'relu' or 'leaky_relu', got 'tanh'"):
        cybn.BatchNorm(3, activation="tanh")
    with raises(ValueError, "negative_slope must be a finite number and not negative, got -1"):
        cybn.BatchNorm(3, negative_slope=-1)
    assert repr(cybn.BatchNorm(3, activation="leaky_relu")).endswith(", activation='leaky_relu', negative_slope=0.01)")


# ----------------------------------------------------------------------------------------------------------- in place


@dtypes
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("extra", ["none", "mask", "weights"])
@given(drawn=problems(min_count=3, max_size=3000), offset=st.sampled_from([0, 100]))
def test_in_place_gives_the_gradients_of_the_plain_form(dtype, affine, activation, extra, drawn, offset):
    p = drawn.arguments
    axis = p["axis"]
    x = (p["x"] + offset).astype(dtype)
    g = p["grad_output"].astype(dtype)
    channels = x.shape[axis]
    named = {"axis": axis, "affine": affine, "dtype": dtype, "activation": activation, "negative_slope": SLOPE}
    plain, layer = cybn.BatchNorm(channels, **named), cybn.BatchNorm(channels, **named, in_place=True)
    for each in (plain, layer) if affine else ():
        each.weight[...], each.bias[...] = p["weight"] * (-1) ** np.arange(channels), p["bias"]
    rng = np.random.default_rng(0)
    rest = shape_without_channels(x, axis)
    extras = {}
    if extra == "mask":
        extras["mask"] = rng.random(rest) < 0.7
        extras["mask"].flat[:2] = True
    elif extra == "weights":
        extras["sample_weight"] = rng.uniform(0.5, 2, rest).astype(dtype)
    want = plain(x, **extras)
    wanted = plain.backward(g)
    here = x.copy(order="K")
    y = layer(here, **extras)
    assert np.shares_memory(y, here)
    assert bits([y]) == bits([want])
    mean, invstd = layer._saved.mean, layer._saved.invstd
    got = layer.backward(g)
    # The input comes back to a rounding of what it was made from ...
    unit = np.finfo(dtype).eps
    scale = np.abs(1 if layer.weight is None else layer.weight).astype(np.float64)
    shift = np.zeros(channels) if layer.bias is None else np.abs(layer.bias.astype(np.float64))
    # (the output is rounded; so is what it is divided by, and the mean that is added)
    d = np.abs(rows_of(x, axis) - mean[:, None]) + ((shift / scale + 1e-3) / invstd)[:, None]
    error = np.abs(rows_of(here, axis).astype(np.float64) - rows_of(x, axis))
    assert (error <= 4 * unit * (d + np.abs(rows_of(x, axis)))).all()
    # ... and so do the gradients, but where the activation's input is 0 within that.
    near = np.abs(rows_of(want, axis)) < 16 * unit * (1 + shift[:, None])
    if activation is not None and near.any():
        return
    sensitivity = (error * invstd[:, None]).max(axis=1, initial=0) + unit
    size = np.abs(rows_of(g, axis)).max(axis=1, initial=0) * scale * invstd
    x_hat = (d * invstd[:, None]).max(axis=1, initial=1)
    bar = 50 * sensitivity * size * (1 + x_hat) ** 2
    difference = np.abs(rows_of(got, axis).astype(np.float64) - rows_of(wanted, axis)).max(axis=1, initial=0)
    assert (difference <= bar).all()
    # A second backward finds the input.
    assert bits([layer.backward(g)]) == bits([got])


def test_what_cannot_be_inverted_is_refused():
    inverse = (
        "activation must have an inverse in place, None or 'leaky_relu' with a negative_slope from 1e-06 to 1e+06, got "
    )
    with raises(ValueError, inverse + "'relu'"):
        cybn.BatchNorm(3, activation="relu", in_place=True)
    with raises(ValueError, inverse + "'leaky_relu' with negative_slope 0.0"):
        cybn.BatchNorm(3, activation="leaky_relu", negative_slope=0, in_place=True)
    for slope in (1e-310, 1e-42, 9e-7, 1.1e6):  # the inverse, or products with it, may leave the type
        with raises(ValueError, inverse + f"'leaky_relu' with negative_slope {slope}"):
            cybn.BatchNorm(3, activation="leaky_relu", negative_slope=slope, in_place=True)
    layer = cybn.BatchNorm(3, in_place=True)
    x = problem((6, 3, 5))["x"]
    with raises(ValueError, "residual must be None in place: x cannot be computed from the sum", x, layer.running_mean):
        layer(x, residual=x + 1)
    with raises(ValueError, "out must be None or x itself in place, got another array", x, layer.running_mean):
        layer(x, out=x.copy())
    for weight in (0.0, -9e-4, np.nan):
        layer.weight[1] = weight
        message = f"weight must be at least 0.001 or at most -0.001 in place, got {layer.weight[1]} in channel 1"
        with raises(ValueError, message, x, layer.running_mean):
            layer(x)
    layer.weight[1] = -1e-3
    layer(x)
    assert repr(layer).endswith("bias=True, in_place=True)")


def test_in_place_the_input_must_be_writeable():
    x = problem((6, 3, 5))["x"]
    x.flags.writeable = False
    layer = cybn.BatchNorm(3, in_place=True)
    with raises(ValueError, "x must be writeable in place, got a read-only array", x, layer.running_mean):
        layer(x)


def test_in_place_a_view_of_another_class_is_x_itself(tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(6, 3, 5))
    x[...] = problem((6, 3, 5))["x"]
    want = cybn.BatchNorm(3)(np.array(x))
    layer = cybn.BatchNorm(3, in_place=True)
    assert layer(x, out=x) is x
    assert bits([np.asarray(x)]) == bits([want])
    g = np.lib.format.open_memmap(tmp_path / "g.npy", mode="w+", dtype=np.float32, shape=(6, 3, 5))
    assert layer.backward(g, out=g) is g


def test_in_place_what_is_no_array_is_not_written_to():
    x = problem((6, 3, 5))["x"].astype(np.float64).tolist()
    layer = cybn.BatchNorm(3, in_place=True, dtype=np.float64)
    with raises(ValueError, "out must be None or x itself in place, got another array"):
        layer(x, out=x)


@pytest.mark.parametrize("spoil", ["weight", "bias", "errstate"])
def test_in_place_a_refused_backward_changes_nothing(spoil):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 8, 4)).astype(np.float32)
    plain, layer = cybn.BatchNorm(4, activation="leaky_relu"), cybn.BatchNorm(4, activation="leaky_relu", in_place=True)
    plain(x)
    want = plain.backward(g)
    y = layer(x.copy())
    if spoil == "errstate":
        with np.errstate(all="raise"):
            got = layer.backward(g)
    else:
        whole = getattr(layer, spoil)
        setattr(layer, spoil, whole[:3])
        with raises(ValueError, f"{spoil} must have shape (4,), one value per channel, got shape (3,)", y):
            layer.backward(g)
        setattr(layer, spoil, whole)
        got = layer.backward(g)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_in_place_the_gradient_is_not_the_output():
    """Which becomes the input again, before the gradient would be read."""
    layer = cybn.BatchNorm(3, in_place=True)
    y = layer(np.random.default_rng(0).normal(size=(8, 3)))
    with raises(
        ValueError, "grad_output must share no memory with the layer's output in place, got overlapping arrays", y
    ):
        layer.backward(y)
    assert layer.backward(np.ones_like(y)).shape == (8, 3)


def test_in_place_takes_half_of_the_memory():
    """Fifty layers ``a = BN(W a)``: each keeps its input for W's gradient, and what BN keeps."""
    peaks = [
        int(
            python(f"""
            import numpy as np, tracemalloc, cybn
            rng = np.random.default_rng(0)
            layers = [cybn.BatchNorm(64, activation="leaky_relu", in_place={in_place}) for _ in range(50)]
            weights = [rng.normal(0, 0.15, (64, 64)).astype(np.float32) for _ in layers]
            a = rng.normal(size=(2000, 64)).astype(np.float32)
            tracemalloc.start()
            inputs = []
            for layer, w in zip(layers, weights):
                inputs.append(a)
                a = layer(a @ w)
            for layer, w in zip(reversed(layers), reversed(weights)):
                d = layer.backward(np.ones_like(a) if layer is layers[-1] else d)
                x = inputs.pop()
                d, gradient = d @ w.T, x.T @ d
            print(tracemalloc.get_traced_memory()[1])
            """)
        )
        for in_place in (False, True)
    ]
    array = 2000 * 64 * 4
    assert peaks[0] > 100 * array
    assert peaks[1] < 56 * array


def test_evaluation_does_not_use_weights():
    p = problem((6, 3, 5))
    want = cybn.batch_norm(p["x"], p["running_mean"], p["running_var"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = cybn.batch_norm(p["x"], p["running_mean"], p["running_var"], sample_weight=np.arange(6.0)[:, None])
    assert bits([got]) == bits([want])
